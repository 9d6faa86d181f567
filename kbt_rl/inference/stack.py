"""The memory of many heads of one kind as stacked arrays, and the machine code that goes through them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from operator import is_
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kbt_rl.inference.batch_record import BatchInfo
from kbt_rl.inference.compiled import RowEngine, plain_interrupts
from kbt_rl.inference.output import replace
from kbt_rl.inference.pool import share
from kbt_rl.inference.posterior import Posterior
from kbt_rl.inference.record import kept
from kbt_rl.inference.stacked_buffers import StackedBuffers
from kbt_rl.inference.triangle import neurons_per_row

Array = npt.NDArray[Any]
_TAKE_AT_ONCE, _NONE = np.empty((0, 0)), np.empty(0, dtype=np.int64)


class Plan(NamedTuple):
    """Steps of ``heads`` ``(R,)`` that ``commit`` takes, ``(R, 2 P + 1)``, and which heads were not refused."""

    heads: Array
    steps: Array
    done: Array


class HeadStack:
    """The buffers of heads one after another; each head goes on with tensors on its part of this memory.

    A tensor of its own for each part, not a view of a common one, so that a change of one head moves the version
    counters of that head only, and copying or saving one takes no other along.

    Args:
        heads: Of one kind, with machine code (see ``serves``).
        code: The machine code.
        lock_of_all: Takes the place of each head's own.

    Attributes:
        replaced, handed_out: See ``stacked_buffers.Watcher``. A cache of what follows from a posterior is told by the
            version counter of its mean. To move a thousand counters that nobody can watch takes as long as a hundred
            updates, so those of means that were never handed out stay.
    """

    def __init__(self, heads: Sequence[Posterior], code: ModuleType, lock_of_all: threading.RLock) -> None:
        head, self._code, self._heads = heads[0], code, tuple(heads)
        self.replaced = self._gone_through = object()
        self.handed_out: dict[int, Tensor] = {}
        self._tensors: list[tuple[Tensor, ...]] = []
        self._kept, self._least = kept(head.mean.dtype), head.state.least_quotient
        names = tuple(head._buffers)
        with ExitStack() as held:
            for lock in {id(each._lock): each._lock for each in heads}.values():
                held.enter_context(lock)
            # A buffer that is made in inference mode could never be changed outside of it.
            held.enter_context(torch.inference_mode(False))
            self._arrays = {
                name: np.stack([each._buffers[name].numpy() for each in heads])  # type: ignore[union-attr]
                for name in names
            }
            for index, each in enumerate(heads):
                for name, array in self._arrays.items():
                    each._buffers[name] = torch.from_numpy(array[index, ...])
                buffers = StackedBuffers(each._buffers, self, index)
                each._buffers = buffers
                each._lock = lock_of_all
                self._tensors.append(tuple(dict.values(buffers)))
        spec, means = head.spec, self._arrays["mean"]
        layers, weights = len(spec.shapes), means.shape[1]
        covs = tuple(self._arrays[name] for name in head._cov_names)
        between = covs[layers] if len(covs) > layers else np.empty((len(heads), 0, 0), means.dtype)
        shapes = tuple((*shape, neurons_per_row(shape)) for shape in spec.shapes)
        self._posterior = means, covs[:layers], between, shapes
        self._neurons = spec.structure in ("neuron", "diagonal") and layers == 2 and spec.outputs == 1
        two_dense = spec.structure in ("joint", "layer") and layers == 2
        columns = weights if spec.structure == "joint" else spec.shapes[0].size
        self._workspace_shape = (spec.shapes[0].n, columns) if two_dense and spec.outputs > 1 else (0, 0)
        self._outputs = spec.outputs
        self._units = self._arrays["feature_mean"], self._arrays["feature_scale"]
        self._labels_seen, self._replacing = self._arrays["labels_seen"], head.rule.condition is replace

    @staticmethod
    def serves(heads: Sequence[Posterior]) -> bool:
        """Whether there is machine code for heads of this kind; a history needs each head's own increments."""
        engine = heads[0].state.engine
        ready = isinstance(engine, RowEngine) and engine.propagates and heads[0]._history is None
        return ready and all(head.mean.device.type == "cpu" for head in heads)

    def __getitem__(self, name: str) -> Array:
        """The buffers of this name, ``(H, ...)``."""
        return self._arrays[name]

    def holds(self, heads: tuple[Posterior, ...]) -> bool:
        """Whether these are the heads, and all their buffers still on this memory.

        A head that gets another buffer says so, see ``StackedBuffers``; then all are gone through, as that may be one
        that it has had before.
        """
        if heads != self._heads or self._moved():  # modules are equal if they are the same
            return False
        replaced = self.replaced
        if replaced is not self._gone_through:
            for head, tensors in zip(heads, self._tensors, strict=True):
                found = tuple(dict.values(head._buffers))
                if len(found) != len(tensors) or not all(map(is_, found, tensors)):
                    return False
            self._gone_through = replaced  # not what another thread may have replaced meanwhile
        return True

    def _moved(self) -> bool:
        """Whether a head's mean is elsewhere: to send it to another process, PyTorch moves a tensor in place.

        Only what somebody has got can be moved, and those who send a head send all of it.
        """
        if not self.handed_out:
            return False
        known, means = dict(self.handed_out), self._arrays["mean"]
        found = np.fromiter(map(Tensor.data_ptr, known.values()), np.int64, len(known))
        expected = means.ctypes.data + means.strides[0] * np.fromiter(known, np.int64, len(known))
        return not np.array_equal(found, expected)

    def means(self, features: Array, threads: int) -> Array:
        """Mean logits ``(H, o)`` for one row a head."""
        rows = _float64(features)
        out = np.empty((len(rows), self._outputs))
        every = np.arange(len(self._heads))
        _share(
            threads, lambda part: self._code.means_many(*self._posterior, *self._units, every[part], rows, out), every
        )
        return out

    def moments(self, features: Array, threads: int) -> tuple[Array, Array]:
        """Mean ``(R, o)`` and covariance ``(R, o, o)`` of the logits for ``R / H`` successive rows a head."""
        rows, outputs = _float64(features), self._outputs
        mean, cov = np.empty((len(rows), outputs)), np.empty((len(rows), outputs, outputs))
        every = np.arange(len(self._heads))

        def predict(part: slice) -> None:
            size = self._workspace_shape
            self._code.moments_many(*self._posterior, size, *self._units, every[part], rows, mean, cov)

        _share(threads, predict, every)
        return mean, cov

    def learn(self, heads: Array, features: Array, target: Array, info: BatchInfo, threads: int) -> Array:
        """Update ``heads`` ``(R,)`` on their rows of ``(H, d)`` and ``(H, 1)``; returns those that are refused."""
        done = self._learn(heads, features, target, info, threads, _TAKE_AT_ONCE)
        return _NONE if done is None else heads[~done]

    def plan(self, heads: Array, features: Array, target: Array, info: BatchInfo, threads: int) -> Plan:
        """What ``learn`` would do, for ``commit``; changes nothing but the record."""
        steps = np.empty((len(heads), 2 * self._posterior[0].shape[1] + 1))
        done = self._learn(heads, features, target, info, threads, steps)
        if done is None:
            return Plan(heads, steps, np.ones(len(heads), dtype=np.bool_))
        return Plan(heads[done], steps[done], done)

    def commit(self, plan: Plan, threads: int) -> None:
        """Take the steps of a plan; nothing must have changed the posteriors in between."""

        def take(part: slice) -> None:
            own = plan.heads[part], plan.steps[part]
            self._code.commit_many(*self._posterior, self._labels_seen, *own)

        self._change(threads, take, plan.heads)

    def _learn(
        self, heads: Array, features: Array, target: Array, info: BatchInfo, threads: int, steps: Array
    ) -> npt.NDArray[np.bool_] | None:
        """Which were not refused, ``(R,)``; None if all were not, as they mostly are."""
        rows, records = _float64(features), np.empty((len(heads), 4))
        labels = _float64(target)[:, 0] / self["target_scale"][:, 0]
        noises = self["noise_cov"][:, 0, 0].copy()

        means, covs, _, _ = self._posterior

        def learn(part: slice) -> None:
            if self._neurons:
                self._code.learn_neurons(
                    means, *covs, *self._units, self._labels_seen, heads[part], rows, labels, noises,
                    self._replacing, self._kept, self._least, steps[part], records[part],
                )  # fmt: skip
            else:
                self._code.learn_many(
                    *self._posterior, self._workspace_shape, *self._units, self._labels_seen, heads[part], rows, labels,
                    noises, self._replacing, self._kept, self._least, steps[part], records[part],
                )  # fmt: skip

        if len(steps):
            _share(threads, learn, heads)
        else:
            self._change(threads, learn, heads)
        learned = self._code.enter_records(
            heads, records, labels, noises, info.innovation, info.nis, info.epistemic_variance,
            info.predictive_variance, info.smallest_variance, info.labels, info.label_weight, info.log_density,
        )  # fmt: skip
        return None if learned == len(heads) else records[:, 3] == 1.0

    def _change(self, threads: int, call: Callable[[slice], None], heads: Array) -> None:
        if self.handed_out:
            # Before, see ``Engine``; not once more after, for whoever caches what follows from a posterior does so
            # under the lock, which the batch holds.
            known = dict(self.handed_out)
            increment_version([known[i] for i in heads.tolist() if i in known])
        _share(threads, call, heads)


def _share(threads: int, call: Callable[[slice], None], items: Array) -> None:
    """Call with all items, or with a part of them in each of several threads."""
    with plain_interrupts:
        if threads == 1 or len(items) < threads:
            call(slice(None))
        else:
            bounds = [len(items) * part // threads for part in range(threads + 1)]
            share(call, list(map(slice, bounds[:-1], bounds[1:])), threads)


def _float64(values: Array) -> Array:
    """As they are or, where numba would compile anew for their kind, a copy."""
    return np.require(values, np.float64, ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE", "ENSUREARRAY"])
