"""Joint updates of several rows, for heads of one or two layers.

What ``joint``, ``smoother`` and ``structures`` define, without the covariance of all rows' hidden units,
``(B n, B n)``, and without that of the weights with each of them, ``(P, B n)``. The first is added up into that of the
outputs a pair of hidden units at a time. Of the second only ``Cov(w, u^L)`` is wanted, which is ``Sigma`` times the
gradients of the mean outputs. So the hidden layer's covariance is read once for any number of rows.

Sizes: ``B`` rows, ``n`` hidden units with ``k`` inputs (bias included), ``o`` outputs, ``P`` weights.
"""

from __future__ import annotations

import math

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.pairs import by_row
from kbt_rl.inference.kernels.rows_dense import between_layers, hidden_dense, outputs_dense
from kbt_rl.inference.kernels.rows_neurons import hidden_neurons, outputs_neurons
from kbt_rl.inference.kernels.terms import Array, MeasureRecord, RowsPass, Shapes, UnitMoments
from kbt_rl.inference.kernels.vectors import normal


@compiled
def _means(weights: Array, inputs: Array) -> Array:
    """``w_j . z~_b``, ``(B o,)``."""
    (o, k), count = weights.shape, inputs.shape[0]
    out = np.empty(count * o)
    for b in range(count):
        for j in range(o):
            total = 0.0
            for p in range(k):
                total += weights[j, p] * inputs[b, p]
            out[b * o + j] = total
    return out


@compiled
def propagate(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes, inputs: Array,
    moments: UnitMoments, o: int,
) -> RowsPass:  # fmt: skip
    """Forward pass of rows ``[z; 1]``, ``(B, k)``, jointly.

    Args:
        mean: ``(P,)``.
        covs: Of each layer, as it is stored.
        first: ``covs[0]``.
        between: ``Cov(w^2, w^1)``, ``(o (n + 1), n k)``; empty unless the structure is ``joint``.
        shapes: See ``Shapes``.
        inputs: Of the first layer.
        moments: Of its units after the ReLU, by ``kernels.unit_moments``; of two layers only.
        o: Outputs.
    """
    count, k = inputs.shape
    cross, variances = np.zeros((count * o, mean.size)), np.empty(mean.size)
    pairs = np.zeros((o * (o + 1) // 2, count, count))
    if len(covs) == 1:
        out_mean = _means(mean.reshape(o, k), inputs)
        if first.ndim == 1:
            outputs_dense(first, shapes[0][2], o, inputs, cross, 0, variances, pairs)
        else:
            outputs_neurons(first, inputs, cross, 0, variances, pairs)
    else:
        n = shapes[0][0]
        hidden, above, activation = n * k, mean[n * k :].reshape(o, n + 1), np.empty((count, n + 1))
        for b in range(count):
            for j in range(n):
                activation[b, j] = moments[0][j, b]
            activation[b, n] = 1.0
        out_mean = _means(above, activation)
        if first.ndim == 1:
            per_row = shapes[1][2]
            hidden_dense(
                first, shapes[0][2], inputs, moments, above, covs[1], per_row, cross, variances, pairs
            )  # fmt: skip
            outputs_dense(covs[1], per_row, o, activation, cross, hidden, variances, pairs)
            if between.size > 0:
                between_layers(between, inputs, activation, moments[2], above, out_mean, cross, pairs)
        else:
            hidden_neurons(first, inputs, moments, above, covs[1], cross, variances, pairs)
            outputs_neurons(covs[1], activation, cross, hidden, variances, pairs)
    return out_mean, by_row(pairs, o), cross, variances


@compiled
def _cholesky(matrix: Array, lost: float) -> bool:
    """``L`` in the lower triangle, in place; False where a pivot is not above ``lost`` times the diagonal entry."""
    size = matrix.shape[0]
    for i in range(size):
        for j in range(i + 1):
            total = matrix[i, j]
            diagonal = total
            for q in range(j):
                total -= matrix[i, q] * matrix[j, q]
            if j < i:
                matrix[i, j] = total / matrix[j, j]
            elif total > lost * diagonal:
                matrix[i, i] = math.sqrt(total)
            else:
                return False
    return True


@compiled
def measure(
    predicted: RowsPass, target: Array, noise_cov: Array, weights: Array, kept: float, lost: float, moved: Array
) -> tuple[bool, MeasureRecord]:
    """``output.measure`` and what it does to the weights, for rows with a Gaussian noise that is known.

    With ``S + R = L L'`` the step of the weights is ``X L^-T (L^-1 e)``, and that of their covariance ``-V V'`` with
    ``V = X L^-T``. So one substitution, of ``X'`` in place, gives both.

    Args:
        predicted: By ``propagate``. Of its parts ``X'``, ``(B o, P)``, becomes ``V'``, the covariance of the outputs
            ``L``, and the variances of the weights those after the step, before it times ``kept``.
        target: ``(B, o)``.
        noise_cov: ``R`` of a row, ``(o, o)``.
        weights: Of the outputs in the sum of squared errors, ``(o,)``.
        kept: See ``record.kept``.
        lost: Relative to the diagonal entry, the smallest pivot that is not rounding.
        moved: Receives the step of the weights, ``(P,)``.

    Returns:
        Whether ``S + R`` could be factorised; if not, only it has changed. And the record.
    """
    mean, cov, cross, variances = predicted
    (count, o), (labels, size) = target.shape, cross.shape
    for b in range(count):
        for j in range(o):
            for i in range(o):
                cov[b * o + j, b * o + i] += noise_cov[j, i]
    if not _cholesky(cov, lost):
        return False, (0.0, 0.0, 0.0, 0.0, 0.0)
    white = np.empty(labels)
    squares = nis = log_det = step = 0.0
    for r in range(size):
        moved[r] = 0.0
        variances[r] *= kept
    for a in range(labels):
        error = target[a // o, a % o] - mean[a]
        squares += weights[a % o] * error * error
        for e in range(a):
            factor = cov[a, e]
            error -= factor * white[e]
            for r in range(size):
                cross[a, r] -= factor * cross[e, r]
        inverse = 1.0 / cov[a, a]
        white[a] = error * inverse
        nis += white[a] * white[a]
        log_det += 2.0 * math.log(cov[a, a])
        for r in range(size):
            move = normal(cross[a, r] * inverse)
            cross[a, r] = move
            moved[r] += white[a] * move
            variances[r] -= move * move
    smallest, total = np.inf, 0.0
    for r in range(size):
        step += moved[r]
        total += variances[r]
        smallest = min(smallest, variances[r])
    # One sum finds any NaN or infinity; inf - inf is NaN.
    return True, (step, squares, nis, log_det, smallest if total - total == 0.0 else total - total)
