"""The inverted pendulum with a few force levels instead of a continuous force, alone and in vector form.

Physics, observations, rewards, ends and infos are those of the continuous forms; what an action stands for differs.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from kbt_rl.arguments import is_flat, shown
from kbt_rl.envs.inverted_pendulum import InvertedPendulumEnv
from kbt_rl.envs.plant import NOMINAL, BoolArray, FloatArray
from kbt_rl.envs.vector import InvertedPendulumVectorEnv, Parameter

FIVE_FORCES = (-15.0, -2.0, 0.0, 2.0, 15.0)
"""Levels (N) with which ``LQRExpert.for_env`` brings both plants to rest: success 1.00 on 300 starts each.

Measured with the nearest level to the regulator's force: with +-12 N outside, 1 of 300 starts of the shifted plant
falls. One step of F newtons changes the nominal pole's velocity by 0.03 F rad/s, and success asks for 0.1 rad/s: with
+-3 N inside it is 0.98, with +-4 N 0.70.
"""
TWO_FORCES = (-15.0, 15.0)
"""Levels (N) with which the expert brings the shifted plant to rest (1.00) and keeps the nominal one upright (1.00).

At 50 Hz no two levels do more: one step of F newtons changes the nominal pole's velocity by 0.03 F rad/s, so that it
exceeds 0.1 rad/s at one of any two successive steps if F > 7, and the shifted plant falls from some starts if F < 8.
"""


class DiscreteInvertedPendulumEnv(InvertedPendulumEnv):
    r"""Balance a pole on a cart by choosing one of a few forces.

    ## Description
    `kbt_rl/DiscreteInvertedPendulum-v0` and `kbt_rl/ShiftedDiscreteInvertedPendulum-v0` are the plants of
    `kbt_rl/InvertedPendulum-v0` and `kbt_rl/ShiftedInvertedPendulum-v0`, see `InvertedPendulumEnv` for all that is not
    said here.

    ## Action Space
    `Discrete(n)`: action `i` is the force `forces[i]` on the cart, held for 0.02 s. Anything that is not a whole number
    from 0 to n - 1 is a ValueError.

    ## Arguments
    `forces`: the levels in newtons, increasing; five by default, -15, -2, 0, 2 and 15 N. `cart_mass`, `pole_mass`,
    `pole_half_length` and `render_mode` are those of `InvertedPendulumEnv`. `params.max_force` is the largest level.

    ## Vectorized environment
    `gymnasium.make_vec(id, num_envs)` gives a `DiscreteInvertedPendulumVectorEnv`.

    ## Version History
    * v0: Initial version.
    """

    def __init__(
        self,
        forces: Sequence[float] = FIVE_FORCES,
        cart_mass: float = NOMINAL.cart_mass,
        pole_mass: float = NOMINAL.pole_mass,
        pole_half_length: float = NOMINAL.pole_half_length,
        render_mode: str | None = None,
    ) -> None:
        self.forces = check_forces(forces)
        super().__init__(cart_mass, pole_mass, pole_half_length, largest(self.forces), render_mode)
        self.action_space = spaces.Discrete(len(self.forces))  # type: ignore[assignment]

    def _force_of(self, action: npt.ArrayLike) -> float:
        return self.forces[int(check_levels(action, (), len(self.forces)))]


class DiscreteInvertedPendulumVectorEnv(InvertedPendulumVectorEnv):
    """Many :class:`DiscreteInvertedPendulumEnv` as one, made by ``gymnasium.make_vec(id, num_envs)``.

    Args:
        num_envs: Number of sub-environments, n.
        max_episode_steps: Steps after which an episode is truncated; -1 or None for no limit.
        render_mode: None or ``"rgb_array"``.
        autoreset_mode: See :class:`~kbt_rl.envs.InvertedPendulumVectorEnv`.
        forces: The levels in newtons, increasing, for all.
        cart_mass: kg, one value for all or ``(n,)``.
        pole_mass: kg, one value for all or ``(n,)``.
        pole_half_length: m, one value for all or ``(n,)``.
    """

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int | None = 500,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        forces: Sequence[float] = FIVE_FORCES,
        cart_mass: Parameter = NOMINAL.cart_mass,
        pole_mass: Parameter = NOMINAL.pole_mass,
        pole_half_length: Parameter = NOMINAL.pole_half_length,
    ) -> None:
        self.forces = check_forces(forces)
        super().__init__(
            num_envs, max_episode_steps, render_mode, autoreset_mode, cart_mass, pole_mass, pole_half_length,
            largest(self.forces),
        )  # fmt: skip
        self.single_action_space: spaces.Space[Any] = spaces.Discrete(len(self.forces))
        self.action_space = batch_space(self.single_action_space, num_envs)

    def _forces_of(self, actions: npt.ArrayLike, ignored: BoolArray) -> FloatArray:
        values = np.asanyarray(actions)
        numbers_of_all = values.shape == ignored.shape and values.dtype.kind in "fiu"
        if ignored.any() and numbers_of_all and not isinstance(values, np.ma.MaskedArray):
            kept = np.where(ignored, 0, values)  # floats, if one that is ignored is NaN
            if np.array_equal(kept, np.round(kept)) and (np.abs(kept) < len(self.forces)).all():
                values = kept.astype(np.int64)
        return np.array(self.forces)[check_levels(values, (self.num_envs,), len(self.forces))]


def check_forces(forces: Sequence[float]) -> tuple[float, ...]:
    """Return force levels as floats.

    Raises:
        TypeError: A level is not a real number.
        ValueError: Fewer than two levels, one that is not finite, or levels that do not increase.
    """
    if not is_flat(forces):
        raise TypeError(f"forces is {shown(forces)}; expected two levels in newtons or more, increasing")
    levels = tuple(forces)
    for level in levels:
        if not isinstance(level, numbers.Real):
            raise TypeError(f"forces must be real numbers in newtons, got {level!r} of type {type(level).__name__}")
    values = tuple(float(level) for level in levels)
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        raise ValueError(f"forces must be at least two finite levels in newtons, got {values}")
    if any(high <= low for low, high in pairwise(values)):
        raise ValueError(f"forces must increase, got {values}; sort them and drop what occurs twice")
    return values


def largest(forces: Sequence[float]) -> float:
    """The largest magnitude among the levels, N."""
    return max(abs(force) for force in forces)


def check_levels(actions: npt.ArrayLike, shape: tuple[int, ...], count: int) -> npt.NDArray[np.int64]:
    """Return actions of ``shape`` as indices of levels, or raise ValueError if they are none."""
    values = np.asanyarray(actions)
    if values.shape != shape:
        raise ValueError(f"the action must have shape {shape}, got {values.shape}")
    if (
        values.dtype.kind not in "iu"
        or isinstance(values, np.ma.MaskedArray)
        or not np.all((values >= 0) & (values < count))
    ):
        raise ValueError(f"an action is a whole number from 0 to {count - 1}, one a force level; got {actions!r}")
    return values.astype(np.int64)
