"""Labels whose noise nobody has told the method: Gaussian, heavy-tailed, and with 5 % wild labels.

Each trial learns from 2,000 labels at i.i.d. states and is judged on held-out ones: the error of its mean against the
noise-free expert, and its predictive distribution against labels with the same noise. ``known`` is told the variance
(of the ordinary labels), ``untold`` keeps the package's default, the others learn it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from studies import plots
from studies.calibration import judge, noise_unit
from studies.cloned import ClonedTrial, Setting
from studies.episodes import FloatArray
from studies.methods import kbt, two_layers
from studies.pendulum import LabelStream
from studies.table import Row, Table, Text
from studies.trial import Method, Size
from studies.uncertainty import NOISE_VARIANCES

Kind = Literal["Gaussian", "Student's t", "5 % wild"]
STUDENT_DOF, ROBUST_DOF = 3.0, 4.0  # of the labels; of the robust heads
WILD_SHARE, WILD_NEWTONS = 0.05, 100.0
HELD_OUT = 4_000
BELIEVED, ERROR, COVERAGE, NLPD = "noise believed in, N²", "error of the mean, N", "coverage 95 %", "nlpd, nats"
_CURVE_STEP = 20


NO_LEARNING, KNOWN, UNTOLD = two_layers("pre-trained policy"), two_layers("known"), two_layers("untold")
ONLINE = two_layers("learned", noise="learned")
VARIATIONAL = two_layers("learned, variational", noise="learned", noise_statistic="variational")
ROBUST = two_layers("learned, robust", noise="learned", robust_dof=ROBUST_DOF)
ROBUST_KNOWN = two_layers("known, robust", robust_dof=ROBUST_DOF)


@dataclass(frozen=True, kw_only=True)
class NoiseTrial(ClonedTrial):
    """One method on one stream of noisy labels.

    Attributes:
        kind: Distribution of the noise.
        variance: Of the noise, of the ordinary labels with wild ones, N^2.
        samples: Labels to learn from.
    """

    study: str = "noise"
    kind: Kind
    variance: float
    samples: int

    @property
    def label(self) -> str:
        """The noise."""
        return f"{self.kind}, {self.variance:g} N²"


def plan(size: Size) -> list[NoiseTrial]:
    """Every method with each noise, on 5 streams of each of 2 policies."""
    of_gaussian = (NO_LEARNING, KNOWN, UNTOLD, ONLINE, VARIATIONAL, ROBUST)
    of_wild = (NO_LEARNING, KNOWN, ONLINE, ROBUST_KNOWN, ROBUST)
    settings: list[tuple[Kind, float, tuple[Method, ...]]] = [
        *[("Gaussian", variance, of_gaussian) for variance in NOISE_VARIANCES],
        ("Student's t", 20.0, of_wild), ("5 % wild", 0.0, of_wild), ("5 % wild", 10.0, of_wild),
    ]  # fmt: skip
    samples = 300 if size.quick else 2_000
    return [
        trial
        for kind, variance, methods in settings
        for trial in size.trials(NoiseTrial, methods, kind=kind, variance=variance, samples=samples)
    ]


def draw_noise(kind: Kind, variance: float, count: int, rng: np.random.Generator) -> FloatArray:
    """Noise of ``count`` labels in newtons; streams of one seed share their ordinary noise."""
    deviation = math.sqrt(variance)
    if kind == "Student's t":  # which has the variance dof / (dof - 2)
        return deviation * math.sqrt((STUDENT_DOF - 2.0) / STUDENT_DOF) * rng.standard_t(STUDENT_DOF, count)
    noise: FloatArray = deviation * rng.standard_normal(count)
    if kind == "5 % wild":
        wild = rng.random(count) < WILD_SHARE
        noise = noise + WILD_NEWTONS * wild * rng.choice([-1.0, 1.0], count)
    return noise


def run(trial: NoiseTrial, setting: Setting) -> Iterator[Row]:
    """The noise that it believes in while it learns; then the judgement of held-out labels."""
    task = setting.task
    told = trial.method in (KNOWN, ROBUST_KNOWN) and trial.variance > 0.0
    learner = kbt(setting, **trial.method.settings, told=trial.variance if told else None)
    head, unit = learner.policy.head, noise_unit(learner, task.max_force)
    stream = LabelStream(task, trial.stream_seed)
    states, held_out = stream.states(trial.samples), stream.states(HELD_OUT)
    noise, fresh = (
        draw_noise(trial.kind, trial.variance, count, np.random.default_rng([trial.stream_seed, place]))
        for count, place in ((trial.samples, 11), (HELD_OUT, 12))
    )
    if trial.method != NO_LEARNING:
        features = learner.policy.encode(learner.policy.start(states)).numpy()
        labels = stream.label(states) + noise[:, None] / task.max_force
        for i in range(trial.samples):
            head.update(features[i : i + 1], labels[i : i + 1])
            if (i + 1) % _CURVE_STEP == 0:
                yield trial.row(i + 1, BELIEVED, unit * float(head.noise_cov[0, 0]))
    found = judge(learner, held_out, task.max_force * stream.label(held_out)[:, 0], fresh, task.max_force)
    values = {
        ERROR: found.error,
        COVERAGE: found.coverage[0.95],
        NLPD: found.nlpd,
        f"final {BELIEVED}": found.assumed_noise,
    }
    for metric, value in values.items():
        yield trial.row(trial.samples, metric, value)


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """The judgement of each method with each noise, and a figure."""
    errors = table.where(method=KNOWN.name, metric=ERROR).by("task")
    yield Text.of("Unknown noise", table, {"task": "labels with", "method": "method"}, {
        BELIEVED: lambda rows: rows.mean(f"final {BELIEVED}"), ERROR: lambda rows: rows.mean(ERROR),
        "over that of known noise": lambda rows: rows.mean(ERROR, 2, 1 / errors[rows.rows[0].task].estimate().mean,
                                                           plain=True),
        "coverage of 95 %, %": lambda rows: rows.mean(COVERAGE, 1, 100.0),
        NLPD: lambda rows: rows.mean(NLPD, plain=True),
    })  # fmt: skip
    believed = Table(row for row in table.where(metric=BELIEVED) if row.task.startswith("Gaussian"))
    learned = {"xlabel": "labels", "ylabel": "N²", "ylim": (0, 90)}
    yield plots.Picture("noise", [
        *(plots.Panel(f"Noise believed in, {method.name}", believed.where(method=method.name), learned, by="task",
                      lines=NOISE_VARIANCES) for method in (ONLINE, VARIATIONAL)),
        plots.Panel("Error of the mean, held out", table.where(metric=ERROR), {"ylabel": "N, rms", "yscale": "log"},
                    "points"),
        plots.Panel("Coverage of 95 % intervals, held out", table.where(metric=COVERAGE),
                    {"ylabel": "% of labels", "ylim": (None, 101)}, "points", scale=100.0, band=(93, 97)),
    ], 8.0, columns=2, legend=4)  # fmt: skip
