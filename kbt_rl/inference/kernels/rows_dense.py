"""What layers with a full covariance add for several rows: ``joint`` and ``layer``."""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.pairs import add_block, relu_block
from kbt_rl.inference.kernels.row_blocks import combine, gather, multiply
from kbt_rl.inference.kernels.terms import Array, UnitMoments
from kbt_rl.inference.kernels.vectors import dot


@compiled
def _places(n: int, k: int, per_row: int) -> tuple[Array, Array, Array]:
    """Of each neuron in a block triangle: where its rows begin, their length, and the weights in front of its block."""
    starts, widths, before = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    start = 0
    for j in range(n):
        first = (j // per_row) * per_row
        starts[j], widths[j], before[j] = start, min(first + per_row, n) * k, first * k
        start += k * widths[j]
    return starts, widths, before


@compiled
def outputs_dense(
    flat: Array, per_row: int, o: int, inputs: Array, cross: Array, column: int, variances: Array, pairs: Array
) -> None:
    """What the weights of the last layer add: ``Sigma (I (x) z~_b)`` to ``cross``, ``z~_b' Sigma_ji z~_c`` to pairs."""
    count, k = inputs.shape
    starts, widths, before = _places(o, k, per_row)
    combined = np.empty((count, o * k))
    pair = 0
    for j in range(o):
        start, width = starts[j], widths[j]
        rows = flat[start : start + k * width].reshape(k, width)
        combine(rows, inputs, combined)
        for b in range(count):
            for c in range(before[j]):
                cross[b * o + j, column + c] += combined[b, c]
            for i in range(width // k):
                for p in range(k):
                    total = 0.0
                    for q in range(k):
                        total += rows[p, i * k + q] * inputs[b, q]
                    cross[b * o + i, column + j * k + p] += total
        for i in range(j + 1):
            for b in range(count):
                for c in range(count):
                    total = 0.0
                    for p in range(k):
                        total += combined[b, i * k + p] * inputs[c, p]
                    pairs[pair, b, c] += total
            pair += 1
        for p in range(k):
            variances[column + j * k + p] = rows[p, j * k + p]


@compiled
def hidden_dense(
    flat: Array, per_row: int, inputs: Array, moments: UnitMoments, above: Array, last: Array, per_row_last: int,
    cross: Array, variances: Array, pairs: Array,
) -> None:  # fmt: skip
    """What the hidden layer adds to ``cross``, ``(B o, P)``, and to pairs, by one reading of its covariance.

    ``above`` ``(o, n + 1)`` are the mean weights of the last layer, ``last`` their covariance.
    """
    _, variance, slope, curvature = moments
    (count, k), (o, width_above) = inputs.shape, above.shape
    n = width_above - 1
    starts, widths, before = _places(n, k, per_row)
    last_starts, last_widths, _ = _places(o, n + 1, per_row_last)
    turned = np.ascontiguousarray(inputs.T)
    # The gradients of the mean outputs with respect to the hidden weights.
    gradients = np.empty((count * o, n * k))
    for b in range(count):
        for j in range(o):
            for i in range(n):
                for p in range(k):
                    gradients[b * o + j, i * k + p] = above[j, i] * slope[i, b] * inputs[b, p]
    combined, block = np.empty((count, n * k)), np.empty((count, count))
    facing = np.zeros_like(pairs)  # what is added to pairs with its rows exchanged
    for j in range(n):
        start, width = starts[j], widths[j]
        rows = flat[start : start + k * width].reshape(k, width)
        own = slice(j * k, (j + 1) * k)
        for b in range(count):
            gather(rows, inputs[b], gradients[b * o], combined[b], cross[b * o, own])
            for a in range(1, o):
                multiply(rows, gradients[b * o + a], cross[b * o + a, own])
            for a in range(o):
                factor = above[a, j] * slope[j, b]
                for c in range(before[j]):
                    cross[b * o + a, c] += factor * combined[b, c]
        for p in range(k):
            variances[j * k + p] = rows[p, j * k + p]
        for i in range(j + 1):
            combine(turned, combined[:, i * k : (i + 1) * k], block)
            relu_block(block, j, i, variance, slope, curvature)
            pair = 0
            for a in range(o):
                begin, length = last_starts[a], last_widths[a]
                for e in range(a + 1):
                    entry = last[begin + j * length + e * (n + 1) + i]
                    add_block(pairs, pair, np.float64(above[a, j]) * above[e, i] + entry, block)
                    if i < j:
                        entry = last[begin + i * length + e * (n + 1) + j]
                        add_block(facing, pair, np.float64(above[a, i]) * above[e, j] + entry, block)
                    pair += 1
    for pair in range(pairs.shape[0]):
        add_block(pairs, pair, 1.0, facing[pair].T)


@compiled
def between_layers(
    between: Array,
    inputs: Array,
    activation: Array,
    slope: Array,
    above: Array,
    mean: Array,
    cross: Array,
    pairs: Array,
) -> None:  # fmt: skip
    """What ``Cov(w^2, w^1)``, ``(o (n + 1), n k)``, adds to the mean, to ``cross`` and to pairs, see ``joint``."""
    (count, k), (o, width) = inputs.shape, above.shape
    n, hidden = width - 1, between.shape[1]
    shared = np.empty((count, o * width, n))  # Cov(w^2, z_bq)
    for b in range(count):
        for r in range(o * width):
            j, p = r // width, r % width
            for q in range(n):
                total = 0.0
                for s in range(k):
                    total += between[r, q * k + s] * inputs[b, s]
                shared[b, r, q] = total * slope[q, b]
            if p < n:
                mean[b * o + j] += shared[b, r, p]
            for c in range(hidden):
                cross[b * o + j, c] += activation[b, p] * between[r, c]
            for a in range(o):
                total = 0.0
                for q in range(n):
                    total += above[a, q] * shared[b, r, q]
                cross[b * o + a, hidden + r] += total
    one_sided, turned = np.zeros((count, count, o, o)), np.empty((count, n))
    for c in range(count):
        for j in range(o):
            combine(shared[c, j * width : (j + 1) * width], activation, turned)  # Cov(w_j, z_c) . z~_b
            for b in range(count):
                for i in range(o):
                    one_sided[b, c, j, i] = dot(turned[b], above[i, :n])
    facing = np.empty((n, n))
    for c in range(count):
        pair = 0
        for j in range(o):
            for q in range(n):
                for p in range(n):
                    facing[q, p] = shared[c, j * width + p, q]
            for i in range(j + 1):
                for b in range(count):
                    both = dot(shared[b, i * width : i * width + n].reshape(n * n), facing.reshape(n * n))
                    pairs[pair, b, c] += one_sided[b, c, j, i] + one_sided[c, b, i, j] + both
                pair += 1
