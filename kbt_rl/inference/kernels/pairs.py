"""The covariance of the outputs of several rows, a pair of outputs at a time.

It is added up as ``(o (o + 1) / 2, B, B)``: entry ``[pair, b, c]`` is ``Cov(u_bj, u_ci)`` of the pair ``i <= j``, so
that the innermost loop is over rows.
"""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.relu import relu_entry
from kbt_rl.inference.kernels.terms import Array


@compiled
def by_row(pairs: Array, o: int) -> Array:
    """``(B o, B o)``, row after row."""
    count = pairs.shape[1]
    out = np.empty((count * o, count * o))
    pair = 0
    for j in range(o):
        for i in range(j + 1):
            for b in range(count):
                for c in range(count):
                    out[b * o + j, c * o + i] = out[c * o + i, b * o + j] = pairs[pair, b, c]
            pair += 1
    return out


@compiled
def relu_block(block: Array, j: int, i: int, variance: Array, slope: Array, curvature: Array) -> None:
    """From ``Cov(u_bj, u_ci)`` of two hidden units, ``(B, B)``, to ``Cov(z_bj, z_ci)``, as ``moments.relu_moments``."""
    count = block.shape[0]
    for b in range(count):
        own, bent = slope[j, b], curvature[j, b]
        for c in range(count):
            block[b, c] = relu_entry(block[b, c], own, bent, slope[i, c], curvature[i, c])
        if i == j:
            block[b, b] = variance[j, b]


@compiled
def add_block(pairs: Array, pair: int, scale: float, block: Array) -> None:
    """Add ``scale block``, ``(B, B)``, to a pair."""
    count = block.shape[0]
    for b in range(count):
        for c in range(count):
            pairs[pair, b, c] += scale * block[b, c]
