"""Success and regret against the number of labels: what several studies measure, each with trials of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kbt_rl.agents.sample import Sample
from kbt_rl.agents.warm_start import WarmStart
from kbt_rl.inference.errors import UpdateError
from studies.cloned import ClonedTrial, Setting
from studies.episodes import Policy, walk
from studies.frozen import frozen
from studies.methods import build
from studies.pendulum import LabelStream, Pendulum, Score
from studies.stacked import WarmStarts
from studies.table import Row, Table, Text, interval
from studies.trial import Fixed, Learner, Method, Size

#: Dense below 50 labels, where the methods differ.
CHECKPOINTS = (0, 5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 75, 100, 125, 150, 200, 250, 300, 350, 400)
#: Of a learner that can learn no more: as a policy that falls from every start.
FAILED = Score(0.0, 99.0, 0.0)
#: Steps of the learner's own path between two labels at visited states.
VISITED_EVERY = 5
VISITED = "labels at visited states"


@dataclass(frozen=True, kw_only=True)
class CurveTrial(ClonedTrial):
    """A learner on a stream of labels, scored alone at each checkpoint; or one on each of several streams.

    Attributes:
        streams: Streams from ``stream_seed`` on. Warm starts on several are trained side by side, in less time.
        checkpoints: Labels after which to score; it learns the last number of labels.
        starts: Episodes behind each score.
        states: Where labels are asked: ``iid`` in the label box, or ``visited`` by the learner itself.
        actions_only: With discrete actions, whether labels are actions rather than distributions over them.
    """

    streams: int = 1
    checkpoints: tuple[int, ...] = CHECKPOINTS
    starts: int = 50
    states: Literal["iid", "visited"] = "iid"
    actions_only: bool = False

    @property
    def label(self) -> str:
        """The task, and where labels are asked if it is not at i.i.d. states."""
        return self.task if self.states == "iid" else f"{self.task}, {VISITED}"


def side_by_side(size: Size, warm_starts: Iterable[Method], **fields: Any) -> list[CurveTrial]:
    """As ``size.trials``, but one trial for all streams of a policy, as its learners are trained in one batch."""
    streams = len(size._replace(policies=1).pairs())
    return [
        replace(trial, streams=streams) for trial in size._replace(streams=1).trials(CurveTrial, warm_starts, **fields)
    ]


def run(trial: CurveTrial, setting: Setting) -> Iterator[Row]:
    """Success, regret and the share without a fall at each checkpoint; ``failed`` from the first refused label on."""
    task = setting.task
    each = [replace(trial, stream_seed=trial.stream_seed + i, streams=1) for i in range(trial.streams)]
    learners = [build(trial.method, setting) for _ in each]
    if isinstance(fixed := learners[0], Fixed):
        for one in each:
            (score,) = task.score([fixed.policy], one.stream_seed, one.starts)
            for labels in one.checkpoints:
                yield from _rows(one, labels, score)
        return
    update = _teacher(learners)
    courses = [_Course(one, learner, task) for one, learner in zip(each, learners, strict=True)]
    for labels in range(trial.checkpoints[-1]):
        for course in courses:
            course.look(labels)
        if not all(course.failed for course in courses):
            for course, outcome in zip(courses, update([course.sample() for course in courses]), strict=True):
                course.note(outcome)
    for course in courses:
        course.look(trial.checkpoints[-1])
        yield from course.rows()


def _teacher(learners: Sequence[Learner]) -> Callable[[Sequence[Sample]], Sequence[Any]]:
    """What gives each learner a sample, and tells what each says of it, or the ``UpdateError`` that it raises."""
    warm_starts = [learner for learner in learners if isinstance(learner, WarmStart)]
    if len(learners) == len(warm_starts) > 1:
        return WarmStarts(warm_starts).update

    def outcome(learner: Learner, sample: Sample) -> Any:
        try:
            return learner.update(sample)
        except UpdateError as error:
            return error

    return lambda samples: list(map(outcome, learners, samples))


class _Course:
    """How a learner does on a stream of labels."""

    def __init__(self, trial: CurveTrial, learner: Learner, task: Pendulum) -> None:
        self._trial, self._learner, self._task = trial, learner, task
        self._samples, self._falls = _samples(trial, learner, task), 0
        self._snapshots: list[Policy] = []
        self._used: dict[int, int | None] = {}  # number of the snapshot at each checkpoint; None once it has failed
        self.failed, self._changed = False, True

    def look(self, labels: int) -> None:
        """Keep the policy if this is a checkpoint."""
        if labels in self._trial.checkpoints:
            if self._changed and not self.failed:
                self._snapshots.append(frozen(self._learner.policy))
                self._changed = False
            self._used[labels] = None if self.failed else len(self._snapshots) - 1

    def sample(self) -> Sample:
        """The next one."""
        sample, falls = next(self._samples)
        self._falls = self._falls if self.failed else falls
        return sample

    def note(self, outcome: Any) -> None:
        """Take down what an update said."""
        self.failed |= isinstance(outcome, UpdateError)
        self._changed |= getattr(outcome, "trainings", 1) > 0  # warm start waits for a full memory

    def rows(self) -> Iterator[Row]:
        """What there is to tell after the last checkpoint."""
        trial, count = self._trial, self._trial.starts
        scores = self._task.score(self._snapshots, trial.stream_seed, count) if self._snapshots else []
        for labels, index in self._used.items():
            yield from _rows(trial, labels, FAILED if index is None else scores[index])
            yield trial.row(labels, "failed", index is None)
        if trial.states == "visited":
            yield trial.row(trial.checkpoints[-1], "falls while learning", self._falls)


def _samples(trial: CurveTrial, learner: Learner, task: Pendulum) -> Iterator[tuple[Sample, int]]:
    """Labelled states one by one, and the learner's falls so far."""
    stream = LabelStream(task, trial.stream_seed, actions_only=trial.actions_only)
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
    """A method a row, a number of labels a column: means, with intervals or to so many digits, and failed trials."""
    body = []
    shown = [labels for labels in at if labels in table.distinct("labels")]
    for method, rows in table.by("method").items():
        curve, failed = rows.where(metric=metric).curve(), rows.where(metric="failed", value=1.0).by("labels")
        cells = []
        for labels in shown:
            lost = f" ({len(failed[labels])} failed)" if labels in failed else ""
            found = curve.get(labels)
            text = "" if found is None else interval(found, digits) if intervals else f"{found.mean:.{digits}g}"
            cells.append(text + lost)
        body.append([method, *cells])
    return Text(title, ["method", *map(str, shown)], body)
