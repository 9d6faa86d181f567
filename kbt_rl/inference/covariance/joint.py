"""``joint``: one covariance over all weights of all layers, as one root ``(P, P)``.

The paper treats layers as independent after every step. Nothing in the closed form needs that, see ``network``.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kbt_rl.inference.covariance import roots
from kbt_rl.inference.covariance.base import Cov, PriorLayer, Structure
from kbt_rl.inference.types import HeadState, Jacobian, LayerShape, Part


def first_weights(shapes: Sequence[LayerShape]) -> list[int]:
    """Number of the first weight of each layer."""
    return list(itertools.accumulate([n * k for n, k in shapes[:-1]], initial=0))


def times_root(columns: Tensor, shape: LayerShape, part: Part) -> Tensor:
    """``J R'`` for the columns ``(m, n k)`` of a root that belong to the part's layer, ``(..., B n, m)``."""
    inputs, factor = part
    if factor is None:
        by_neuron = _by_neuron(columns, shape, inputs.reshape(-1, shape.k))
        return by_neuron.permute(2, 1, 0).reshape(*inputs.shape[:-2], inputs.shape[-2] * shape.n, len(columns))
    jacobian = factor.unsqueeze(-1) * inputs.unsqueeze(-2).unsqueeze(-2)  # [..., B, m, n, k]
    return jacobian.flatten(-2).flatten(-3, -2) @ columns.mT


def _by_neuron(columns: Tensor, shape: LayerShape, inputs: Tensor) -> Tensor:
    """``R (e_j (x) z~_b)`` for each neuron and row of ``(B, k)``, as ``(m, n, B)``."""
    product: Tensor = columns.unflatten(-1, shape) @ inputs.mT
    return product


def own_covariance(columns: Tensor, shape: LayerShape, inputs: Tensor) -> Tensor:
    """Covariance of a layer's logits ``W z~`` by its own weights, ``(..., B n, B n)``.

    Whichever is less work: for few rows their products with the root, else the covariance of the weights itself.

    Args:
        columns: ``(m, n k)`` of the root, 0 above its own diagonal.
        shape: Of the layer.
        inputs: ``z~``, ``(..., B, k)``.
    """
    (n, k), rows = shape, inputs.shape[-2]
    if inputs.ndim > 2:
        units = times_root(columns, shape, Part(inputs, None))
        return units @ units.mT
    if rows < k:
        found = roots.square(_by_neuron(columns, shape, inputs), k)
    else:
        by_weight = roots.square(columns.unflatten(-1, shape), k).view(n, k, n, k)
        found = inputs @ (by_weight @ inputs.mT).view(n, k, n * rows)  # [j, b, l c]
    return found.view(n, rows, n, rows).permute(1, 0, 3, 2).reshape(rows * n, rows * n)


class ByRoot(Structure):
    """What a root of the covariance of all weights answers; ``root`` says where it is."""

    @abstractmethod
    def root(self, state: HeadState) -> Tensor:
        """Lower triangular ``R`` with ``R' R = Sigma``, ``(P, P)``."""

    def project(self, state: HeadState, jacobian: Jacobian) -> Tensor:
        """``J R'``, ``(..., B m, P)``."""
        return self._products(state, jacobian, 0)

    def gram(self, projected: Tensor) -> Tensor:
        """See ``Structure``."""
        return projected @ projected.mT

    def covariance(self, state: HeadState, jacobian: Jacobian) -> Tensor:
        """See ``Structure``."""
        ((layer, (inputs, factor)), *others) = jacobian.items()
        if others or factor is not None:
            return self.gram(self.project(state, jacobian))
        return own_covariance(self._own_columns(state, layer), state.spec.shapes[layer], inputs)

    def coupling(self, state: HeadState, jacobian: Jacobian, layer: int) -> Tensor:
        """See ``Structure``."""
        first = first_weights(state.spec.shapes)[layer]  # above it this layer's columns are 0
        return (self._products(state, jacobian, first) @ self._own_columns(state, layer)).mT

    def input_part(self, state: HeadState, layer: int, input_cov: Tensor, rows: int, apart: bool = False) -> Tensor:
        """See ``Structure``."""
        return roots.input_part(self._own_columns(state, layer), state.spec.shapes[layer], input_cov, rows)

    def cross(self, state: HeadState, projected: Tensor, step: Tensor) -> Tensor:
        """See ``Structure``."""
        return (step @ projected) @ self.root(state)

    def _own_columns(self, state: HeadState, layer: int) -> Tensor:
        """Columns of the root that belong to a layer's weights, from the diagonal on, ``(m, n k)``."""
        first, (n, k) = first_weights(state.spec.shapes)[layer], state.spec.shapes[layer]
        return self.root(state)[first:, first : first + n * k]

    def _products(self, state: HeadState, jacobian: Jacobian, start: int) -> Tensor:
        """Entries from ``start`` on of ``J R'``, ``(..., B m, P - start)``."""
        total, shapes = None, state.spec.shapes
        for layer, part in jacobian.items():
            first = first_weights(shapes)[layer]
            columns = self._own_columns(state, layer)[max(start - first, 0) :]
            product = times_root(columns, shapes[layer], part)
            if total is None:
                total = product if first <= start else functional.pad(product, (first - start, 0))
            else:
                total[..., max(first - start, 0) :] += product
        assert total is not None, "a Jacobian of no layer"
        return total


class Joint(ByRoot):
    """The root of the full covariance."""

    def from_prior(self, layers: Sequence[PriorLayer]) -> Cov:
        """See ``Structure``."""
        return (torch.block_diag(*(layer.root for layer in layers for _ in range(layer.n))),)

    def root(self, state: HeadState) -> Tensor:
        """See ``ByRoot``."""
        return state.cov[0]

    def measured(self, state: HeadState, projected: Tensor, directions: Tensor, rest: Tensor) -> roots.Measurements:
        """See ``Structure``."""
        return roots.whitened(projected.mT @ directions, rest)

    def replaced(self, state: HeadState, projected: Tensor, factor: Tensor, signs: Tensor) -> Any:
        """See ``Structure``."""
        return roots.replacing(state.cov[0], projected.mT @ factor, signs, "the covariance of all weights")

    def apply(self, cov: Cov, moves: Any) -> Cov:
        """See ``Structure``."""
        return (roots.measured(cov[0], moves),)

    def revert(self, cov: Cov, moves: Any) -> Cov:
        """See ``Structure``."""
        return (roots.unmeasured(cov[0], moves),)

    def invertible(self, moves: Any) -> bool:
        """See ``Structure``."""
        return roots.are_invertible(moves)

    def added(self, cov: Cov, other: Cov, scale: float, other_scale: float) -> Cov:
        """See ``Structure``."""
        return tuple(roots.added_roots(*pair, scale, other_scale) for pair in zip(cov, other, strict=True))

    def variances(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        return state.cov[0].square().sum(0)

    def dense(self, state: HeadState) -> Tensor:
        """See ``Structure``."""
        return roots.square(state.cov[0].unsqueeze(-1))

    def check(self, cov: Cov) -> None:
        """See ``Structure``."""
        roots.check_roots(cov)

    def count(self, shapes: Sequence[LayerShape]) -> int:
        """See ``Structure``."""
        return 1
