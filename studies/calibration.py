"""How well a head's predictive distribution fits labels that it has never seen."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from kbt_rl.agents.kbt import KBT
from studies.episodes import FloatArray

#: Nominal levels of the predictive intervals.
LEVELS = (0.50, 0.80, 0.90, 0.95, 0.99)
_QUANTILES = chi2.ppf(LEVELS, 1)
_LOG_TWO_PI = math.log(2.0 * math.pi)


class Judgement(NamedTuple):
    """Of a head on held-out labels.

    Attributes:
        error: Rms difference of the predicted mean and the clean label, N.
        coverage: Share of labels inside the central interval of each of ``LEVELS``.
        nlpd: Negative log predictive density of a label in newtons, under the Gaussian that the head predicts, nats.
        assumed_noise: Noise variance that the head believes in, N^2.
    """

    error: float
    coverage: dict[float, float]
    nlpd: float
    assumed_noise: float


def noise_unit(learner: KBT, max_force: float) -> float:
    """Newtons squared in one unit of the head's variances."""
    return learner.policy.head.mean_square_scale * max_force**2


def judge(
    learner: KBT,
    states: npt.NDArray[Any],
    clean: FloatArray,
    noise: FloatArray,
    max_force: float,
    *,
    whole: bool = True,
) -> Judgement:
    """Judge a head on labels ``clean + noise``.

    Args:
        learner: Whose head.
        states: Held-out states, ``(n, 4)``.
        clean: The expert's forces there, N, ``(n,)``.
        noise: Of the labels, N, ``(n,)``.
        max_force: Newtons of an action of 1.
        whole: Whether the noise counts in the predicted variance; the rule ``replace`` has none beside the weights'.
    """
    moments = learner.policy.predict_moments(states)
    variance = moments.epistemic[:, 0, 0] + (moments.aleatoric[:, 0, 0] if whole else 0.0)
    variance = variance * max_force**2
    error = max_force * moments.mean[:, 0] - clean
    square = (noise - error) ** 2 / variance
    coverage = {level: float(np.mean(square <= limit)) for level, limit in zip(LEVELS, _QUANTILES, strict=True)}
    return Judgement(
        float(np.sqrt(np.mean(error**2))),
        coverage,
        0.5 * float(np.mean(square + np.log(variance)) + _LOG_TWO_PI),
        float(learner.policy.head.noise_cov[0, 0]) * noise_unit(learner, max_force),
    )


def best_nlpd(noise: FloatArray, variance: float) -> float:
    """Negative log density of the labels under the true mean and noise variance: nobody does better on average."""
    return 0.5 * (float(np.mean(noise**2)) / variance + math.log(variance) + _LOG_TWO_PI)
