"""Recursive least squares of the last layer with exponential forgetting."""

from __future__ import annotations

from studies.rivals.base import Start
from studies.rivals.last_layer import FloatArray, LastLayer, measured


class RecursiveLeastSquares(LastLayer):
    """The exponentially weighted RLS algorithm (Haykin, Adaptive Filter Theory), for ``lambda`` the forgetting factor.

    ``k = P u / (lambda + u' P u)``, ``xi = d - w' u``, ``w <- w + k xi``, ``P <- (P - k u' P) / lambda``. The same
    recursion was read at https://en.wikipedia.org/wiki/Recursive_least_squares_filter.

    Args:
        start: Where it starts: ``w`` is the trained layer.
        forgetting: ``lambda``, at most 1; labels count ``1 / (1 - lambda)`` steps long.
        delta: ``P = delta I`` at the start, the prior variance over that of the noise. Haykin's delta is its inverse.
    """

    def __init__(self, start: Start, forgetting: float, delta: float) -> None:
        super().__init__(start, delta)
        self.forgetting = forgetting

    def conditioned(
        self, mean: FloatArray, spread: FloatArray, features: FloatArray, label: float
    ) -> tuple[FloatArray, FloatArray]:
        """See ``LastLayer``."""
        new, left = measured(mean, spread, features, label, self.forgetting)
        return new, left / self.forgetting
