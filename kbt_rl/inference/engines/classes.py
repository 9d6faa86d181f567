"""Machine code for one softmax layer of independent classes."""

from __future__ import annotations

import math

import numpy as np
import torch

from kbt_rl.inference import checks
from kbt_rl.inference.engines.base import Array, Buffers, Engine, float64
from kbt_rl.inference.kind import Kind
from kbt_rl.inference.types import Gaussian, Rows, UpdateInfo

_NO_BASIS = np.empty((0, 0))


class ClassesEngine(Engine):
    """One softmax layer of independent classes, rules ``laplace`` and ``fisher``."""

    @staticmethod
    def serves(kind: Kind) -> bool:
        """See ``Engine``."""
        one_layer = len(kind.spec.shapes) == 1 and kind.spec.feature_variance == 0.0
        independent = kind.spec.structure in ("neuron", "diagonal", "rotated")
        return one_layer and independent and kind.config.rule in ("laplace", "fisher")

    def bound(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """See ``Engine``."""
        basis = arrays.get("feature_basis", _NO_BASIS)
        return arrays | {
            "weights": arrays["mean"].reshape(self.kind.spec.shapes[0]),
            "basis": basis,
            "seen": arrays["labels_seen"].reshape(1),
        }

    def learn(self, buffers: Buffers, features: Rows, target: Rows) -> UpdateInfo | None:
        """See ``Engine``."""
        config, drift = self.kind.config, 0.0
        if config.forgetting != "none":
            if config.forgetting != "process_noise" or self.kind.spec.structure == "neuron":
                return None
            drift = config.forgetting_rate * self.kind.last_variance(buffers)
        found, row, label = self.arrays(buffers), self.row(features), self._distribution(target)
        if found is None or row is None or label is None:
            return None
        record = np.empty(5)
        done = self.code.classes.learn(
            found["weights"], found["cov_0"], found["feature_mean"], found["feature_scale"], found["basis"], row, label,
            config.rule == "laplace", config.active_probability, drift, found["seen"], record,
        )  # fmt: skip
        if not done:
            return None
        square, nis, epistemic, density, ratio = record.tolist()
        noise = float(found["noise_cov"][0, 0])
        return UpdateInfo(
            math.sqrt(square), nis, epistemic, epistemic + noise, len(label), 1.0, density, log_ratio=ratio
        )

    def predict(self, buffers: Buffers, features: Rows, variances: bool = True) -> Gaussian | None:
        """See ``Engine``."""
        found, rows = self.arrays(buffers), self.rows(features)
        if found is None or rows is None:
            return None
        mean, variance = np.empty((len(rows), self.kind.out_features)), np.empty((len(rows), self.kind.out_features))
        cov = found["cov_0"] if variances else np.empty((0,) * found["cov_0"].ndim)
        self.code.classes.predict(
            found["weights"], cov, found["feature_mean"], found["feature_scale"], found["basis"], rows, mean, variance
        )
        return Gaussian(torch.from_numpy(mean), torch.from_numpy(variance))

    def _distribution(self, target: Rows) -> Array | None:
        """The target of one row as a distribution, or None."""
        found, classes = float64(target), self.kind.out_features
        if found is None:
            return None
        if found.shape == (1,) and checks.is_whole(target):
            if not 0 <= found[0] < classes:
                return None
            label = np.zeros(classes)
            label[int(found[0])] = 1.0
            return label
        if found.shape != (1, classes) or not (found >= 0.0).all() or abs(found.sum() - 1.0) > 1e-12:
            return None
        row: Array = found[0]
        return row
