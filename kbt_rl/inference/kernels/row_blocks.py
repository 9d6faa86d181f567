"""The rows of a covariance that belong to one neuron, ``(k, width)``, times vectors from either side.

Four rows at a time. An index that is no loop's own variable could be negative for all numba knows, and what it does
about that forbids vector instructions; so a neuron's rows come as a matrix of their own, and each function here is
written out: what they have in common would be given four rows and an index, which takes 1.2 to 2 times as long.
"""

from __future__ import annotations

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.terms import Array


@compiled
def gather(rows: Array, inputs: Array, gradient: Array, combined: Array, products: Array) -> None:
    """``combined = rows' inputs`` and ``products = rows gradient``, by one reading of the rows."""
    k, width = rows.shape
    whole = k - k % 4
    for c in range(width):
        combined[c] = 0.0
    for p in range(0, whole, 4):
        x0, x1, x2, x3 = inputs[p], inputs[p + 1], inputs[p + 2], inputs[p + 3]
        t0 = t1 = t2 = t3 = 0.0
        for c in range(width):
            combined[c] += x0 * rows[p, c] + x1 * rows[p + 1, c] + x2 * rows[p + 2, c] + x3 * rows[p + 3, c]
        for c in range(width):
            g = gradient[c]
            t0 += rows[p, c] * g
            t1 += rows[p + 1, c] * g
            t2 += rows[p + 2, c] * g
            t3 += rows[p + 3, c] * g
        products[p], products[p + 1], products[p + 2], products[p + 3] = t0, t1, t2, t3
    for p in range(whole, k):
        x0, t0 = inputs[p], 0.0
        for c in range(width):
            combined[c] += x0 * rows[p, c]
        for c in range(width):
            t0 += rows[p, c] * gradient[c]
        products[p] = t0


@compiled
def combine(rows: Array, inputs: Array, out: Array) -> None:
    """``out[b, c] = sum_p inputs[b, p] rows[p, c]``."""
    k, width = rows.shape
    whole = k - k % 4
    for b in range(inputs.shape[0]):
        for c in range(width):
            out[b, c] = 0.0
        for p in range(0, whole, 4):
            x0, x1, x2, x3 = inputs[b, p], inputs[b, p + 1], inputs[b, p + 2], inputs[b, p + 3]
            for c in range(width):
                out[b, c] += x0 * rows[p, c] + x1 * rows[p + 1, c] + x2 * rows[p + 2, c] + x3 * rows[p + 3, c]
        for p in range(whole, k):
            x0 = inputs[b, p]
            for c in range(width):
                out[b, c] += x0 * rows[p, c]


@compiled
def multiply(rows: Array, gradient: Array, products: Array) -> None:
    """``products = rows gradient``."""
    k, width = rows.shape
    whole = k - k % 4
    for p in range(0, whole, 4):
        t0 = t1 = t2 = t3 = 0.0
        for c in range(width):
            g = gradient[c]
            t0 += rows[p, c] * g
            t1 += rows[p + 1, c] * g
            t2 += rows[p + 2, c] * g
            t3 += rows[p + 3, c] * g
        products[p], products[p + 1], products[p + 2], products[p + 3] = t0, t1, t2, t3
    for p in range(whole, k):
        t0 = 0.0
        for c in range(width):
            t0 += rows[p, c] * gradient[c]
        products[p] = t0
