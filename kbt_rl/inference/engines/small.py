"""Machine code for small dense heads of two layers with one output: one head, or many in one call."""

from __future__ import annotations

import numpy as np
import torch

from kbt_rl.inference.density import scalar_log_density
from kbt_rl.inference.engines.base import Array, Buffers, Engine, float64
from kbt_rl.inference.kind import Kind
from kbt_rl.inference.types import Gaussian, Rows, UpdateInfo


class SmallEngine(Engine):
    """Two layers with one output; learns by ``measure`` with known noise."""

    @staticmethod
    def serves(kind: Kind) -> bool:
        """See ``Engine``."""
        spec = kind.spec
        plain = spec.feature_variance == 0.0 and spec.relu_order == 2 and kind.config.propagation == "moments"
        plain = plain and kind.rule.link == "identity"
        return plain and len(spec.shapes) == 2 and spec.outputs == 1

    @property
    def learns(self) -> bool:
        """Whether it learns too."""
        kind = self.kind
        return kind.config.rule == "measure" and kind.noise_model is None and kind.config.forgetting == "none"

    def bound(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """See ``Engine``; as of a batch of one head."""
        return self.stacked({name: array[None] for name, array in arrays.items()})

    def stacked(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """The arrays of many heads in the shapes that ``kernels.small`` takes."""
        heads, structure = len(arrays["mean"]), self.kind.spec.structure
        last = np.empty((heads, 0, 0)) if structure == "joint" else arrays["cov_1"]
        if structure in ("neuron", "diagonal"):
            last = last.reshape(heads, *last.shape[2:])
        units = np.zeros((self.kind.spec.shapes[0].n, arrays["cov_0"].shape[-1]))
        return arrays | {"last": last, "units": units, "first": np.zeros(1, np.int64), "record": np.empty((1, 4))}

    def learn(self, buffers: Buffers, features: Rows, target: Rows) -> UpdateInfo | None:
        """See ``Engine``."""
        if not self.learns:
            return None
        found, row, label = self.arrays(buffers), self.row(features), float64(target)
        if found is None or row is None or label is None or label.shape != (1, 1):
            return None
        labels, records = label[:, 0] / found["target_scale"][:, 0], found["record"]
        self.learn_many(found, found["first"], row[None], labels, found["noise_cov"][:, 0, 0], True, records)
        return None if records[0, 3] == 0.0 else record_of(labels[0], records[0])

    def learn_many(
        self, found: dict[str, Array], heads: Array, rows: Array, labels: Array, noise: Array, change: bool, out: Array
    ) -> None:
        """See ``kernels.small.learn_dense``."""
        code = self.code.small
        dense = self.kind.spec.structure in ("joint", "layer")
        (code.learn_dense if dense else code.learn_neurons)(
            found["mean"], found["cov_0"], found["last"], found["feature_mean"], found["feature_scale"], heads, rows,
            labels, noise, change, found["labels_seen"], out, found["units"],
        )  # fmt: skip

    def predict(self, buffers: Buffers, features: Rows, variances: bool = True) -> Gaussian | None:
        """See ``Engine``."""
        found, rows = self.arrays(buffers), self.rows(features)
        return None if found is None or rows is None else self.predict_many(found, rows, variances)

    def predict_many(self, found: dict[str, Array], rows: Array, variances: bool) -> Gaussian:
        """See ``kernels.small.predict_dense``; covariances ``(R, 1, 1)``."""
        code = self.code.small
        dense = self.kind.spec.structure in ("joint", "layer")
        mean, variance = np.empty(len(rows)), np.empty(len(rows))
        (code.predict_dense if dense else code.predict_neurons)(
            found["mean"], found["cov_0"], found["last"], found["feature_mean"], found["feature_scale"], rows,
            variances, mean, variance,
        )  # fmt: skip
        return Gaussian(torch.from_numpy(mean[:, None]), torch.from_numpy(variance[:, None, None]))


class BatchEngine(SmallEngine):
    """``SmallEngine`` for the stacked memory of many heads."""

    def bound(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """See ``Engine``."""
        return self.stacked(arrays)

    def learn_heads(
        self, buffers: Buffers, heads: Array, features: Rows, target: Rows, together: bool
    ) -> tuple[Array, Array] | None:
        """Update ``heads`` ``(R,)`` on their rows; with ``together`` all or none.

        Returns:
            Labels ``(H,)`` in the heads' units, and a record of each ``(R, 4)``, see ``kernels.small``; None if there
            is no machine code for this, and nothing done.
        """
        found, rows, labels = self.arrays(buffers), float64(features), float64(target)
        if not self.learns or found is None or rows is None or labels is None:
            return None
        own = labels[:, 0] / found["target_scale"][:, 0]
        noise, records = found["noise_cov"][:, 0, 0].copy(), np.empty((len(heads), 4))
        if together:
            self.learn_many(found, heads, rows, own, noise, False, records)
            if not records[:, 3].all():
                return own, records
        self.learn_many(found, heads, rows, own, noise, True, records)
        return own, records

    def predict_heads(self, buffers: Buffers, features: Rows, variances: bool = True) -> Gaussian | None:
        """Of ``R / H`` successive rows a head."""
        found, rows = self.arrays(buffers), float64(features)
        return None if found is None or rows is None else self.predict_many(found, rows, variances)


def record_of(label: float, record: Array) -> UpdateInfo:
    """The record of an update by ``kernels.small``."""
    mean, epistemic, predictive, _ = record.tolist()
    error = float(label) - mean
    nis = error * error / predictive
    return UpdateInfo(abs(error), nis, epistemic, predictive, 1, 1.0, scalar_log_density(nis, predictive))
