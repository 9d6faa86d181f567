"""Assumed density filtering of the last layer, the rule of probabilistic backpropagation."""

from __future__ import annotations

from studies.rivals.base import Start
from studies.rivals.last_layer import FloatArray, LastLayer


class AssumedDensityFilter(LastLayer):
    """A Gaussian for each weight of the last layer, matched to each label (Hernandez-Lobato and Adams 2015).

    ``m <- m + v dlogZ/dm`` and ``v <- v - v^2 ((dlogZ/dm)^2 - 2 dlogZ/dv)`` with ``Z = N(y | m'x, v'x^2 + noise)``, as
    ``do_ADF_update`` of https://github.com/HIPS/Probabilistic-Backpropagation has them. The noise is fixed here, not
    inferred.

    Args:
        start: Where it starts.
        prior_variance: ``v`` at the start.
        noise_variance: Of the labels; both in squared units, and only their ratio counts for the actions.
    """

    def __init__(self, start: Start, prior_variance: float, noise_variance: float) -> None:
        super().__init__(start, prior_variance, diagonal=True)
        self.noise_variance = noise_variance

    def conditioned(
        self, mean: FloatArray, spread: FloatArray, features: FloatArray, label: float
    ) -> tuple[FloatArray, FloatArray]:
        """See ``LastLayer``."""
        error, variance = label - mean @ features, spread @ features**2 + self.noise_variance
        by_mean = error / variance * features
        by_variance = 0.5 * (error**2 / variance - 1.0) / variance * features**2
        return mean + spread * by_mean, spread - spread**2 * (by_mean**2 - 2.0 * by_variance)
