"""Wild labels: Student's t noise as a scale mixture of Gaussians, so that one of them does not wreck the posterior.

The noise of a label is Gaussian with covariance ``R / tau``, where the precision factor ``tau`` of that label is
unknown and Gamma distributed with shape and rate ``dof / 2``: together Student's t distribution. Given the
one-step-ahead error ``e``, ``tau`` has a one-dimensional posterior, which is summed over fixed nodes of its logarithm.
With ``a = (S + R / tau)^-1`` the exact posterior mean and covariance of the output follow from

    dm = E[a] e,        dC = -E[a] + Cov[a e]

(the first two derivatives of the log evidence by the mean). ``dC`` is not negative semi-definite where it is undecided
whether a label is wild: the exact posterior is then wider than the prior. Such directions count as no information here,
so that a label never takes away what others have given; the mean moves exactly as it should.

The predictive density of a label is the same sum over the nodes of ``N(e; 0, S + R / tau)``, without approximation. Of
several rows in one update each has a precision factor of its own, and their joint density would be a sum over all
combinations of nodes. It is taken row after row instead: each row given the Gaussian factors that stand for those
before it. That is a normalised density, the exact one where the rows are uncorrelated or the tails Gaussian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from kbt_rl.inference.density import LOG_TWO_PI
from kbt_rl.inference.types import Array

# Nodes of log tau: the trapezoid rule on a smooth density is all but exact at this step. A label whose squared error is
# ``q`` times the noise has its ``tau`` around ``1 / q``; the nodes reach e^-20 times that, and at least e^-40.
_STEP, _HIGHEST, _BELOW, _LOWEST = 0.25, 4.0, 20.0, -40.0


class Site(NamedTuple):
    """A Gaussian factor on one label's output: precision ``T T'``, shift ``h``, and the label's weight.

    The weight is its precision over that of an ordinary label.
    """

    root: Array
    shift: Array
    weight: float


@dataclass(frozen=True)
class StudentNoise:
    """Student's t noise of labels with ``outputs`` entries.

    Attributes:
        dof: Degrees of freedom; the fewer, the heavier the tails.
        outputs: Entries of a label, which share one precision factor.
    """

    dof: float
    outputs: int

    def scalar(self, error: float, variance: float, noise: float) -> tuple[float, float]:
        """``dm`` and the information ``-dC``, not below 0, for one label with one entry."""
        log_prior, spreads = self._nodes(error * error / noise)
        total = variance + noise * spreads
        gains = self._posterior(log_prior - 0.5 * (np.log(total) + error * error / total)) / total
        gain = float(gains.sum())
        spread = float(gains @ (1.0 / total)) - gain * gain
        return gain * error, max(gain - spread * error * error, 0.0)

    def site(self, error: Array, cov: Array, noise_cov: Array) -> Site:
        """The Gaussian that stands for one label among the rows of a joint update.

        Its precision ``P`` and shift ``h`` give ``dm`` and ``dC`` of the module if the label is conditioned on alone:
        ``P = I_ (1 - S I_)^-1`` for the information ``I_ = -dC``, and ``h = (1 + P S) dm``.

        Args:
            error: Label minus prediction, ``(o,)``.
            cov: Epistemic covariance ``S`` of the prediction, ``(o, o)``.
            noise_cov: Ordinary noise ``R``, positive definite, ``(o, o)``.
        """
        to_label, variances = _diagonalised(cov, noise_cov)
        along = to_label.T @ error
        log_prior, spreads = self._nodes(float(along @ along))
        total = variances + spreads[:, None]
        share = self._posterior(log_prior - 0.5 * (np.log(total) + along * along / total).sum(-1))[:, None]
        gains = share / total
        gain = gains.sum(0)
        moves = (1.0 / total - gain) * along
        info = np.diag(gain) - moves.T @ (share * moves)
        values, vectors = np.linalg.eigh(info)
        half = vectors * np.sqrt(np.maximum(values, 0.0))
        # P = H (1 - H' S H)^-1 H' for I_ = H H'.
        inner = np.eye(len(half)) - half.T @ (variances[:, None] * half)
        white_root = half @ np.linalg.inv(np.linalg.cholesky(inner)).T
        precision = white_root @ white_root.T
        shift = gain * along + precision @ (variances * gain * along)
        # The precision of an ordinary label is 1 in these coordinates.
        return Site(to_label @ white_root, to_label @ shift, float(np.trace(precision)) / self.outputs)

    def scalar_log_density(self, error: float, variance: float, noise: float) -> float:
        """Logarithm of the predictive density of one label with one entry."""
        log_prior, spreads = self._nodes(error * error / noise)
        total = variance + noise * spreads
        return _log_mean(log_prior, -0.5 * (np.log(total) + error * error / total)) - 0.5 * LOG_TWO_PI

    def log_density(self, error: Array, cov: Array, noise_cov: Array) -> float:
        """Logarithm of the predictive density of labels: of one as it is, of several one after another, see the module.

        Args:
            error: Labels minus predictions, ``(B, o)``.
            cov: Epistemic covariance of all rows jointly, ``(B o, B o)``.
            noise_cov: Ordinary noise ``R``, positive definite, ``(o, o)``.
        """
        o, left, total = self.outputs, error.ravel(), 0.0
        for _ in range(len(error) - 1):
            own, across = cov[:o, :o], cov[o:, :o]
            total += self._row_log_density(left[:o], own, noise_cov)
            site = self.site(left[:o], own, noise_cov)
            # dC = -F F' and dm of this row, as in ``NoiseModel``, move the rows that are left.
            inner = np.linalg.cholesky(np.eye(o) + site.root.T @ own @ site.root)
            factor = np.linalg.solve(inner, site.root.T).T
            step = site.shift - factor @ (factor.T @ (own @ site.shift))
            moves = across @ factor
            left, cov = left[o:] - across @ step, cov[o:, o:] - moves @ moves.T
        return total + self._row_log_density(left, cov, noise_cov)

    def _row_log_density(self, error: Array, cov: Array, noise_cov: Array) -> float:
        to_label, variances = _diagonalised(cov, noise_cov)
        along = to_label.T @ error
        log_prior, spreads = self._nodes(float(along @ along))
        total = variances + spreads[:, None]
        # The change of coordinates has the determinant of R^-1/2.
        _, log_det = np.linalg.slogdet(noise_cov)
        densities = _log_mean(log_prior, -0.5 * (np.log(total) + along * along / total).sum(-1))
        return densities - 0.5 * (float(log_det) + self.outputs * LOG_TWO_PI)

    @staticmethod
    def _posterior(log_weights: Array) -> Array:
        weights: Array = np.exp(log_weights - log_weights.max())
        return np.asarray(weights / weights.sum())

    def clip(self, square: float) -> float:
        """Factor on a label's squared error where the noise is learned: Student's weight over its Gaussian mean.

        What is learned is thereby the covariance of ordinary labels: unbiased if all labels are Gaussian, and a wild
        one counts as an error of a few standard deviations, however far off it is.

        Args:
            square: Normalised innovation squared of the label, chi-square with ``o`` degrees of freedom.
        """
        return (self.dof + self.outputs) / (self.dof + square) / self._gaussian_mean

    def _nodes(self, square: float) -> tuple[Array, Array]:
        """The nodes for a label whose squared error is ``square`` times the noise, see ``_nodes``."""
        return _nodes(self.dof, _reach(square))

    @cached_property
    def _gaussian_mean(self) -> float:
        """``E[(dof + o) q / (dof + q)] / o`` for ``q`` chi-square with ``o`` degrees of freedom.

        ``q / (dof + q) = 1 - dof / (dof + q)``, and ``E 1 / (dof + q)`` is the integral of ``exp(-dof t)`` times the
        moment generating function of ``q`` at ``-t``.
        """
        from scipy.integrate import quad

        inverse, _ = quad(lambda t: math.exp(-self.dof * t) * (1.0 + 2.0 * t) ** (-0.5 * self.outputs), 0.0, math.inf)
        return (self.dof + self.outputs) * (1.0 - self.dof * float(inverse)) / self.outputs


def _reach(square: float) -> float:
    """Smallest ``log tau`` that counts for a label, in steps of ten."""
    if square <= math.exp(-_LOWEST - _BELOW):
        return _LOWEST
    return -10.0 * math.ceil((math.log(square) + _BELOW) / 10.0)


@lru_cache(maxsize=64)
def _nodes(dof: float, lowest: float) -> tuple[Array, Array]:
    """Logarithm of the density of ``log tau`` up to a constant, and ``1 / tau``, each ``(nodes,)``."""
    log_precisions = np.arange(lowest, _HIGHEST, _STEP)
    return 0.5 * dof * (log_precisions - np.exp(log_precisions)), np.exp(-log_precisions)


def _log_mean(log_prior: Array, log_values: Array) -> float:
    """Logarithm of the mean over ``tau`` of values at the nodes."""
    return float(np.logaddexp.reduce(log_prior + log_values) - np.logaddexp.reduce(log_prior))


def _diagonalised(cov: Array, noise_cov: Array) -> tuple[Array, Array]:
    """``T`` and ``s`` with ``T' R T = 1`` and ``T' S T = diag(s)``: in the coordinates ``T' e`` the noise is 1."""
    whitener = np.linalg.inv(np.linalg.cholesky(noise_cov))
    variances, axes = np.linalg.eigh(whitener @ cov @ whitener.T)
    # A positive semi-definite matrix up to rounding.
    return whitener.T @ axes, np.maximum(variances, 0.0)
