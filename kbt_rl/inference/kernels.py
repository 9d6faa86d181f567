"""The forward pass and the update of one row in machine code (numba), for heads of one or two layers.

A head's update takes a few tens of microseconds of arithmetic; calling a tensor library dozens of times for it takes
ten times as long. These functions restate, for one row, what ``joint``, ``smoother``, ``structures``, ``triangle`` and
``moments`` define for any number of rows and layers; ``tests/test_compiled.py`` holds the two together. They allocate
nothing of the covariance's size and read it once. They share one file because numba's cache of a compiled function
notices changes in the function's own file only.

Sizes: ``n`` hidden units with ``k`` inputs (bias included), ``o`` outputs, ``P`` weights.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]
# Mean (o,) and covariance (o, o) of the output, Cov(w, u) transposed (o, P), and the variance of each weight (P,).
RowPass: TypeAlias = tuple[Array, Array, Array, Array]
# Mean and variance of the output before the update, the smallest variance of a weight after it, and 1 if it was done.
ScalarRecord: TypeAlias = tuple[float, float, float, float]
# Neurons, inputs with bias, and neurons a block row (see ``triangle``) of each layer.
Shapes: TypeAlias = tuple[tuple[int, int, int], ...]

_INV_SQRT2 = 1.0 / math.sqrt(2.0)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
# As in ``moments``: below and beyond these a ratio or its square leaves float64.
_SMALLEST_SD = math.sqrt(np.finfo(np.float64).tiny)
_FAR = 0.5 * math.sqrt(np.finfo(np.float64).max)

# The moves of a neuron that is all but switched off are smaller; their products would be subnormal numbers.
_SMALLEST_MOVE = 1e-150

# Sums may be reordered, so that they use vector instructions; NaN and infinity keep their meaning.
_compiled = njit(cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")


# ------------------------------------------------------------------ one layer's own covariance


@_compiled
def _row_dots(row: Array, inputs: Array, stop: int, out: Array, column: int) -> None:
    """``out[j, column] = row_j . inputs`` for the first ``stop`` segments of a row."""
    k = inputs.size
    for j in range(stop):
        total = 0.0
        for q in range(k):
            total += row[j * k + q] * inputs[q]
        out[j, column] = total


@_compiled
def _project_triangle(
    flat: Array, inputs: Array, n: int, per_row: int, out: Array, start: int, variances: Array
) -> None:
    """``triangle.project``, transposed: ``out[j, start + r] = Cov(w_r, u_j)``; on the way ``triangle.diagonal``."""
    k, offset, first = inputs.size, 0, 0
    while first < n:
        last = min(first + per_row, n)
        before, width = first * k, last * k
        for a in range(first, last):
            above = out[a, start : start + before]
            for c in range(before):
                above[c] = 0.0
            for p in range(k):
                row = flat[offset : offset + width]
                for c in range(before):
                    above[c] += inputs[p] * row[c]
                _row_dots(row, inputs, last, out, start + a * k + p)
                variances[start + a * k + p] = row[a * k + p]
                offset += width
        first = last


@_compiled
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
                _axpy(row, signs[q] * own[r], own)
            offset += width
        first = last


@_compiled
def _copy(values: Array, out: Array) -> None:
    for i in range(values.size):
        out[i] = values[i]


@_compiled
def _axpy(row: Array, scale: float, vector: Array) -> None:
    for c in range(row.size):
        row[c] += scale * vector[c]


# ------------------------------------------------------------------ ReLU


@_compiled
def _relu_unit(mean: float, variance: float) -> tuple[float, float, float, float]:
    """Mean and variance of ``relu(u)``, the slope ``Phi``, and the density over the sd for the covariance series."""
    sd = math.sqrt(variance)
    if sd < _SMALLEST_SD:
        sd = _SMALLEST_SD
    ratio = mean / sd
    if ratio > _FAR:
        ratio = _FAR
    elif ratio < -_FAR:
        ratio = -_FAR
    upper, lower = 0.5 * math.erfc(-ratio * _INV_SQRT2), 0.5 * math.erfc(ratio * _INV_SQRT2)
    density = math.exp(-0.5 * ratio * ratio) * _INV_SQRT_2PI
    spread = upper + ratio * (ratio * (upper * lower) - density * (upper - lower)) - density * density
    if spread < 0.0:
        spread = 0.0
    return mean * upper + sd * density, variance * spread, upper, density / sd


@_compiled
def _relu_dense(mean: Array, cov: Array) -> tuple[Array, Array, Array]:
    """``moments.relu_moments`` with a series of two terms: mean, covariance, slope."""
    n = mean.size
    out_mean, out_cov, slope, curvature = np.empty(n), np.empty((n, n)), np.empty(n), np.empty(n)
    for j in range(n):
        out_mean[j], out_cov[j, j], slope[j], curvature[j] = _relu_unit(mean[j], cov[j, j])
        for i in range(j):
            entry = cov[j, i]
            entry *= slope[j] * slope[i] + 0.5 * entry * (curvature[j] * curvature[i])
            out_cov[j, i] = out_cov[i, j] = entry
    return out_mean, out_cov, slope


# ------------------------------------------------------------------ full covariance: joint and layer


@_compiled
def _with_one(values: Array) -> Array:
    """``[z; 1]``."""
    out = np.empty(values.size + 1)
    for i in range(values.size):
        out[i] = values[i]
    out[values.size] = 1.0
    return out


@_compiled
def _dot(left: Array, right: Array) -> float:
    total = 0.0
    for i in range(left.size):
        total += left[i] * right[i]
    return total


@_compiled
def _matvec(matrix: Array, vector: Array) -> Array:
    """The product; written out, as all loops here are, since an array expression takes ten times as long to compile."""
    out = np.empty(matrix.shape[0])
    for i in range(out.size):
        out[i] = _dot(matrix[i], vector)
    return out


@_compiled
def _logits_cov(projection: Array, inputs: Array, start: int) -> Array:
    """``z~' Sigma_ji z~`` from ``Sigma (I (x) z~)``, whose columns of this layer begin at ``start``; ``(n, n)``."""
    n, k = projection.shape[0], inputs.size
    out = np.empty((n, n))
    for j in range(n):
        own = slice(start + j * k, start + (j + 1) * k)
        for i in range(j + 1):
            out[j, i] = out[i, j] = _dot(projection[i, own], inputs)
    return out


@_compiled
def _linear_dense(mean: Array, cov: Array, features: Array, o: int, per_row: int) -> RowPass:
    """One layer, see ``RowPass``."""
    inputs = _with_one(features)
    cross, variances = np.empty((o, mean.size)), np.empty(mean.size)
    _project_triangle(cov, inputs, o, per_row, cross, 0, variances)
    return _matvec(mean.reshape(o, inputs.size), inputs), _logits_cov(cross, inputs, 0), cross, variances


@_compiled
def _two_layers_dense(
    mean: Array,
    first: Array,
    last: Array,
    between: Array,
    features: Array,
    o: int,
    per_row_first: int,
    per_row_last: int,
    projection: Array,
) -> RowPass:
    """Two layers, see ``RowPass``.

    ``between`` is ``Cov(w^2, w^1)``, ``(o (n+1), n k)``, or empty for ``layer``. ``projection`` is memory for
    ``Cov(theta, u^1)`` transposed, ``(n, P)``, for ``layer`` ``(n, n k)``: allocated anew it would take longer to
    provide than to fill.
    """
    k = features.size + 1
    n = (mean.size - o) // (k + o)
    hidden, coupled = n * k, between.size > 0
    inputs, weights = _with_one(features), mean[hidden:].reshape(o, n + 1)

    variances = np.empty(mean.size)
    _project_triangle(first, inputs, n, per_row_first, projection, 0, variances)
    z_mean, z_cov, slope = _relu_dense(_matvec(mean[:hidden].reshape(n, k), inputs), _logits_cov(projection, inputs, 0))

    activation = _with_one(z_mean)
    cross = np.zeros((o, mean.size))
    for r in range(between.shape[0]):
        _row_dots(between[r], inputs, n, projection, hidden + r)
        _axpy(cross[r // (n + 1), :hidden], activation[r % (n + 1)], between[r])
    _project_triangle(last, activation, o, per_row_last, cross, hidden, variances)
    out_mean = _matvec(weights, activation)
    out_cov = _logits_cov(cross, activation, hidden)
    _add_input_part(out_cov, weights, last, z_cov, per_row_last)
    if coupled:
        for q in range(n):  # Cov(w^2, z), by Stein's lemma
            for r in range(hidden, mean.size):
                projection[q, r] *= slope[q]
        _add_coupled_part(out_mean, out_cov, weights, projection[:, hidden:], activation)
        for j in range(o):
            for q in range(n):
                _axpy(cross[j, hidden:], weights[j, q], projection[q, hidden:])
    for j in range(o):
        for q in range(n):
            _axpy(cross[j, :hidden], weights[j, q] * slope[q], projection[q, :hidden])
    return out_mean, out_cov, cross, variances


@_compiled
def _add_input_part(out_cov: Array, weights: Array, cov: Array, z_cov: Array, per_row: int) -> None:
    """Add ``w_j' Cov(z) w_i + trace(Sigma_ji Cov(z))``, Eqs. (20), (21)."""
    o, k = weights.shape
    n = k - 1
    offset, start = 0, 0
    while start < o:
        stop = min(start + per_row, o)
        width = stop * k
        for j in range(start, stop):
            for i in range(j + 1):
                total = 0.0
                for p in range(n):
                    row = cov[offset + p * width + i * k : offset + p * width + i * k + n]
                    total += _dot(row, z_cov[p]) + weights[j, p] * _dot(weights[i, :n], z_cov[p])
                out_cov[j, i] += total
                if i < j:
                    out_cov[i, j] += total
            offset += k * width
        start = stop


@_compiled
def _add_coupled_part(out_mean: Array, out_cov: Array, weights: Array, shared: Array, activation: Array) -> None:
    """Add what ``Cov(w_jp, z_q) = shared[q, j k + p]`` makes of mean and covariance (``joint._product_cov``)."""
    o, k = weights.shape
    n = k - 1
    one_sided = np.zeros((o, o))
    for j in range(o):
        for q in range(n):
            out_mean[j] += shared[q, j * k + q]
            turned = _dot(shared[q, j * k : (j + 1) * k], activation)
            for i in range(o):
                one_sided[j, i] += turned * weights[i, q]
    for j in range(o):
        for i in range(o):
            both = 0.0
            for p in range(n):
                for q in range(n):
                    both += shared[q, j * k + p] * shared[p, i * k + q]
            out_cov[j, i] += one_sided[j, i] + one_sided[i, j] + both


# ------------------------------------------------------------------ independent neurons: neuron and diagonal


@_compiled
def _project_neurons(cov: Array, inputs: Array, out: Array, variances: Array) -> None:
    """``Sigma_j z~`` and variances of each neuron, ``(n, k)``, for blocks ``(n, k, k)`` or variances ``(n, k)``."""
    for j in range(cov.shape[0]):
        for p in range(inputs.size):
            if cov.ndim == 3:
                out[j, p], variances[j, p] = _dot(cov[j, p], inputs), cov[j, p, p]
            else:
                out[j, p], variances[j, p] = cov[j, p] * inputs[p], cov[j, p]


@_compiled
def _linear_neurons(mean: Array, cov: Array, features: Array, o: int) -> RowPass:
    """As ``_linear_dense``, for independent neurons."""
    inputs = _with_one(features)
    k = inputs.size
    projection, cross, out_cov = np.empty((o, k)), np.zeros((o, mean.size)), np.zeros((o, o))
    variances = np.empty(mean.size)
    _project_neurons(cov, inputs, projection, variances.reshape(o, k))
    for j in range(o):
        _axpy(cross[j, j * k : (j + 1) * k], 1.0, projection[j])
        out_cov[j, j] = _dot(projection[j], inputs)
    return _matvec(mean.reshape(o, k), inputs), out_cov, cross, variances


@_compiled
def _two_layers_neurons(mean: Array, first: Array, last: Array, features: Array, o: int) -> RowPass:
    """As ``_two_layers_dense``, for independent neurons."""
    inputs = _with_one(features)
    n, k = first.shape[0], inputs.size
    hidden = n * k
    weights = mean[hidden:].reshape(o, n + 1)
    projection, slope, variances = np.empty((n, k)), np.empty(n), np.empty(mean.size)
    _project_neurons(first, inputs, projection, variances[:hidden].reshape(n, k))
    logits = _matvec(mean[:hidden].reshape(n, k), inputs)
    activation, z_variance = np.empty(n + 1), np.empty(n)
    activation[n] = 1.0
    for j in range(n):
        activation[j], z_variance[j], slope[j], _ = _relu_unit(logits[j], _dot(projection[j], inputs))

    above = np.empty((o, n + 1))
    _project_neurons(last, activation, above, variances[hidden:].reshape(o, n + 1))
    cross, out_cov = np.zeros((o, mean.size)), np.empty((o, o))
    for j in range(o):
        for q in range(n):
            _axpy(cross[j, q * k : (q + 1) * k], weights[j, q] * slope[q], projection[q])
        _axpy(cross[j, hidden + j * (n + 1) : hidden + (j + 1) * (n + 1)], 1.0, above[j])
        for i in range(j + 1):
            total = 0.0
            for q in range(n):
                total += weights[j, q] * weights[i, q] * z_variance[q]
            out_cov[j, i] = out_cov[i, j] = total
        out_cov[j, j] += _dot(above[j], activation)
        for q in range(n):
            out_cov[j, j] += z_variance[q] * (last[j, q, q] if last.ndim == 3 else last[j, q])
    return _matvec(weights, activation), out_cov, cross, variances


# ------------------------------------------------------------------ from the output's step to the weights


@_compiled
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
        _axpy(moved, mean_step[j], cross[j])
        for q in range(signs.size):
            _axpy(moves[q], factor[j, q], cross[j])
    after = np.empty(total)
    for r in range(total):
        after[r] = kept * variances[r]
        for q in range(signs.size):
            moves[q, r] = _normal(moves[q, r])
            after[r] += signs[q] * moves[q, r] * moves[q, r]
    return moved, moves, _sum(moved), _smallest(after)


@_compiled
def _normal(move: float) -> float:
    """The move, or 0 where products of such moves leave float64's normal range: arithmetic is slow there."""
    return move if abs(move) > _SMALLEST_MOVE else 0.0


@_compiled
def _sum(values: Array) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


@_compiled
def _smallest(values: Array) -> float:
    """The smallest entry; NaN if there is one."""
    smallest = np.inf
    for value in values:
        if not value >= smallest:  # taken by a NaN as well
            smallest = value
            if value != value:
                break
    return smallest


@_compiled
def _scalar_step(
    row: RowPass, label: float, noise: float, replacing: bool, kept: float
) -> tuple[ScalarRecord, float, Array, Array]:
    """``output.measure`` or ``output.replace`` and ``weight_step`` for one output.

    Returns:
        The record, whose ``done`` says whether the step may be taken; the sign of ``dC``; ``X dm`` ``(P,)``; and
        ``(X F)'`` ``(1, P)``.
    """
    mean, variance = row[0][0], row[1][0, 0]
    cross, variances = row[2][0], row[3]
    inverted = variance if replacing else variance + noise
    # dC = S^-1 (Sigma_data - S) S^-1 for `replace`, -(S + R)^-1 for `measure`.
    change = (noise - inverted) / (inverted * inverted) if replacing else -1.0 / inverted
    gain, root = (label - mean) / inverted, math.sqrt(abs(change))
    moved, moves = np.empty(variances.size), np.empty((1, variances.size))
    after = np.empty(variances.size)
    for r in range(variances.size):
        moved[r] = gain * cross[r]
        moves[0, r] = _normal(root * cross[r])
        after[r] = kept * variances[r] + change * cross[r] * cross[r]
    smallest = _smallest(after)
    # One sum finds any NaN or infinity; inf - inf is NaN.
    total = _sum(moved) + gain * gain + variance
    done = inverted > 0.0 and smallest >= 0.0 and total - total == 0.0
    return (mean, variance, smallest, 1.0 if done else 0.0), math.copysign(1.0, change), moved, moves


@_compiled
def _commit_dense(covs: tuple[Array, ...], between: Array, shapes: Shapes, moves: Array, signs: Array) -> None:
    start = 0
    for depth in range(len(covs)):
        n, k, per_row = shapes[depth]
        _downdate_triangle(covs[depth], moves, start, signs, n, k, per_row)
        start += n * k
    above = start - between.shape[0]
    for r in range(between.shape[0]):
        for q in range(signs.size):
            _axpy(between[r], signs[q] * moves[q, above + r], moves[q, :above])


@_compiled
def _downdate_neurons(cov: Array, moves: Array, start: int, signs: Array) -> None:
    k = cov.shape[1]
    for j in range(cov.shape[0]):
        for q in range(signs.size):
            own = moves[q, start + j * k : start + (j + 1) * k]
            for p in range(k):
                if cov.ndim == 3:
                    _axpy(cov[j, p], signs[q] * own[p], own)
                else:
                    cov[j, p] += signs[q] * own[p] * own[p]


@_compiled
def _commit_neurons(covs: tuple[Array, ...], moves: Array, signs: Array) -> None:
    """What is not stored is dropped."""
    start = 0
    for cov in covs:
        _downdate_neurons(cov, moves, start, signs)
        start += cov.shape[0] * cov.shape[1]


# ------------------------------------------------------------------ any head of one or two layers


# numba compiles only the branch that the types leave: a triangle is flat, blocks of neurons are not.
@_compiled
def propagate(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes, workspace: Array,
    features: Array, o: int,
) -> RowPass:  # fmt: skip
    """Forward pass of a row ``(d,)``; ``first`` is ``covs[0]``, the rest as in ``_two_layers_dense``."""
    row: RowPass
    if first.ndim == 1:
        if len(covs) == 2:
            per_row = shapes[0][2], shapes[1][2]
            row = _two_layers_dense(mean, first, covs[1], between, features, o, per_row[0], per_row[1], workspace)
        else:
            row = _linear_dense(mean, first, features, o, shapes[0][2])
    elif len(covs) == 2:
        row = _two_layers_neurons(mean, first, covs[1], features, o)
    else:
        row = _linear_neurons(mean, first, features, o)
    return row


@_compiled
def commit(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes,
    moved: Array, moves: Array, signs: Array,
) -> None:  # fmt: skip
    """Apply a step in one call, which no signal handler can interrupt."""
    _axpy(mean, 1.0, moved)
    if first.ndim == 1:
        _commit_dense(covs, between, shapes, moves, signs)
    else:
        _commit_neurons(covs, moves, signs)


@_compiled
def _entry(cov: Array, unit: int, p: int, q: int, place: int) -> float:
    """Entry ``(p, q)`` of the covariance of one neuron's weights; in a triangle it is at ``place``."""
    entry = 0.0
    if cov.ndim == 1:
        entry = cov[place]
    elif cov.ndim == 3:
        entry = cov[unit, p, q]
    elif p == q:
        entry = cov[unit, p]
    return entry


@_compiled
def acting_form(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes
) -> tuple[Array, Array, Array, Array]:
    """What ``acting.acting_view`` takes from a posterior of two layers, as copies.

    Returns:
        Both weight means; the variance of the hidden units as a form on ``z~_p z~_q`` with ``p <= q``; the coupling,
        empty where layers are independent.
    """
    (n, k, per_row), (o, _, _) = shapes
    weights, above = np.empty((n, k)), np.empty((o, n + 1))
    form, coupling = np.empty((k * (k + 1) // 2, n)), np.empty((o if between.size > 0 else 0, n, k))
    _copy(mean[: n * k], weights.reshape(n * k))
    _copy(mean[n * k :], above.reshape(o * (n + 1)))
    offset, begin = 0, 0
    for unit in range(n):
        if unit == begin + per_row:  # the next block row of the triangle
            offset += (begin + per_row) * k * per_row * k
            begin = unit
        width = min(begin + per_row, n) * k
        pair = 0
        for p in range(k):
            row = offset + ((unit - begin) * k + p) * width + unit * k
            for q in range(p, k):
                entry = _entry(first, unit, p, q, row + q)
                form[pair, unit] = entry if p == q else 2.0 * entry
                pair += 1
        for j in range(coupling.shape[0]):
            _copy(between[j * (n + 1) + unit, unit * k : (unit + 1) * k], coupling[j, unit])
    return weights, above, form, coupling


@_compiled
def act(
    first: Array, last: Array, hidden_form: Array, coupling: Array, centre: Array, scale: Array, features: Array
) -> Array:
    """``acting.view_mean`` of a two-layer view for one row ``(d,)``, in the encoder's units; ``(o,)``."""
    n, k = first.shape
    o = last.shape[0]
    inputs, variance, out = np.empty(k), np.zeros(n), np.empty(o)
    for p in range(k - 1):
        inputs[p] = (features[p] - centre[p]) / scale[p]
    inputs[k - 1] = 1.0
    pair = 0
    for p in range(k):
        for q in range(p, k):
            _axpy(variance, inputs[p] * inputs[q], hidden_form[pair])
            pair += 1
    for j in range(o):
        out[j] = last[j, n]
    for i in range(n):
        mean, _, slope, _ = _relu_unit(_dot(first[i], inputs), max(variance[i], 0.0))
        for j in range(o):
            out[j] += last[j, i] * mean
            if coupling.size > 0:
                out[j] += slope * _dot(coupling[j, i], inputs)
    return out


@_compiled
def _resolved(
    mean: Array, covs: tuple[Array, ...], first: Array, shapes: Shapes, inputs: Array, row: RowPass, least: float
) -> bool:
    """Whether ``resolution``'s quotient of a row ``[z; 1]``, for one output, is at least ``least``."""
    n, k, per_row = shapes[0]
    cross, variances = row[2][0], row[3]
    hidden, two = n * k, len(covs) == 2
    together, apart, offset, begin = 0.0, 0.0, 0, 0
    for unit in range(n):
        if unit == begin + per_row:  # the next block row of the triangle
            offset += (begin + per_row) * k * per_row * k
            begin = unit
        width, own, slope = min(begin + per_row, n) * k, unit * k, 1.0
        if two:
            variance = 0.0
            for p in range(k):
                place = offset + (own - begin * k + p) * width + own
                if first.ndim == 1:
                    variance += inputs[p] * _dot(first[place : place + k], inputs)
                elif first.ndim == 3:
                    variance += inputs[p] * _dot(first[unit, p], inputs)
                else:  # the structure that has nothing to repair
                    variance += inputs[p] * inputs[p] * first[unit, p]
            activation, _, slope, _ = _relu_unit(_dot(mean[own : own + k], inputs), max(variance, 0.0))
            slope *= mean[hidden + unit]
            together += activation * cross[hidden + unit]
            apart += activation * activation * variances[hidden + unit]
        for p in range(k):
            gradient = slope * inputs[p]
            together += gradient * cross[own + p]
            apart += gradient * gradient * variances[own + p]
    if two:
        together += cross[hidden + n]
        apart += variances[hidden + n]
    return together >= least * apart


@_compiled
def learn(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes, workspace: Array,
    centre: Array, scale: Array, labels_seen: Array,
    features: Array, o: int, label: float, noise: float, replacing: bool, kept: float, least: float,
) -> ScalarRecord:  # fmt: skip
    """A whole update on one row and the label of one output, in one call; or nothing changes.

    With ``least`` above 0 nor does it for a row that needs a repair, see ``resolution``.
    """
    inputs = np.empty(features.size)
    for i in range(features.size):
        inputs[i] = (features[i] - centre[i]) / scale[i]
    row = propagate(mean, covs, first, between, shapes, workspace, inputs, o)
    record: ScalarRecord
    record, sign, moved, moves = _scalar_step(row, label, noise, replacing, kept)
    if least > 0.0 and not _resolved(mean, covs, first, shapes, _with_one(inputs), row, least):
        record = (record[0], record[1], record[2], 0.0)
    if record[3] == 1.0:
        signs = np.empty(1)
        signs[0] = sign
        commit(mean, covs, first, between, shapes, moved, moves, signs)
        labels_seen[0] += 1
    return record
