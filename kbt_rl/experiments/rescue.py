"""Rescue: the pre-trained policy stands on the shifted plant and falls; the learner has a few labels to save it.

A label reaches the learner after the policy has acted, the labels stop after a budget, and from then on the policy is
alone until the end of the 10 s. Beside each method stand those that need no learning: holding the newest label, and the
expert acting itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kbt_rl.agents.kbt import KBT
from kbt_rl.envs.plant import LABEL_BOX, SHIFTED, is_settled, is_upright, rk4_step
from kbt_rl.experiments.config import Method
from kbt_rl.experiments.fleet import Fleet, HeadFleet, make_fleet
from kbt_rl.experiments.simulation import EPISODE_STEPS, Outcome, expert_force, simulate, starts

FloatArray = npt.NDArray[np.float64]
Source = Literal["iid", "visited", "uncertain"]


@dataclass(frozen=True)
class Labelling:
    """When labels are asked for, and where.

    Attributes:
        source: ``iid`` (uniform in the label box), ``visited`` (the state that the policy is in) or ``uncertain`` (of a
            pool of i.i.d. states the one with the largest epistemic variance; i.i.d. for learners without one).
        budget: Labels in all.
        every: Steps between two labels; the first is asked for at step 0.
        delay: Steps until a label arrives, at least 1: the policy has acted by then.
        pool: States to choose from, for ``uncertain``.
    """

    source: Source
    budget: int
    every: int = 1
    delay: int = 1
    pool: int = 32

    def __post_init__(self) -> None:
        for name in ("every", "delay", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def last_step(self) -> int:
        """The step at which the last label arrives."""
        return (self.budget - 1) * self.every + self.delay


class RescueTrace(NamedTuple):
    """One rescue of ``n`` pendulums at a time: states ``(T + 1, n, 4)``, forces and deviations ``(T, n)`` in N."""

    states: FloatArray
    forces: FloatArray
    deviation: FloatArray
    innovation: FloatArray
    outcome: Outcome


def rescue(fleet: Fleet, initial: FloatArray, labelling: Labelling, seed: int, *, watch: bool = False) -> RescueTrace:
    """Run one episode of 10 s from each start while each learner gets its labels.

    Args:
        fleet: As many learners as starts.
        initial: Starts, ``(n, 4)``.
        labelling: Where labels come from and when they stop.
        seed: Of the label states.
        watch: Record the standard deviation of the policy's mean at each step, which takes time.

    Returns:
        Trajectories, the innovation of each label at the step of its arrival (NaN elsewhere), success and cost.
    """
    rng, label = np.random.default_rng([seed, 11]), expert_force(SHIFTED)
    state, count = np.array(initial), len(initial)
    upright = np.ones(count, dtype=bool)
    on_the_way: list[tuple[int, FloatArray]] = []
    states, forces, deviations, innovations = [state], [], [], []
    for step in range(EPISODE_STEPS):
        command = np.clip(fleet.force(state), -SHIFTED.max_force, SHIFTED.max_force)
        deviations.append(fleet.uncertainty(state) if watch else np.full(count, np.nan))
        if step % labelling.every == 0 and step // labelling.every < labelling.budget:
            asked = _asked_states(fleet, labelling, state, rng)
            on_the_way.append((step + labelling.delay, asked))
        state = np.where(upright[:, None], rk4_step(state, command, SHIFTED), state)
        upright &= is_upright(state)
        innovation = np.full(count, np.nan)
        while on_the_way and on_the_way[0][0] <= step + 1:
            asked = on_the_way.pop(0)[1]
            target = label(asked)
            if watch:
                innovation = target - fleet.force(asked)
            fleet.learn(asked, target)
        innovations.append(innovation)
        states.append(state)
        forces.append(np.where(upright, command, 0.0))
    outcome = Outcome(upright & is_settled(state), np.where(upright, 0.0, np.inf))
    return RescueTrace(np.stack(states), np.stack(forces), np.stack(deviations), np.stack(innovations), outcome)


def _asked_states(fleet: Fleet, labelling: Labelling, state: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Where each learner asks, ``(n, 4)``, in the precision of an observation."""
    if labelling.source == "visited":
        return state.astype(np.float32).astype(np.float64)
    box = np.asarray(LABEL_BOX)
    if labelling.source == "iid" or not isinstance(fleet, HeadFleet):
        return rng.uniform(-box, box, state.shape).astype(np.float32).astype(np.float64)
    pool = rng.uniform(-box, box, (len(state), labelling.pool, 4)).astype(np.float32)
    chosen = fleet.pool_variances(pool).argmax(axis=1)
    most: FloatArray = pool[np.arange(len(state)), chosen].astype(np.float64)
    return most


@dataclass(frozen=True)
class RescueTrial:
    """A method and a labelling on a set of starts: a pure function of this value."""

    method: Method
    labelling: Labelling
    pretrain_seed: int
    seed: int
    starts: int = 100


def run_rescue(trial: RescueTrial, pretrained: KBT) -> dict[str, Any]:
    """Share of starts without a fall and with success at the end of the labelled episode."""
    fleet = make_fleet(trial.method, pretrained, trial.starts, SHIFTED)
    trace = rescue(fleet, starts(trial.seed, trial.starts), trial.labelling, trial.seed)
    return {
        "no_fall": float(np.isfinite(trace.outcome.cost).mean()),
        "success": float(trace.outcome.success.mean()),
        "starts": trial.starts,
    }


def label_free_score(fleet: Fleet, initial: FloatArray) -> FloatArray:
    """Success rate of each learner alone, ``(n,)``, from starts of its own, ``(n, m, 4)``."""
    rate: FloatArray = simulate(fleet.force, initial, SHIFTED).success.mean(axis=1)
    return rate
