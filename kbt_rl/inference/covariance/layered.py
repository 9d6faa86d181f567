"""``layer``, one full covariance a layer, and what all structures share whose layers are independent."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from kbt_rl.inference.covariance import roots
from kbt_rl.inference.covariance.base import Cov, PriorLayer, Structure
from kbt_rl.inference.covariance.joint import own_covariance, times_root
from kbt_rl.inference.types import HeadState, Jacobian, LayerShape


class Layered(Structure):
    """Each layer has a root of its own, of independent blocks: ``state.cov[i]`` is ``(..., m, m)``.

    ``project`` gives ``R J'`` of each layer, its independent blocks first, ``(..., blocks, m, r)``.
    """

    def gram(self, projected: list[Tensor]) -> Tensor:
        """See ``Structure``."""
        grams = [(columns.mT @ columns).sum(-3) for columns in projected]
        total: Tensor = reduce(torch.add, grams)
        return total

    def cross(self, state: HeadState, projected: list[Tensor], step: Tensor) -> Tensor:
        """See ``Structure``."""
        parts = []
        for root, columns in zip(state.cov, projected, strict=True):
            moved = (columns @ step).unsqueeze(-1)  # (blocks, m, 1)
            parts.append((root.view(-1, *root.shape[-2:]).mT @ moved).flatten())
        return torch.cat(parts)

    def measured(self, state: HeadState, projected: list[Tensor], directions: Tensor, rest: Tensor) -> Any:
        """See ``Structure``; to each block, what the others contribute to an output is noise."""
        columns = [layer @ directions for layer in projected]
        others = roots.sums_of_others(torch.cat([layer.mT @ layer for layer in columns]))
        return [
            _like(root, roots.whitened(layer, other + rest))
            for root, layer, other in zip(state.cov, columns, others.split([len(c) for c in columns]), strict=True)
        ]

    def replaced(self, state: HeadState, projected: list[Tensor], factor: Tensor, signs: Tensor) -> Any:
        """See ``Structure``."""
        return [
            _like(
                root,
                roots.replacing(root.view(-1, *root.shape[-2:]), columns @ factor, signs, "the weights' covariance"),
            )
            for root, columns in zip(state.cov, projected, strict=True)
        ]

    def apply(self, cov: Cov, moves: Any) -> Cov:
        """See ``Structure``."""
        return tuple([roots.measured(root, own) for root, own in zip(cov, moves, strict=True)])

    def revert(self, cov: Cov, moves: Any) -> Cov:
        """See ``Structure``."""
        return tuple([roots.unmeasured(root, own) for root, own in zip(cov, moves, strict=True)])

    def invertible(self, moves: Any) -> bool:
        """See ``Structure``."""
        return all(roots.are_invertible(own) for own in moves)

    def added(self, cov: Cov, other: Cov, scale: float, other_scale: float) -> Cov:
        """See ``Structure``."""
        return tuple(roots.added_roots(*pair, scale, other_scale) for pair in zip(cov, other, strict=True))

    def variances(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        return torch.cat([root.square().sum(-2).flatten() for root in state.cov])

    def dense(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        blocks = [block for root in state.cov for block in (root.mT @ root).view(-1, *root.shape[-2:])]
        full: Tensor = torch.block_diag(*blocks)
        return full

    def check(self, cov: Cov) -> None:
        """See ``Structure``."""
        roots.check_roots(cov)


def _like(root: Tensor, moves: Any) -> Any:
    """A move of ``(blocks, ...)`` with the leading dimensions of a layer's root."""
    return type(moves)(*(part.reshape(*root.shape[:-2], *part.shape[1:]) for part in moves))


class Layer(Layered):
    """One full covariance a layer, the paper's choice; roots ``(n k, n k)``."""

    def from_prior(self, layers: Sequence[PriorLayer]) -> Cov:
        """See ``Structure``."""
        return tuple(torch.block_diag(*[layer.root] * layer.n) for layer in layers)

    def project(self, state: HeadState, jacobian: Jacobian) -> list[Tensor]:
        """See ``Layered``; one block a layer."""
        return [
            times_root(root, shape, jacobian[layer]).mT.unsqueeze(-3)
            for layer, (root, shape) in enumerate(zip(state.cov, state.spec.shapes, strict=True))
            if layer in jacobian
        ]

    def covariance(self, state: HeadState, jacobian: Jacobian) -> Tensor:
        """See ``Structure``."""
        grams = []
        for layer, part in jacobian.items():
            root, shape = state.cov[layer], state.spec.shapes[layer]
            if part.factor is None:
                grams.append(own_covariance(root, shape, part.inputs))
            else:
                rows = times_root(root, shape, part)
                grams.append(rows @ rows.mT)
        return reduce(torch.add, grams)

    def input_part(self, state: HeadState, layer: int, input_cov: Tensor, rows: int, apart: bool = False) -> Tensor:
        """See ``Structure``."""
        return roots.input_part(state.cov[layer], state.spec.shapes[layer], input_cov, rows)

    def sizes(self, shapes: Sequence[LayerShape]) -> int:
        """See ``Structure``."""
        return sum(shape.size**2 for shape in shapes)
