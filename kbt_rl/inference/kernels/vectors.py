"""Products and sums of short vectors."""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.terms import SMALLEST_MOVE, Array


@compiled
def dot(left: Array, right: Array) -> float:
    """``left . right``."""
    total = 0.0
    for i in range(left.size):
        total += left[i] * right[i]
    return total


@compiled
def row_dots(row: Array, inputs: Array, stop: int, out: Array, column: int) -> None:
    """``out[j, column] = row_j . inputs`` for the first ``stop`` segments of a row."""
    k = inputs.size
    for j in range(stop):
        total = 0.0
        for q in range(k):
            total += row[j * k + q] * inputs[q]
        out[j, column] = total


@compiled
def matvec(matrix: Array, vector: Array) -> Array:
    """The product; written out, as all loops here are, since an array expression takes ten times as long to compile."""
    out = np.empty(matrix.shape[0])
    for i in range(out.size):
        out[i] = dot(matrix[i], vector)
    return out


@compiled
def axpy(row: Array, scale: float, vector: Array) -> None:
    """``row += scale vector``."""
    for c in range(row.size):
        row[c] += scale * vector[c]


@compiled
def copy(values: Array, out: Array) -> None:
    """``out = values``."""
    for i in range(values.size):
        out[i] = values[i]


@compiled
def with_one(values: Array) -> Array:
    """``[z; 1]``."""
    out = np.empty(values.size + 1)
    for i in range(values.size):
        out[i] = values[i]
    out[values.size] = 1.0
    return out


@compiled
def sum_of(values: Array) -> float:
    """The sum of the entries."""
    total = 0.0
    for value in values:
        total += value
    return total


@compiled
def smallest_of(values: Array) -> float:
    """The smallest entry, or a negative one if there is any; NaN if there is one or infinity."""
    bits = values.view(np.int64)
    smallest, total = bits[0], 0.0
    for i in range(values.size):
        # The bits of floats that are not negative are in the order of the floats, those of the others are negative;
        # and what may be done with the minimum of integers on several at a time, NaN forbids for that of floats.
        smallest = bits[i] if bits[i] < smallest else smallest
        total += values[i]
    found: float = np.int64(smallest).view(np.float64) if total - total == 0.0 else total - total
    return found


@compiled
def normal(move: float) -> float:
    """The move, or 0 where products of such moves leave float64's normal range: arithmetic is slow there."""
    return move if abs(move) > SMALLEST_MOVE else 0.0


@compiled
def is_finite(values: Array) -> bool:
    """Whether the sum of the entries is, and so each of them."""
    total = sum_of(values)
    found: bool = total - total == 0.0
    return found
