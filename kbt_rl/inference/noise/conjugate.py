"""Learned noise in closed form, for the structure ``shared``: inverse-Wishart, and Student's t predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.likelihoods.base import EachConditioning
from kbt_rl.inference.noise.base import above_floor, cholesky
from kbt_rl.inference.types import NoiseEstimate


class EachJudgement(NamedTuple):
    """What a conjugate noise makes of a label.

    Attributes:
        answer: The step and the measurement of each output, in units of its noise.
        estimate: What the noise is thought to be after it.
        scale: What it was thought to be before, the variance of each output, ``(o,)``.
        dof: Smallest degrees of freedom of the predictive Student's t distributions of the outputs that had a label.
    """

    answer: EachConditioning
    estimate: NoiseEstimate
    scale: Tensor
    dof: float


@dataclass(frozen=True)
class ConjugateNoise:
    """Noise that is learned exactly, together with weights whose covariance ``V (x) P`` is in units of it.

    ``V`` has an inverse-Wishart distribution, and a label with the one-step-ahead error ``e`` and ``s = h' P h`` is
    predicted by Student's t distribution with ``nu`` degrees of freedom and the scale ``(1 + s) V``. It leaves

        V <- (nu V + e e' / (1 + s)) / (nu + 1),        nu <- nu + 1

    (matrix-normal inverse-Wishart regression, e.g. Murphy 2012, section 7.6.3, with ``nu`` the degrees of freedom of
    the predictive distribution rather than of the inverse-Wishart: those do not change where outputs are left out.) A
    label that only some outputs have makes them independent of the others from then on; each marginal distribution
    stays exact.

    Attributes:
        memory: Labels over which the estimate averages; infinite for a noise that never changes, which is exact.
        floor: Smallest noise variance that is learned, in any direction.
    """

    memory: float
    floor: float
    learned: bool = True
    robust_dof: None = None

    def judge_each(self, innovation: Tensor, spread: Tensor, group: Tensor, estimate: NoiseEstimate) -> EachJudgement:
        """Condition on a label.

        Args:
            innovation: Label minus predicted mean, NaN where there is none, ``(o,)``.
            spread: ``s`` of each output.
            group: Outputs of different groups are independent, ``(o,)``.
            estimate: The noise before the label; ``labels`` are the degrees of freedom of each output.
        """
        error, spreads = (value.cpu().numpy() for value in (innovation, spread))
        given, members = ~np.isnan(error), group.cpu().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            white = np.where(given, error, 0.0) / np.sqrt(1.0 + spreads)
            cov, dof = estimate.cov.copy(), np.asarray(estimate.labels, dtype=np.float64).copy()
            # Weights that were reopened are one group again, but not so what is known of each output's noise.
            known = np.stack([given, members, dof])
            cov[(known[:, :, None] != known[:, None]).any(0)] = 0.0
            nis = density = 0.0
            repairs = 0
            for kind in np.unique(known[:, given], axis=1).T:
                own = np.flatnonzero((known == kind[:, None]).all(0))
                block = np.ix_(own, own)
                root = cholesky(cov[block])
                nu, square = float(kind[2]), float(np.square(np.linalg.solve(root, white[own])).sum())
                log_det = 2.0 * float(np.log(root.diagonal()).sum()) + float(np.log1p(spreads[own]).sum())
                density += student_log_density(square, log_det, nu, len(own))
                nis += square
                kept = min(nu, max(self.memory - 1.0, 0.0)) if math.isfinite(self.memory) else nu
                moved = (kept * cov[block] + np.outer(white[own], white[own])) / (kept + 1.0)
                cov[block], raised = above_floor(moved, self.floor)
                dof[own] = kept + 1.0
                repairs += raised
        if not np.isfinite(cov).all():
            raise UpdateError(
                "the learned noise is not finite; the posterior is unchanged. Check the target for huge values"
            )
        step = torch.where(torch.isnan(innovation), 0.0, innovation) / (1.0 + spread)
        noise = torch.where(torch.isnan(innovation), torch.inf, 1.0)
        as_scalar = innovation.new_tensor
        answer = EachConditioning(
            step, noise.to(step), torch.nan_to_num(innovation, nan=0.0), as_scalar(nis), as_scalar(density)
        )
        labels = np.asarray(estimate.labels)[given]
        scale = torch.from_numpy(estimate.cov.diagonal().copy()).to(step)
        return EachJudgement(answer, NoiseEstimate(cov, dof), scale, float(labels.min(initial=math.inf)))


def student_log_density(square: float, log_det: float, dof: float, size: int) -> float:
    """Of Student's t distribution: squared error in units of its scale, log determinant of the scale, dimension."""
    half = 0.5 * (dof + size)
    return (
        math.lgamma(half)
        - math.lgamma(0.5 * dof)
        - 0.5 * (size * math.log(dof * math.pi) + log_det)
        - half * math.log1p(square / dof)
    )
