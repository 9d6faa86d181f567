"""The extended Kalman filter on the same head: Jacobian at the mean weights instead of moments; a rival.

It has the head's prior and its joint covariance, but linearises the network where the closed form propagates means and
variances, and acts with the network at the mean weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference.acting import ActingView
from kbt_rl.inference.density import scalar_log_density
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.memory import Memory
from kbt_rl.inference.moments import Gaussian
from kbt_rl.inference.record import UpdateInfo

Array = npt.NDArray[Any]


class EKFHead(BayesianHead):
    """A two-layer head with joint covariance and one output that learns by the extended Kalman filter.

    The covariance is held as one full matrix beside the buffers, which keep the prior.
    """

    _full: Array | None = None

    @torch.no_grad()
    def update(self, features: Tensor | Array, target: Tensor | Array) -> UpdateInfo:
        """Condition on one labelled row; see ``BayesianHead.update``."""
        rows, labels = self._checked(features, target)
        if len(rows) != 1 or len(self.spec.shapes) != 2 or self.out_features != 1 or self.spec.structure != "joint":
            raise ValueError("this filter takes one row, two layers, one output and the structure joint")
        if self._full is None:
            self._full = self.state.dense_cov().numpy()
        jacobian, output = self._linearised(rows[0])
        projected = self._full @ jacobian
        epistemic, noise = float(jacobian @ projected), float(self.noise_cov[0, 0])
        predictive = epistemic + noise
        innovation = float(labels[0, 0]) - output
        self.mean += torch.from_numpy(projected * (innovation / predictive))
        self._full -= np.outer(projected, projected / predictive)
        smallest = float(self._full.diagonal().min())
        nis = innovation**2 / predictive
        density = scalar_log_density(nis, predictive)
        return UpdateInfo(abs(innovation), nis, epistemic, predictive, smallest, 1, log_density=density)

    def _moments(self, memory: Memory, features: Tensor, outputs: Array) -> Gaussian:
        """Of the linearised network, under the filter's own covariance."""
        cov = memory.state.dense_cov().numpy() if self._full is None else self._full
        found = [self._linearised(row) for row in self.standardise(features).numpy()]
        mean = np.array([[mean] for _, mean in found]) * outputs
        variance = np.array([[[jacobian @ cov @ jacobian]] for jacobian, _ in found]) * outputs**2
        return Gaussian(torch.from_numpy(mean), torch.from_numpy(variance))

    def _linearised(self, row: Array) -> tuple[Array, float]:
        """Gradient of the output with respect to all weights, ``(P,)``, and the output, both at the mean weights."""
        first, last = (weight.numpy() for weight in self.state.weights)
        inputs = np.append(row, 1.0)
        logits = first @ inputs
        hidden = np.append(np.maximum(logits, 0.0), 1.0)
        slopes = last[0, :-1] * (logits > 0.0)
        return np.concatenate([np.outer(slopes, inputs).ravel(), hidden]), float(last[0] @ hidden)

    def _acting_view(self) -> ActingView:
        """The network at the mean weights: no variance in the hidden units."""
        first, last = (weight.clone() for weight in self.state.weights)
        n, k = first.shape
        return ActingView((first, last), torch.zeros(k * (k + 1) // 2, n, dtype=torch.float64))
