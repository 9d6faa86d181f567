"""Logarithms of Gaussian densities, in nats: what a label's predictive distribution makes of it."""

from __future__ import annotations

import math

import numpy as np

from kbt_rl.inference.types import Array

LOG_TWO_PI = math.log(2.0 * math.pi)


def scalar_log_density(nis: float, variance: float) -> float:
    """Of one number with this positive variance and this squared error in units of the variance."""
    return -0.5 * (nis + math.log(variance) + LOG_TWO_PI)


def log_density(error: Array, cov: Array) -> float:
    """Of a vector ``(r,)``, given as its difference from the mean, with the positive definite covariance ``(r, r)``."""
    root = np.linalg.cholesky(cov)
    white = np.linalg.solve(root, error)
    return -0.5 * (float(white @ white) + len(error) * LOG_TWO_PI) - float(np.log(root.diagonal()).sum())
