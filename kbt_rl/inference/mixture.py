"""How well several models have predicted, and what their mixture predicts; nothing here knows how they learn.

Let ``e`` be the error of a label before it is learned and ``V`` its variance under a model, in units of an unknown
scale whose inverse has a gamma distribution. Then the label has Student's t density,

    log p_k = sum_j -1/2 log(b_kj V_kj / n_j) - (n_j + 1)/2 log(1 + e_kj^2 / (b_kj V_kj)) + const

and after it ``b <- b + w e^2 / V``, ``n <- n + w``, ``log v_k <- log v_k + w log p_k``, where ``w`` is what the label
counts for and ``v`` are the weights of the models.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

# Labels' worth of trust in the scale of the errors before any label, which is that of the target.
START_DOF = 2.0

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


class Moments(NamedTuple):
    """What a mixture predicts: mean and epistemic variance ``(B, o)``, and the noise variance ``(o,)``."""

    mean: Array
    epistemic: Array
    aleatoric: Array


class Evidence(NamedTuple):
    """How well each model has predicted, and how large the errors are.

    Attributes:
        logs: Logarithm of the weight of each model, ``(k,)``.
        misfit: Sum of squared errors over their variances, ``(k, o)``.
        dof: Labels that it is the sum of, ``(o,)``.
    """

    logs: Array
    misfit: Array
    dof: Array

    @classmethod
    def start(cls, shares: Array, outputs: int) -> Evidence:
        """Before any label, given what each model is trusted, ``(k,)``."""
        misfit = np.full((len(shares), outputs), START_DOF)
        return cls(np.log(shares / shares.sum()), misfit, np.full(outputs, START_DOF))

    @property
    def shares(self) -> Array:
        """Weight of each model, ``(k,)``."""
        shares: Array = np.exp(self.logs - np.logaddexp.reduce(self.logs))
        return shares

    @property
    def scale(self) -> Array:
        """Squared scale of the errors in units of their variances, ``(k, o)``."""
        scale: Array = self.misfit / self.dof
        return scale

    @property
    def finite(self) -> bool:
        """Whether no label has led out of float64."""
        return math.isfinite(float(self.logs.sum() + self.misfit.sum() + self.dof.sum()))

    def densities(self, squares: Array, variances: Array, given: Mask) -> Array:
        """Log density of a label under each model, ``(k,)``.

        Args:
            squares: Squared errors over ``variances``, ``(k, o)``.
            variances: Of the label in units of the scale, ``(k, o)``.
            given: Outputs that have a label, ``(o,)``.
        """
        normaliser = gammaln(0.5 * (self.dof + 1.0)) - gammaln(0.5 * self.dof) - 0.5 * np.log(math.pi * self.dof)
        each = normaliser - 0.5 * np.log(self.scale * variances)
        each = each - 0.5 * (self.dof + 1.0) * np.log1p(squares / self.misfit)
        densities: Array = np.where(given, each, 0.0).sum(axis=1)
        return densities

    def after(self, squares: Array, densities: Array, given: Mask, weight: float) -> Evidence:
        """The evidence after a label that counts for ``weight``."""
        logs = self.logs + weight * densities
        return Evidence(
            logs - np.logaddexp.reduce(logs), self.misfit + weight * squares * given, self.dof + weight * given
        )

    def towards(self, other: Evidence, fraction: float) -> Evidence:
        """So far on the way to other evidence."""
        return Evidence(*[(1.0 - fraction) * mine + fraction * its for mine, its in zip(self, other, strict=True)])

    def noise(self, ratios: Array) -> Array:
        """Noise variance of the mixture ``(o,)``, given that of each model in units of the scale, ``(k, 1)``."""
        noise: Array = (self.shares[:, None] * self.scale * ratios).sum(axis=0)
        return noise

    def mixture(self, means: Array, own: Array, ratios: Array) -> Moments:
        """What the mixture predicts, given means and epistemic variances of each model, ``(B, k, o)``."""
        shares = self.shares[:, None]
        mean = (shares * means).sum(axis=1)
        epistemic = (shares * (own * self.scale + (means - mean[:, None]) ** 2)).sum(axis=1)
        return Moments(mean, epistemic, self.noise(ratios))
