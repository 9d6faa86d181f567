"""``neuron``, ``diagonal``: neurons are independent of each other, or all weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from kbt_rl.inference.covariance import roots
from kbt_rl.inference.covariance.base import Cov, PriorLayer, Replacement
from kbt_rl.inference.covariance.layered import Layered
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.types import HeadState, Jacobian, LayerShape


class ByNeuron(Layered):
    """Neurons are independent."""

    independent_outputs = True

    @abstractmethod
    def base(self, root: Tensor, inputs: Tensor) -> Tensor:
        """``Sigma^(1/2) z~`` of each neuron, ``(..., n, k, B)``."""

    @abstractmethod
    def spread(self, root: Tensor, input_cov: Tensor) -> Tensor:
        """``trace(Sigma_j C_cb)`` of each neuron, for ``C`` of shape ``(..., B, k-1, B, k-1)``, ``(..., n, B, B)``."""

    @abstractmethod
    def weight_variances(self, root: Tensor) -> Tensor:
        """``(n, k)``."""

    def unit_blocks(self, state: HeadState, layer: int, inputs: Tensor) -> Tensor:
        """See ``Structure``."""
        base = self.base(state.cov[layer], inputs)
        return base.mT @ base

    def project(self, state: HeadState, jacobian: Jacobian) -> list[Tensor]:
        """See ``Layered``; a block a neuron."""
        found = []
        for layer, root in enumerate(state.cov):
            if layer in jacobian:
                inputs, factor = jacobian[layer]
                if factor is None:
                    eye = torch.eye(len(root), dtype=inputs.dtype, device=inputs.device)
                    factor = eye.expand(*inputs.shape[:-1], -1, -1)
                base = self.base(root, inputs)
                found.append((base.unsqueeze(-1) * factor.movedim(-1, -3).unsqueeze(-3)).flatten(-2))
        return found

    def covariance(self, state: HeadState, jacobian: Jacobian) -> Tensor:
        """See ``Structure``."""
        grams = []
        for layer, (inputs, factor) in jacobian.items():
            blocks = self.unit_blocks(state, layer, inputs)
            if factor is None:
                grams.append(self._embedded(blocks))
            else:
                gram = torch.einsum("...bmj,...jbc,...clj->...bmcl", factor, blocks, factor)
                grams.append(gram.flatten(-4, -3).flatten(-2))
        return reduce(torch.add, grams)

    def input_part(self, state: HeadState, layer: int, input_cov: Tensor, rows: int, apart: bool = False) -> Tensor:
        """See ``Structure``."""
        if apart:
            variances = self.weight_variances(state.cov[layer])[:, :-1]
            return self._embedded((variances @ input_cov.flatten(-2)).unflatten(-1, (rows, rows)))
        return self._embedded(self.spread(state.cov[layer], roots.by_rows(input_cov, rows)))

    def _embedded(self, by_neuron: Tensor) -> Tensor:
        """``(..., n, B, B)`` as ``(..., B n, B n)``, zero between different neurons."""
        n, rows = by_neuron.shape[-3:-1]
        if n == 1:
            return by_neuron.squeeze(-3)
        full = torch.diag_embed(by_neuron.movedim(-3, -1))  # [b, c, j, l]
        return full.movedim(-3, -2).reshape(*by_neuron.shape[:-3], rows * n, rows * n)


class Neuron(ByNeuron):
    """One block a neuron, as in Kalman Bayesian neural networks (Wagner et al. 2023); roots ``(n, k, k)``."""

    def output_variances(self, state: HeadState, inputs: Tensor) -> Tensor:
        """See ``Structure``."""
        return (state.cov[0] @ inputs.mT).square().sum(-2).mT

    def output_step(
        self, state: HeadState, inputs: Tensor, step: Tensor, noise: Tensor
    ) -> tuple[Tensor, list[roots.Measurements]]:
        """See ``Structure``."""
        (root,), given = state.cov, torch.isfinite(noise)
        phi = root @ inputs
        gains = (root.mT @ phi.unsqueeze(-1)).squeeze(-1)
        moves = roots.Measurements(
            torch.where(given.unsqueeze(-1), phi, 0.0).unsqueeze(-2), torch.where(given, noise, 1.0).unsqueeze(-1)
        )
        return (step.unsqueeze(-1) * gains).flatten(), [moves]

    def from_prior(self, layers: Sequence[PriorLayer]) -> Cov:
        """See ``Structure``."""
        return tuple(layer.root.expand(layer.n, -1, -1).clone() for layer in layers)

    def base(self, root: Tensor, inputs: Tensor) -> Tensor:
        """See ``ByNeuron``."""
        return root @ inputs.mT.unsqueeze(-3)

    def spread(self, root: Tensor, input_cov: Tensor) -> Tensor:
        """See ``ByNeuron``."""
        inner = root[..., :-1]
        return torch.einsum("jpq,...bpcq->...jbc", inner.mT @ inner, input_cov)

    def weight_variances(self, root: Tensor) -> Tensor:
        """See ``ByNeuron``."""
        return root.square().sum(-2)

    def sizes(self, shapes: Sequence[LayerShape]) -> int:
        """See ``Structure``."""
        return sum(shape.n * shape.k**2 for shape in shapes)


class Diagonal(ByNeuron):
    """One variance a weight, ``(n, k)``: for wide heads."""

    def output_variances(self, state: HeadState, inputs: Tensor) -> Tensor:
        """See ``Structure``."""
        return inputs.square() @ state.cov[0].mT

    def output_step(self, state: HeadState, inputs: Tensor, step: Tensor, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See ``Structure``."""
        (variances,) = state.cov
        own = variances * inputs.square()
        others = roots.sums_of_others(own.mT).mT + noise.unsqueeze(-1)
        kept = torch.where(torch.isfinite(others) & (others + own > 0.0), others / (others + own), 1.0)
        return (step.unsqueeze(-1) * variances * inputs).flatten(), [kept]

    def from_prior(self, layers: Sequence[PriorLayer]) -> Cov:
        """See ``Structure``; refuses correlated weights, which it cannot store."""
        for layer in layers:
            if not torch.equal(layer.root.diagonal().diag(), layer.root):
                raise ValueError(
                    "the diagonal structure cannot store the correlated weights of a tied prior; pass rho=0 for the "
                    "paper's independent prior, or use structure='neuron'"
                )
        return tuple(layer.root.diagonal().square().expand(layer.n, -1).clone() for layer in layers)

    def from_variances(self, variances: Tensor, rank: int) -> Cov:
        """See ``Structure``."""
        return (variances.unsqueeze(0).clone(),)

    def base(self, root: Tensor, inputs: Tensor) -> Tensor:
        """See ``ByNeuron``."""
        return root.sqrt().unsqueeze(-1) * inputs.mT.unsqueeze(-3)

    def spread(self, root: Tensor, input_cov: Tensor) -> Tensor:
        """See ``ByNeuron``."""
        return torch.einsum("jp,...bpcp->...jbc", root[:, :-1], input_cov)

    def weight_variances(self, root: Tensor) -> Tensor:
        """See ``ByNeuron``."""
        return root

    def cross(self, state: HeadState, projected: list[Tensor], step: Tensor) -> Tensor:
        """See ``Structure``."""
        parts = [
            (variances.sqrt() * (columns @ step)).flatten()
            for variances, columns in zip(state.cov, projected, strict=True)
        ]
        return torch.cat(parts)

    def measured(self, state: HeadState, projected: list[Tensor], directions: Tensor, rest: Tensor) -> Any:
        """See ``Structure``; the factor of each variance, one tensor a layer."""
        columns = [layer @ directions for layer in projected]
        kept = kept_variances(torch.cat([layer.flatten(0, 1) for layer in columns]), rest)
        sizes = [variances.numel() for variances in state.cov]
        return [part.view_as(own) for part, own in zip(kept.split(sizes), state.cov, strict=True)]

    def replaced(self, state: HeadState, projected: list[Tensor], factor: Tensor, signs: Tensor) -> Replacement:
        """See ``Structure``."""
        after = []
        for variances, columns in zip(state.cov, projected, strict=True):
            moves = variances.sqrt().unsqueeze(-1) * (columns @ factor)
            new = variances + moves.square() @ signs
            if not bool((new >= 0.0).all()):
                raise UpdateError(
                    f"the update would make a weight variance negative ({float(new.min()):.3g}); the posterior is "
                    "unchanged. Raise the noise variance, or use the rule 'measure', which cannot do this"
                )
            after.append(new)
        return Replacement(state.clone().cov, tuple(after))

    def apply(self, cov: Cov, moves: Any) -> Cov:
        """See ``Structure``."""
        if isinstance(moves, Replacement):
            return moves.after
        return tuple([variances * kept for variances, kept in zip(cov, moves, strict=True)])

    def revert(self, cov: Cov, moves: Any) -> Cov:
        """See ``Structure``."""
        if isinstance(moves, Replacement):
            return moves.before
        return tuple([variances / kept for variances, kept in zip(cov, moves, strict=True)])

    def invertible(self, moves: Any) -> bool:
        """See ``Structure``."""
        return isinstance(moves, Replacement) or all(bool((kept > 0.0).all()) for kept in moves)

    def added(self, cov: Cov, other: Cov, scale: float, other_scale: float) -> Cov:
        """See ``Structure``."""
        return tuple(scale * mine + other_scale * theirs for mine, theirs in zip(cov, other, strict=True))

    def variances(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        return torch.cat([variances.flatten() for variances in state.cov])

    def dense(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        return torch.diag(self.variances(state))

    def check(self, cov: Cov) -> None:
        """See ``Structure``."""
        for variances in cov:
            if not bool((torch.isfinite(variances) & (variances >= 0.0)).all()):
                raise ValueError(
                    f"the posterior holds the variance {float(variances.min()):.3g}; expected finite, >= 0"
                )

    def sizes(self, shapes: Sequence[LayerShape]) -> int:
        """See ``Structure``."""
        return sum(shape.size for shape in shapes)


def kept_variances(columns: Tensor, rest: Tensor) -> Tensor:
    """What a measurement leaves of each weight's variance, as a factor in (0, 1].

    Args:
        columns: ``sqrt(v) J' W`` of each weight, ``(P, q)``.
        rest: See ``Structure.measured``, ``(q, q)``.
    """
    if rest.shape[-1] == 1:
        square = columns[:, 0].square()
        others = roots.sums_of_others(square) + rest
        total = others + square
        return torch.where(total > 0.0, others / total, 1.0).flatten()
    total_cov = rest + columns.mT @ columns
    cholesky, failed = torch.linalg.cholesky_ex(total_cov)
    if int(failed):
        roots.proper_root(total_cov, "the predicted covariance plus noise")
    kept: Tensor = 1.0 - torch.linalg.solve_triangular(cholesky, columns.mT, upper=False).square().sum(0)
    # Where one weight explains nearly all of a measurement (of at most q can that be said), 1 - t has no digits left.
    for index in torch.nonzero(kept < 1e-4).flatten().tolist():
        others = torch.cat([columns[:index], columns[index + 1 :]])
        noise = rest + others.mT @ others
        own = columns[index]
        kept[index] = 1.0 / (1.0 + own @ torch.linalg.solve(noise, own))
    return kept
