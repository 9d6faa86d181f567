"""Experience replay: each step of Adam sees the new label and some earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.rivals.adam import Adam
from studies.rivals.base import Layers, Start


class Replay(Adam):
    """One step of Adam for each label, on it and ``replayed`` earlier labels, drawn with replacement from all of them.

    Args:
        start: Where it starts.
        learning_rate: Step size.
        replayed: Earlier labels in a step.
        layers: Whether all layers learn, or the last alone.
        seed: Of the draws.
    """

    def __init__(
        self, start: Start, learning_rate: float, replayed: int = 20, layers: Layers = "all", seed: int = 0
    ) -> None:
        super().__init__(start, learning_rate, layers)
        self.replayed, self._generator = replayed, torch.Generator().manual_seed(seed)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """See ``Rival``."""
        rows = [(inputs, target)]
        if self._seen:
            drawn = torch.randint(len(self._seen), (self.replayed,), generator=self._generator)
            rows += [self._seen[index] for index in drawn.tolist()]
        self._seen.append((inputs, target))
        batch, targets = (torch.cat(parts) for parts in zip(*rows, strict=True))
        self.descend(self.loss(self.body(batch), targets))
