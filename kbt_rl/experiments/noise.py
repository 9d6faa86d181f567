"""Unknown noise: Figure 5 without telling the method the variance of the labels, and labels with heavy tails.

Each trial learns from one stream of labels at i.i.d. states of the label box and is judged on held-out states: the
error of its mean against the noise-free expert, and its predictive distribution against labels with the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.kbt import KBT
from kbt_rl.envs.plant import SHIFTED
from kbt_rl.experiments import learners
from kbt_rl.experiments.aggregate import Z95, estimate
from kbt_rl.experiments.config import FIRST_REPORTED_SEED, KBT_METHOD, NOISE_VARIANCES, PRETRAINING, Method, Trial
from kbt_rl.experiments.learners import LabelStream, build, features_of

FloatArray = npt.NDArray[np.float64]
Kind = Literal["gaussian", "student_t", "outliers"]

STUDENT_DOF = 3.0
OUTLIER_SHARE, OUTLIER_NEWTONS = 0.05, 100.0
HELD_OUT = 4_000
#: Degrees of freedom of the robust heads; not those of the labels.
ROBUST_DOF = 4.0
_CURVE_STEP = 20

LEARNED = {"noise": "learned"}
#: What each method is told: ``known`` the labels' variance (of the ordinary ones), ``untold`` the package's default.
KNOWN = Method("known", "kbt")
UNTOLD = Method("untold", "kbt")
ONLINE = Method("learned", "kbt", LEARNED)
VARIATIONAL = Method("learned, variational", "kbt", {**LEARNED, "noise_statistic": "variational"})
ROBUST = Method("learned, robust", "kbt", {**LEARNED, "robust_dof": ROBUST_DOF})
ROBUST_KNOWN = Method("known, robust", "kbt", {"robust_dof": ROBUST_DOF})
NO_LEARNING = Method("pre-trained", "pretrained")


@dataclass(frozen=True)
class NoiseTrial:
    """One method on one stream of noisy labels.

    Attributes:
        method: Which learner; ``known`` in its name means that it is told the variance.
        kind: Distribution of the noise.
        variance: Variance of the noise, of the ordinary labels with ``outliers``, N^2.
        pretrain_seed: Seed of the pre-trained policy.
        stream_seed: Seed of states and noise.
        samples: Labels to learn from.
        pretraining: How the policy was pre-trained.
    """

    method: Method
    kind: Kind
    variance: float
    pretrain_seed: int
    stream_seed: int
    samples: int = 2_000
    pretraining: PretrainConfig = field(default=PRETRAINING)


class NoiseRow(NamedTuple):
    """A trial at its end: learned variance in N^2, error of the mean in N, held-out coverage and density.

    ``nlpd`` is the negative log predictive density of a label in newtons, under the Gaussian that the head predicts.
    """

    method: str
    kind: str
    noise_variance: float
    pretrain_seed: int
    stream_seed: int
    learned_variance: float
    mean_error: float
    coverage: float
    nlpd: float


class CurveRow(NamedTuple):
    """The variance a trial believes in after so many labels, N^2."""

    method: str
    kind: str
    noise_variance: float
    pretrain_seed: int
    stream_seed: int
    iteration: int
    learned_variance: float


class SummaryRow(NamedTuple):
    """Means over trials, with 95 % bootstrap intervals of the mean."""

    method: str
    kind: str
    noise_variance: float
    trials: int
    learned_variance: float
    learned_lower: float
    learned_upper: float
    mean_error: float
    error_lower: float
    error_upper: float
    coverage: float
    coverage_lower: float
    coverage_upper: float
    nlpd: float
    nlpd_lower: float
    nlpd_upper: float


def noise_plan(*, quick: bool = False, seed: int = FIRST_REPORTED_SEED) -> list[NoiseTrial]:
    """Every trial of ``kbt-rl noise``: 5 streams times 2 pre-trained policies, or one of each."""
    pairs = [(seed, seed)] if quick else [(seed + p, seed + s) for s in range(5) for p in range(2)]
    of_gaussian = (NO_LEARNING, KNOWN, UNTOLD, ONLINE, VARIATIONAL, ROBUST)
    of_wild = (NO_LEARNING, KNOWN, ONLINE, ROBUST_KNOWN, ROBUST)
    settings: list[tuple[Kind, float, tuple[Method, ...]]] = [
        *[("gaussian", variance, of_gaussian) for variance in NOISE_VARIANCES],
        ("student_t", 20.0, of_wild),
        *[("outliers", variance, of_wild) for variance in (0.0, 10.0)],
    ]
    return [
        NoiseTrial(method, kind, variance, p, s, samples=300 if quick else 2_000)
        for kind, variance, methods in settings
        for method in methods
        for p, s in pairs
    ]


def draw_noise(kind: Kind, variance: float, count: int, rng: np.random.Generator) -> FloatArray:
    """Noise of ``count`` labels in newtons; streams of one seed share their ordinary noise."""
    sd = math.sqrt(variance)
    if kind == "student_t":
        # Student's t has the variance dof / (dof - 2).
        return sd * math.sqrt((STUDENT_DOF - 2.0) / STUDENT_DOF) * rng.standard_t(STUDENT_DOF, count)
    noise: FloatArray = sd * rng.standard_normal(count)
    if kind == "outliers":
        wild = rng.random(count) < OUTLIER_SHARE
        noise = noise + OUTLIER_NEWTONS * wild * rng.choice([-1.0, 1.0], count)
    return noise


def run_noise_trial(trial: NoiseTrial, models: Path | None = None) -> tuple[NoiseRow, list[CurveRow]]:
    """Learn from the stream and judge the head on held-out states.

    Args:
        trial: What to do.
        models: Folder in which pre-trained policies are kept; each is trained anew if None.
    """
    plain = Trial("uncertainty", KBT_METHOD, trial.pretrain_seed, trial.stream_seed, pretraining=trial.pretraining)
    path = learners.pretrained_path(trial.pretrain_seed, trial.pretraining, models)
    pretrained = learners.pretrain(trial.pretrain_seed, trial.pretraining, path)
    told = trial.variance if trial.method in (KNOWN, ROBUST_KNOWN) else 0.0
    learner = build(trial.method, pretrained, told)
    assert isinstance(learner, KBT)
    stream = LabelStream(plain)
    states, held_out = stream.states(trial.samples), stream.states(HELD_OUT)
    noise, fresh = (
        draw_noise(trial.kind, trial.variance, count, np.random.default_rng([trial.stream_seed, place]))
        for count, place in ((trial.samples, 11), (HELD_OUT, 12))
    )
    key = (trial.method.name, trial.kind, trial.variance, trial.pretrain_seed, trial.stream_seed)
    curve = [] if trial.method.kind == "pretrained" else list(_learn(learner, states, stream.label(states), noise))
    clean = SHIFTED.max_force * stream.label(held_out)[:, 0]
    judged = judge(learner, held_out, clean, fresh)
    return NoiseRow(*key, *judged), [CurveRow(*key, *point) for point in curve]


def _learn(
    learner: KBT, states: npt.NDArray[Any], labels: FloatArray, noise: FloatArray
) -> Iterator[tuple[int, float]]:
    """Update label by label; now and then the iteration and the variance believed in."""
    head, unit = learner.policy.head, noise_unit(learner)
    features = features_of(learner.policy, states).numpy()
    noisy = labels + noise[:, None] / SHIFTED.max_force
    for i in range(len(states)):
        head.update(features[i : i + 1], noisy[i : i + 1])
        if (i + 1) % _CURVE_STEP == 0:
            yield i + 1, unit * float(head.noise_cov[0, 0])


def noise_unit(learner: KBT) -> float:
    """Newtons squared in one unit of the head's variances."""
    return (float(learner.policy.head.target_scale[0]) * SHIFTED.max_force) ** 2


def errors_and_variances(learner: KBT, states: npt.NDArray[Any], clean: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Predicted minus clean force (N) and predictive variance of a label (N^2) in the states ``(n, 4)``, ``(n,)``."""
    newton = SHIFTED.max_force
    prediction = learner.policy.head.predict(features_of(learner.policy, states))
    error = newton * prediction.mean[:, 0].numpy() - clean
    variance = newton**2 * (prediction.epistemic + prediction.aleatoric)[:, 0, 0].numpy()
    return error, variance


def judge(
    learner: KBT, states: npt.NDArray[Any], clean: FloatArray, noise: FloatArray
) -> tuple[float, float, float, float]:
    """Noise variance believed in (N^2), error of the mean (N), coverage of 95 % intervals, and density of labels."""
    error, variance = errors_and_variances(learner, states, clean)
    white = (noise - error) ** 2 / variance
    return (
        noise_unit(learner) * float(learner.policy.head.noise_cov[0, 0]),
        float(np.sqrt(np.mean(error**2))),
        float(np.mean(white <= Z95**2)),
        float(np.mean(0.5 * (np.log(2.0 * math.pi * variance) + white))),
    )


def summarise(rows: Sequence[NoiseRow]) -> list[SummaryRow]:
    """Each method on each noise, over streams and pre-trained policies."""
    groups: dict[tuple[str, str, float], list[NoiseRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.kind, row.noise_variance), []).append(row)
    summary = []
    for key, members in groups.items():
        values: list[float] = []
        for name in ("learned_variance", "mean_error", "coverage", "nlpd"):
            found = estimate([getattr(row, name) for row in members])
            values += [found.mean, found.lower, found.upper]
        summary.append(SummaryRow(*key, len(members), *values))
    return summary


class RatioRow(NamedTuple):
    """Error of the mean over that of a reference on the same streams: mean of the paired ratios and its interval."""

    method: str
    kind: str
    noise_variance: float
    reference: str
    ratio: float
    lower: float
    upper: float


def ratios(rows: Sequence[NoiseRow]) -> list[RatioRow]:
    """Every learner against the one that is told the variance, on the same streams without wild labels."""
    reference = {
        (row.noise_variance, row.pretrain_seed, row.stream_seed): row.mean_error
        for row in rows
        if row.method == KNOWN.name and row.kind == "gaussian"
    }
    groups: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        beside = reference.get((row.noise_variance, row.pretrain_seed, row.stream_seed))
        if beside is not None:
            groups.setdefault((row.method, row.kind, row.noise_variance), []).append(row.mean_error / beside)
    name = "known, Gaussian labels"
    return [RatioRow(*key, name, *estimate(values)[:3]) for key, values in groups.items()]
