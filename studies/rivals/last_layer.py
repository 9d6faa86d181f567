"""What the closed forms for the last layer share: its inputs, and a mean and a spread for each output."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from studies.rivals.base import DivergedError, Rival, Start

FloatArray = npt.NDArray[np.float64]


def measured(
    mean: FloatArray, spread: FloatArray, features: FloatArray, label: float, noise: float
) -> tuple[FloatArray, FloatArray]:
    """Mean and covariance of Gaussian weights after a label with noise of this variance (Sherman and Morrison)."""
    projected = spread @ features
    gain = projected / (noise + features @ projected)
    return mean + gain * (label - mean @ features), spread - np.outer(gain, projected)


class LastLayer(Rival):
    """A closed form for weights and bias of the last layer, each output on its own, in NumPy and float64.

    Labels are in units of the outputs. Features are the last hidden layer as it is, and a one for the bias.

    Args:
        start: Where it starts.
        variance: Of each weight at the start.
        diagonal: Whether the spread is a diagonal.

    Attributes:
        mean: ``(o, d + 1)``, bias last, in units.
        spread: Of each output's weights: a matrix ``(d + 1, d + 1)`` or a diagonal ``(d + 1,)``.
    """

    def __init__(self, start: Start, variance: float, diagonal: bool = False) -> None:
        super().__init__(start, "last")
        layer = torch.cat([self.last.weight, self.last.bias.unsqueeze(1)], dim=1).detach().double().numpy()
        outputs, size = layer.shape
        self.mean: FloatArray = layer / self.units.double().numpy().T
        first = np.full(size, variance) if diagonal else variance * np.eye(size)
        self.spread: list[FloatArray] = [first.copy() for _ in range(outputs)]

    @abstractmethod
    def conditioned(
        self, mean: FloatArray, spread: FloatArray, features: FloatArray, label: float
    ) -> tuple[FloatArray, FloatArray]:
        """Mean ``(d + 1,)`` and spread of one output, given its label and the features ``(d + 1,)``."""

    @np.errstate(over="ignore", invalid="ignore")
    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """See ``Rival``."""
        units = self.units.double().numpy()
        features = np.append(self.hidden(inputs).double().numpy(), 1.0)
        labels = (target.double().numpy() / units)[0]
        mean, spread = self.mean.copy(), list(self.spread)
        for output in np.flatnonzero(~np.isnan(labels)):
            mean[output], new = self.conditioned(mean[output], spread[output], features, float(labels[output]))
            if not np.isfinite(new if new.ndim == 1 else new.diagonal()).all():
                raise DivergedError
            spread[output] = new
        layer = torch.from_numpy(mean * units.T).float()
        self.put(torch.cat([layer[:, :-1].flatten(), layer[:, -1]]))
        self.mean, self.spread = mean, spread
