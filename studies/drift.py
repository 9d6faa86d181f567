"""A slow drift: the logarithms of all three plant parameters take a small random step with every label.

Strategies against it are scored on the plant of the moment, every 100 labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from studies import changing, plots
from studies.changing import Adaptive, ChangingTrial, drifting_plants, labelled
from studies.cloned import Setting
from studies.frozen import frozen
from studies.methods import EXPERT, PRETRAINED
from studies.pendulum import Pendulum
from studies.table import Row, Table, Text
from studies.trial import Size

METHODS = (changing.NONE, changing.FORGET, changing.PROCESS, changing.CUSUM, PRETRAINED, EXPERT)


@dataclass(frozen=True, kw_only=True)
class DriftTrial(ChangingTrial):
    """A strategy under the drift.

    Attributes:
        samples: Labels.
        every: Labels between two scores.
        rate: Standard deviation of the step that each logarithm takes with every label.
    """

    study: str = "drift"
    samples: int = 1_500
    every: int = 100
    rate: float = 0.02


def plan(size: Size) -> list[DriftTrial]:
    """Four strategies on 5 streams of each of 2 policies."""
    small = {"samples": 200, "starts": 5} if size.quick else {}
    return size.trials(DriftTrial, METHODS, **small)


def run(trial: DriftTrial, setting: Setting) -> Iterator[Row]:
    """Success on the plant of the moment."""
    plants = list(itertools.islice(drifting_plants(trial.stream_seed, trial.rate), trial.samples + 1))
    learner = None
    if trial.method not in (PRETRAINED, EXPERT):
        learner = Adaptive(trial, setting)
        stream = labelled(learner.model.policy, plants[:-1], (trial.stream_seed, 24), trial.noise_variance)
    for labels in range(trial.samples + 1):
        if labels % trial.every == 0:
            task = Pendulum(plants[labels])
            fixed = task.expert() if trial.method == EXPERT else setting.pretrained.policy
            policy = fixed if learner is None else frozen(learner.model.policy)
            (score,) = task.score([policy], trial.stream_seed, trial.starts)
            yield trial.row(labels, "success", score.success)
        if learner is not None and labels < trial.samples:
            learner.update(stream[labels])


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """Success from the 100th label on with intervals over trials, and a figure."""
    late = Table(row for row in table if row.labels > 0)
    means = Table(
        rows.rows[0]._replace(value=rows.estimate().mean)
        for rows in late.by("method", "policy_seed", "stream_seed").values()
    )
    title = "Success under a slow drift, from the 100th label on"
    yield Text.of(title, means, {"method": "strategy"}, {"success": lambda rows: rows.mean("success")})
    axes = {"xlabel": "labels", "ylabel": "success on the plant of the moment", "ylim": (-0.03, 1.05)}
    yield plots.Picture("drift", [plots.Panel("A slow drift", table, axes)], 4.2)
