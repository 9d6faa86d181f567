"""The world moves again and again: ten plants in succession, drawn at random.

Each plant is one on which the expert of the one before succeeds from less than half of the starts. A strategy sees 150
noisy labels of each; success is scored 0, 10 and 25 labels after a shift, and an alarm is counted from the first label
of the new plant on. The rows of a shift are those of the task ``shift N``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kbt_rl.callbacks.adaptation import ReopenOnDetection
from kbt_rl.envs.plant import NOMINAL
from studies import changing, plots
from studies.changing import Adaptive, ChangingTrial, draw_plants, labelled
from studies.cloned import Setting
from studies.curve import grid
from studies.episodes import FloatArray
from studies.frozen import frozen
from studies.methods import EXPERT, PRETRAINED
from studies.pendulum import Pendulum
from studies.table import Row, Table, Text
from studies.trial import Size

METHODS = (
    changing.NONE, changing.FORGET, changing.PROCESS, changing.TOWARDS, changing.WINDOW, changing.CUSUM,
    changing.LEARNED, changing.TRAP, PRETRAINED, EXPERT,
)  # fmt: skip
CHECKPOINTS = (0, 10, 25)
ALARM, REPEATS = "labels until the first alarm", "further alarms"


@dataclass(frozen=True, kw_only=True)
class ChangeTrial(ChangingTrial):
    """A strategy through all plants of a stream.

    Attributes:
        plants: Shifts in sequence.
        samples: Labels on each plant, and before the first shift on the nominal one.
    """

    study: str = "change"
    plants: int = 10
    samples: int = 150


def plan(size: Size) -> list[ChangeTrial]:
    """All strategies on 5 streams of each of 2 policies."""
    small = {"plants": 2, "starts": 5} if size.quick else {}
    trials = size.trials(ChangeTrial, METHODS, **small)
    return sorted(trials, key=lambda trial: trial.stream_seed)  # which share the drawn plants


def run(trial: ChangeTrial, setting: Setting) -> Iterator[Row]:
    """Success after each shift; where the strategy looks for changes, when it noticed each (0: the plant before)."""
    plants = draw_plants(trial.stream_seed, trial.plants)
    if trial.method in (PRETRAINED, EXPERT):
        for shift, plant in enumerate(plants, 1):
            policy = setting.pretrained.policy if trial.method == PRETRAINED else Pendulum(plant).expert()
            (score,) = Pendulum(plant).score([policy], trial.stream_seed, trial.starts)
            for labels in CHECKPOINTS:
                yield trial.row(labels, "success", score.success, task=f"shift {shift}")
        return
    learner = Adaptive(trial, setting)
    visited = [NOMINAL, *plants]
    stream = labelled(
        learner.model.policy, [plant for plant in visited for _ in range(trial.samples)], (trial.stream_seed, 22),
        trial.noise_variance,
    )  # fmt: skip
    for shift, plant in enumerate(visited):
        alarms, policies = [], []
        for index in range(trial.samples):
            if shift and index in CHECKPOINTS:
                policies.append(frozen(learner.model.policy))
            learner.update(stream[shift * trial.samples + index])
            if learner.noticed:
                alarms.append(index + 1)
        if policies:
            scores = Pendulum(plant).score(policies, trial.stream_seed, trial.starts)
            for labels, score in zip(CHECKPOINTS, scores, strict=True):
                yield trial.row(labels, "success", score.success, task=f"shift {shift}")
        if isinstance(learner.strategy, ReopenOnDetection):
            yield trial.row(trial.samples, ALARM, alarms[0] if alarms else np.inf, task=f"shift {shift}")
            yield trial.row(trial.samples, REPEATS, max(len(alarms) - 1, 0), task=f"shift {shift}")


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """Success with intervals over shifts, alarms, and a figure."""
    yield grid(table, "Success so many labels after a shift, mean [95 % interval over shifts]", "success", CHECKPOINTS)
    alarms = table.where(metric=(ALARM, REPEATS))
    after = Table(row for row in alarms if row.task != "shift 0")
    yield Text.of("Alarms", after, {"method": "strategy"}, {
        "shifts": lambda rows: str(len(_delays(rows))),
        "noticed within 5": lambda rows: str((_delays(rows) <= 5).sum()),
        "missed": lambda rows: str(np.isinf(_delays(rows)).sum()),
        "largest delay": lambda rows: f"{max((d for d in _delays(rows) if np.isfinite(d)), default=0):.0f}",
        "further alarms": lambda rows: str(_repeats(rows)),
    })  # fmt: skip
    before = alarms.where(task="shift 0")
    yield Text.of("Before the first shift", before, {"method": "strategy"}, {
        "false alarms": lambda rows: str(np.isfinite(_delays(rows)).sum() + _repeats(rows)),
    })  # fmt: skip
    success = {"xlabel": "labels since the shift", "ylabel": "success", "ylim": (-0.03, 1.05)}
    delays = {"xlabel": "labels since the shift", "ylabel": "share of the shifts", "ylim": (-0.03, 1.05)}
    yield plots.Picture("change", [
        plots.Panel("Success on ten successive plants", table.where(metric="success"), success, "points",
                    along="labels"),
        plots.Panel("Labels until noticed", Table(_shares(after.where(metric=ALARM))), delays, "points"),
    ], 5.2)  # fmt: skip


def _delays(rows: Table) -> FloatArray:
    return np.array(rows.where(metric=ALARM).values())


def _repeats(rows: Table) -> int:
    return round(sum(rows.where(metric=REPEATS).values()))


def _shares(alarms: Table) -> Iterator[Row]:
    """Whether each shift was noticed after just so many labels, which stand in the place of the task."""
    for row in alarms:
        found = "none" if np.isinf(row.value) else "6+" if row.value > 5 else f"{row.value:.0f}"
        for words in ("1", "2", "3", "4", "5", "6+", "none"):
            yield row._replace(task=words, value=float(words == found))
