"""Stochastic gradient Langevin dynamics: gradient steps with as much noise as samples of a posterior have."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.rivals.base import Layers, Rival, Start


class Langevin(Rival):
    """``theta <- theta + eps / 2 grad log p + N(0, eps T)`` (Welling and Teh 2011), acting by the newest sample.

    In "Bayesian Learning via Stochastic Gradient Langevin Dynamics" ``T = 1``. With a temperature it is
    ``overdamped_langevin`` of blackjax (``sgmcmc/diffusions.py``) at the step size ``eps / 2``. Here ``-log p`` is the
    loss of the newest label alone: the prior is flat, and no label counts for those that are gone.

    Args:
        start: Where it starts.
        learning_rate: ``eps``, constant.
        temperature: ``T``; 0 is gradient descent.
        layers: Whether all layers learn, or the last alone.
        seed: Of the noise.
    """

    def __init__(
        self, start: Start, learning_rate: float, temperature: float, layers: Layers = "all", seed: int = 0
    ) -> None:
        super().__init__(start, layers)
        self.learning_rate, self.temperature = learning_rate, temperature
        self._generator = torch.Generator().manual_seed(seed)

    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """See ``Rival``."""
        weights = self.vector()
        noise = torch.randn(len(weights), generator=self._generator)
        step = -0.5 * self.learning_rate * self.gradient(inputs, target)
        self.put(weights + step + (self.learning_rate * self.temperature) ** 0.5 * noise)
