"""Machine code for one layer under several label noises: all models and their evidence in one call."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kbt_rl.inference.engines.base import Array, Buffers, float64
from kbt_rl.inference.engines.outputs import OutputsEngine
from kbt_rl.inference.types import Rows, UpdateInfo


class AverageEngine(OutputsEngine):
    """``OutputsEngine`` for the head of a ``ModelAverage``, whose own buffers it binds too."""

    def run_once(self, buffers: Buffers, row: Array, target: Array) -> None:
        """See ``Engine``; what the head itself runs is ready before."""
        one = torch.ones(1, dtype=torch.float64)
        evidence = {"log_shares": one, "misfit": one[None], "dof": one, "last": one}
        self.learn_all({**buffers, **evidence}, row, target, np.ones((1, 1)), 1.0, 1.0)
        self.layer({**buffers, **evidence})

    def layer(self, buffers: Buffers) -> tuple[Tensor, Tensor] | None:
        """Weight ``(o, d)`` and bias ``(o,)`` of the mixture's mean, see ``ModelAverage._layer``; or None."""
        found = self.arrays(buffers)
        if found is None:
            return None
        weight, bias = np.empty((len(found["dof"]), self.kind.in_features)), np.empty(len(found["dof"]))
        self.code.average.layer(
            found["weights"], found["log_shares"], found["target_scale"], found["feature_mean"],
            found["feature_scale"], weight, bias,
        )  # fmt: skip
        return torch.from_numpy(weight), torch.from_numpy(bias)

    def learn_all(
        self, buffers: Buffers, features: Rows, target: Rows, ratios: Array, spread: float, first: float
    ) -> UpdateInfo | None:
        """A whole update of a ``ModelAverage``, or None and nothing done.

        Args:
            buffers: Of the head and of the average.
            features: ``(B, d)``.
            target: ``(B, o)``, see ``ModelAverage.update``.
            ratios: Of each model, ``(m, 1)``.
            spread: See ``ModelAverage.reset``.
            first: See ``ModelAverage``.
        """
        found, row, label = self.arrays(buffers), self.row(features), float64(target)
        if found is None or row is None or label is None or label.shape != (1, len(found["dof"])):
            return None
        record = np.empty(7)
        done = self.code.average.learn(
            found["weights"], found["cov_0"], found["group"], found["feature_mean"], found["feature_scale"],
            found["target_scale"], found["noise_cov"].diagonal().copy(), ratios, found["log_shares"], found["misfit"],
            found["dof"], found["last"], row, label[0], self.kind.spec.largest_deviation, spread, first, found["seen"],
            record,
        )  # fmt: skip
        if not done:
            return None
        square, nis, epistemic, predictive, density, dof, labels = record.tolist()
        return UpdateInfo(math.sqrt(square), nis, epistemic, predictive, int(labels), log_density=density, dof=dof)
