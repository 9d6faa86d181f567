"""One step of Adam for each label, which is then forgotten."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.rivals.base import Layers, Rival, Start


class Adam(Rival):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1) in torch's implementation, with one step a label.

    Args:
        start: Where it starts.
        learning_rate: Step size.
        layers: Whether all layers learn, or the last alone.
    """

    def __init__(self, start: Start, learning_rate: float, layers: Layers = "all") -> None:
        super().__init__(start, layers)
        self.optimiser = torch.optim.Adam(self.weights, lr=learning_rate, fused=True)

    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """See ``Rival``."""
        self.descend(self.loss(self.body(inputs), target))

    def descend(self, loss: Tensor) -> None:
        """One step; a gradient that is not finite never comes into the moments."""
        self.optimiser.zero_grad()
        loss.backward()
        self.check(torch.stack([weight.grad.abs().max() for weight in self.weights if weight.grad is not None]))
        self.optimiser.step()
