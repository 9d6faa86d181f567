"""The commonest update, one row through a head of one or two layers, by the functions of ``kernels``.

numba is an extra (``pip install "kbt_rl[fast]"``). Without it, and for several rows, deeper heads, uncertain features
or another device, the same update goes the general way through PyTorch.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch.autograd.graph import increment_version

from kbt_rl.inference.triangle import neurons_per_row

if TYPE_CHECKING:
    from types import ModuleType

    from kbt_rl.inference.kernels import RowPass
    from kbt_rl.inference.update import HeadState

Array = npt.NDArray[Any]
_NOTHING = np.empty((0, 0))


@lru_cache(maxsize=1)
def kernels() -> ModuleType | None:
    """The machine code, or None without numba or with its ``NUMBA_DISABLE_JIT``."""
    if find_spec("numba") is None:
        return None
    import numba

    if numba.config.DISABLE_JIT:
        return None
    from kbt_rl.inference import kernels as module

    return module


class RowEngine:
    """Machine code bound to the memory of one posterior, for one row at a time.

    Attributes:
        propagates: Whether ``propagate`` serves this head; ``commit`` serves every head of one or two layers.
    """

    def __init__(self, state: HeadState, code: ModuleType) -> None:
        spec = state.spec
        layers = len(spec.shapes)
        self._code, self._outputs, self._counter = code, spec.outputs, state.mean
        self._mean, cov = state.mean.numpy(), [block.numpy() for block in state.cov]
        self._layers = tuple(cov[:layers])
        self._between = cov[layers] if len(cov) > layers else _NOTHING
        self._dense = spec.structure in ("joint", "layer")
        self._shapes = tuple((*shape, neurons_per_row(shape)) for shape in spec.shapes)
        columns = state.mean.shape[0] if spec.structure == "joint" else spec.shapes[0].size
        two_dense = self._dense and layers == 2
        self._workspace = np.empty((spec.shapes[0].n, columns) if two_dense else (0, 0))
        self.propagates = spec.relu_order == 2 and spec.feature_variance == 0.0

    def propagate(self, features: Array) -> RowPass:
        """The forward pass of one row ``(d,)``, float64, see ``kernels.RowPass``."""
        code, o, mean, layers = self._code, self._outputs, self._mean, self._layers
        result: RowPass
        with _plain_interrupts:
            if not self._dense:
                forward = code.linear_neurons if len(layers) == 1 else code.two_layers_neurons
                result = forward(mean, *layers, features, o)
            elif len(layers) == 1:
                result = code.linear_dense(mean, *layers, features, o, self._shapes[0][2])
            else:
                per_row = self._shapes[0][2], self._shapes[1][2]
                result = code.two_layers_dense(mean, *layers, self._between, features, o, *per_row, self._workspace)
        return result

    def weight_step(
        self, row: RowPass, mean_step: Array, factor: Array, signs: Array, kept: float
    ) -> tuple[Array, Array, float, float]:
        """See ``kernels.weight_step``."""
        _, _, cross, variances = row
        step: tuple[Array, Array, float, float]
        with _plain_interrupts:
            step = self._code.weight_step(cross, variances, mean_step, factor, signs, kept)
        return step

    def scalar_step(
        self, row: RowPass, target: float, noise: float, replacing: bool, kept: float
    ) -> tuple[float, float, float, Array, Array, float, float]:
        """See ``kernels.scalar_step``."""
        step: tuple[float, float, float, Array, Array, float, float]
        with _plain_interrupts:
            step = self._code.scalar_step(row, target, noise, replacing, kept)
        return step

    def commit(self, moved: Array, moves: Array, signs: Array) -> None:
        """``mean += moved``, ``Sigma += V diag(signs) V'`` for ``V'`` of shape ``(q, P)``, not to be interrupted."""
        # Whoever caches what follows from the posterior watches this counter, which NumPy does not move. Before, so
        # that an interrupt cannot leave a new posterior with the old number; after, for those in another thread.
        increment_version(self._counter)
        with _plain_interrupts:
            if self._dense:
                self._code.commit_dense(self._mean, self._layers, self._between, moved, moves, signs, self._shapes)
            else:
                self._code.commit_neurons(self._mean, self._layers, moved, moves, signs)
        increment_version(self._counter)


class _PlainInterrupts:
    """Raises what a signal handler raised; numba's call comes back with it inside one or more SystemErrors."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        cause = error
        while isinstance(cause, SystemError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if cause is not None and cause is not error:
            raise cause from None


_plain_interrupts = _PlainInterrupts()


def engine(state: HeadState) -> RowEngine | None:
    """The engine of a posterior, or None where there is no machine code for it."""
    if state.mean.device.type != "cpu" or not 1 <= len(state.spec.shapes) <= 2:
        return None
    code = kernels()
    return None if code is None else RowEngine(state, code)
