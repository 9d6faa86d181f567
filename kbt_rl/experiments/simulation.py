"""Many policies on many starts as one batch: success and cost on the shifted plant.

Evaluation is most of an experiment's time. All checkpoints of a trial and all starts are stepped together, with the
same equations of motion as the environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kbt_rl.agents.lqr import lqr_gain
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
    state = np.array(initial, dtype=np.float64)
    upright = np.ones(state.shape[:-1], dtype=bool)
    cost = np.zeros(state.shape[:-1])
    for _ in range(steps):
        # What the environment shows a policy is single precision; a fallen row is left where it fell.
        command = np.clip(force(state.astype(np.float32)), -params.max_force, params.max_force)
        cost += stage_cost(state, command) * DT
        state = np.where(upright[..., None], rk4_step(state, command, params), state)
        upright &= is_upright(state)
        if not upright.any():
            break
    return Outcome(upright & is_settled(state), np.where(upright, cost, np.inf))


def expert_force(params: InvertedPendulumParams) -> Force:
    """The linear-quadratic expert of a plant."""
    gain = lqr_gain(params)[0]
    return lambda states: -(states.astype(np.float64) @ gain)


def regret(cost: FloatArray, expert_cost: FloatArray) -> FloatArray:
    """``sum J(policy) / sum J(expert) - 1`` over the last axis, each cost capped at 100 times the expert's."""
    capped = np.minimum(cost, COST_CAP * expert_cost)
    result: FloatArray = capped.sum(axis=-1) / expert_cost.sum() - 1.0
    return result
