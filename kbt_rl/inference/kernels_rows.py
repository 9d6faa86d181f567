"""Joint updates of several rows in machine code (numba), for heads of one or two layers.

As ``kernels``, for rows that are learned together: what ``joint``, ``smoother`` and ``structures`` define, without the
covariance of all rows' hidden units, ``(B n, B n)``, and without that of the weights with each of them, ``(P, B n)``.
The first is added up into that of the outputs a pair of hidden units at a time. Of the second only ``Cov(w, u^L)`` is
wanted, which is ``Sigma`` times the gradients of the mean outputs. So the hidden layer's covariance is read once for
any number of rows. ``tests/test_compiled.py`` holds the two definitions together.

Nothing here calls a function of ``kernels``: numba's cache notices changes in the function's own file only.

Sizes: ``B`` rows, ``n`` hidden units with ``k`` inputs (bias included), ``o`` outputs, ``P`` weights.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]
# Mean (B o,) and covariance (B o, B o) of the outputs, Cov(w, u) transposed (B o, P), the weights' variances (P,).
RowsPass: TypeAlias = tuple[Array, Array, Array, Array]
# The sums of the step of the weights and of the squared errors, the NIS, the log determinant, the smallest variance.
MeasureRecord: TypeAlias = tuple[float, float, float, float, float]
# Of each hidden unit in each row, (n, B): mean and variance of z, the slope Phi, the density over the sd.
UnitMoments: TypeAlias = tuple[Array, Array, Array, Array]
Shapes: TypeAlias = tuple[tuple[int, int, int], ...]

# As in ``kernels``.
_SMALLEST_MOVE = 1e-150

# Sums may be reordered, so that they use vector instructions; NaN and infinity keep their meaning.
_compiled = njit(cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")

# ------------------------------------------------------------------ pairs of outputs


# The covariance of the outputs is added up as (o (o + 1) / 2, B, B): entry [pair, b, c] is Cov(u_bj, u_ci) of the pair
# i <= j, so that the innermost loop is over rows.


@_compiled
def _by_row(pairs: Array, o: int) -> Array:
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


@_compiled
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


@_compiled
def _relu_block(block: Array, j: int, i: int, variance: Array, slope: Array, curvature: Array) -> None:
    """From ``Cov(u_bj, u_ci)`` of two hidden units, ``(B, B)``, to ``Cov(z_bj, z_ci)``, as ``moments.relu_moments``."""
    count = block.shape[0]
    for b in range(count):
        own, bent = slope[j, b], 0.5 * curvature[j, b]
        for c in range(count):
            entry = block[b, c]
            block[b, c] = entry * (own * slope[i, c] + entry * (bent * curvature[i, c]))
        if i == j:
            block[b, b] = variance[j, b]


@_compiled
def _add_block(pairs: Array, pair: int, scale: float, block: Array) -> None:
    count = block.shape[0]
    for b in range(count):
        for c in range(count):
            pairs[pair, b, c] += scale * block[b, c]


@_compiled
def _add_turned_block(pairs: Array, pair: int, scale: float, block: Array) -> None:
    count = block.shape[0]
    for b in range(count):
        for c in range(count):
            pairs[pair, b, c] += scale * block[c, b]


# ------------------------------------------------------------------ full covariance: joint and layer


@_compiled
def _places(n: int, k: int, per_row: int) -> tuple[Array, Array, Array]:
    """Of each neuron in a block triangle: where its rows begin, their length, and the weights in front of its block."""
    starts, widths, before = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    start = 0
    for j in range(n):
        first = (j // per_row) * per_row
        starts[j], widths[j], before[j] = start, min(first + per_row, n) * k, first * k
        start += k * widths[j]
    return starts, widths, before


# Indices that are no loop's own variable could be negative for all numba knows, and what it does about that forbids
# vector instructions; so a neuron's rows are handed on as a matrix of their own.


@_compiled
def _combine(rows: Array, inputs: Array, out: Array) -> None:
    """``out[b, c] = sum_p inputs[b, p] rows[p, c]``, four rows at a time."""
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


@_compiled
def _gather(rows: Array, inputs: Array, gradient: Array, combined: Array, products: Array) -> None:
    """As ``kernels._gather``: ``combined = rows' inputs`` and ``products = rows gradient``."""
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


@_compiled
def _multiply(rows: Array, gradient: Array, products: Array) -> None:
    """``products = rows gradient``, four rows at a time."""
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


@_compiled
def _outputs_dense(
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
        _combine(rows, inputs, combined)
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


@_compiled
def _hidden_dense(
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
    for j in range(n):
        start, width = starts[j], widths[j]
        rows = flat[start : start + k * width].reshape(k, width)
        own = slice(j * k, (j + 1) * k)
        for b in range(count):
            _gather(rows, inputs[b], gradients[b * o], combined[b], cross[b * o, own])
            for a in range(1, o):
                _multiply(rows, gradients[b * o + a], cross[b * o + a, own])
            for a in range(o):
                factor = above[a, j] * slope[j, b]
                for c in range(before[j]):
                    cross[b * o + a, c] += factor * combined[b, c]
        for p in range(k):
            variances[j * k + p] = rows[p, j * k + p]
        for i in range(j + 1):
            _combine(turned, combined[:, i * k : (i + 1) * k], block)
            _relu_block(block, j, i, variance, slope, curvature)
            pair = 0
            for a in range(o):
                begin, length = last_starts[a], last_widths[a]
                for e in range(a + 1):
                    entry = last[begin + j * length + e * (n + 1) + i]
                    _add_block(pairs, pair, above[a, j] * above[e, i] + entry, block)
                    if i < j:
                        entry = last[begin + i * length + e * (n + 1) + j]
                        _add_turned_block(pairs, pair, above[a, i] * above[e, j] + entry, block)
                    pair += 1


@_compiled
def _between_layers(
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
    one_sided = np.zeros((count, count, o, o))
    for b in range(count):
        for c in range(count):
            for j in range(o):
                for q in range(n):
                    turned = 0.0  # Cov(w_j, z_cq) . z~_b
                    for p in range(width):
                        turned += activation[b, p] * shared[c, j * width + p, q]
                    for i in range(o):
                        one_sided[b, c, j, i] += turned * above[i, q]
    facing = np.empty((n, n))
    for c in range(count):
        pair = 0
        for j in range(o):
            for q in range(n):
                for p in range(n):
                    facing[q, p] = shared[c, j * width + p, q]
            for i in range(j + 1):
                for b in range(count):
                    both = 0.0
                    for q in range(n):
                        for p in range(n):
                            both += facing[q, p] * shared[b, i * width + q, p]
                    pairs[pair, b, c] += one_sided[b, c, j, i] + one_sided[c, b, i, j] + both
                pair += 1


# ------------------------------------------------------------------ independent neurons: neuron and diagonal


@_compiled
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


@_compiled
def _outputs_neurons(cov: Array, inputs: Array, cross: Array, column: int, variances: Array, pairs: Array) -> None:
    """As ``_outputs_dense``."""
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


@_compiled
def _hidden_neurons(
    first: Array, inputs: Array, moments: UnitMoments, above: Array, last: Array, cross: Array, variances: Array,
    pairs: Array,
) -> None:  # fmt: skip
    """As ``_hidden_dense``."""
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
        _relu_block(block, j, j, variance, slope, curvature)
        pair = 0
        for a in range(o):
            for e in range(a):
                _add_block(pairs, pair, above[a, j] * above[e, j], block)
                pair += 1
            entry = last[a, j, j] if last.ndim == 3 else last[a, j]
            _add_block(pairs, pair, above[a, j] * above[a, j] + entry, block)
            pair += 1


# ------------------------------------------------------------------ any head of one or two layers


@_compiled
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
            _outputs_dense(first, shapes[0][2], o, inputs, cross, 0, variances, pairs)
        else:
            _outputs_neurons(first, inputs, cross, 0, variances, pairs)
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
            _hidden_dense(
                first, shapes[0][2], inputs, moments, above, covs[1], per_row, cross, variances, pairs
            )  # fmt: skip
            _outputs_dense(covs[1], per_row, o, activation, cross, hidden, variances, pairs)
            if between.size > 0:
                _between_layers(between, inputs, activation, moments[2], above, out_mean, cross, pairs)
        else:
            _hidden_neurons(first, inputs, moments, above, covs[1], cross, variances, pairs)
            _outputs_neurons(covs[1], activation, cross, hidden, variances, pairs)
    return out_mean, _by_row(pairs, o), cross, variances


# ------------------------------------------------------------------ from the outputs' labels to the weights


@_compiled
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


@_compiled
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
            move = cross[a, r] * inverse
            move = move if abs(move) > _SMALLEST_MOVE else 0.0
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
