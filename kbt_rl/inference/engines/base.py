"""Machine code bound to a head: the named fast paths, and which heads they serve.

An engine answers None for whatever it does not do, and for all that must be refused: the definition then does it, or
says why not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference.kind import Kind
from kbt_rl.inference.types import Gaussian, Rows, UpdateInfo

Array = npt.NDArray[Any]
Buffers = Mapping[str, Any]


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

    def run_once(self, buffers: Buffers, row: Array, target: Array) -> None:
        """Run all machine code, which is compiled or loaded by its first call."""
        self.predict(buffers, row)
        self.predict(buffers, row, False)
        self.learn(buffers, row, target)

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
        found = float64(features)
        return None if found is None or found.shape != (1, self.kind.in_features) else found[0]

    def rows(self, features: Rows) -> Array | None:
        """Rows ``(N, d)`` of features, or None."""
        found = float64(features)
        return found if found is not None and found.ndim == 2 and found.shape[1] == self.kind.in_features else None


def float64(values: Rows) -> Array | None:
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
