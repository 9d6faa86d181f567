"""Adaptation without an oracle: the policy stands on an unknown plant and the labels come from identifying it.

Every learner of a study has a start, an identifying expert and a posterior of its own; they run side by side. In each
step the policy acts, the expert sees the transition, its labels are learned, and only then the policy acts again. After
one and after five episodes the policy is tested alone: labels off, fresh starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.identification import SelfTuningLQR
from kbt_rl.agents.lqr import LQRExpert, lqr_gain
from kbt_rl.envs.plant import DT, LABEL_BOX, SHIFTED, is_settled, is_upright, rk4_step
from kbt_rl.experiments.config import KBT_METHOD, PRETRAINING, digest
from kbt_rl.experiments.fleet import HeadFleet, make_fleet
from kbt_rl.experiments.learners import NOMINAL_ID, pretrain, pretrained_path
from kbt_rl.experiments.rescue import label_free_score
from kbt_rl.experiments.runner import versions, write_json
from kbt_rl.experiments.simulation import EPISODE_STEPS, starts

FloatArray = npt.NDArray[np.float64]
Labels = Literal["iid", "visited", "both", "none"]
SHIFTED_ID = "kbt_rl/ShiftedInvertedPendulum-v0"
_TEST_SEED_OFFSET = 700_000
#: Methods as tables and legends name them.
IDENTIFIED_IID, IDENTIFIED_VISITED = "identified, i.i.d. labels", "identified, labels at visited states"
ORACLE_IID, ORACLE_VISITED = "oracle, i.i.d. labels", "oracle, labels at visited states"
PRETRAINED, EXPERT_ACTS = "pre-trained, no labels", "identified LQR acts itself"
#: Standard deviation of the dither in the methods named so, N.
DITHER = 3.0


@dataclass(frozen=True)
class NoOracleConfig:
    """One method on one pre-trained policy.

    Attributes:
        name: What tables and legends call it.
        labels: Where labels are asked in each step: one i.i.d. state of the label box, the visited state, or both.
        oracle: The expert knows the new plant; for comparison.
        expert_acts: The expert drives the plant itself and nothing is learned by a policy; for comparison.
        dither: Standard deviation of what is added to each force while labels are on, N.
        pretrain_seed: Seed of the pre-trained policy.
        seed: Seed of starts and labels.
        learners: Starts of the first episode, one learner each.
        continued: How many of them, the first, go on to further episodes.
        tests: Fresh starts of a test.
        checkpoints: Episodes after which to test.
        steps: Length of an episode.
        pretraining: How the policy was pre-trained.
    """

    name: str = "identified, i.i.d. labels"
    labels: Labels = "iid"
    oracle: bool = False
    expert_acts: bool = False
    dither: float = 0.0
    pretrain_seed: int = 1000
    seed: int = 1000
    learners: int = 50
    continued: int = 10
    tests: int = 100
    checkpoints: tuple[int, ...] = (1, 5)
    steps: int = EPISODE_STEPS
    pretraining: PretrainConfig = field(default=PRETRAINING)


class LearnerRow(NamedTuple):
    """One learner: whether it stayed up in its first episode, and the success of its policy alone at a checkpoint.

    ``gain_error`` is the largest relative error of the expert's gain at the checkpoint; ``score`` is None where no
    policy learns, ``episode_success`` the success of the episode before the checkpoint, labels and all.
    """

    method: str
    pretrain_seed: int
    learner: int
    episodes: int
    no_fall: bool
    episode_success: bool
    score: float | None
    gain_error: float
    fallbacks: int


class CurveRow(NamedTuple):
    """Relative error of the gain in the first episode, over the learners that have not fallen."""

    method: str
    pretrain_seed: int
    time: float
    median: float
    upper: float


class Study(NamedTuple):
    """Rows of one configuration."""

    learners: list[LearnerRow]
    curve: list[CurveRow]


def run_study(config: NoOracleConfig, models: Path | None = None) -> Study:
    """Run one configuration.

    Args:
        config: What to do.
        models: Folder in which pre-trained policies are kept; trained anew if None.
    """
    torch.manual_seed(config.seed)
    path = pretrained_path(config.pretrain_seed, config.pretraining, models)
    pretrained = pretrain(config.pretrain_seed, config.pretraining, path)
    learners = make_fleet(KBT_METHOD, pretrained, config.learners, SHIFTED)
    assert isinstance(learners, HeadFleet)
    seed = config.seed + 10_000 * config.pretrain_seed
    rng = np.random.default_rng([seed, 11])
    experts = _experts(config)
    tests = starts(seed + _TEST_SEED_OFFSET, config.tests)
    rows: list[LearnerRow] = []
    curve: list[CurveRow] = []
    stayed = np.ones(config.learners, dtype=bool)
    for episode in range(1, max(config.checkpoints) + 1):
        first = episode == 1
        if not first:
            experts = experts[: config.continued]
            learners.keep(config.continued)
        initial = starts(seed + episode, config.learners)[: len(experts)]
        upright, success = _episode(config, learners, experts, initial, rng, curve if first else None)
        stayed = upright if first else stayed
        if episode in config.checkpoints:
            fresh = np.broadcast_to(tests, (len(experts), *tests.shape))
            scores = [None] * len(experts) if config.expert_acts else label_free_score(learners, fresh).tolist()
            outcomes = zip(
                stayed.tolist(), success.tolist(), scores, _gain_errors(experts).tolist(), experts, strict=False
            )
            for i, (no_fall, succeeded, score, error, expert) in enumerate(outcomes):
                kept = getattr(expert, "fallbacks", 0)
                rows.append(
                    LearnerRow(config.name, config.pretrain_seed, i, episode, no_fall, succeeded, score, error, kept)
                )
    return Study(rows, curve)


def _experts(config: NoOracleConfig) -> list[LQRExpert]:
    """One expert a learner; oracles have nothing of their own to keep."""
    if config.oracle:
        return [LQRExpert.for_env(gym.make(SHIFTED_ID))] * config.learners
    env = gym.make(NOMINAL_ID)  # all that the identifying experts are told
    return [SelfTuningLQR.for_env(env) for _ in range(config.learners)]


def _force(expert: LQRExpert, state: npt.NDArray[np.float32]) -> float:
    """What the expert would do in a state ``(4,)``, N."""
    return float(expert.label(state)[0]) * SHIFTED.max_force


def _gain_errors(experts: Sequence[LQRExpert]) -> FloatArray:
    """Largest relative error of each gain's entries."""
    gains = np.stack([expert.gain[0] for expert in experts])
    errors: FloatArray = np.abs(gains / lqr_gain(SHIFTED)[0] - 1.0).max(axis=1)
    return errors


def _episode(
    config: NoOracleConfig,
    learners: HeadFleet,
    experts: Sequence[LQRExpert],
    initial: FloatArray,
    rng: np.random.Generator,
    curve: list[CurveRow] | None,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """One episode of every learner, labels on; who stayed up, and who also settled. A fallen learner waits."""
    state = initial.copy()
    upright = np.ones(len(state), dtype=bool)
    for step in range(config.steps):
        alive = np.flatnonzero(upright)
        if len(alive) == 0:
            break
        observed = state.astype(np.float32)
        force = learners.force(observed)
        if config.expert_acts:
            force[alive] = [_force(experts[i], observed[i]) for i in alive.tolist()]
        if config.dither:
            force = force + config.dither * rng.standard_normal(len(force))
        force = np.clip(force, -SHIFTED.max_force, SHIFTED.max_force)
        state = np.where(upright[:, None], rk4_step(state, force, SHIFTED), state)
        arrived = state.astype(np.float32)
        if not config.oracle and (config.expert_acts or config.labels != "none"):
            for i in alive.tolist():
                expert = experts[i]
                assert isinstance(expert, SelfTuningLQR)
                expert.observe(observed[i], force[i : i + 1] / SHIFTED.max_force, arrived[i])
        if not config.expert_acts:
            _teach(config, learners, experts, observed, alive, rng)
        upright &= is_upright(state)
        if curve is not None and step % 5 == 4 and not config.oracle and upright.any():
            errors = _gain_errors([experts[i] for i in np.flatnonzero(upright).tolist()])
            median, upper = np.percentile(errors, (50, 95))
            curve.append(CurveRow(config.name, config.pretrain_seed, (step + 1) * DT, float(median), float(upper)))
    return upright, upright & is_settled(state)


def _teach(
    config: NoOracleConfig,
    learners: HeadFleet,
    experts: Sequence[LQRExpert],
    observed: npt.NDArray[np.float32],
    alive: npt.NDArray[np.intp],
    rng: np.random.Generator,
) -> None:
    """The labels of one step; the visited state is the one that the policy has just acted in."""
    asked = []
    if config.labels in ("iid", "both"):
        box = np.asarray(LABEL_BOX)
        # Drawn for all learners, so that one that falls does not change the others' states.
        asked.append(rng.uniform(-box, box, observed.shape).astype(np.float32))
    if config.labels in ("visited", "both"):
        asked.append(observed)
    for states in asked:
        forces = np.full(len(states), np.nan)
        forces[alive] = [_force(experts[i], states[i]) for i in alive.tolist()]
        learners.learn(states, forces)


# ---------------------------------------------------------------------- the study


def study_plan(*, seed: int = 1000, quick: bool = False, policies: int = 2) -> list[NoOracleConfig]:
    """Every configuration: the identifying expert with either kind of labels, then the baselines.

    Args:
        seed: First pre-training seed, and that of starts and labels; at least 1000 for reported figures.
        quick: One policy, few learners, one episode; for a look.
        policies: Pre-trained policies.
    """
    few, dithered = {"learners": 10}, {"dither": DITHER, "learners": 20}
    once = {"checkpoints": (1,)}
    methods: list[dict[str, Any]] = [
        {"name": IDENTIFIED_IID, "labels": "iid"},
        {"name": IDENTIFIED_VISITED, "labels": "visited"},
        {"name": f"{IDENTIFIED_IID}, dither {DITHER:g} N", "labels": "iid", **dithered},
        {"name": f"{IDENTIFIED_VISITED}, dither {DITHER:g} N", "labels": "visited", **dithered},
        {"name": PRETRAINED, "labels": "none", **once},
        {"name": EXPERT_ACTS, "labels": "none", "expert_acts": True, **once},
        {"name": ORACLE_IID, "labels": "iid", "oracle": True, **few},
        {"name": ORACLE_VISITED, "labels": "visited", "oracle": True, **few},
    ]
    size: dict[str, Any] = {"learners": 3, "tests": 10, **once} if quick else {}
    return [
        NoOracleConfig(**{**method, **size}, pretrain_seed=seed + p, seed=seed)
        for method in methods
        for p in range(1 if quick else policies)
    ]


def perform(config: NoOracleConfig, out: Path) -> Path:
    """Run a configuration unless its result is there already; returns the result's path."""
    path = out / "no_oracle" / f"{digest(config)}.json"
    if not path.exists():
        study = run_study(config, out / "models")
        rows = {"learners": [row._asdict() for row in study.learners], "curve": [row._asdict() for row in study.curve]}
        write_json({"config": asdict(config), **rows, "versions": versions()}, path)
    return path
