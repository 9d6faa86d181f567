"""Bayesian gradient descent: a Gaussian over each weight, whose variance is the weight's learning rate."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.rivals.base import Layers, Rival, Start


class BayesianGradientDescent(Rival):
    """One step of BGD for each label (Zeno et al. 2018, arXiv:1803.10123), acting by the means.

    With ``theta = mu + eps sigma``, ``g`` the gradient of the loss at ``theta`` and means ``E`` over the samples:
    ``mu <- mu - eta sigma^2 E[g]``, ``sigma <- sigma sqrt(1 + (sigma E[g eps] / 2)^2) - sigma^2 E[g eps] / 2``, as
    the authors' ``bgd_optimizer.py`` has them (https://github.com/igolan/bgd). The loss is taken for ``-log p``.

    Args:
        start: Where it starts.
        deviation: ``sigma`` of all weights at the start.
        mean_rate: ``eta``.
        samples: Monte-Carlo samples; the authors' default is 10.
        layers: Whether all layers learn, or the last alone.
        seed: Of the samples.
    """

    def __init__(
        self,
        start: Start,
        deviation: float,
        mean_rate: float = 1.0,
        samples: int = 3,
        layers: Layers = "all",
        seed: int = 0,
    ) -> None:
        super().__init__(start, layers)
        self.mean, self.mean_rate, self.samples = self.vector(), mean_rate, samples
        self.deviation = torch.full_like(self.mean, deviation)
        self._generator = torch.Generator().manual_seed(seed)

    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """See ``Rival``."""
        gradient, product = torch.zeros_like(self.mean), torch.zeros_like(self.mean)  # E[g], E[g eps]
        for _ in range(self.samples):
            noise = torch.randn(len(self.mean), generator=self._generator)
            self.put(self.mean + self.deviation * noise)
            found = self.gradient(inputs, target) / self.samples
            gradient += found
            product += found * noise
        half = 0.5 * self.deviation * product
        deviation = self.deviation * ((1.0 + half.square()).sqrt() - half)
        mean = self.mean - self.mean_rate * self.deviation.square() * gradient
        self.check(deviation)
        self.put(mean)
        self.mean, self.deviation = mean, deviation
