"""The buffers of a head as it computes with them: NumPy arrays on their memory on the CPU, tensors elsewhere.

At the size of the paper's head a PyTorch call costs more than its arithmetic, and NumPy's cost a third of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference import compiled
from kbt_rl.inference.acting import acting_view
from kbt_rl.inference.compiled import RowEngine
from kbt_rl.inference.conditioning import NoiseBelief
from kbt_rl.inference.moments import Gaussian
from kbt_rl.inference.noise import NoiseEstimate, NoiseModel
from kbt_rl.inference.output import RULES, OutputRule, measure, replace
from kbt_rl.inference.prior import layer_shapes, prior_cov
from kbt_rl.inference.record import LARGEST, UpdateInfo
from kbt_rl.inference.rows import learn_row, row_step
from kbt_rl.inference.state import HeadSpec, HeadState

Array = npt.NDArray[Any]

# Rows are predicted one by one in machine code, unless they are many and the covariance has more entries than the
# cache holds: then they share the reading of it.
_FEW_ROWS = 16
_CACHED_ENTRIES = 2**18


class Memory:
    """The buffers of a head on their device: the posterior, and the units as arrays (CPU) or tensors.

    Args:
        spec: What of the head never changes.
        cov_names: Names of the covariance's buffers, in order.
        buffers: All buffers of the head.
        rule: How the target conditions the output.
        noise_model: How the noise is judged; None where it is known and Gaussian.
        recorded: Whether the increments of updates are wanted, so that no update goes without making one.
    """

    def __init__(
        self,
        spec: HeadSpec,
        cov_names: tuple[str, ...],
        buffers: Mapping[str, Tensor | None],
        rule: OutputRule,
        noise_model: NoiseModel | None = None,
        recorded: bool = False,
    ) -> None:
        held = {name: buffer for name, buffer in buffers.items() if buffer is not None}
        self.buffers = tuple(held.values())
        self._addresses = tuple(map(Tensor.data_ptr, self.buffers))
        self.state = HeadState(spec, held["mean"], tuple(held[name] for name in cov_names))
        self.device = held["mean"].device
        self.on_cpu = self.device.type == "cpu"
        self.noise_cov = held["noise_cov"]
        names = ("feature_mean", "feature_scale", "target_scale", "labels_seen")
        local = ((held[name].numpy() if self.on_cpu else held[name]) for name in names)
        self.centre: Any
        self.scale: Any
        self.outputs: Any
        self.labels_seen: Any
        self.centre, self.scale, self.outputs, self.labels_seen = local
        self.ones = np.ones_like(self.outputs) if self.on_cpu else torch.ones_like(self.outputs)
        self.noise_model = noise_model
        # The one call that learns a row keeps no increment that a history could take back.
        plain = not recorded and noise_model is None and spec.outputs == 1 and rule.condition in (measure, replace)
        engine = self.state.engine if plain else None
        self._row_engine = engine if engine is not None and engine.propagates else None
        cached = sum(block.numel() for block in self.state.cov) <= _CACHED_ENTRIES
        self._most_rows = math.inf if cached else _FEW_ROWS
        self._replacing = rule.condition is replace
        self._noise: tuple[Any, ...] = tuple(
            held[name].numpy() if self.on_cpu else held[name] for name in ("noise_cov", "noise_labels") if name in held
        )

    def holds(self, buffers: tuple[Tensor | None, ...]) -> bool:
        """Whether these are the buffers, where they were: to send one to another process, PyTorch moves it in place."""
        same = len(buffers) == len(self.buffers) and all(map(is_, self.buffers, buffers))
        return same and tuple(map(Tensor.data_ptr, self.buffers)) == self._addresses

    def learn(self, features: Tensor | Array, target: Tensor | Array) -> UpdateInfo | None:
        """The commonest update, one row with the label of one output; None, and nothing done, for every other.

        Also for what must be refused: who takes the general way then learns why.
        """
        engine = self._row_engine
        if engine is None:
            return None
        rows, labels = self.take(features), self.take(target)
        if rows.shape != (1, len(self.centre)) or labels.shape != (1, 1):
            return None
        row = _for_machine_code(rows[0])
        label, noise = float(labels[0, 0]) / float(self.outputs[0]), float(self._noise[0][0, 0])
        units = self.centre, self.scale, self.labels_seen.reshape(1)
        return learn_row(engine, units, row, label, noise, self._replacing)

    def predict(self, features: Tensor | Array, outputs: Any) -> Gaussian | None:
        """Moments of the logits times ``outputs``, by machine code for rows that it takes one by one; else None."""
        engine = self.state.engine
        if engine is None or not engine.propagates or features.ndim != 2 or features.shape[1] != len(self.centre):
            return None
        if not 0 < len(features) <= self._most_rows:
            return None
        mean, cov = engine.predict(self.centre, self.scale, outputs, self.rows(features))
        return Gaussian(torch.from_numpy(mean), torch.from_numpy(cov))

    def noise_of_target(self) -> Tensor:
        """A copy of the noise covariance in squared target units, ``(o, o)``."""
        outputs, noise = self.outputs, self._noise[0]
        if not self.on_cpu:
            return noise * (outputs.unsqueeze(-1) * outputs)  # type: ignore[no-any-return]
        return torch.from_numpy(noise * (outputs[:, None] * outputs))

    def weights(self) -> Tensor | None:
        """Squared scales of the outputs over their mean, ``(o,)``; None where they are equal."""
        scales = self.outputs.tolist()
        if min(scales) == max(scales):
            return None
        outputs = torch.as_tensor(self.outputs)
        return outputs.square() / outputs.square().mean()

    def belief(self) -> NoiseBelief | None:
        """What is thought of the noise, as a copy; None where it is known and Gaussian."""
        if self.noise_model is None:
            return None
        cov, labels = self._noise[0], self._noise[1] if self.noise_model.learned else math.inf
        return NoiseBelief(self.noise_model, NoiseEstimate(_copy(cov), float(labels)))

    def keep(self, estimate: NoiseEstimate | None) -> None:
        """Store what an update has made of the noise; nothing changes where it is not learned."""
        if estimate is None or self.noise_model is None or not self.noise_model.learned:
            return
        cov, labels = self._noise
        cov[:] = estimate.cov if self.on_cpu else torch.from_numpy(estimate.cov).to(self.device)
        labels[...] = estimate.labels

    def take(self, values: Tensor | Array) -> Any:
        """Values as this memory computes with them, detached, so that nothing is recorded for a gradient.

        Raises:
            TypeError: They are not real numbers: complex, text or objects.
        """
        if not self.on_cpu:
            tensor = torch.as_tensor(values).detach()
            if tensor.is_complex():
                raise TypeError(f"features or target hold {tensor.dtype}; expected real numbers")
            return tensor.to(self.device, torch.float64)
        return as_array(values)

    def rows(self, features: Tensor | Array) -> Array:
        """Features on the CPU as machine code takes them, ``(N, d)``."""
        return _for_machine_code(self.take(features))

    def largest(self, features: Any, target: Any) -> float:
        """Largest magnitude of an entry, or ``LARGEST`` where none is larger; NaN if one is NaN."""
        if self.on_cpu and np.vdot(features, features) + np.vdot(target, target) <= LARGEST * LARGEST:
            return LARGEST  # the usual case
        largest: float = abs(features).max().item() + abs(target).max().item()
        return largest


def _for_machine_code(array: Array) -> Array:
    """A copy, contiguous, writeable and in float64: numba would compile anew, for seconds, for any other kind."""
    return np.array(array, np.float64, order="C")


def as_array(values: Tensor | npt.ArrayLike) -> Array:
    """Values on the CPU, detached, without a copy where that is possible.

    Raises:
        TypeError: They are not real numbers: complex, text or objects; or some of them are masked.
    """
    array: Array
    if isinstance(values, Tensor):
        try:
            array = values.numpy()
        except (TypeError, RuntimeError):  # it needs a gradient, is elsewhere, or has a dtype that NumPy lacks
            values = values.detach().cpu()
            array = (values if values.is_complex() else values.double()).numpy()
    else:
        if isinstance(values, np.ma.MaskedArray):
            raise TypeError(
                "observations, features or target are a masked array, and its mask would be lost; use NaN for no label"
            )
        array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"observations, features or target hold {array.dtype}; expected real numbers")
    # PyTorch knows no longer numbers.
    return array.astype(np.float64) if array.dtype.itemsize > 8 else array


def _copy(cov: Any) -> Array:
    return cov.copy() if isinstance(cov, np.ndarray) else np.array(cov.cpu())


@lru_cache(maxsize=16)
def prepare(structure: str, layers: int, propagates: bool, dtype: torch.dtype) -> None:
    """Load the machine code for heads of this kind (the first time on a machine: compile it), so no update waits.

    Args:
        structure: How the covariance is stored.
        layers: Depth.
        propagates: See ``Engine``; without it there is nothing but the commit.
        dtype: Of the posterior.
    """
    state = _smallest_state(structure, layers, dtype)
    mean, engine = state.mean, state.engine
    if engine is not None:
        zeros = np.zeros(len(mean))
        engine.commit(zeros, zeros[None], np.zeros(1))
    if isinstance(engine, RowEngine) and state.least_quotient:
        engine.gradients(np.zeros((1, 1)))
    units = np.zeros(1), np.ones(1), np.zeros(1, dtype=np.int64)
    if engine is not None and propagates:
        row_step(engine, np.zeros((1, 1)), np.zeros((1, 1)), RULES["measure"], torch.ones(1, 1, dtype=torch.float64))
        engine.predict(*units[:2], np.ones(1), np.zeros((1, 1)))
        engine.learn(units, np.zeros(1), 0.0, 1.0, False)
    if isinstance(engine, RowEngine) and propagates:
        actor = compiled.actor(acting_view(state))
        if actor is not None:
            actor(*units[:2], np.zeros((1, 1)))


@lru_cache(maxsize=16)
def prepare_rows(structure: str, layers: int, propagates: bool, dtype: torch.dtype) -> None:
    """As ``prepare``, for joint updates of several rows."""
    engine = _smallest_state(structure, layers, dtype).engine
    if engine is not None and propagates and engine.takes(2, 1):
        row_step(engine, np.zeros((2, 1)), np.zeros((2, 1)), RULES["measure"], torch.ones(1, 1, dtype=torch.float64))


def _smallest_state(structure: str, layers: int, dtype: torch.dtype) -> HeadState:
    """A posterior of this kind with one feature and one output."""
    shapes = layer_shapes(1, 1, layers, None)
    cov = prior_cov(shapes, structure, hidden_variance=1.0, last_variance=1.0, rho=0.0)
    mean = torch.zeros(sum(shape.size for shape in shapes), dtype=dtype)
    return HeadState(HeadSpec(shapes, structure), mean, tuple(block.to(dtype) for block in cov))
