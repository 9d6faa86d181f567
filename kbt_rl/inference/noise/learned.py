"""The noise of the labels where it is not simply known: learned online, or with wild labels among the others.

Everything happens in the space of one update's outputs. For a label with the one-step-ahead error ``e``, the epistemic
covariance ``S`` of its prediction and the noise covariance ``R``, let ``W = R (S + R)^-1``. The residual after the
update is ``W e``, the epistemic covariance after it ``W S``, and both learners move the estimate by

    R <- R + D / n,        D = W (e e' - S - R) W' = (W e)(W e)' + W S - R

which is zero on average when ``R`` is right. Read in the first form, ``D`` is the squared one-step-ahead error minus
the epistemic variance, weighted by how much of an error is noise; in the second, it is the statistic of the
inverse-Wishart variational Bayes of Särkkä and Nummenmaa (2009), "Recursive noise adaptive Kalman filtering by
variational Bayesian approximations". The learners differ in ``n``, the labels' worth of information on the noise:

* ``variational`` counts every label as one, also while ``S`` is far larger than ``R`` and an error says next to nothing
  of the noise. As in the paper the update is conditioned with the estimate after the label, by fixed-point iteration.
* ``innovation`` counts the information itself: ``trace(W W) / o`` is the share of a label's Fisher information on the
  noise that an epistemic covariance ``S`` leaves. The update is conditioned with the estimate before the label.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from kbt_rl.inference.density import log_density, scalar_log_density
from kbt_rl.inference.errors import NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.noise.base import NoiseSettings, above_floor, cholesky
from kbt_rl.inference.student_t import Site, StudentNoise
from kbt_rl.inference.types import Array, NoiseEstimate

# One update takes away at most this share of the estimate, however little has been seen.
_LARGEST_CUT = 0.5
_TOO_SMALL = (
    "the label noise is too small beside the variance of the prediction to weigh a label in float64; the posterior is "
    "unchanged. Raise the noise variance or lower the prior"
)
# Fixed-point iterations of the variational learner within one update.
_ITERATIONS = 2
STATISTICS = ("innovation", "variational")


class Judgement(NamedTuple):
    """What a noise model makes of labelled rows.

    Attributes:
        mean_step: ``dm`` of ``likelihoods.base.Conditioning``, ``(B o,)``.
        directions: ``W`` of the same, ``(B o, B o)``; its noise is 1 in every direction.
        weight: Average label weight: about 1 for ordinary labels, near 0 for wild ones.
        nis: Normalised innovation squared under the noise as it was before these labels.
        log_density: Logarithm of the predictive density of these labels under that noise.
        estimate: What the noise is thought to be after these labels.
        repairs: Times it had to be made what float64 can hold.
    """

    mean_step: Array
    directions: Array
    weight: float
    nis: float
    log_density: float
    estimate: NoiseEstimate
    repairs: int


@dataclass(frozen=True)
class NoiseModel:
    """How the noise is learned, and how wild labels are treated.

    Attributes:
        learned: Whether the noise covariance is learned.
        statistic: ``innovation`` or ``variational``, see the module.
        memory: Labels over which the estimate averages; infinite for a noise that never changes.
        floor: Smallest noise variance that is learned, in any direction.
        robust_dof: Degrees of freedom of Student's t noise; None for Gaussian noise.
        outputs: Entries of a label.
    """

    learned: bool
    statistic: str
    memory: float
    floor: float
    robust_dof: float | None
    outputs: int

    @classmethod
    def of(cls, config: NoiseSettings, outputs: int) -> NoiseModel | None:
        """The model that a head's configuration asks for; None for the plain one, known Gaussian noise."""
        learned, dof = config.noise == "learned", config.robust_dof
        if not learned and dof is None:
            return None
        return cls(learned, config.noise_statistic, config.noise_memory, config.noise_floor, dof, outputs)

    @cached_property
    def student(self) -> StudentNoise | None:
        """The distribution of the noise if it has heavy tails."""
        return None if self.robust_dof is None else StudentNoise(self.robust_dof, self.outputs)

    # ------------------------------------------------------------------ one row with one output

    def judge_scalar(
        self, error: float, variance: float, noise: float, labels: float
    ) -> tuple[float, float, float, float, float]:
        """``judge`` for one row and one output, in plain floats.

        Args:
            error: Label minus predicted mean.
            variance: Epistemic variance of the prediction.
            noise: Noise variance before the label.
            labels: Information that it rests on.

        Returns:
            ``dm``, the precision of the label as a measurement, its weight, and the noise and its information after it.
        """
        if not noise > 0.0:
            raise NotPositiveDefiniteError("label noise variance", noise)
        used = learned = noise
        if self.learned:
            square = error * error
            if self.student is not None:
                square *= self.student.clip(square / (variance + noise))
            learn = self._innovation_scalar if self.statistic == "innovation" else self._variational_scalar
            learned, labels = learn(square, variance, noise, labels)
            used = noise if self.statistic == "innovation" else learned
        if self.student is None:
            return error / (variance + used), 1.0 / used, 1.0, learned, labels
        move, info = self.student.scalar(error, variance, used)
        left = 1.0 - variance * info
        if not left > 0.0:
            raise UpdateError(_TOO_SMALL)
        # The precision that alone gives this information ``-dC``, over that of an ordinary label.
        return move, info / left, used * info / left, learned, labels

    def _innovation_scalar(self, square: float, variance: float, noise: float, labels: float) -> tuple[float, float]:
        share = noise / (variance + noise)
        labels = min(labels + share * share, self.memory)
        step = share * share * (square - variance - noise) / max(labels, share / _LARGEST_CUT)
        return max(noise + step, self.floor), labels

    def _variational_scalar(self, square: float, variance: float, noise: float, labels: float) -> tuple[float, float]:
        kept, learned = self._kept(1) * labels, noise
        for _ in range(_ITERATIONS):
            share = learned / (variance + learned)
            learned = (kept * noise + share * (share * square + variance)) / (kept + 1.0)
        return max(learned, self.floor), kept + 1.0

    # ------------------------------------------------------------------ any number of rows and outputs

    def judge(self, error: Array, cov: Array, estimate: NoiseEstimate) -> Judgement:
        """Weigh labelled rows, and learn the noise from them.

        Args:
            error: Labels minus predicted means, ``(B, o)``.
            cov: Epistemic covariance of all rows jointly, ``(B o, B o)``.
            estimate: The noise before these labels.

        Raises:
            NotPositiveDefiniteError: The noise covariance is singular.
            UpdateError: An error is too large to be squared, or a covariance is not finite in units of the noise.
        """
        rows, o = error.shape
        own = [cov[b * o : (b + 1) * o, b * o : (b + 1) * o] for b in range(rows)]
        # In units of the noise R is 1, so that W is (S + 1)^-1 and symmetric.
        root = cholesky(estimate.cov)
        whitener = np.linalg.inv(root)
        big = np.kron(np.eye(rows), whitener)
        share, nis = np.empty_like(cov), math.nan
        white, epistemic = error @ whitener.T, big @ cov @ big.T
        if np.isfinite(epistemic).all():
            share = np.linalg.inv(epistemic + np.eye(rows * o))
            nis = float(white.ravel() @ share @ white.ravel())
        if not math.isfinite(nis):
            raise UpdateError(
                f"the update is not finite (NIS {nis}); the posterior is unchanged. Check features and target for huge "
                "values."
            )
        after, used, repairs = estimate, estimate.cov, 0
        if self.learned:
            if self.student is not None:
                for b, block in enumerate(own):
                    square = float(error[b] @ np.linalg.solve(block + estimate.cov, error[b]))
                    white[b] *= math.sqrt(self.student.clip(square))
            learn = self._innovation if self.statistic == "innovation" else self._variational
            learned, labels = learn(white, epistemic, share, estimate.labels)
            raised, repairs = above_floor(root @ learned @ root.T, self.floor)
            after = NoiseEstimate(raised, labels)
            used = estimate.cov if self.statistic == "innovation" else after.cov
        density = self.log_density(error, cov, estimate.cov)
        return Judgement(*self._condition(error, cov, used, own), nis, density, after, repairs)

    def log_density(self, error: Array, cov: Array, noise: Array) -> float:
        """Logarithm of the predictive density of labels: Gaussian with ``S + R``, or Student's t noise on top of ``S``.

        ``R`` is taken for known: where it is learned, that it is uncertain is left out.

        Args:
            error: Labels minus predicted means, ``(B, o)``.
            cov: Epistemic covariance of all rows jointly, ``(B o, B o)``.
            noise: Noise covariance before the labels, ``(o, o)``.
        """
        if self.student is not None:
            return self.student.log_density(error, cov, noise)
        return log_density(error.ravel(), cov + np.kron(np.eye(len(error)), noise))

    def log_density_scalar(self, error: float, variance: float, noise: float) -> float:
        """``log_density`` for one row and one output, in plain floats."""
        if self.student is not None:
            return self.student.scalar_log_density(error, variance, noise)
        return scalar_log_density(error * error / (variance + noise), variance + noise)

    def _condition(self, error: Array, cov: Array, noise: Array, own: list[Array]) -> tuple[Array, Array, float]:
        """``dm``, ``W`` and the average weight of labels whose ordinary noise is ``noise``.

        With the precision ``P = T T'`` and the shift ``h`` of the labels, block-diagonal over the rows, ``W = T`` and
        ``dm = (1 + P S)^-1 h``; nothing but ``1 + T' S T`` is inverted.
        """
        rows, o = error.shape
        if self.student is None:
            whitener = np.linalg.inv(cholesky(noise))
            sites = [Site(whitener.T, whitener.T @ (whitener @ row), 1.0) for row in error]
        else:
            try:
                sites = [self.student.site(error[b], block, noise) for b, block in enumerate(own)]
            except np.linalg.LinAlgError as problem:
                raise UpdateError(_TOO_SMALL) from problem
        root = np.zeros((rows * o, rows * o))
        for b, site in enumerate(sites):
            root[b * o : (b + 1) * o, b * o : (b + 1) * o] = site.root
        shift = np.concatenate([site.shift for site in sites])
        inner = cholesky(np.eye(rows * o) + root.T @ cov @ root)
        factor = np.linalg.solve(inner, root.T).T
        return shift - factor @ (factor.T @ (cov @ shift)), root, sum(site.weight for site in sites) / rows

    def _innovation(self, white: Array, cov: Array, share: Array, labels: float) -> tuple[Array, float]:
        """The estimate after these labels in units of the one before, and its information."""
        rows, o = white.shape
        excess = _second_moment(white, cov, share) - rows * np.eye(o)
        labels = min(labels + float(np.sum(share * share)) / o, self.memory)
        # D is at least -W, summed over the rows, so that this bound keeps the estimate positive definite.
        largest = float(np.linalg.eigvalsh(_own_blocks(share, o))[-1])
        return np.eye(o) + excess / max(labels, largest / _LARGEST_CUT), labels

    def _variational(self, white: Array, cov: Array, share: Array, labels: float) -> tuple[Array, float]:
        """As ``_innovation``."""
        rows, o = white.shape
        kept, learned = self._kept(rows) * labels, np.eye(o)
        for _ in range(_ITERATIONS):
            noise = np.kron(np.eye(rows), learned)
            moment = _second_moment(white, cov, noise @ np.linalg.inv(cov + noise))
            learned = (kept * np.eye(o) + moment) / (kept + rows)
        return learned, kept + rows

    def _kept(self, rows: int) -> float:
        """Share of the information that is kept over ``rows`` labels, so that it settles at ``memory``."""
        return float((1.0 - 1.0 / self.memory) ** rows)


def _second_moment(white: Array, cov: Array, share: Array) -> Array:
    """Second moment of the noise after the update, ``W e e' W' + W S``, summed over the rows, ``(o, o)``."""
    rows, o = white.shape
    residual = (share @ white.ravel()).reshape(rows, o)
    moment: Array = residual.T @ residual + _own_blocks(share @ cov, o)
    return moment


def _own_blocks(matrix: Array, o: int) -> Array:
    """Sum of the diagonal blocks, one a row."""
    rows = len(matrix) // o
    total: Array = np.einsum("bibj->ij", matrix.reshape(rows, o, rows, o))
    return total
