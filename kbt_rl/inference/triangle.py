"""A symmetric matrix over the weights of a layer, stored as its lower block triangle.

The update of a head with a full covariance is bound by memory: every entry is read once to predict, and read and
written once to learn. Storing each pair of neurons once halves that. A block row holds the covariance of a few
neighbouring neurons with all neurons up to and including them, one after another in a flat tensor, so that each is a
contiguous matrix. Only the small blocks on the diagonal hold both halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class LayerShape(NamedTuple):
    """Outputs ``n`` and inputs with bias ``k`` of a layer; its weights are vectorised neuron by neuron, bias last."""

    n: int
    k: int

    @property
    def size(self) -> int:
        """Number of weights, bias included."""
        return self.n * self.k


class BlockRow(NamedTuple):
    """Neurons ``first`` to ``last`` (excluded), and the covariance of their weights with all weights up to them."""

    first: int
    last: int
    matrix: Tensor


# Weights of a block row: long enough for a matrix product, short enough to waste little above the diagonal.
_ROW_WEIGHTS = 64


def neurons_per_row(shape: LayerShape) -> int:
    """Neurons of a block row (the last one may have fewer)."""
    return -(-_ROW_WEIGHTS // shape.k)


@lru_cache(maxsize=64)
def _bounds(shape: LayerShape) -> tuple[tuple[int, int, int, int], ...]:
    """First neuron, end, and the range in the flat tensor of each block row."""
    bounds, offset, step = [], 0, neurons_per_row(shape)
    for first in range(0, shape.n, step):
        last = min(first + step, shape.n)
        size = (last - first) * last * shape.k**2
        bounds.append((first, last, offset, offset + size))
        offset += size
    return tuple(bounds)


def storage_size(shape: LayerShape) -> int:
    """Entries of the flat tensor."""
    return _bounds(shape)[-1][3]


def block_rows(flat: Tensor, shape: LayerShape) -> Iterator[BlockRow]:
    """Views of the block rows."""
    for first, last, start, stop in _bounds(shape):
        yield BlockRow(first, last, flat[start:stop].view((last - first) * shape.k, last * shape.k))


def pack(dense: Tensor, shape: LayerShape) -> Tensor:
    """The stored form of a symmetric matrix ``(n k, n k)``."""
    k = shape.k
    return torch.cat([dense[first * k : last * k, : last * k].flatten() for first, last, _, _ in _bounds(shape)])


def pack_neurons(blocks: Tensor) -> Tensor:
    """The stored form of independent neurons with covariances ``(n, k, k)``."""
    shape = LayerShape(*blocks.shape[:2])
    flat = blocks.new_zeros(storage_size(shape))
    for first, last, matrix in block_rows(flat, shape):
        matrix[:, first * shape.k :] = torch.block_diag(*blocks[first:last])
    return flat


def unpack(flat: Tensor, shape: LayerShape) -> Tensor:
    """The full matrix ``(n k, n k)``, for tests, plots and small layers."""
    dense = flat.new_empty(shape.size, shape.size)
    for first, last, matrix in block_rows(flat, shape):
        own, upto = slice(first * shape.k, last * shape.k), slice(last * shape.k)
        dense[own, upto] = matrix
        dense[upto, own] = matrix.mT
    return dense


def project(flat: Tensor, shape: LayerShape, rows: Tensor) -> Tensor:
    """``Sigma (I (x) z~)`` for rows of inputs ``(N, k)``, shape ``(n k, n, N)``: covariance of weights and outputs."""
    n, k = shape
    out = flat.new_empty(n * k, n, len(rows))
    for first, last, matrix in block_rows(flat, shape):
        own, before = slice(first * k, last * k), slice(first * k)
        out[own, :last] = (matrix.view(-1, k) @ rows.mT).view(-1, last, len(rows))
        if first:  # the half that is not stored: earlier weights, these outputs
            by_neuron = matrix.view(last - first, k, last * k)[..., before]
            out[before, first:last] = (rows @ by_neuron).permute(2, 0, 1)
    return out


def unflatten_rows(projection: Tensor, inputs: Tensor) -> Tensor:
    """``(P, n, N)``, projected with all rows of ``inputs`` ``(..., B, k)``, as ``(..., P, n, B)``."""
    if inputs.ndim == 2:
        return projection
    split: Tensor = projection.unflatten(-1, inputs.shape[:-1])
    return split.movedim((0, 1), (-3, -2))


def downdate_(flat: Tensor, shape: LayerShape, factor: Tensor, signed: Tensor) -> None:
    """``Sigma += V diag(signs) V'`` in place, for ``V`` and ``signed`` = ``V diag(signs)`` of shape ``(n k, q)``."""
    for first, last, matrix in block_rows(flat, shape):
        matrix.addmm_(signed[first * shape.k : last * shape.k], factor[: last * shape.k].mT)


def diagonal(flat: Tensor, shape: LayerShape) -> Tensor:
    """Variance of each weight, ``(n k,)``."""
    return torch.cat([row.matrix.diagonal(row.first * shape.k) for row in block_rows(flat, shape)])


def set_diagonal_(flat: Tensor, shape: LayerShape, variances: Tensor) -> None:
    """Put variances ``(n k,)`` in their places."""
    k = shape.k
    for first, last, matrix in block_rows(flat, shape):
        matrix.diagonal(first * k).copy_(variances[first * k : last * k])


def neuron_blocks(flat: Tensor, shape: LayerShape) -> Tensor:
    """Covariance of each neuron's own weights, ``(n, k, k)``."""
    k = shape.k
    parts = []
    for first, last, matrix in block_rows(flat, shape):
        own = matrix[:, first * k :].unflatten(0, (-1, k)).unflatten(-1, (last - first, k))
        parts.append(own.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
    return torch.cat(parts)
