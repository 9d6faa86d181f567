"""Figure 5: the variance that a head predicts for noisy labels, over 70,000 of them.

Labels at i.i.d. states have noise of 0, 10, 20 or 50 N^2, which the head is told. The rule ``measure`` is Bayes' rule;
``replace`` is the paper's, which puts the label's distribution in the place of the output's. At the end the mean is
compared with the noise-free expert and the intervals with labels that were held out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from studies import plots
from studies.calibration import judge, noise_unit
from studies.cloned import ClonedTrial, Setting
from studies.methods import kbt, two_layers
from studies.pendulum import LabelStream
from studies.table import Row, Table, Text
from studies.trial import Size

NOISE_VARIANCES = (0.0, 10.0, 20.0, 50.0)
#: Of each rule. There is no machine code for ``replace``, and its error is stationary after some hundred labels.
LABELS = {"measure": 70_000, "replace": 1_000}
PREDICTED, ERROR, COVERAGE = "predicted variance, N²", "error of the mean, N", "coverage 95 %"
# The curve is a moving average, kept at every so many labels.
_WINDOW, _CURVE_STEP = 500, 100
_HELD_OUT = 4_000


@dataclass(frozen=True, kw_only=True)
class UncertaintyTrial(ClonedTrial):
    """One rule on one stream of noisy labels.

    Attributes:
        noise_variance: Of the labels, N^2.
        samples: Labels to learn from.
    """

    study: str = "uncertainty"
    noise_variance: float
    samples: int

    @property
    def label(self) -> str:
        """The noise of the labels."""
        return f"{self.noise_variance:g} N²"


def plan(size: Size) -> list[UncertaintyTrial]:
    """Both rules with each noise on one stream."""
    return [
        trial
        for rule, samples in LABELS.items()
        for variance in NOISE_VARIANCES
        for trial in size.trials(
            UncertaintyTrial, [two_layers(rule, rule=rule)], policies=1, streams=1, noise_variance=variance,
            samples=1_000 if size.quick else samples,
        )
    ]  # fmt: skip


def run(trial: UncertaintyTrial, setting: Setting) -> Iterator[Row]:
    """Predicted variance against labels; then the error of the mean and the coverage of intervals."""
    task = setting.task
    learner = kbt(setting, **trial.method.settings, told=trial.noise_variance or None)
    policy, head, unit = learner.policy, learner.policy.head, noise_unit(learner, task.max_force)
    stream = LabelStream(task, trial.stream_seed, trial.noise_variance)
    states = stream.states(trial.samples)
    labels, features = stream.label(states), policy.encode(policy.start(states)).numpy()
    replacing = trial.method.settings["head"]["rule"] == "replace"
    variance = np.empty(trial.samples)
    for i in range(trial.samples):
        info = head.update(features[i : i + 1], labels[i : i + 1])
        variance[i] = unit * (info.epistemic_variance if replacing else info.predictive_variance)
    smooth = np.convolve(variance, np.full(_WINDOW, 1.0 / _WINDOW), mode="valid")
    for place, value in enumerate(smooth[::_CURVE_STEP]):
        yield trial.row(_WINDOW + place * _CURVE_STEP, PREDICTED, value)
    held_out = stream.states(_HELD_OUT)
    clean = task.max_force * task.expert().label(held_out)[:, 0]
    noise = task.max_force * stream.label(held_out)[:, 0] - clean
    found = judge(learner, held_out, clean, noise, task.max_force, whole=not replacing)
    yield trial.row(trial.samples, "final " + PREDICTED, smooth[-1])
    yield trial.row(trial.samples, ERROR, found.error)
    yield trial.row(trial.samples, COVERAGE, found.coverage[0.95])


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """The values after the last label, and Figure 5."""
    yield Text.of("Uncertainty after the last label", table, {"task": "label noise", "method": "rule"}, {
        "labels": lambda rows: f"{max(rows.distinct('labels')):,}",
        PREDICTED: lambda rows: rows.mean(f"final {PREDICTED}", plain=True),
        ERROR: lambda rows: rows.mean(ERROR, plain=True),
        "coverage of 95 % intervals, held out": lambda rows: rows.mean(COVERAGE, 3, plain=True),
    })  # fmt: skip
    curves = {"xlabel": "labels", "ylabel": "N², mean of 500 labels", "ylim": (0, 62), "xscale": "log"}
    error = {"ylabel": "N, rms, held-out states", "ylim": (0, None), "xlabel": "noise of the labels"}
    coverage = {"ylabel": "% of held-out labels", "xlabel": "noise of the labels"}
    yield plots.Picture("figure5", [
        *(plots.Panel(f"Predicted variance of a label, {rule}", rows, curves, by="task", lines=NOISE_VARIANCES)
          for rule, rows in table.where(metric=PREDICTED).by("method").items()),
        plots.Panel("Error of the mean", table.where(metric=ERROR), error, "points"),
        plots.Panel("Coverage of 95 %", table.where(metric=COVERAGE), coverage, "points", scale=100.0, band=(93, 97)),
    ], 7.6, columns=2, legend=6)  # fmt: skip
