"""For a new structure: everything from what is kept of a full covariance, and how it is made full again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kbt_rl.inference.covariance import roots
from kbt_rl.inference.covariance.base import Cov, PriorLayer, Replacement
from kbt_rl.inference.covariance.joint import ByRoot
from kbt_rl.inference.types import HeadState, LayerShape


class Stored(ByRoot):
    """Everything from ``dense`` and ``store``: a new structure in a few lines, at the cost of ``P^3`` an update.

    Bayes' rule is applied to the full covariance, of which ``store`` then keeps what it keeps.
    """

    @abstractmethod
    def store(self, cov: Tensor, shapes: Sequence[LayerShape]) -> Cov:
        """What is kept of a full covariance ``(P, P)``."""

    def from_prior(self, layers: Sequence[PriorLayer]) -> Cov:
        """See ``Structure``."""
        blocks = [layer.root.mT @ layer.root for layer in layers for _ in range(layer.n)]
        shapes = [LayerShape(layer.n, len(layer.root)) for layer in layers]
        return self.store(torch.block_diag(*blocks), shapes)

    def root(self, state: HeadState) -> Tensor:
        """See ``ByRoot``."""
        values, vectors = torch.linalg.eigh(self.dense(state))
        # Eigenvalues of a singular covariance come out a little below 0, which is rounding.
        root = (vectors * values.clamp_min(0.0).sqrt()).mT
        return roots.combined(root, torch.zeros_like(root))

    def measured(self, state: HeadState, projected: Tensor, directions: Tensor, rest: Tensor) -> Any:
        """See ``Structure``."""
        after = roots.measured(self.root(state), roots.whitened(projected.mT @ directions, rest))
        return self._moved(state, after.mT @ after)

    def replaced(self, state: HeadState, projected: Tensor, factor: Tensor, signs: Tensor) -> Replacement:
        """See ``Structure``."""
        moves = self.root(state).mT @ (projected.mT @ factor)
        return self._moved(state, self.dense(state) + (moves * signs) @ moves.mT)

    def _moved(self, state: HeadState, cov: Tensor) -> Replacement:
        return Replacement(state.clone().cov, self.store(cov, state.spec.shapes))

    def apply(self, cov: Cov, moves: Replacement) -> Cov:
        """See ``Structure``."""
        return moves.after

    def revert(self, cov: Cov, moves: Replacement) -> Cov:
        """See ``Structure``."""
        return moves.before

    def added(self, cov: Cov, other: Cov, scale: float, other_scale: float) -> Cov:
        """See ``Structure``; for forms that are linear in the covariance, as those that keep entries of it are."""
        return tuple(scale * mine + other_scale * theirs for mine, theirs in zip(cov, other, strict=True))

    def variances(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        return self.dense(state).diagonal().clone()

    def count(self, shapes: Sequence[LayerShape]) -> int:
        """See ``Structure``; one, unless a structure says otherwise."""
        return 1

    def check(self, cov: Cov) -> None:
        """See ``Structure``; finite is all that is known of a form that others have invented."""
        if not all(bool(torch.isfinite(block).all()) for block in cov):
            raise ValueError("the covariance holds NaN or infinity")
