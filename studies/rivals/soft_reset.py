"""Soft parameter reset: drift towards the trained weights, as far as the new label asks for, then a gradient step."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.rivals.base import Layers, Rival, Start


class SoftReset(Rival):
    """SGD after a drift ``gamma`` for each weight matrix and bias (Galashov et al. 2024, arXiv:2411.04034).

    With the trained weights ``theta0``, the prior deviation ``sigma0`` and ``s`` the deviation of the posterior in
    units of it, the weights before a label are ``N(m, v)``: ``m = gamma theta + (1 - gamma) theta0`` and ``v = sigma0^2
    (gamma^2 s^2 + 1 - gamma^2)``, an Ornstein-Uhlenbeck step. From ``gamma = 1``, which is no drift, one step ``gamma
    <- gamma + eta d log E[p(y)] / d gamma`` on Monte-Carlo samples, cut to [0, 1]; then ``theta <- m - alpha (gamma^2 +
    (1 - gamma^2) / s^2) grad L(m)``. The loss is taken for ``-log p``.

    Note:
        Abstract, introduction and figure captions of the paper were read, its numbered equations could not be. These
        are derived from the model that it describes; the step size is in proportion to ``v``, ``alpha`` at no drift.

    Args:
        start: Where it starts.
        learning_rate: ``alpha``.
        drift_rate: ``eta``.
        deviation: ``sigma0``.
        ratio: ``s``, at most 1.
        samples: Of the weights, for the predictive likelihood.
        layers: Whether all layers learn, or the last alone.
        seed: Of the samples.
    """

    def __init__(
        self,
        start: Start,
        learning_rate: float,
        drift_rate: float,
        deviation: float = 0.01,
        ratio: float = 0.5,
        samples: int = 1,
        layers: Layers = "all",
        seed: int = 0,
    ) -> None:
        super().__init__(start, layers)
        self.learning_rate, self.drift_rate = learning_rate, drift_rate
        self.deviation, self.ratio, self.samples = deviation, ratio, samples
        self.initial = self.vector()
        self._sizes = [weight.numel() for weight in self.weights]
        self._generator = torch.Generator().manual_seed(seed)

    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """See ``Rival``."""
        weights = self.vector()
        drift = (1.0 + self.drift_rate * self.slopes(weights, inputs, target)).clamp(0.0, 1.0)
        gamma = drift.repeat_interleave(torch.tensor(self._sizes))
        mean = gamma * weights + (1.0 - gamma) * self.initial
        rate = self.learning_rate * (gamma.square() + (1.0 - gamma.square()) / self.ratio**2)
        self.put(mean)
        self.put(mean - rate * self.gradient(inputs, target))

    def slopes(self, weights: Tensor, inputs: Tensor, target: Tensor) -> Tensor:
        """Of the log predictive likelihood by each ``gamma``, at 1."""
        losses, slopes = [], []
        for _ in range(self.samples):
            noise = self.deviation * torch.randn(len(weights), generator=self._generator)
            self.put(weights + self.ratio * noise)
            losses.append(self.loss(self.body(inputs), target))
            gradient = torch.cat([part.flatten() for part in torch.autograd.grad(losses[-1], self.weights)])
            moved = weights - self.initial + noise * (self.ratio**2 - 1.0) / self.ratio  # d sample / d gamma
            slopes.append(torch.stack([part.sum() for part in (-gradient * moved).split(self._sizes)]))
        return torch.stack(losses).detach().neg().softmax(0) @ torch.stack(slopes)
