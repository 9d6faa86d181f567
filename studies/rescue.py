"""A falling pole, a few labels, and who saves it.

The pre-trained policy stands on the shifted plant and falls. Labels of the new plant's optimal controller arrive one
step after the policy has acted and stop after a budget; from then on the policy is alone until the end of the 10 s. The
labels are free of noise, and every KBT but one knows it (noise and hidden prior variance were chosen on policy seeds 0
and 1, start seeds 20 and 21). Beside the learners stand those that need no learning: hold the newest label, and the
expert itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from studies import methods
from studies.cloned import ClonedTrial, Setting
from studies.episodes import Episodes, FloatArray, Observations
from studies.fleet import Fleet
from studies.methods import EXPERT, PRETRAINED, two_layers, warm_start
from studies.pendulum import Pendulum, uniform_states
from studies.table import Row, Table, Text
from studies.trial import Method, Size

_FREE_OF_NOISE: dict[str, Any] = {"noise_variance": 1e-5, "hidden_variance": 1e-6}
NOISE_FREE = two_layers(**_FREE_OF_NOISE)
DEFAULT_NOISE = two_layers(f"{NOISE_FREE.name}, default noise")
ONE_LAYER = Method(methods.ONE_LAYER.name, "kbt", {"head": {"layers": 1, "noise_variance": 1e-5}, "skip": "none"})
DEFAULT = Method(methods.DEFAULT.name, "kbt", {"head": {"noise_variance": 1e-5}})
RIVAL = two_layers("EKF", structure="joint", propagation="linearised", **_FREE_OF_NOISE)
HOLD = Method("hold the last label", "hold")
#: States to choose the most uncertain from.
POOL = 32


@dataclass(frozen=True, kw_only=True)
class RescueTrial(ClonedTrial):
    """A method with one kind of labels from many starts.

    Attributes:
        states: Where labels are asked: ``iid`` (uniform in the label box), ``visited`` (where the policy is), or
            ``uncertain`` (of 32 i.i.d. states the one with the largest epistemic variance; the first for learners
            without one).
        budget: Labels for each start.
        every: Steps between two labels, the first of which is asked at step 0.
        starts: Episodes, each with a learner of its own.
    """

    study: str = "rescue"
    states: Literal["iid", "visited", "uncertain"]
    budget: int
    every: int = 1
    starts: int = 100

    @property
    def label(self) -> str:
        """The labels."""
        words = {"iid": "at i.i.d. states", "visited": "at visited states", "uncertain": "at uncertain states"}
        return f"{self.budget} labels {words[self.states]}, one every {self.every} steps"


def compared(labels: int) -> list[Method]:
    """What is compared; warm start trains at least once on what it gets."""
    memory = min(20, labels)
    rate: float = warm_start(20 if memory == 20 else 10).settings["learning_rate"]
    warm = replace(warm_start(memory, rate), name="warm start")
    return [RIVAL, warm, NOISE_FREE, DEFAULT_NOISE, ONE_LAYER, DEFAULT, HOLD, PRETRAINED, EXPERT]


def plan(size: Size) -> list[RescueTrial]:
    """Every method with every kind of labels, on 2 policies."""
    kinds: list[dict[str, Any]] = [
        {"states": "iid", "budget": 8},
        {"states": "iid", "budget": 20},
        {"states": "uncertain", "budget": 8},
        {"states": "visited", "budget": 50, "every": 4},
    ]
    starts = 8 if size.quick else 100
    return [
        replace(trial, stream_seed=trial.policy_seed)
        for kind in kinds
        for trial in size.trials(RescueTrial, compared(kind["budget"]), streams=1, starts=starts, **kind)
    ]


class Step(NamedTuple):
    """One step of a rescue before its labels are learned: what was seen and done, and asked if anything was."""

    episodes: Episodes
    observations: Observations
    actions: FloatArray
    asked: Observations | None
    labels: FloatArray | None


def rescue(fleet: Fleet, task: Pendulum, trial: RescueTrial) -> Iterator[Step]:
    """One episode from each start, in which each learner gets its labels."""
    rng, expert = np.random.default_rng([trial.stream_seed, 11]), task.expert()
    episodes = Episodes(task.envs(trial.starts), task.starts(trial.stream_seed, trial.starts))
    step, state = 0, None
    while episodes.running.any():
        observations = episodes.observations
        actions, state = fleet.predict(observations, state, episodes.begins, deterministic=True)
        asked = None
        if step % trial.every == 0 and step // trial.every < trial.budget:
            asked = _asked(fleet, trial, observations, rng)
        labels = None if asked is None else expert.label(asked)
        episodes.step(actions)
        yield Step(episodes, observations, actions, asked, labels)
        if asked is not None and labels is not None:
            fleet.update(asked, labels)
        step += 1


def _asked(fleet: Fleet, trial: RescueTrial, observations: Observations, rng: np.random.Generator) -> Observations:
    """Where each learner asks, ``(n, 4)``."""
    if trial.states == "visited":
        return observations
    if trial.states == "iid" or not fleet.is_uncertain:
        return uniform_states(rng, (trial.starts,))
    pool = uniform_states(rng, (trial.starts, POOL))
    most: Observations = pool[np.arange(trial.starts), fleet.variances(pool).argmax(axis=1)]
    return most


def run(trial: RescueTrial, setting: Setting) -> Iterator[Row]:
    """Shares of the starts without a fall and with success."""
    task = setting.task
    steps = list(rescue(Fleet(trial.method, setting, trial.starts), task, trial))
    outcome = steps[-1].episodes.outcome()
    yield trial.row(trial.budget, "no fall", np.isfinite(outcome.cost).mean())
    yield trial.row(trial.budget, "success", outcome.success.mean())
    yield trial.row(trial.budget, "starts", trial.starts)


def report(table: Table) -> Iterator[Text]:
    """Shares of all starts, with Wilson's intervals."""
    for task, rows in table.by("task").items():
        yield Text.of(f"{task}, then none", rows, {"method": "method"}, {
            "no fall": lambda own: own.share("no fall", _starts(own)),
            "success": lambda own: own.share("success", _starts(own)), "starts": lambda own: str(_starts(own)),
        })  # fmt: skip


def _starts(rows: Table) -> int:
    return round(sum(rows.where(metric="starts").values()))
