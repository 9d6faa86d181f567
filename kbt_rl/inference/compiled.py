"""Rows through a head to learn, act and predict, in machine code: ``kernels``, from three layers on ``kernels.deep``.

They go one by one, but for joint updates of several rows (``kernels.rows``, one or two layers). numba is an extra
(``pip install "kbt_rl[fast]"``). Without it, and for uncertain features or another device, the same is done the general
way through PyTorch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch.autograd.graph import increment_version

from kbt_rl.inference.record import kept
from kbt_rl.inference.triangle import neurons_per_row

if TYPE_CHECKING:
    from types import ModuleType

    from kbt_rl.inference.acting import ActingView
    from kbt_rl.inference.kernels.terms import MeasureRecord, RowPass, ScalarRecord
    from kbt_rl.inference.state import HeadState

Array = npt.NDArray[Any]
# Mean and scale of the features, (d,) each, and the counter of labels, (1,).
Units = tuple[Array, Array, Array]
# A covariance with more entries, 16 MB, has no form of its own for predictions: a head of some 2,000 weights.
_LARGEST_FORM = 2**21
_NOTHING, _NO_COUPLING = np.empty((0, 0)), np.empty((0, 0, 0))
_NO_UNITS = (_NOTHING,) * 4
# Of more labels at a time a matrix library makes shorter work.
_MOST_LABELS = 128


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


class Engine(ABC):
    """Machine code bound to the memory of one posterior; one of the two below.

    Attributes:
        propagates: Whether all of it serves this head, ``learn`` if it has one output; ``commit`` always does.
    """

    def __init__(self, state: HeadState, code: ModuleType) -> None:
        layers, cov = len(state.spec.shapes), [block.numpy() for block in state.cov]
        self._code = self._step_code = code
        self._counter, self._kept = state.mean, kept(state.mean.dtype)
        shapes = tuple((*shape, neurons_per_row(shape)) for shape in state.spec.shapes)
        # Empty blocks of the posterior's dtype too, so that the same machine code serves ``layer`` and ``joint``.
        between = self._between(cov[layers:], np.empty((0, 0), cov[0].dtype))
        self._posterior = (state.mean.numpy(), tuple(cov[:layers]), cov[0], between, shapes)
        self.propagates = state.spec.plain_moments

    @abstractmethod
    def _between(self, blocks: list[Array], none: Array) -> Any:
        """The covariances between layers as the machine code takes them; ``none`` where there are none."""

    def takes(self, rows: int, outputs: int) -> bool:
        """Whether ``propagate`` is the shortest way to a joint update of so many rows."""
        return self.propagates and rows * outputs <= _MOST_LABELS

    @abstractmethod
    def propagate(self, features: Array) -> RowPass:
        """The forward pass of rows ``(B, d)``, float64, jointly, see ``kernels.terms.RowsPass``."""

    @abstractmethod
    def predict(self, centre: Array, scale: Array, outputs: Array, rows: Array) -> tuple[Array, Array]:
        """Mean ``(N, o)`` and covariance ``(N, o, o)`` of the output for rows ``(N, d)``, float64, one by one.

        Args:
            centre: Mean of the features, ``(d,)``.
            scale: Their scale, ``(d,)``.
            outputs: What the outputs are multiplied by, ``(o,)``.
            rows: As they come from the encoder.
        """

    @abstractmethod
    def learn(self, units: Units, features: Array, label: float, noise: float, replacing: bool) -> ScalarRecord:
        """A whole update on one row and one label, in the head's ``units``, see ``kernels.learn``."""

    def measure(
        self, row: RowPass, target: Array, noise_cov: Array, weights: Array, lost: float
    ) -> tuple[Array, MeasureRecord] | None:
        """Step of the weights ``(P,)`` and record of ``kernels.rows.measure``, which uses ``row`` up, or None."""
        from kbt_rl.inference.kernels import rows

        moved = np.empty(len(row[3]))
        with plain_interrupts:
            done, record = rows.measure(row, target, noise_cov, weights, self._kept, lost, moved)
        return (moved, record) if done else None

    def weight_step(
        self, row: RowPass, mean_step: Array, factor: Array, signs: Array
    ) -> tuple[Array, Array, float, float]:
        """See ``kernels.weight_step``."""
        _, _, cross, variances = row
        step: tuple[Array, Array, float, float]
        with plain_interrupts:
            step = self._step_code.weight_step(cross, variances, mean_step, factor, signs, self._kept)
        return step

    def commit(self, moved: Array, moves: Array, signs: Array) -> None:
        """``mean += moved``, ``Sigma += V diag(signs) V'`` for ``V'`` of shape ``(q, P)``, not to be interrupted."""
        self._change(self._code.commit, moved, moves, signs)

    def _change(self, code: Callable[..., Any], *arguments: Any) -> Any:
        # Whoever caches what follows from the posterior watches this counter, which NumPy does not move. Before, so
        # that an interrupt cannot leave a new posterior with the old number; after, for those in another thread.
        increment_version(self._counter)
        with plain_interrupts:
            result = code(*self._posterior, *arguments)
        increment_version(self._counter)
        return result


class RowEngine(Engine):
    """For heads of one or two layers."""

    def __init__(self, state: HeadState, code: ModuleType) -> None:
        super().__init__(state, code)
        spec = state.spec
        self._least, self._outputs = state.least_quotient, spec.outputs
        columns = len(state.mean) if spec.structure == "joint" else spec.shapes[0].size
        two_dense = spec.structure in ("joint", "layer") and len(spec.shapes) == 2
        self._workspace = np.empty((spec.shapes[0].n, columns) if two_dense and spec.outputs > 1 else (0, 0))
        self._has_form = two_dense and sum(block.numel() for block in state.cov) <= _LARGEST_FORM
        self._form = _NOTHING
        self._form_version = -1

    def _between(self, blocks: list[Array], none: Array) -> Array:
        return blocks[0] if blocks else none

    def propagate(self, features: Array) -> RowPass:
        """See ``Engine``."""
        result: RowPass
        if len(features) == 1:
            with plain_interrupts:
                result = self._code.propagate(*self._posterior, self._workspace, features[0], self._outputs)
            return result
        from kbt_rl.inference.kernels import rows

        inputs, moments = self._units_of(features)
        with plain_interrupts:
            result = rows.propagate(*self._posterior, inputs, moments, self._outputs)
        return result

    def gradients(self, features: Array) -> Array:
        """Derivatives of the mean outputs of rows ``(B, d)`` by the weights, ``(B o, P)``, see ``resolution``."""
        mean, _, _, _, shapes = self._posterior
        inputs, moments = self._units_of(features)
        found: Array
        with plain_interrupts:
            found = self._code.gradients(mean, shapes, inputs, moments, self._outputs)
        return found

    def _units_of(self, features: Array) -> tuple[Array, Any]:
        """``[z; 1]`` of each row, and the moments of the hidden units if there are any."""
        mean, _, first, _, shapes = self._posterior
        inputs = np.ones((len(features), features.shape[1] + 1))
        inputs[:, :-1] = features
        with plain_interrupts:
            return inputs, self._code.unit_moments(mean, first, shapes, inputs) if len(shapes) == 2 else _NO_UNITS

    def predict(self, centre: Array, scale: Array, outputs: Array, rows: Array) -> tuple[Array, Array]:
        """See ``Engine``.

        A dense covariance is halved to what predictions need of it, once after each change of the posterior. That
        takes as long as one forward pass, and a prediction by it a quarter.
        """
        moments: tuple[Array, Array]
        with plain_interrupts:
            if self._has_form and self._form_version != self._counter._version:
                (n, k, per_row), _ = self._posterior[-1]
                if not self._form.size:
                    self._form = np.empty((n * (n + 1) // 2, k * (k + 1) // 2))
                self._form_version = -1
                self._code.pair_form(self._posterior[2], n, k, per_row, self._form)
                self._form_version = self._counter._version
            moments = self._code.predict(*self._posterior, self._workspace, self._form, centre, scale, outputs, rows)
        return moments

    def acting_form(self) -> tuple[Array, Array, Array, Array]:
        """See ``kernels.acting_form``."""
        form: tuple[Array, Array, Array, Array]
        with plain_interrupts:
            form = self._code.acting_form(*self._posterior)
        return form

    def learn(self, units: Units, features: Array, label: float, noise: float, replacing: bool) -> ScalarRecord:
        """See ``Engine``."""
        record: ScalarRecord = self._change(
            self._code.learn, self._workspace, *units, features, label, noise, replacing, self._kept, self._least
        )
        return record


class DeepEngine(Engine):
    """For heads of three layers or more, in float64; of several rows a joint update goes the general way."""

    def __init__(self, state: HeadState, code: ModuleType) -> None:
        from kbt_rl.inference.kernels import deep

        super().__init__(state, code)
        self._code = deep

    def _between(self, blocks: list[Array], none: Array) -> tuple[Array, ...]:
        return tuple(blocks) or (none,)

    def takes(self, rows: int, outputs: int) -> bool:
        """See ``Engine``."""
        return rows == 1 and super().takes(rows, outputs)

    def propagate(self, features: Array) -> RowPass:
        """See ``Engine``, for one row."""
        result: RowPass
        (row,) = features
        with plain_interrupts:
            result = self._code.propagate(*self._posterior, row)
        return result

    def predict(self, centre: Array, scale: Array, outputs: Array, rows: Array) -> tuple[Array, Array]:
        """See ``Engine``."""
        moments: tuple[Array, Array]
        with plain_interrupts:
            moments = self._code.predict(*self._posterior, centre, scale, outputs, rows)
        return moments

    def learn(self, units: Units, features: Array, label: float, noise: float, replacing: bool) -> ScalarRecord:
        """See ``Engine``."""
        record: ScalarRecord = self._change(self._code.learn, *units, features, label, noise, replacing, self._kept)
        return record


class RowActor:
    """``acting.view_mean`` of a two-layer view for rows one by one, in machine code."""

    def __init__(self, view: ActingView, code: ModuleType) -> None:
        assert view.hidden_form is not None
        coupling = _NO_COUPLING if view.coupling is None else view.coupling.numpy()
        self._code = code
        self._view = (*(weight.numpy() for weight in view.weights), view.hidden_form.numpy(), coupling)

    def __call__(self, centre: Array, scale: Array, rows: Array) -> Array:
        """Mean logits ``(N, o)`` for features ``(N, d)`` as they come from the encoder, whose units are given."""
        means: Array
        with plain_interrupts:
            means = self._code.act(*self._view, centre, scale, rows)
        return means


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


plain_interrupts = _PlainInterrupts()


def actor(view: ActingView) -> RowActor | None:
    """Machine code that acts by a view on the CPU, or None where there is none for it."""
    if view.hidden_form is None or view.feature_part is not None or view.hidden_form.device.type != "cpu":
        return None
    code = kernels()
    return None if code is None else RowActor(view, code)


def engine(state: HeadState) -> Engine | None:
    """The engine of a posterior, or None where there is no machine code for it."""
    code, layers = kernels(), len(state.spec.shapes)
    if code is None or state.mean.device.type != "cpu" or layers == 0:
        return None
    return RowEngine(state, code) if layers <= 2 else DeepEngine(state, code)
