"""Success and regret against the number of labels: what several studies measure, each with trials of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kbt_rl.agents.sample import Sample
from kbt_rl.inference.errors import UpdateError
from studies.episodes import Policy, walk
from studies.frozen import frozen
from studies.methods import build
from studies.pendulum import LabelStream, Pendulum, Score
from studies.table import Row, Table, Text, interval
from studies.trial import Fixed, Learner, Setting, Trial

#: Dense below 50 labels, where the methods differ.
CHECKPOINTS = (0, 5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 75, 100, 125, 150, 200, 250, 300, 350, 400)
#: Of a learner that can learn no more: as a policy that falls from every start.
FAILED = Score(0.0, 99.0, 0.0)
#: Steps of the learner's own path between two labels at visited states.
VISITED_EVERY = 5
VISITED = "labels at visited states"


@dataclass(frozen=True, kw_only=True)
class CurveTrial(Trial):
    """A learner on a stream of labels, scored alone at each checkpoint.

    Attributes:
        checkpoints: Labels after which to score; it learns the last number of labels.
        starts: Episodes behind each score.
        states: Where labels are asked: ``iid`` in the label box, or ``visited`` by the learner itself.
        actions_only: With discrete actions, whether labels are actions rather than distributions over them.
    """

    checkpoints: tuple[int, ...] = CHECKPOINTS
    starts: int = 50
    states: Literal["iid", "visited"] = "iid"
    actions_only: bool = False

    @property
    def label(self) -> str:
        """The task, and where labels are asked if it is not at i.i.d. states."""
        return self.task if self.states == "iid" else f"{self.task}, {VISITED}"


def run(trial: CurveTrial, setting: Setting) -> Iterator[Row]:
    """Success, regret and the share without a fall at each checkpoint; ``failed`` from the first refused label on."""
    task, learner = setting.task, build(trial.method, setting)
    if isinstance(learner, Fixed):
        (score,) = task.score([learner.policy], trial.stream_seed, trial.starts)
        for labels in trial.checkpoints:
            yield from _rows(trial, labels, score)
        return
    stream = LabelStream(task, trial.stream_seed, actions_only=trial.actions_only)
    falls = 0
    snapshots: list[Policy] = []
    used: dict[int, int | None] = {}  # number of the snapshot at each checkpoint; None once it has failed
    samples = _samples(trial, stream, learner, task)
    failed, changed = False, True
    for labels in range(trial.checkpoints[-1] + 1):
        if labels in trial.checkpoints:
            if changed and not failed:
                snapshots.append(frozen(learner.policy))
            used[labels], changed = None if failed else len(snapshots) - 1, False
        if labels < trial.checkpoints[-1] and not failed:
            sample, falls = next(samples)
            try:
                info = learner.update(sample)
                changed |= getattr(info, "trainings", 1) > 0  # warm start waits for a full memory
            except UpdateError:
                failed = True
    scores = task.score(snapshots, trial.stream_seed, trial.starts) if snapshots else []
    for labels, index in used.items():
        yield from _rows(trial, labels, FAILED if index is None else scores[index])
        yield trial.row(labels, "failed", index is None)
    if trial.states == "visited":
        yield trial.row(trial.checkpoints[-1], "falls while learning", falls)


def _samples(trial: CurveTrial, stream: LabelStream, learner: Learner, task: Pendulum) -> Iterator[tuple[Sample, int]]:
    """Labelled states one by one, and the learner's falls so far."""
    if trial.states == "visited":
        envs = task.envs(1, same_step=True)
        for state, falls in walk(learner.policy, envs, trial.stream_seed + 500_000, VISITED_EVERY):
            yield Sample(state, stream.label(state)), falls
    states = stream.states(trial.checkpoints[-1])
    labels = stream.label(states)
    for index in itertools.count():
        yield Sample(states[index : index + 1], labels[index : index + 1]), 0


def _rows(trial: CurveTrial, labels: int, score: Score) -> Iterator[Row]:
    yield trial.row(labels, "success", score.success)
    yield trial.row(labels, "regret", score.regret)
    yield trial.row(labels, "no fall", score.no_fall)


def minus_warm_starts(table: Table, method: str) -> dict[str, Table]:
    """A method minus each warm start, trial by trial, by the warm start's name."""
    ours, names = (
        table.where(method=method),
        [name for name in table.distinct("method") if name.startswith("warm start")],
    )
    return {name: ours.minus(table.where(method=name)) for name in names}


def grid(table: Table, title: str, metric: str, at: Sequence[int], *, digits: int = 2, intervals: bool = True) -> Text:
    """A method a row, a number of labels a column: means with their intervals over trials, and trials that failed."""
    body = []
    shown = [labels for labels in at if labels in table.distinct("labels")]
    for method, rows in table.by("method").items():
        curve, failed = rows.where(metric=metric).curve(), rows.where(metric="failed", value=1.0).by("labels")
        cells = []
        for labels in shown:
            lost = f" ({len(failed[labels])} failed)" if labels in failed else ""
            found = curve.get(labels)
            text = "" if found is None else interval(found, digits) if intervals else f"{found.mean:.{digits}f}"
            cells.append(text + lost)
        body.append([method, *cells])
    return Text(title, ["method", *map(str, shown)], body)
