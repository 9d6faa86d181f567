"""Many policies on many starts as one batch: success and cost on the shifted plant.

Evaluation is most of an experiment's time. All checkpoints of a trial and all starts are stepped together, with the
same equations of motion as the environment, as machine code where numba is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kbt_rl.agents.lqr import lqr_gain
from kbt_rl.envs import motion
from kbt_rl.envs.plant import (
    DT,
    NOMINAL,
    START_BOX,
    InvertedPendulumParams,
    PlantArrays,
    is_settled,
    is_upright,
    rk4_step,
    stage_cost,
)
from kbt_rl.inference import compiled

FloatArray = npt.NDArray[np.float64]
EPISODE_STEPS = 500
#: The cost of one episode is capped at so many times the expert's, which a fall always reaches.
COST_CAP = 100.0


Force = Callable[[npt.NDArray[Any]], FloatArray]


class Outcome(NamedTuple):
    """Results of episodes: ``success`` bool and ``cost`` (s's + u^2) dt summed over 10 s, infinite after a fall."""

    success: npt.NDArray[np.bool_]
    cost: FloatArray


class PlantBatch(PlantArrays):
    """Many plants, whose values broadcast against the starts; they share the force limit of the nominal one."""

    max_force = NOMINAL.max_force


def starts(seed: int, count: int) -> FloatArray:
    """Starts uniform in the start box, ``(count, 4)``."""
    box = np.asarray(START_BOX)
    return np.random.default_rng([seed, 7]).uniform(-box, box, (count, 4))


def simulate(
    force: Force,
    initial: FloatArray,
    params: InvertedPendulumParams | PlantBatch,
    steps: int = EPISODE_STEPS,
) -> Outcome:
    """Run episodes of 10 s side by side.

    Args:
        force: Forces ``(...)`` in N for states ``(..., 4)``; limited here to what the actuator can do.
        initial: Starts, ``(..., 4)``.
        params: The plant, or one for each start.
        steps: Length of an episode.

    Returns:
        Success and cost, both ``(...)``.
    """
    state = np.array(initial, dtype=np.float64, order="C")
    upright = np.ones(state.shape[:-1], dtype=bool)
    cost = np.zeros(state.shape[:-1])
    rows, row_upright, row_cost = state.reshape(-1, 4), upright.reshape(-1), cost.reshape(-1)  # the same memory
    constants = (params.cart_mass, params.pole_mass, params.pole_half_length, params.gravity)
    plants = np.stack([np.broadcast_to(value, cost.shape).ravel() for value in constants], axis=-1)
    advance = _machine_code() or _advance
    for _ in range(steps):
        # What the environment shows a policy is single precision; a fallen row is left where it fell.
        command = np.array(force(state.astype(np.float32)), dtype=np.float64).ravel()
        with compiled.plain_interrupts:
            advance(rows, command, row_upright, row_cost, plants, params.max_force, DT)
        if not upright.any():
            break
    return Outcome(upright & is_settled(state), np.where(upright, cost, np.inf))


@lru_cache(maxsize=1)
def _machine_code() -> Callable[..., None] | None:
    """``motion.advance`` as machine code, in a third of the time of arrays; None without numba."""
    if compiled.kernels() is None:
        return None
    from numba import njit
    from numba.extending import register_jitable

    register_jitable(motion.accelerations)
    register_jitable(motion.rk4)
    code: Callable[..., None] = njit(cache=True, error_model="numpy")(motion.advance)
    return code


def _advance(
    states: FloatArray, command: FloatArray, upright: npt.NDArray[np.bool_], cost: FloatArray, plants: FloatArray,
    max_force: float, dt: float,
) -> None:  # fmt: skip
    """``motion.advance`` by arrays."""
    limited = np.clip(command, -max_force, max_force)
    cost += stage_cost(states, limited) * dt
    moving = np.flatnonzero(upright)
    states[moving] = rk4_step(states[moving], limited[moving], PlantArrays(*plants[moving].T), dt)
    upright &= is_upright(states)


def expert_force(params: InvertedPendulumParams) -> Force:
    """The linear-quadratic expert of a plant."""
    gain = lqr_gain(params)[0]
    return lambda states: -(states.astype(np.float64) @ gain)


def regret(cost: FloatArray, expert_cost: FloatArray) -> FloatArray:
    """``sum J(policy) / sum J(expert) - 1`` over the last axis, each cost capped at 100 times the expert's."""
    capped = np.minimum(cost, COST_CAP * expert_cost)
    result: FloatArray = capped.sum(axis=-1) / expert_cost.sum() - 1.0
    return result
