"""How much each label is worth: rules that choose when to ask, scored by the policy alone afterwards.

Learners run closed-loop episodes on the shifted plant, a label reaching each one step after it has acted. A rule
decides at every step whether to ask, and where. Then labels stop, and the score is the success rate from fresh starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kbt_rl.agents.kbt import KBT
from kbt_rl.envs.plant import LABEL_BOX, SHIFTED, is_upright, rk4_step
from kbt_rl.experiments.config import Method
from kbt_rl.experiments.fleet import Fleet, HeadFleet, make_fleet
from kbt_rl.experiments.rescue import label_free_score
from kbt_rl.experiments.simulation import EPISODE_STEPS, expert_force, starts

FloatArray = npt.NDArray[np.float64]
Rule = Literal["every", "random", "gate", "pool"]


@dataclass(frozen=True)
class RuleTrial:
    """One rule on a set of learners; its record follows from this value.

    Attributes:
        rule: ``every`` (each ``value``-th step), ``random`` (with probability ``value``), ``gate`` (where the epistemic
            variance exceeds ``value`` times the noise variance), all at the visited state; ``pool`` (at each
            ``value``-th step, at the most uncertain of a pool of i.i.d. states).
        value: Its parameter.
        method: Learner.
        pretrain_seed: Seed of the pre-trained policy.
        seed: Seed of starts and label states.
        episodes: Labelled episodes of 10 s; a fall begins a new start within the episode's time.
        learners: Learners side by side, each with labels of its own.
        starts: Fresh starts for each learner.
        budget: Labels for each learner at most.
        pool: States that ``pool`` chooses from.
    """

    rule: Rule
    value: float
    method: Method
    pretrain_seed: int
    seed: int
    episodes: int = 1
    learners: int = 5
    starts: int = 20
    budget: int = 10_000
    pool: int = 32


def run_rule(trial: RuleTrial, pretrained: KBT) -> dict[str, Any]:
    """Labels used and the label-free score after each episode."""
    fleet = make_fleet(trial.method, pretrained, trial.learners, SHIFTED)
    rng, fresh = np.random.default_rng([trial.seed, 13]), starts(trial.seed + 250_000, trial.learners * trial.starts)
    fresh = fresh.reshape(trial.learners, trial.starts, 4)
    begin = starts(trial.seed + 125_000, trial.learners * 200).reshape(trial.learners, 200, 4)
    falls, used = 0, np.zeros(trial.learners)
    record: dict[str, Any] = {"labels": [], "score": [], "scores": [], "falls": []}
    which = np.zeros(trial.learners, dtype=int)
    for _ in range(trial.episodes):
        which += 1
        state = begin[np.arange(trial.learners), which]
        for step in range(EPISODE_STEPS):
            command = np.clip(fleet.force(state), -SHIFTED.max_force, SHIFTED.max_force)
            asked = _where(trial, fleet, state, step, rng)
            asked[used >= trial.budget] = np.nan
            state = rk4_step(state, command, SHIFTED)
            used += learn_where_asked(fleet, asked)
            fallen = ~is_upright(state)
            falls += int(fallen.sum())
            which += fallen
            state = np.where(fallen[:, None], begin[np.arange(trial.learners), which], state)
        scores = label_free_score(fleet, fresh)
        record["labels"].append(float(used.mean()))
        record["score"].append(float(scores.mean()))
        record["scores"].append(scores.tolist())
        record["falls"].append(falls)
    return record


def learn_where_asked(fleet: Fleet, asked: FloatArray) -> FloatArray:
    """Label the states that are not NaN, ``(n, 4)``, and learn; returns the labels used by each learner."""
    present: npt.NDArray[np.bool_] = np.isfinite(asked[:, 0])
    if present.any():
        forces = np.where(present, expert_force(SHIFTED)(np.nan_to_num(asked)), np.nan)
        fleet.learn(asked, forces)
    return present.astype(np.float64)


def _where(trial: RuleTrial, fleet: Fleet, state: FloatArray, step: int, rng: np.random.Generator) -> FloatArray:
    """States that the rule asks for, ``(n, 4)``, NaN where it does not ask."""
    seen = state.astype(np.float32).astype(np.float64)
    if trial.rule == "every":
        wanted = np.full(len(state), step % int(trial.value) == 0)
    elif trial.rule == "random":
        wanted = rng.random(len(state)) < trial.value
    elif trial.rule == "gate":
        assert isinstance(fleet, HeadFleet)
        wanted = fleet.pool_variances(seen[:, None])[:, 0] > trial.value * fleet.noise_variance
    else:
        wanted = np.full(len(state), step % int(trial.value) == 0)
        if wanted.any():
            assert isinstance(fleet, HeadFleet)
            box = np.asarray(LABEL_BOX)
            pool = rng.uniform(-box, box, (len(state), trial.pool, 4)).astype(np.float32).astype(np.float64)
            seen = pool[np.arange(len(state)), fleet.pool_variances(pool).argmax(axis=1)]
    return np.where(wanted[:, None], seen, np.nan)
