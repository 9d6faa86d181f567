"""SWAG: gradient descent, acting by the mean of all its iterates."""

from __future__ import annotations

from torch import Tensor

from studies.rivals.base import Layers, Rival, Start


class SWAG(Rival):
    """A step of SGD for each label, and ``mean <- (n mean + theta) / (n + 1)`` (Maddox et al. 2019, arXiv:1902.02476).

    As ``collect_model`` of https://github.com/wjmaddox/swa_gaussian, after every step; the trained weights count as the
    first iterate. The covariance, which decides no action, is not kept.

    Args:
        start: Where it starts.
        learning_rate: Of SGD.
        layers: Whether all layers learn, or the last alone.
    """

    def __init__(self, start: Start, learning_rate: float, layers: Layers = "all") -> None:
        super().__init__(start, layers)
        self.learning_rate, self.collected = learning_rate, 1
        self.iterate = self.mean = self.vector()

    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """See ``Rival``."""
        self.put(self.iterate)
        iterate = self.iterate - self.learning_rate * self.gradient(inputs, target)
        self.check(iterate)
        mean = (self.collected * self.mean + iterate) / (self.collected + 1)
        self.put(mean)
        self.iterate, self.mean, self.collected = iterate, mean, self.collected + 1
