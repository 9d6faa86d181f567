"""``shared``: one covariance for all outputs of a single layer, and its rotated diagonal form for very many outputs.

Outputs that have had the same labels with the same noise have the same covariance, whatever their number: recursive
least squares with several outputs. ``Shared`` stores it once, ``(1, k, k)``. A label that tells outputs apart, because
it is missing for some of them or noisier for some, splits them into groups with a copy each, at most one an output, so
that the posterior is exact in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kbt_rl.inference.covariance import roots
from kbt_rl.inference.covariance.base import Cov, PriorLayer, Structure
from kbt_rl.inference.covariance.neuron import Diagonal
from kbt_rl.inference.types import HeadState, LayerShape


class SharedMoves(NamedTuple):
    """A measurement of each output.

    Attributes:
        parent: Which group each of the new groups comes from, ascending, ``(g,)``.
        group: The new group of each output, ``(o,)``.
        phi: ``R h`` of each new group, 0 where it is not measured, ``(g, k)``.
        noise: ``(g,)``.
    """

    parent: Tensor
    group: Tensor
    phi: Tensor
    noise: Tensor


class Shared(Structure):
    """Roots of the groups ``(g, k, k)``, and the group of each output ``(o,)``."""

    independent_outputs = True

    def from_prior(self, layers: Sequence[PriorLayer]) -> Cov:
        """See ``Structure``."""
        if len(layers) != 1:
            raise ValueError(f"the structure 'shared' is for one layer; this head has {len(layers)}")
        return layers[0].root.unsqueeze(0).clone(), torch.zeros(layers[0].n, dtype=torch.int64)

    def output_variances(self, state: HeadState, inputs: Tensor) -> Tensor:
        """See ``Structure``."""
        root, group = state.cov
        return (root @ inputs.mT).square().sum(-2).mT[:, group]

    def output_step(self, state: HeadState, inputs: Tensor, step: Tensor, noise: Tensor) -> tuple[Tensor, SharedMoves]:
        """See ``Structure``."""
        root, group = state.cov
        phi = root @ inputs  # (g, k)
        gains = (root.mT @ phi.unsqueeze(-1)).squeeze(-1)
        told = torch.stack([group.to(noise.dtype), noise], dim=-1)
        kinds, new_group = torch.unique(told, dim=0, return_inverse=True)
        parent, measured = kinds[:, 0].long(), torch.isfinite(kinds[:, 1])
        new_phi = torch.where(measured.unsqueeze(-1), phi[parent], 0.0)
        moves = SharedMoves(parent, new_group, new_phi, torch.where(measured, kinds[:, 1], 1.0))
        return (step.unsqueeze(-1) * gains[group]).flatten(), moves

    def apply(self, cov: Cov, moves: Any) -> Cov:
        """See ``Structure``."""
        own = roots.Measurements(moves.phi.unsqueeze(-2), moves.noise.unsqueeze(-1))
        return roots.measured(cov[0][moves.parent], own), moves.group

    def revert(self, cov: Cov, moves: Any) -> Cov:
        """See ``Structure``; groups that the measurement has split are one again."""
        before = roots.restored(cov[0], moves.phi, moves.noise)
        groups = torch.arange(int(moves.parent[-1]) + 1, device=moves.parent.device)
        last = torch.searchsorted(moves.parent, groups, right=True) - 1  # of each, the noisiest part
        return before[last], moves.parent[cov[1]]

    def invertible(self, moves: Any) -> bool:
        """See ``Structure``."""
        return roots.are_invertible(roots.Measurements(moves.phi, moves.noise))

    def added(self, cov: Cov, other: Cov, scale: float, other_scale: float) -> Cov:
        """See ``Structure``."""
        (root, group), (other_root, other_group) = cov, other
        if scale == 0.0:
            return other_root * other_scale**0.5, other_group.clone()
        # The group of an output in the other covariance is that of the first output of its group here.
        first = torch.stack([(group == index).nonzero()[0, 0] for index in range(len(root))])
        pairs = zip(root, other_root[other_group[first]], strict=True)
        return torch.stack([roots.added_roots(*pair, scale, other_scale) for pair in pairs]), group.clone()

    def variances(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        root, group = state.cov
        return root.square().sum(-2)[group].flatten()

    def dense(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        root, group = state.cov
        full: Tensor = torch.block_diag(*(root.mT @ root)[group])
        return full

    def check(self, cov: Cov) -> None:
        """See ``Structure``."""
        root, group = cov
        roots.check_roots((root,))
        count = root.shape[-3]
        if any(sorted(set(row)) != list(range(count)) for row in group.reshape(-1, group.shape[-1]).tolist()):
            raise ValueError(f"outputs belong to the groups {group.unique().tolist()}; there are {count}")

    def count(self, shapes: Sequence[LayerShape]) -> int:
        """See ``Structure``."""
        return 2

    def sizes(self, shapes: Sequence[LayerShape]) -> int:
        """See ``Structure``; before labels tell outputs apart."""
        return shapes[0].k ** 2


class Rotated(Diagonal):
    """One variance a weight, for features that are rotated into the eigenbasis of their covariance.

    The rotation is part of the head's units (``feature_basis``). Independent weights lose little there.
    """
