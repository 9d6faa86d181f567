"""Adaptation without an oracle: the policy stands on an unknown plant and the labels come from identifying it.

``SelfTuningLQR`` starts from the nominal plant, learns the new one from transitions by Bayesian linear regression and
re-solves the regulator; its gain labels the states. Every learner has a start, an identifying expert and a posterior of
its own; in each step the policy acts, the expert sees the transition, its labels are learned, and only then the policy
acts again. After one and after five episodes the policy is scored alone: labels off, fresh starts. In the result table
``stream_seed`` counts the learners.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kbt_rl.agents.identification import SelfTuningLQR
from kbt_rl.agents.lqr import LQRExpert
from studies.cloned import ClonedTrial, Setting
from studies.episodes import Episodes, FloatArray, Observations, evaluate
from studies.fleet import Fleet
from studies.methods import PRETRAINED, TWO_LAYERS
from studies.pendulum import Pendulum, uniform_states
from studies.table import Row, Table, Text
from studies.trial import Size

STEPS, DITHER = 500, 3.0
STAYED, SCORE = "no fall, first episode", "success alone"


@dataclass(frozen=True, kw_only=True)
class NoOracleTrial(ClonedTrial):
    """One way to get labels on one pre-trained policy.

    Attributes:
        labels: Where they are asked in each step: one i.i.d. state of the label box, the visited state, or nowhere.
        oracle: Whether the expert knows the new plant; for comparison.
        expert_acts: Whether the expert drives the plant itself and no policy learns; for comparison.
        dither: Standard deviation of what is added to each force while labels are on, N.
        learners: Learners of the first episode.
        continued: How many of them, the first, go on to further episodes.
        tests: Fresh starts of a score.
        episodes: Episodes after which to score.
    """

    study: str = "no_oracle"
    labels: Literal["iid", "visited", "none"]
    oracle: bool = False
    expert_acts: bool = False
    dither: float = 0.0
    learners: int = 50
    continued: int = 10
    tests: int = 100
    episodes: tuple[int, ...] = (1, 5)

    @property
    def identifies(self) -> bool:
        """Whether the plant is identified."""
        return not self.oracle and (self.expert_acts or self.labels != "none")

    @property
    def label(self) -> str:
        """Where the labels come from."""
        if self.labels == "none":
            return "identified LQR acts itself" if self.expert_acts else "no labels"
        states = {"iid": "i.i.d.", "visited": "visited"}[self.labels]
        dither = f", dither {self.dither:g} N" if self.dither else ""
        return f"{'oracle' if self.oracle else 'identified'}, at {states} states{dither}"


def plan(size: Size) -> list[NoOracleTrial]:
    """Both kinds of labels, alone and with dither, then what they are compared with; on 2 policies."""
    once: dict[str, Any] = {"episodes": (1,)}
    kinds: list[dict[str, Any]] = [
        {"labels": "iid"},
        {"labels": "visited"},
        {"labels": "iid", "dither": DITHER, "learners": 20},
        {"labels": "visited", "dither": DITHER, "learners": 20},
        {"labels": "iid", "oracle": True, "learners": 10},
        {"labels": "visited", "oracle": True, "learners": 10},
        {"labels": "none", "expert_acts": True, **once},
        {"labels": "none", **once},
    ]
    small = {"learners": 3, "tests": 10, **once} if size.quick else {}
    return [
        trial
        for kind in kinds
        for trial in size.trials(
            NoOracleTrial, [PRETRAINED if kind["labels"] == "none" else TWO_LAYERS], streams=1, **{**kind, **small}
        )
    ]


def run(trial: NoOracleTrial, setting: Setting) -> Iterator[Row]:
    """Of each learner whether it stayed up in the first episode, and the success of its policy alone."""
    task, seed = setting.task, trial.stream_seed + 10_000 * trial.policy_seed
    fleet, rng = Fleet(trial.method, setting, trial.learners), np.random.default_rng([seed, 11])
    experts: list[LQRExpert] = [
        task.expert() if trial.oracle else SelfTuningLQR.for_env(task.env()) for _ in range(trial.learners)
    ]
    tests = task.starts(seed + 700_000, trial.tests)
    for episode in range(1, max(trial.episodes) + 1):
        # Learners that do not go on wait as rows that have ended.
        going = trial.learners if episode == 1 else min(trial.continued, trial.learners)
        running = Episodes(task.envs(trial.learners), task.starts(seed + episode, trial.learners))
        running.running[going:] = False
        _episode(trial, task, fleet, experts, running, rng)
        if episode == 1:
            for index, fallen in enumerate(running.fallen):
                yield trial.row(0, STAYED, not fallen)._replace(stream_seed=index)
        if episode in trial.episodes and not trial.expert_acts:
            alone = [fleet.alone(index) for index in range(going)]
            success = evaluate(alone, task.envs(going * trial.tests), tests).success.mean(axis=1)
            for index, share in enumerate(success):
                yield trial.row(episode * STEPS, SCORE, share)._replace(stream_seed=index)


def _episode(
    trial: NoOracleTrial,
    task: Pendulum,
    fleet: Fleet,
    experts: Sequence[LQRExpert],
    episodes: Episodes,
    rng: np.random.Generator,
) -> None:
    """One episode of every learner, labels on. A fallen learner waits."""
    state = None
    while episodes.running.any():
        up, seen = np.flatnonzero(episodes.running).tolist(), episodes.observations
        actions, state = fleet.predict(seen, state, episodes.begins, deterministic=True)
        if trial.expert_acts:
            actions = np.array(actions)
            actions[up] = np.concatenate([experts[i].predict(seen[i : i + 1])[0] for i in up])
        actions = actions + trial.dither / task.max_force * rng.standard_normal(actions.shape)
        actions = np.clip(actions, -1.0, 1.0).astype(np.float32)
        episodes.step(actions)
        if trial.identifies:
            for i in up:
                expert = experts[i]
                assert isinstance(expert, SelfTuningLQR)
                expert.observe(seen[i], actions[i], episodes.observations[i])
        if trial.labels != "none":
            # Drawn for all learners, so that one that falls does not change the others' states.
            asked = uniform_states(rng, (trial.learners,)) if trial.labels == "iid" else seen
            fleet.update(asked, _labels(experts, asked, up))


def _labels(experts: Sequence[LQRExpert], states: Observations, up: Sequence[int]) -> FloatArray:
    """What each expert would do, ``(n, 1)``; NaN for learners that have fallen."""
    labels = np.full((len(states), 1), np.nan)
    for i in up:
        labels[i] = experts[i].label(states[i])
    return labels


def report(table: Table) -> Iterator[Text]:
    """Shares of the learners that stay up and of the starts from which they succeed alone."""
    yield Text.of("Labels of an identified plant", table, {"task": "labels"}, {
        "learners": lambda rows: str(len(rows.where(metric=STAYED))),
        "no fall in the first episode": lambda rows: rows.share(STAYED, len(rows.where(metric=STAYED))),
        "success alone after one episode": lambda rows: rows.where(labels=STEPS).mean(SCORE),
        "after five": lambda rows: rows.where(labels=5 * STEPS).mean(SCORE),
    })  # fmt: skip
