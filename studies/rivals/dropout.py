"""Monte-Carlo dropout: Adam with dropout before the last layer, acting by the mean network."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.rivals.adam import Adam
from studies.rivals.base import Layers, Start


class Dropout(Adam):
    """One step of Adam for each label, with some units of the last hidden layer left out (Gal and Ghahramani 2016).

    The source is arXiv:1506.02142. The units that stay are scaled by ``1 / (1 - probability)``, as torch's dropout
    does, so that the mean network, which acts, is the network itself.

    Args:
        start: Where it starts.
        learning_rate: Step size.
        probability: Of a unit to be left out.
        layers: Whether all layers learn, or the last alone.
        seed: Of the units.
    """

    def __init__(
        self, start: Start, learning_rate: float, probability: float, layers: Layers = "all", seed: int = 0
    ) -> None:
        super().__init__(start, learning_rate, layers)
        self.probability, self._generator = probability, torch.Generator().manual_seed(seed)

    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """See ``Rival``."""
        hidden = self.hidden(inputs)
        kept = torch.rand(hidden.shape, generator=self._generator) >= self.probability
        self.descend(self.loss(self.last(hidden * kept / (1.0 - self.probability)), target))
