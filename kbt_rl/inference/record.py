"""What one update adds to a posterior, and what it saw: the record that callbacks log and monitors test."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kbt_rl.inference.errors import NegativeVarianceError, UpdateError
from kbt_rl.inference.noise import NoiseEstimate

_LOST = {dtype: 8.0 * torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}

# Of a feature, a label or the step of a weight, in the head's own units. The variance of a prediction of L layers has
# products of 2 (L + 1) of them, which must stay in float64 (up to four layers), also when several such labels came.
LARGEST = 1e25

# Standard deviations from its prediction up to which a label is learned where the noise is Gaussian. Such noise takes
# every label at its word, and the step of a farther one is so far beyond where a network is linear that what follows it
# could not be learned either.
FARTHEST = 1e6


def kept(dtype: torch.dtype) -> float:
    """The part of a variance that counts, so that a downdate to nothing is refused, not left below 0 by rounding."""
    return 1.0 - _LOST[dtype]


class UpdateInfo(NamedTuple):
    """What one update saw, in the head's own units. Variances are those of the targets before the update, averaged.

    Averages over outputs weigh each by its squared ``target_scale``, so that times ``Posterior.mean_square_scale`` they
    are the averages in units of the target.

    Attributes:
        innovation: Root mean square of target minus predicted mean.
        nis: Normalised innovation squared, chi-square with ``labels`` degrees of freedom when calibrated.
        epistemic_variance: Variance from the weights.
        predictive_variance: Variance from the weights and the noise.
        smallest_variance: Smallest variance of a weight after the update.
        labels: Number of scalar targets used; 0 when every label was missing.
        label_weight: What the labels counted for where wild ones are expected: about 1 if ordinary, near 0 if wild.
        log_density: Logarithm of the predictive density of the targets before the update, all entries jointly, in
            nats: Gaussian, or with Student's t noise where wild labels are expected. With the softmax link the log
            probability of the labels at the mean logits. NaN where it was not computed.
        repairs: Times a covariance was repaired: that of the weights before it could take the rows, see
            ``inference.resolution`` (never in float64), and that of a learned noise after a wild label, see
            ``inference.noise``.
    """

    innovation: float
    nis: float
    epistemic_variance: float
    predictive_variance: float
    smallest_variance: float
    labels: int
    label_weight: float = 1.0
    log_density: float = math.nan
    repairs: int = 0


class Increment(NamedTuple):
    """``mean += mean_step``, ``cov += V diag(signs) V'``; shapes ``(P,)``, ``(P, q)``, ``(q,)``.

    ``noise`` is what the label noise is thought to be afterwards, None where it is known. Before anything is added, the
    covariances of weights with each other are multiplied by ``correlation``, see ``inference.resolution``.
    """

    mean_step: Tensor
    cov_factor: Tensor
    signs: Tensor
    info: UpdateInfo
    noise: NoiseEstimate | None = None
    correlation: float = 1.0


def merge(records: Sequence[UpdateInfo]) -> UpdateInfo:
    """One record of successive blocks: sums of NIS, log density and labels; averages of what is an average."""
    labels = sum(record.labels for record in records)

    def average(values: Iterable[float]) -> float:
        return sum(value * record.labels for value, record in zip(values, records, strict=True)) / labels

    return UpdateInfo(
        innovation=math.sqrt(average(record.innovation**2 for record in records)),
        nis=sum(record.nis for record in records),
        epistemic_variance=average(record.epistemic_variance for record in records),
        predictive_variance=average(record.predictive_variance for record in records),
        smallest_variance=records[-1].smallest_variance,
        labels=labels,
        label_weight=average(record.label_weight for record in records),
        log_density=sum(record.log_density for record in records),
        repairs=sum(record.repairs for record in records),
    )


def check_distance(nis: float, labels: int) -> None:
    """Raise UpdateError for labels that Gaussian noise cannot account for, see ``FARTHEST``.

    Args:
        nis: Normalised innovation squared of all labels.
        labels: Their number.
    """
    if nis > FARTHEST * FARTHEST * labels:
        raise UpdateError(
            f"the target is {math.sqrt(nis / labels):.3g} standard deviations from its prediction, where at most "
            f"{FARTHEST:.0e} are learned; the posterior is unchanged. Check the target's units, raise the noise "
            "variance if it is meant, or expect wild labels with robust_dof=4"
        )


def check(mean_step: float, info: UpdateInfo) -> None:
    """Raise UpdateError for a step that is not finite or would make a variance negative.

    Args:
        mean_step: Sum of what would be added to the means; one sum finds any NaN or infinity, as inf - inf is NaN.
        info: The record, with the smallest variance after the update.
    """
    if abs(mean_step) > LARGEST and math.isfinite(mean_step):
        raise UpdateError(
            f"the update would move the weights by {mean_step:.3g}, and products of such numbers leave float64; the "
            "posterior is unchanged. Check features and target for huge values."
        )
    total = mean_step + info.nis + info.epistemic_variance + info.smallest_variance
    if total - total != 0.0:
        raise UpdateError(
            f"the update is not finite (sum of mean steps {mean_step}, NIS {info.nis}, predicted variance "
            f"{info.epistemic_variance}, smallest weight variance {info.smallest_variance}); the posterior is "
            "unchanged. Check features and target for huge values."
        )
    if info.smallest_variance < 0.0:
        raise NegativeVarianceError(
            f"the update would make a weight variance negative ({info.smallest_variance:.3g}); the posterior is "
            "unchanged. The noise variance is too small for the prior variance in the head's dtype: raise it."
        )
