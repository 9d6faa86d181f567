"""Means with their intervals: the bootstrap of all studies, and Wilson's interval for shares near 0 and 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import trim_mean

RESAMPLES = 2_000
#: Half the width of a central 95 % interval of a Gaussian, in standard deviations.
Z95 = 1.959964
_SEED = 20_240
_PERCENTILES = (2.5, 97.5)


class Estimate(NamedTuple):
    """A mean over trials, or over the middle half of them, its 95 % interval, and the extremes of single trials."""

    mean: float
    lower: float
    upper: float
    minimum: float
    maximum: float
    trials: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and its 95 % interval by a percentile bootstrap over trials, always with the same resamples.

    Raises:
        ValueError: There are no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("there are no values to take the mean of")
    drawn = np.random.default_rng(_SEED).integers(len(array), size=(RESAMPLES, len(array)))
    lower, upper = np.percentile(array[drawn].mean(axis=1), _PERCENTILES)
    return Estimate(float(array.mean()), float(lower), float(upper), float(array.min()), float(array.max()), len(array))


def interquartile(groups: Sequence[Sequence[float]]) -> Estimate:
    """Mean of the middle half of all values, with a 95 % interval by a bootstrap that resamples each group by itself.

    Agarwal et al., Deep reinforcement learning at the edge of the statistical precipice, 2021; a group is a task.

    Raises:
        ValueError: A group has no values.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if not arrays or not all(array.size for array in arrays):
        raise ValueError("there are no values to take the mean of")
    rng = np.random.default_rng(_SEED)
    drawn = [array[rng.integers(len(array), size=(RESAMPLES, len(array)))] for array in arrays]
    lower, upper = np.percentile(trim_mean(np.concatenate(drawn, axis=1), 0.25, axis=1), _PERCENTILES)
    every = np.concatenate(arrays)
    middle = float(trim_mean(every, 0.25))
    return Estimate(middle, float(lower), float(upper), float(every.min()), float(every.max()), len(every))


def wilson(share: float, trials: int) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, Probable inference, 1927); it does not collapse at 0 and 1."""
    weight = Z95**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = Z95 * np.sqrt(share * (1 - share) / trials + weight / trials / 4) / (1 + weight)
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def largest_drop(points: Iterable[tuple[int, float]], after: int = 50) -> float:
    """Largest fall of a curve ``(labels, value)`` below its running maximum at any point after ``after`` labels."""
    best, drop = -np.inf, 0.0
    for labels, value in points:
        best = max(best, value)
        if labels > after:
            drop = max(drop, best - value)
    return drop
