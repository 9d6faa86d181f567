"""Machine code for one layer with independent outputs and known noise."""

from __future__ import annotations

import math

import numpy as np
import torch

from kbt_rl.inference.engines.base import Array, Buffers, Engine, float64
from kbt_rl.inference.kind import Kind
from kbt_rl.inference.types import Gaussian, Rows, UpdateInfo

_NO_ROOTS = np.empty((0, 0, 0))


class OutputsEngine(Engine):
    """One layer with independent outputs and known noise: ``shared`` and ``neuron``, rule ``measure``."""

    @staticmethod
    def serves(kind: Kind) -> bool:
        """See ``Engine``."""
        one_layer = len(kind.spec.shapes) == 1 and kind.spec.feature_variance == 0.0
        return one_layer and kind.spec.structure in ("shared", "neuron") and kind.rule.link == "identity"

    def bound(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """See ``Engine``."""
        shape, scale = self.kind.spec.shapes[0], arrays["target_scale"]
        group = arrays["cov_1"] if self.kind.spec.structure == "shared" else np.arange(shape.n)
        square = scale * scale
        return arrays | {
            "weights": arrays["mean"].reshape(shape),
            "group": group,
            "shares": square / square.mean(),
            "seen": arrays["labels_seen"].reshape(1),
        }

    def learn(self, buffers: Buffers, features: Rows, target: Rows) -> UpdateInfo | None:
        """See ``Engine``."""
        kind = self.kind
        if kind.config.rule != "measure" or kind.noise_model is not None or kind.config.forgetting != "none":
            return None
        found, row, label = self.arrays(buffers), self.row(features), float64(target)
        if found is None or row is None or label is None or label.shape != (1, kind.out_features):
            return None
        noise = found["noise_cov"].diagonal().copy()
        if kind.out_features > 1 and np.count_nonzero(found["noise_cov"]) > np.count_nonzero(noise):
            return None  # correlated noise
        record = np.empty(6)
        done = self.code.outputs.learn(
            found["weights"], found["cov_0"], found["group"], found["feature_mean"], found["feature_scale"],
            found["target_scale"], found["shares"], noise, row, label[0], kind.spec.largest_deviation, found["seen"],
            record,
        )  # fmt: skip
        if not done:
            return None
        square, nis, epistemic, predictive, density, labels = record.tolist()
        return UpdateInfo(math.sqrt(square), nis, epistemic, predictive, int(labels), 1.0, density)

    def predict(self, buffers: Buffers, features: Rows, variances: bool = True) -> Gaussian | None:
        """See ``Engine``."""
        found, rows = self.arrays(buffers), self.rows(features)
        if found is None or rows is None or (variances and self.kind.spec.in_noise_units):
            return None
        mean, variance = np.empty((len(rows), self.kind.out_features)), np.empty((len(rows), self.kind.out_features))
        roots = found["cov_0"] if variances else _NO_ROOTS
        self.code.outputs.predict(
            found["weights"], roots, found["group"], found["feature_mean"], found["feature_scale"], rows, mean, variance
        )
        return Gaussian(torch.from_numpy(mean), torch.from_numpy(variance))
