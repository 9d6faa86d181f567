"""What the models of the noise share: settings, and covariances that float64 can hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from kbt_rl.inference.errors import NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.types import Array

# Largest variance of a learned noise over its smallest that leaves the smaller one three digits.
_MOST_APART = 1e13


class NoiseSettings(Protocol):
    """Of a ``HeadConfig``, what says how its noise is judged."""

    @property
    def noise(self) -> str:
        """A name of ``NOISES``."""

    @property
    def noise_statistic(self) -> str:
        """One of ``STATISTICS``."""

    @property
    def noise_memory(self) -> float:
        """Labels over which a learned noise averages."""

    @property
    def noise_floor(self) -> float:
        """Smallest variance that is learned."""

    @property
    def robust_dof(self) -> float | None:
        """Degrees of freedom of Student's t noise; None for Gaussian noise."""


@contextmanager
def huge_values_refused() -> Iterator[None]:
    """What leaves the range of float64 while labels are judged becomes NaN, which is refused, or an UpdateError.

    Warnings about it would say less, and are errors where warnings are.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            yield
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise UpdateError(
            "the update is not finite where the noise is judged; the posterior is unchanged. Check features and target "
            "for huge values."
        ) from error


def cholesky(cov: Array) -> Array:
    """The lower root of a noise covariance.

    Raises:
        NotPositiveDefiniteError: It is singular.
    """
    try:
        return np.asarray(np.linalg.cholesky(cov), dtype=np.float64)
    except np.linalg.LinAlgError as error:
        raise NotPositiveDefiniteError("label noise covariance", float(np.linalg.eigvalsh(cov)[0])) from error


def above_floor(cov: Array, floor: float) -> tuple[Array, int]:
    """The covariance, made symmetric, with no variance in any direction below the floor, and the repairs of it.

    After a wild label one direction may be so much noisier than another that float64 does not hold both. The smallest
    variance is then raised to what it can hold, which trusts labels less, never more, and is counted.
    """
    cov = 0.5 * (cov + cov.T)
    values, vectors = np.linalg.eigh(cov)
    resolved = values[-1] / _MOST_APART
    if values[0] >= max(floor, resolved):
        return cov, 0
    raised = (vectors * np.maximum(values, max(floor, resolved))) @ vectors.T
    symmetric: Array = 0.5 * (raised + raised.T)
    return symmetric, int(max(values[0], floor) < resolved)
