"""A world that differs from the one a policy was trained in: at once, at given times, slowly, or each episode anew."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from kbt_rl.arguments import instance, is_flat, number, shown, whole
from kbt_rl.envs.inverted_pendulum import check_seed
from kbt_rl.envs.parameters import Parameter, World, checked, known, world_of

Values = Mapping[str, float]


class DynamicsShift(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Change parameters of Gymnasium's classic control or of a MuJoCo environment.

    Values of classic control are absolute (``{"masspole": 0.5}``); those of MuJoCo are factors of what the model was
    made with (``{"gear.bshin": 0.2, "gravity": 1.1}``). ``parameters`` lists the names with their nominal values and
    bounds. The values in force are in ``info["dynamics"]`` of every reset and step.

    Args:
        env: Wrapped or not.
        values: From the start on.
        at: Pairs of a number of steps of this wrapper, over all episodes, and the values from then on; increasing.
        drift: Change of a parameter with each step, until it reaches a bound.
        ranges: Parameters that each reset draws uniformly, with the smallest and the largest value.
        bounds: Narrower or wider bounds than those of ``parameters``.
        world: The parameters of an environment of your own; found by itself for those named above.

    Raises:
        TypeError: The environment is none of these, or a parameter unknown.
        ValueError: A value is out of bounds, or times do not increase.

    Example:
        >>> env = DynamicsShift(gym.make("HalfCheetah-v5"), {"gear.bshin": 0.2, "gear.fshin": 0.2})
        >>> DynamicsShift(gym.make("Pendulum-v1"), at=[(5_000, {"m": 1.5})], drift={"l": 1e-5})
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        values: Values | None = None,
        *,
        at: Sequence[tuple[int, Values]] = (),
        drift: Values | None = None,
        ranges: Mapping[str, tuple[float, float]] | None = None,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        world: World | None = None,
    ) -> None:
        RecordConstructorArgs.__init__(self, values=values, at=at, drift=drift, ranges=ranges, bounds=bounds)
        gym.Wrapper.__init__(self, env)
        if world is not None:
            instance("world", world, World, "derive from kbt_rl.envs.parameters.World")
        self._world = world_of(env.unwrapped) if world is None else world
        for name, given in (("values", values), ("drift", drift), ("ranges", ranges), ("bounds", bounds)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"{name} is {shown(given)}; expected a dict of parameters, see DynamicsShift")
        for name, pairs in (("ranges", ranges), ("bounds", bounds)):
            for parameter, pair in (pairs or {}).items():
                _interval(f"{name} of {parameter}", pair)
        self._bounds, self._drift, self._ranges = dict(bounds or {}), dict(drift or {}), dict(ranges or {})
        known(self._world, [*self._bounds, *self._drift, *self._ranges])
        start = self._checked(values or {})
        self._at = [(time, self._checked(changed)) for time, changed in _timed(at)]
        if any(later <= earlier for (earlier, _), (later, _) in pairwise(self._at)):
            raise ValueError(f"the times of the shifts must increase, got {[time for time, _ in self._at]}")
        for name, rate in self._drift.items():
            if not math.isfinite(number(f"the drift of {name}", rate)):
                raise ValueError(f"the drift of {name} is {rate}; a change with each step is finite")
        for name, (low, high) in self._ranges.items():
            for end in (low, high):
                self._checked({name: end})
            if not low < high:
                raise ValueError(f"the range of {name} is ({low}, {high}); the smallest value comes first")
        self.steps = 0
        self._rng = np.random.default_rng()
        self._values = {name: parameter.nominal for name, parameter in self._world.parameters.items()}
        self._set(start)

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What can be changed: nominal value and bounds by name."""
        return {
            name: parameter._replace(low=self._limits(name)[0], high=self._limits(name)[1])
            for name, parameter in self._world.parameters.items()
        }

    @property
    def dynamics(self) -> dict[str, float]:
        """The values in force."""
        return dict(self._values)

    def shift(self, values: Values) -> None:
        """Change parameters now; the episode goes on."""
        self._set(self._checked(values))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See ``gymnasium.Env``; draws what ``ranges`` names, from a generator of its own."""
        if seed is not None:
            self._rng = np.random.default_rng([check_seed(seed) or 0, 13])
        self._set({name: float(self._rng.uniform(*limits)) for name, limits in self._ranges.items()})
        self._apply_due()
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {**info, "dynamics": self.dynamics}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """See ``gymnasium.Env``."""
        self._apply_due()
        now = self.dynamics
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps += 1
        moved = {}
        for name, rate in self._drift.items():
            low, high = self._limits(name)
            moved[name] = min(max(self._values[name] + rate, low), high)
        self._set(moved)
        return observation, reward, terminated, truncated, {**info, "dynamics": now}

    def _apply_due(self) -> None:
        while self._at and self._at[0][0] <= self.steps:
            self._set(self._at.pop(0)[1])

    def _limits(self, name: str) -> tuple[float, float]:
        parameter = self._world.parameters[name]
        return self._bounds.get(name, (parameter.low, parameter.high))

    def _checked(self, values: Values) -> dict[str, float]:
        return checked(self._world, values, self._bounds)

    def _set(self, values: Values) -> None:
        if values:
            self._world.set(values)
            self._values |= values


def _interval(name: str, pair: Any) -> None:
    """Raise TypeError or ValueError unless these are two numbers, the smaller first."""
    if not is_flat(pair) or len(pair) != 2:
        raise TypeError(f"the {name} is {shown(pair)}; expected the smallest and the largest value")
    for end in pair:
        number(f"the {name}", end, "expected two numbers")


def _timed(at: Any) -> list[tuple[int, Values]]:
    """Pairs of a time in steps and values."""
    if isinstance(at, (str, bytes)) or not isinstance(at, Sequence):
        raise TypeError(f"at is {shown(at)}; expected pairs of a number of steps and the values from then on")
    found = []
    for shift in at:
        if not (isinstance(shift, (tuple, list)) and len(shift) == 2):
            raise TypeError(f"a shift of at is {shown(shift)}; expected a number of steps and the values from then on")
        found.append((whole("the time of a shift", shift[0], 0, "a whole number of steps, not negative"), shift[1]))
    return found
