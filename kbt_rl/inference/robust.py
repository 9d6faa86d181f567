"""Wild labels: Student's t noise as a scale mixture of Gaussians, so that one of them does not wreck the posterior.

The noise of a label is Gaussian with covariance ``R / tau``, where the precision factor ``tau`` of that label is
unknown and Gamma distributed with shape and rate ``dof / 2``: together Student's t distribution. Given the
one-step-ahead error, ``tau`` has a one-dimensional posterior, which is summed over fixed nodes of its logarithm. The
label is then conditioned with one Gaussian noise, larger than ``R`` where the label is implausible. That noise is the
one whose gain is the posterior mean of the gain, so that the mean of the head moves as under the exact mixture.

The Gaussian that is left drops one term of the exact second moment, the variance of the gain times the squared error,
which would widen the posterior where it is undecided whether a label is wild.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Nodes of log tau. The trapezoid rule on a smooth density is all but exact at this step, and e^-40 leaves room for an
# error of 10^8 standard deviations.
_LOG_PRECISIONS = np.arange(-40.0, 4.0, 0.25)


@dataclass(frozen=True)
class StudentNoise:
    """Student's t noise of labels with ``outputs`` entries.

    Attributes:
        dof: Degrees of freedom; the fewer, the heavier the tails.
        outputs: Entries of a label, which share one precision factor.
    """

    dof: float
    outputs: int

    def inflation(self, white: Array, variances: Array) -> Array:
        """By what factor the noise of a label is larger than ordinary, for each of its uncorrelated entries.

        Args:
            white: Errors in standard deviations of the noise, ``(o,)``.
            variances: Epistemic variances in units of the noise, ``(o,)``.

        Returns:
            ``E[a / tau] / E[a]`` with ``a = (S + 1 / tau)^-1``, ``(o,)``; it is ``1 / E[tau]`` for ``S = 0``.
        """
        log_prior, spreads = self._nodes
        total = variances + spreads
        log_posterior = log_prior - 0.5 * (np.log(total) + white * white / total).sum(-1)
        weights = np.exp(log_posterior - log_posterior.max())
        gains = weights[:, None] / total
        factor: Array = (gains * spreads).sum(0) / gains.sum(0)
        return factor

    def inflated(self, noise_cov: Array, error: Array, cov: Array) -> tuple[Array, float]:
        """Noise covariance to condition one label with, ``(o, o)``, and its weight: 1 or more if it is ordinary.

        Args:
            noise_cov: Ordinary noise ``R``, positive definite, ``(o, o)``.
            error: Label minus prediction, ``(o,)``.
            cov: Epistemic covariance of the prediction, ``(o, o)``.
        """
        root = np.linalg.cholesky(noise_cov)
        whitener = np.linalg.inv(root)
        variances, axes = np.linalg.eigh(whitener @ cov @ whitener.T)
        variances = np.maximum(variances, 0.0)  # a positive semi-definite matrix up to rounding
        factors = self.inflation(axes.T @ (whitener @ error), variances)
        half = root @ axes
        inflated: Array = (half * factors) @ half.T
        return inflated, self.outputs / float(factors.sum())

    def clip(self, square: float) -> float:
        """Factor on a label's squared error where the noise is learned: Student's weight over its Gaussian mean.

        What is learned is thereby the covariance of ordinary labels: unbiased if all labels are Gaussian, and a wild
        one counts as an error of a few standard deviations, however far off it is.

        Args:
            square: Normalised innovation squared of the label, chi-square with ``o`` degrees of freedom.
        """
        return (self.dof + self.outputs) / (self.dof + square) / self._gaussian_mean

    @cached_property
    def _nodes(self) -> tuple[Array, Array]:
        """Logarithm of the density of ``log tau`` up to a constant ``(nodes,)``, and ``1 / tau`` ``(nodes, 1)``."""
        return 0.5 * self.dof * (_LOG_PRECISIONS - np.exp(_LOG_PRECISIONS)), np.exp(-_LOG_PRECISIONS)[:, None]

    @cached_property
    def _gaussian_mean(self) -> float:
        """``E[(dof + o) q / (dof + q)] / o`` for ``q`` chi-square with ``o`` degrees of freedom.

        ``q / (dof + q) = 1 - dof / (dof + q)``, and ``E 1 / (dof + q)`` is the integral of ``exp(-dof t)`` times the
        moment generating function of ``q`` at ``-t``.
        """
        from scipy.integrate import quad

        inverse, _ = quad(lambda t: math.exp(-self.dof * t) * (1.0 + 2.0 * t) ** (-0.5 * self.outputs), 0.0, math.inf)
        return (self.dof + self.outputs) * (1.0 - self.dof * float(inverse)) / self.outputs
