"""From the step of the outputs to that of the weights, and taking it: ``structures`` and ``triangle.downdate_``."""

from __future__ import annotations

import math

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.neurons import downdate_neurons
from kbt_rl.inference.kernels.terms import FARTHEST, LARGEST, Array, ScalarRecord, Shapes
from kbt_rl.inference.kernels.vectors import axpy, dot, normal, smallest_of, sum_of


@compiled
def weight_step(
    cross: Array, variances: Array, mean_step: Array, factor: Array, signs: Array, kept: float
) -> tuple[Array, Array, float, float]:
    """What ``dm`` ``(o,)`` and ``dC = F diag(signs) F'``, ``F`` ``(o, q)``, do to the weights.

    Returns:
        ``X dm`` ``(P,)``, ``(X F)'`` ``(q, P)``, the sum of ``X dm``, and the smallest of ``kept`` times a weight's
        variance plus its change; NaN if any is.
    """
    o, total = cross.shape
    moved, moves = np.zeros(total), np.zeros((signs.size, total))
    for j in range(o):
        axpy(moved, mean_step[j], cross[j])
        for q in range(signs.size):
            axpy(moves[q], factor[j, q], cross[j])
    after = np.empty(total)
    for r in range(total):
        after[r] = kept * variances[r]
        for q in range(signs.size):
            moves[q, r] = normal(moves[q, r])
            after[r] += signs[q] * moves[q, r] * moves[q, r]
    return moved, moves, sum_of(moved), smallest_of(after)


@compiled
def scalar_step(
    mean: float, variance: float, cross: Array, variances: Array, inputs: Array, label: float, noise: float,
    replacing: bool, kept: float, resolved: bool, moved: Array, moves: Array, signs: Array,
) -> ScalarRecord:  # fmt: skip
    """``output.measure`` or ``output.replace`` and ``weight_step`` for one output.

    Args:
        mean: Of the output.
        variance: Of the output.
        cross: ``Cov(w, u)``, ``(P,)``.
        variances: Of the weights before, ``(P,)``; afterwards ``kept`` times that plus the change.
        inputs: ``[z; 1]``; the general way refuses large ones.
        label: In the head's own units.
        noise: Variance of the label.
        replacing: Whether the rule is ``replace``.
        kept: See ``record.kept``.
        resolved: Whether the posterior needs no repair before this step.
        moved: Receives ``X dm``, ``(P,)``.
        moves: Receives ``(X F)'``, ``(1, P)``.
        signs: Receives the sign of ``dC``, ``(1,)``.

    Returns:
        The record, whose ``done`` says whether the step may be taken.
    """
    inverted = variance if replacing else variance + noise
    # dC = S^-1 (Sigma_data - S) S^-1 for `replace`, -(S + R)^-1 for `measure`.
    change = (noise - inverted) / (inverted * inverted) if replacing else -1.0 / inverted
    error, root = label - mean, math.sqrt(abs(change))
    gain = error / inverted
    for r in range(variances.size):
        move = root * cross[r]
        moved[r] = gain * cross[r]
        moves[0, r] = normal(move)
        variances[r] = kept * variances[r] + change * (cross[r] * cross[r])
    step, smallest = sum_of(moved), smallest_of(variances)
    # One sum finds any NaN or infinity; inf - inf is NaN.
    total = step + gain * gain + variance
    near = error * error <= FARTHEST * FARTHEST * (variance + noise)
    moderate = variance <= LARGEST * LARGEST and abs(label) <= LARGEST and dot(inputs, inputs) <= LARGEST * LARGEST
    done = (
        resolved
        and moderate
        and near
        and inverted > 0.0
        and smallest >= 0.0
        and total - total == 0.0
        and abs(step) <= LARGEST
    )
    signs[0] = math.copysign(1.0, change)
    return mean, variance, smallest, 1.0 if done else 0.0


@compiled
def _downdate_triangle(flat: Array, factor: Array, start: int, signs: Array, n: int, k: int, per_row: int) -> None:
    """``triangle.downdate_`` for ``factor`` of shape ``(q, P)``, whose columns of this layer begin at ``start``."""
    offset, first = 0, 0
    while first < n:
        last = min(first + per_row, n)
        width = last * k
        for r in range(first * k, width):
            row = flat[offset : offset + width]
            for q in range(signs.size):
                own = factor[q, start : start + width]
                axpy(row, signs[q] * own[r], own)
            offset += width
        first = last


@compiled
def _commit_dense(covs: tuple[Array, ...], between: Array, shapes: Shapes, moves: Array, signs: Array) -> None:
    start = np.int64(0)
    for depth in range(len(covs)):
        n, k, per_row = shapes[depth]
        _downdate_triangle(covs[depth], moves, start, signs, n, k, per_row)
        start += n * k
    above = start - between.shape[0]
    for r in range(between.shape[0]):
        for q in range(signs.size):
            axpy(between[r], signs[q] * moves[q, above + r], moves[q, :above])


@compiled
def _commit_neurons(covs: tuple[Array, ...], moves: Array, signs: Array) -> None:
    """What is not stored is dropped."""
    start = 0
    for cov in covs:
        stop = start + cov.shape[0] * cov.shape[1]
        for q in range(signs.size):
            downdate_neurons(cov, moves[q, start:stop], signs[q])
        start = stop


@compiled
def commit(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes,
    moved: Array, moves: Array, signs: Array,
) -> None:  # fmt: skip
    """Apply a step in one call, which no signal handler can interrupt."""
    axpy(mean, 1.0, moved)
    if first.ndim == 1:
        _commit_dense(covs, between, shapes, moves, signs)
    else:
        _commit_neurons(covs, moves, signs)
