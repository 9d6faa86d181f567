"""Warm start: gather labels, train all layers on them, forget them; the baseline of the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.rivals.base import Rival, Start


class WarmStart(Rival):
    """After every ``memory`` labels all layers are trained on these, from where they are, with a fresh Adam.

    Until the first block is full it acts as the plain policy. Source: arXiv:2509.10695, Section V, as in
    ``kbt_rl.agents.warm_start``.

    Args:
        start: Where it starts.
        memory: Labels of a block; the paper tests 10 to 100.
        learning_rate: Step size of Adam.
        steps: Adam steps on a block, all its labels in each.
    """

    def __init__(self, start: Start, memory: int, learning_rate: float, steps: int = 100) -> None:
        super().__init__(start)
        self.memory, self.learning_rate, self.steps = memory, learning_rate, steps
        self._stored: list[tuple[Tensor, Tensor]] = []

    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """See ``Rival``."""
        self._stored.append((inputs, target))
        if len(self._stored) < self.memory:
            return
        block, targets = (torch.cat(parts) for parts in zip(*self._stored, strict=True))
        self._stored = []
        optimiser = torch.optim.Adam(self.weights, lr=self.learning_rate, fused=True)
        for _ in range(self.steps):
            optimiser.zero_grad()
            self.loss(self.body(block), targets).backward()
            optimiser.step()
