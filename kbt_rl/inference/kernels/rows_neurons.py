"""What layers of independent neurons add for several rows: ``neuron`` and ``diagonal``."""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.pairs import add_block, relu_block
from kbt_rl.inference.kernels.terms import Array, UnitMoments


@compiled
def _project(cov: Array, neuron: int, inputs: Array, out: Array) -> None:
    """``Sigma_j z~_b``, ``(B, k)``, for blocks ``(n, k, k)`` or variances ``(n, k)``."""
    count, k = inputs.shape
    for b in range(count):
        for q in range(k):
            out[b, q] = 0.0
            if cov.ndim == 2:
                out[b, q] = cov[neuron, q] * inputs[b, q]
        if cov.ndim == 3:
            for p in range(k):
                for q in range(k):
                    out[b, q] += inputs[b, p] * cov[neuron, p, q]


@compiled
def outputs_neurons(cov: Array, inputs: Array, cross: Array, column: int, variances: Array, pairs: Array) -> None:
    """As ``outputs_dense``."""
    o, (count, k) = cov.shape[0], inputs.shape
    projection = np.empty((count, k))
    for j in range(o):
        _project(cov, j, inputs, projection)
        own, pair = column + j * k, j * (j + 3) // 2
        for b in range(count):
            for p in range(k):
                cross[b * o + j, own + p] = projection[b, p]
            for c in range(count):
                total = 0.0
                for p in range(k):
                    total += projection[b, p] * inputs[c, p]
                pairs[pair, b, c] += total
        for p in range(k):
            variances[own + p] = cov[j, p, p] if cov.ndim == 3 else cov[j, p]


@compiled
def hidden_neurons(
    first: Array, inputs: Array, moments: UnitMoments, above: Array, last: Array, cross: Array, variances: Array,
    pairs: Array,
) -> None:  # fmt: skip
    """As ``hidden_dense``."""
    _, variance, slope, curvature = moments
    (count, k), o = inputs.shape, above.shape[0]
    projection, block = np.empty((count, k)), np.empty((count, count))
    for j in range(first.shape[0]):
        _project(first, j, inputs, projection)
        for b in range(count):
            for c in range(count):
                total = 0.0
                for p in range(k):
                    total += projection[b, p] * inputs[c, p]
                block[b, c] = total
            for a in range(o):
                factor = above[a, j] * slope[j, b]
                for p in range(k):
                    cross[b * o + a, j * k + p] = factor * projection[b, p]
        for p in range(k):
            variances[j * k + p] = first[j, p, p] if first.ndim == 3 else first[j, p]
        relu_block(block, j, j, variance, slope, curvature)
        pair = 0
        for a in range(o):
            for e in range(a):
                add_block(pairs, pair, np.float64(above[a, j]) * above[e, j], block)
                pair += 1
            entry = last[a, j, j] if last.ndim == 3 else last[a, j]
            add_block(pairs, pair, np.float64(above[a, j]) * above[a, j] + entry, block)
            pair += 1
