"""Machine code bound to a head: the named fast paths, and which heads they serve.

An engine answers None for whatever it does not do, and for all that must be refused: the definition then does it, or
says why not.
"""

from __future__ import annotations

import math
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from operator import is_
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference import checks
from kbt_rl.inference.config import StructureName
from kbt_rl.inference.density import scalar_log_density
from kbt_rl.inference.kind import Kind
from kbt_rl.inference.machine_code import kernels
from kbt_rl.inference.types import Gaussian, Rows, UpdateInfo

Array = npt.NDArray[Any]
Buffers = Mapping[str, Any]

_NO_BASIS, _NO_ROOTS = np.empty((0, 0)), np.empty((0, 0, 0))


class Engine(ABC):
    """Machine code for heads of one kind, on the memory of one head.

    Args:
        kind: Of the head.
        code: The kernels.
    """

    def __init__(self, kind: Kind, code: Any) -> None:
        self.kind, self.code = kind, code
        self._buffers: tuple[Tensor, ...] = ()
        self._addresses: tuple[int, ...] = ()
        self._arrays: dict[str, Array] = {}

    @staticmethod
    @abstractmethod
    def serves(kind: Kind) -> bool:
        """Whether there is machine code for heads of this kind."""

    @abstractmethod
    def learn(self, buffers: Buffers, features: Rows, target: Rows) -> UpdateInfo | None:
        """A whole update, or None and nothing done."""

    @abstractmethod
    def predict(self, buffers: Buffers, features: Rows, variances: bool = True) -> Gaussian | None:
        """Mean ``(N, o)`` of the outputs for rows ``(N, d)``, and their variances ``(N, o)`` or covariances."""

    def arrays(self, buffers: Buffers) -> dict[str, Array] | None:
        """The buffers as arrays, bound anew when one was replaced or moved; None on another device.

        To send a tensor to another process, PyTorch moves it in place.
        """
        held = tuple(buffers.values())
        same = len(held) == len(self._buffers) and all(map(is_, held, self._buffers))
        if not same or tuple(map(Tensor.data_ptr, held)) != self._addresses:
            if any(buffer.device.type != "cpu" or not buffer.is_contiguous() for buffer in held):
                return None
            self._buffers, self._addresses = held, tuple(map(Tensor.data_ptr, held))
            self._arrays = self.bound({name: buffer.detach().numpy() for name, buffer in buffers.items()})
        return self._arrays

    def bound(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """The arrays in the shapes that the machine code takes."""
        return arrays

    def row(self, features: Rows) -> Array | None:
        """One row ``(d,)`` of features, or None."""
        found = _float64(features)
        return None if found is None or found.shape != (1, self.kind.in_features) else found[0]

    def rows(self, features: Rows) -> Array | None:
        """Rows ``(N, d)`` of features, or None."""
        found = _float64(features)
        return found if found is not None and found.ndim == 2 and found.shape[1] == self.kind.in_features else None


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
        found, row, label = self.arrays(buffers), self.row(features), _float64(target)
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
        found, classes = _float64(target), self.kind.out_features
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
        found, row, label = self.arrays(buffers), self.row(features), _float64(target)
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
        found, rows, labels = self.arrays(buffers), _float64(features), _float64(target)
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
        found, rows = self.arrays(buffers), _float64(features)
        return None if found is None or rows is None else self.predict_many(found, rows, variances)


def record_of(label: float, record: Array) -> UpdateInfo:
    """The record of an update by ``kernels.small``."""
    mean, epistemic, predictive, _ = record.tolist()
    error = float(label) - mean
    nis = error * error / predictive
    return UpdateInfo(abs(error), nis, epistemic, predictive, 1, 1.0, scalar_log_density(nis, predictive))


ENGINES: tuple[type[Engine], ...] = (OutputsEngine, ClassesEngine, SmallEngine)


def engine_for(kind: Kind) -> Engine | None:
    """Machine code for a head, compiled if this machine does not have it yet; None where there is none."""
    # No generator that is left before its end: Python drops a signal whose handler raises while it closes one.
    serving = [engine for engine in ENGINES if engine.serves(kind)]
    if not serving or kernels() is None:
        return None
    _prepare(serving[0], kind)
    return serving[0](kind, kernels())


def batch_engine_for(kind: Kind) -> BatchEngine | None:
    """Machine code for many heads in one call, or None."""
    if not SmallEngine.serves(kind) or kernels() is None:
        return None
    _prepare(SmallEngine, kind)
    return BatchEngine(kind, kernels())


_prepared: set[tuple[Any, ...]] = set()


def _prepare(engine: type[Engine], kind: Kind) -> None:
    """Load the machine code of heads of this kind, so that no update waits; the first time on a machine: compile it."""
    config = replace(kind.config, width=None, structure=cast(StructureName, kind.spec.structure))
    tiny = type(kind).of(1, 2 if kind.rule.link == "softmax" else 1, config)
    key = (engine, tiny.spec.structure, config.rule, config.noise, config.robust_dof is None)
    if key in _prepared:
        return
    _prepared.add(key)
    tried, row = engine(tiny, kernels()), np.zeros((1, 1))
    target, buffers = np.full((1, tiny.out_features), 1.0 / tiny.out_features), tiny.tensors()
    with _said_if_long():
        tried.predict(buffers, row)
        tried.predict(buffers, row, False)
        tried.learn(buffers, row, target)


@contextmanager
def _said_if_long() -> Iterator[None]:
    """A line on stderr if what follows takes more than three seconds, as the first compilation on a machine does."""

    def say() -> None:
        print(
            "kbt_rl: preparing machine code for this kind of head; compiled the first time on a machine, some 10 s",
            file=sys.stderr,
        )

    timer = threading.Timer(3.0, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _float64(values: Rows) -> Array | None:
    """Real numbers as a C-contiguous, writeable float64 array, for which numba has compiled; None for anything else."""
    if type(values) is np.ndarray and values.dtype == np.float64 and values.flags.carray:
        return values
    if isinstance(values, Tensor):
        if values.device.type != "cpu" or values.is_complex():
            return None
        values = values.detach()
        array = values.numpy() if values.dtype == torch.float64 else values.double().numpy()
    elif type(values) is np.ndarray and values.dtype.kind in "fiu":
        array = values
    else:
        return None
    return np.require(array, np.float64, ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE", "ENSUREARRAY"])
