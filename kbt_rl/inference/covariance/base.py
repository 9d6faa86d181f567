"""What the update asks of a covariance, whatever form it is stored in.

A structure never shows the covariance to anybody. It projects Jacobians: for units ``u`` of the network with the
Jacobian ``J = dE[u] / d weights``, it makes ``Sigma^(1/2) J'`` in a form of its own, from which ``J Sigma J'`` and
``Cov(w, u) = Sigma J'`` follow. And it takes measurements of the outputs, in the form of moves that are computed first
and applied afterwards.

A new structure can start from ``stored.Stored``, which derives everything from ``dense`` and ``store``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.types import HeadState, Jacobian, LayerShape

Cov = tuple[Tensor, ...]


class PriorLayer(NamedTuple):
    """The prior of one layer: ``n`` independent neurons, each with the covariance ``root' root`` of its ``k`` weights.

    ``root`` is lower triangular, ``(k, k)``.
    """

    n: int
    root: Tensor


class Replacement(NamedTuple):
    """A move that replaces the stored covariance, for structures and rules without a smaller one."""

    before: Cov
    after: Cov


class Structure(ABC):
    """How the covariance of the weights is stored. Stateless; ``state.cov`` holds the tensors."""

    #: Whether it stores one covariance for each output of a single layer, so that many outputs cost little.
    independent_outputs = False

    @abstractmethod
    def from_prior(self, layers: Sequence[PriorLayer]) -> Cov:
        """What is stored for a prior; new tensors, float64."""

    def from_variances(self, variances: Tensor, rank: int) -> Cov:
        """What is stored for independent weights of any module, variances ``(P,)``; ``rank`` is for ``low_rank``."""
        return self.from_prior([PriorLayer(1, variances.sqrt().diag())])

    def project(self, state: HeadState, jacobian: Jacobian) -> Any:
        """``Sigma^(1/2) J'`` for the units of a Jacobian, in a form of this structure's own."""
        raise self._unsuited(state)

    def gram(self, projected: Any) -> Tensor:
        """``J Sigma J'`` of what ``project`` has made, ``(..., B m, B m)``."""
        raise ValueError(f"{type(self).__name__} projects nothing whose products could be asked for; use 'joint'")

    def covariance(self, state: HeadState, jacobian: Jacobian) -> Tensor:
        """``J Sigma J'`` where nothing else is wanted: of hidden units, which are many."""
        return self.gram(self.project(state, jacobian))

    def unit_blocks(self, state: HeadState, layer: int, inputs: Tensor) -> Tensor:
        """Covariance of a layer's logits between rows ``z~`` of ``(..., B, k)``, ``(..., n, B, B)``.

        Only where neurons are independent, ``independent_outputs``.
        """
        raise self._unsuited(state)

    def coupling(self, state: HeadState, jacobian: Jacobian, layer: int) -> Tensor | None:
        """``Cov(w, u)`` for the weights of another layer, ``(..., n k, B m)``; None where layers are independent."""
        return None

    def input_part(self, state: HeadState, layer: int, input_cov: Tensor, rows: int, apart: bool = False) -> Tensor:
        """``trace(Sigma_jl C_cb)`` for neurons j, l and rows b, c, ``(..., B n, B n)``; Eq. (20).

        Args:
            state: The posterior.
            layer: Which.
            input_cov: ``Cov(z)`` of all rows without the constant 1, ``(..., B (k-1), B (k-1))``; with ``apart``
                ``(..., k-1, B, B)``.
            rows: B.
            apart: Whether the inputs are independent of each other; only for a structure with ``unit_blocks``.
        """
        raise self._unsuited(state)

    def cross(self, state: HeadState, projected: Any, step: Tensor) -> Tensor:
        """``Cov(w, u) step`` for a step ``(r,)`` of all outputs, ``(P,)``."""
        raise self._unsuited(state)

    def measured(self, state: HeadState, projected: Any, directions: Tensor, rest: Tensor) -> Any:
        """The move by a measurement of ``directions' u``; changes nothing.

        Args:
            state: The posterior.
            projected: See ``project``; of the outputs, without leading dimensions.
            directions: ``W``, ``(r, q)``.
            rest: The part of the measurements' covariance that does not come from the weights to first order: label
                noise and what linearisation leaves out, ``(q, q)``.

        Raises:
            UpdateError: There is no proper covariance after it.
        """
        raise self._unsuited(state)

    @staticmethod
    def _unsuited(state: HeadState) -> ValueError:
        return ValueError(
            f"the structure {state.spec.structure!r} cannot be asked this: it is for "
            "another network, noise or rule (see HeadConfig.structure); use 'joint'"
        )

    def replaced(self, state: HeadState, projected: Any, factor: Tensor, signs: Tensor) -> Any:
        """The move ``Sigma += X F diag(signs) F' X'`` with ``X = Cov(w, u)``, for rules that are not Bayes' rule.

        Raises:
            UpdateError: The result would not be a covariance.
        """
        raise UpdateError(f"the structure {state.spec.structure!r} takes measurements only, by Bayes' rule")

    def output_variances(self, state: HeadState, inputs: Tensor) -> Tensor:
        """Variance of each output of a single layer for rows ``z~`` of ``(N, k)``, ``(N, o)``.

        Only where outputs are independent, ``independent_outputs``.
        """
        raise self._unsuited(state)

    def output_step(self, state: HeadState, inputs: Tensor, step: Tensor, noise: Tensor) -> tuple[Tensor, Any]:
        """Step of the means ``(P,)`` and move by a measurement of each output of a single layer for one row ``(k,)``.

        Args:
            state: The posterior.
            inputs: ``z~``.
            step: ``dm`` of each output, ``(o,)``.
            noise: Of each measurement, ``(o,)``; infinite for none.
        """
        raise self._unsuited(state)

    @abstractmethod
    def apply(self, cov: Cov, moves: Any) -> Cov:
        """What is stored after a move; new tensors, whose shapes may have changed."""

    @abstractmethod
    def revert(self, cov: Cov, moves: Any) -> Cov:
        """What was stored before the last move; new tensors."""

    def invertible(self, moves: Any) -> bool:
        """Whether ``revert`` can be asked; not after a measurement without noise."""
        return True

    @abstractmethod
    def added(self, cov: Cov, other: Cov, scale: float, other_scale: float) -> Cov:
        """``scale Sigma + other_scale Sigma_other``, new tensors; both scales are at least 0."""

    @abstractmethod
    def variances(self, state: HeadState) -> Tensor:
        """Variance of each weight, ``(P,)``."""

    @abstractmethod
    def dense(self, state: HeadState) -> Tensor:
        """The full covariance ``(P, P)``, zero where nothing is stored; for tests, plots and small heads."""

    @abstractmethod
    def check(self, cov: Cov) -> None:
        """Raise ValueError unless these tensors, of the right shapes, are a covariance."""

    def count(self, shapes: Sequence[LayerShape]) -> int:
        """Tensors that it stores."""
        return len(shapes)

    def sizes(self, shapes: Sequence[LayerShape]) -> int:
        """Numbers that it stores, so that one can ask before it is built."""
        return sum(shape.size for shape in shapes) ** 2
