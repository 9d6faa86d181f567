"""``low_rank``: a diagonal plus a few directions, for any number of weights of any module.

The precision is ``diag(v) + U U'`` with ``U`` of shape ``(P, r)`` (LoFi: Chang et al. 2023, "Low-rank extended Kalman
filtering for online learning of neural networks from streaming data"). A measurement appends its directions to ``U``;
the columns are then brought back to ``r``, those that tell most in the metric ``1 / v``, and the squares of what is
dropped are added to ``v``, so that no weight is told more than it was. An update takes ``P r^2`` operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kbt_rl.inference.covariance.base import Cov, PriorLayer, Replacement, Structure
from kbt_rl.inference.errors import NotPositiveDefiniteError
from kbt_rl.inference.types import HeadState, Jacobian, LayerShape

# Directions that tell less, beside the one that tells most, are not told apart from rounding.
_LEAST = 1e-14


class Projected(NamedTuple):
    """``Sigma^(1/2) J'`` in two orthogonal parts, so that ``J Sigma J'`` is a sum of squares.

    With ``B = v^(-1/2) J'``, ``W = v^(-1/2) U`` and the eigenvalues ``l`` of ``W' W``, ``J Sigma J' = |B_rest|^2 +
    |C|^2 / (1 + l)`` for the part ``C`` of ``B`` along the columns of ``W`` and what is left of it.

    Attributes:
        jacobian: ``J'``, ``(P, r)``.
        product: ``Sigma J'``, ``(P, r)``.
        gram: ``J Sigma J'``, ``(r, r)``.
    """

    jacobian: Tensor
    product: Tensor
    gram: Tensor


class LowRank(Structure):
    """``v`` ``(P,)`` and ``U`` ``(P, r)`` of the precision."""

    def from_prior(self, layers: Sequence[PriorLayer]) -> Cov:
        """Only for modules, see ``from_variances``."""
        raise ValueError("structure='low_rank' is for LinearisedHead, which takes any module; use 'joint' or 'neuron'")

    def from_variances(self, variances: Tensor, rank: int) -> Cov:
        """See ``Structure``."""
        return 1.0 / variances, torch.zeros(len(variances), rank, dtype=variances.dtype, device=variances.device)

    def project(self, state: HeadState, jacobian: Jacobian) -> Projected:
        """See ``Structure``; of a module, whose parameters are the weights of one neuron."""
        (v, u), columns = state.cov, jacobian[0].inputs.mT
        half = v.rsqrt().unsqueeze(-1)
        b, w = half * columns, half * u
        told, axes = torch.linalg.eigh(w.mT @ w)
        known = told > _LEAST * told[-1].clamp_min(torch.finfo(told.dtype).tiny)
        told, basis = told[known], axes[:, known] * told[known].rsqrt()  # the columns of W times it are orthonormal
        along = basis.mT @ (w.mT @ b)
        rest = torch.addmm(b, w, basis @ along, alpha=-1.0)
        again = basis.mT @ (w.mT @ rest)  # for what rounding has left along them
        rest = torch.addmm(rest, w, basis @ again, alpha=-1.0)
        kept = along / (1.0 + told).unsqueeze(-1)
        product = half * torch.addmm(rest, w, basis @ kept)
        return Projected(columns, product, rest.mT @ rest + along.mT @ kept)

    def gram(self, projected: Projected) -> Tensor:
        """See ``Structure``."""
        return projected.gram

    def cross(self, state: HeadState, projected: Projected, step: Tensor) -> Tensor:
        """See ``Structure``."""
        return projected.product @ step

    def measured(self, state: HeadState, projected: Projected, directions: Tensor, rest: Tensor) -> Replacement:
        """See ``Structure``."""
        (v, u), columns = state.cov, projected.jacobian @ directions
        cholesky, failed = torch.linalg.cholesky_ex(rest)
        if int(failed):
            raise NotPositiveDefiniteError("the label noise", float(torch.linalg.eigvalsh(rest)[0]))
        gained = torch.linalg.solve_triangular(cholesky, columns.mT, upper=False).mT
        everything = torch.cat([u, gained], dim=-1)
        half = v.rsqrt().unsqueeze(-1) * everything
        _, axes = torch.linalg.eigh(half.mT @ half)
        dropped, kept = axes[:, : -u.shape[1]], axes[:, -u.shape[1] :]  # ascending: the last tell most
        after = v + (everything @ dropped).square().sum(-1), everything @ kept
        return Replacement(tuple(block.clone() for block in state.cov), after)

    def apply(self, cov: Cov, moves: Any) -> Cov:
        """See ``Structure``."""
        return moves.after  # type: ignore[no-any-return]

    def revert(self, cov: Cov, moves: Any) -> Cov:
        """See ``Structure``."""
        return moves.before  # type: ignore[no-any-return]

    def added(self, cov: Cov, other: Cov, scale: float, other_scale: float) -> Cov:
        """See ``Structure``; ``other`` is a prior, whose weights are independent, or not used.

        With ``Sigma = 1/v - L L'`` the sum is ``d - a L L'``, whose precision is again a diagonal plus as many
        directions.
        """
        v, u = cov
        if other_scale == 0.0:
            return v / scale, u / scale**0.5
        if scale == 0.0:
            return other[0] / other_scale, other[1].clone()
        loading = scale**0.5 * self._loading(v, u)
        d = scale / v + other_scale / other[0]
        inner = -(loading.mT @ (loading / d.unsqueeze(-1)))
        inner.diagonal().add_(1.0)
        root = torch.linalg.cholesky(inner)
        scaled = (loading / d.unsqueeze(-1)).mT
        return 1.0 / d, torch.linalg.solve_triangular(root, scaled, upper=False).mT.contiguous()

    def variances(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        v, u = state.cov
        # A part of 1 / v, below 0 only by rounding.
        return (1.0 / v - self._loading(v, u).square().sum(-1)).clamp_min(0.0)

    def dense(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        v, u = state.cov
        loading = self._loading(v, u)
        return torch.diag(1.0 / v) - loading @ loading.mT

    @staticmethod
    def _loading(v: Tensor, u: Tensor) -> Tensor:
        """``L`` with ``Sigma = diag(1 / v) - L L'``, ``(P, r)``."""
        scaled = u / v.unsqueeze(-1)
        inner = u.mT @ scaled
        inner.diagonal().add_(1.0)
        loading: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), scaled.mT, upper=False).mT
        return loading

    def check(self, cov: Cov) -> None:
        """See ``Structure``."""
        v, u = cov
        if not bool((torch.isfinite(v) & (v > 0.0)).all() and torch.isfinite(u).all()):
            raise ValueError("the posterior holds no precision: v must be positive and finite, U finite")

    def count(self, shapes: Sequence[LayerShape]) -> int:
        """See ``Structure``."""
        return 2

    def sizes(self, shapes: Sequence[LayerShape]) -> int:
        """See ``Structure``; without its directions."""
        return sum(shape.size for shape in shapes)
