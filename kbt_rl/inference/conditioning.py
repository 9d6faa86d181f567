"""From the distribution of the outputs and their labels to what the weights have to follow.

Where the noise is known and Gaussian the output rule answers; where it is learned or has heavy tails, its model does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.moments import Gaussian
from kbt_rl.inference.noise import Judgement, NoiseEstimate, NoiseModel
from kbt_rl.inference.output import Conditioning, OutputRule
from kbt_rl.inference.record import UpdateInfo, check_distance

_HUGE = (
    "the update is not finite where the noise is judged; the posterior is unchanged. Check features and target for "
    "huge values."
)


class NoiseBelief(NamedTuple):
    """How the noise is judged, and what it is thought to be before an update."""

    model: NoiseModel
    estimate: NoiseEstimate


class Conditioned(NamedTuple):
    """The step of the outputs, the record (its smallest variance still to come) and the noise afterwards, if judged."""

    step: Conditioning
    info: UpdateInfo
    noise: NoiseEstimate | None


def condition(
    output: Gaussian,
    target: Tensor,
    rule: OutputRule,
    noise_cov: Tensor,
    belief: NoiseBelief | None,
    weights: Tensor | None = None,
) -> Conditioned:
    """Condition the outputs of rows on their targets; the arguments are those of ``update.increment``."""
    if belief is None:
        step = rule.condition(output, target, noise_cov)
        if rule.link == "identity":
            check_distance(float(step.nis), target.numel())
        return Conditioned(step, _describe(output, step, noise_cov, 1.0, weights), None)
    error = (target - output.mean.view_as(target)).cpu().numpy()
    with huge_values_refused():
        judged = belief.model.judge(error, output.cov.cpu().numpy(), belief.estimate)
    if belief.model.robust_dof is None:
        check_distance(judged.nis, target.numel())
    if not np.isfinite(judged.estimate.cov).all():
        raise UpdateError(_HUGE)
    step = _as_conditioning(output, target, judged)
    info = _describe(output, step, noise_cov, judged.weight, weights)._replace(repairs=judged.repairs)
    return Conditioned(step, info, judged.estimate)


@contextmanager
def huge_values_refused() -> Iterator[None]:
    """What leaves the range of float64 while labels are judged becomes NaN, which is refused, or an UpdateError.

    Warnings about it would say less, and are errors where warnings are.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            yield
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise UpdateError(_HUGE) from error


def _as_conditioning(output: Gaussian, target: Tensor, judged: Judgement) -> Conditioning:
    """A judgement in the form in which the output rules answer."""
    mean_step, factor = (torch.from_numpy(array).to(target) for array in (judged.mean_step, judged.cov_factor))
    innovation = target.flatten() - output.mean
    nis, log_density = (torch.tensor(value, dtype=target.dtype) for value in (judged.nis, judged.log_density))
    return Conditioning(mean_step, factor, -torch.ones_like(innovation), innovation, nis, log_density)


def _describe(
    output: Gaussian, step: Conditioning, noise_cov: Tensor, label_weight: float, weights: Tensor | None
) -> UpdateInfo:
    """The record of the update, as floats; the smallest variance is still to come."""
    labels, o = step.innovation.numel(), len(noise_cov)
    squares, epistemic, noise = step.innovation.square().view(-1, o), output.cov.diagonal(), noise_cov.diagonal()
    if weights is not None:
        squares, epistemic, noise = squares * weights, epistemic.view(-1, o) * weights, noise * weights
    variance = float(epistemic.sum()) / labels
    return UpdateInfo(
        innovation=math.sqrt(float(squares.sum()) / labels),
        nis=float(step.nis),
        epistemic_variance=variance,
        predictive_variance=variance + float(noise.sum()) / o,
        smallest_variance=math.nan,
        labels=labels,
        label_weight=label_weight,
        log_density=float(step.log_density),
    )
