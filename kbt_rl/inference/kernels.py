"""The forward pass and the update of one row in machine code (numba), for heads of one or two layers, one or many.

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
_LOG_TWO_PI = math.log(2.0 * math.pi)
# As in ``moments``: below and beyond these a ratio or its square leaves float64.
_SMALLEST_SD = math.sqrt(np.finfo(np.float64).tiny)
_FAR = 0.5 * math.sqrt(np.finfo(np.float64).max)

# For ``_exp``: a number to which a float can be added only in whole units, and ln 2 as a short number and the rest.
_LOG2_E, _SHIFT = 1.0 / math.log(2.0), 1.5 * 2.0**52
_INFINITY_BITS = 0x7FF0000000000000
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")

# As ``record.LARGEST``: what is beyond goes the general way, which refuses it.
_LARGEST = 1e25
# The moves of a neuron that is all but switched off are smaller; their products would be subnormal numbers.
_SMALLEST_MOVE = 1e-150
# The same for all weights of a unit at once, whose moves are some variances times this.
_SMALLEST_GATE = 1e-140

# Sums may be reordered, so that they use vector instructions; NaN and infinity keep their meaning. A loop that adds up
# stores nothing: one that does both is compiled twice, with vector instructions and without, and where its arrays lie
# decides at run time in which of the two orders it adds (``tests/test_bits.py``). In ``_in_order``
# the order is what keeps the digits; ``_inlined`` is copied into each caller, whose loop can then be vectorised.
_compiled = njit(cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")
_in_order = njit(cache=True, fastmath={"contract"}, error_model="numpy")
_inlined = njit(cache=True, fastmath={"reassoc", "contract"}, error_model="numpy", inline="always")
# A number in the source is a type of its own to numba, for which callees are compiled once more: hence np.int64(0).
_compiled_nogil = njit(cache=True, fastmath={"reassoc", "contract"}, error_model="numpy", nogil=True)


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


# libm's exp and erfc are calls, which no loop over units can turn into vector instructions; these are arithmetic alone.


@_in_order
def _exp(exponent: float) -> float:
    """``exp`` of a number of at most 0, to two units in the last place; 0 below -700, so that none is subnormal."""
    shifted = max(exponent, -700.0) * _LOG2_E + _SHIFT  # the last bits are now the nearest whole power of 2
    power = shifted - _SHIFT
    rest = (max(exponent, -700.0) - power * _LN2_HIGH) - power * _LN2_LOW
    series = rest * (1.0 / 6227020800.0) + 1.0 / 479001600.0
    series = (series * rest + 1.0 / 39916800.0) * rest + 1.0 / 3628800.0
    series = (series * rest + 1.0 / 362880.0) * rest + 1.0 / 40320.0
    series = (series * rest + 1.0 / 5040.0) * rest + 1.0 / 720.0
    series = (series * rest + 1.0 / 120.0) * rest + 1.0 / 24.0
    series = (series * rest + 1.0 / 6.0) * rest + 0.5
    series = (series * rest + 1.0) * rest + 1.0
    bits = np.float64(shifted).view(np.int64)
    scale = np.int64((bits + 1023) << 52).view(np.float64)
    return series * scale if exponent >= -700.0 or exponent != exponent else 0.0


@_in_order
def _mills(x: float) -> float:
    """Mills' ratio ``(1 - Phi(x)) / phi(x)`` for ``x >= 0``, to a few units in the last place.

    ``(x + 5)`` times it is a smooth function of ``t = (x - 5) / (x + 5)``, here as the first 23 terms of its Chebyshev
    series, in powers of ``t``; what is left out is 6e-17 of it.
    """
    inverse = 1.0 / (x + 5.0)
    t = (x - 5.0) * inverse
    p = -1.968820796668673e-09
    p = (p * t + 1.2681778133106914e-09) * t + 2.324918339616538e-08
    p = (p * t - 1.2601401701289641e-08) * t - 1.6898908396071304e-07
    p = (p * t + 8.984895390080813e-08) * t + 1.0865648093633823e-06
    p = (p * t - 8.29951776733244e-07) * t - 6.9405498481783575e-06
    p = (p * t + 9.971212523126543e-06) * t + 4.181269707272043e-05
    p = (p * t - 0.00012473429411922815) * t - 0.00014883252854029768
    p = (p * t + 0.0013658588260150296) * t - 0.0019999620670556138
    p = (p * t - 0.007503282770439648) * t + 0.05212550242182693
    p = (p * t - 0.17325473409133701) * t + 0.41364471573217226
    p = (p * t - 0.7859110755463842) * t + 1.241547061573877
    p = (p * t - 1.667866595188962) * t + 1.9280810471531575
    return p * inverse


@_inlined
def _relu_unit(mean: float, variance: float) -> tuple[float, float, float, float]:
    """Mean and variance of ``relu(u)``, the slope ``Phi``, and the density over the sd for the covariance series.

    Without a branch, so that a loop over units runs on several at a time.
    """
    sd = math.sqrt(variance)
    sd = _SMALLEST_SD if sd < _SMALLEST_SD else sd
    ratio = mean / sd
    ratio = _FAR if ratio > _FAR else ratio
    ratio = -_FAR if ratio < -_FAR else ratio
    density = _exp(-0.5 * ratio * ratio) * _INV_SQRT_2PI
    tail = density * _mills(abs(ratio))  # the other one is at least 1/2, and 1 minus this one to rounding
    upper = 1.0 - tail if ratio > 0.0 else tail
    lower = tail if ratio > 0.0 else 1.0 - tail
    spread = upper + ratio * (ratio * (upper * lower) - density * (upper - lower)) - density * density
    spread = 0.0 if spread < 0.0 else spread
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
    _project_triangle(cov, inputs, o, per_row, cross, np.int64(0), variances)
    return _matvec(mean.reshape(o, inputs.size), inputs), _logits_cov(cross, inputs, np.int64(0)), cross, variances


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
    """Two layers with several outputs, see ``RowPass``.

    ``between`` is ``Cov(w^2, w^1)``, ``(o (n+1), n k)``, or empty for ``layer``. ``projection`` is memory for
    ``Cov(theta, u^1)`` transposed, ``(n, P)``, for ``layer`` ``(n, n k)``: allocated anew it would take longer to
    provide than to fill.
    """
    k = features.size + 1
    n = (mean.size - o) // (k + o)
    hidden, coupled = n * k, between.size > 0
    inputs, weights = _with_one(features), mean[hidden:].reshape(o, n + 1)

    variances = np.empty(mean.size)
    start = np.int64(0)
    _project_triangle(first, inputs, n, per_row_first, projection, start, variances)
    u_cov = _logits_cov(projection, inputs, start)
    z_mean, z_cov, slope = _relu_dense(_matvec(mean[:hidden].reshape(n, k), inputs), u_cov)

    activation = _with_one(z_mean)
    cross = np.zeros((o, mean.size))
    for r in range(between.shape[0]):
        _row_dots(between[r], inputs, n, projection, hidden + r)
        _axpy(cross[r // (n + 1), :hidden], activation[r % (n + 1)], between[r])
    shared = projection[:, hidden:]
    _slope_rows(shared, slope)
    out_mean, out_cov = _outputs(weights, last, per_row_last, activation, z_cov, shared, cross, hidden, variances)
    for j in range(o):
        for q in range(n):
            if coupled:
                _axpy(cross[j, hidden:], weights[j, q], shared[q])
            _axpy(cross[j, :hidden], weights[j, q] * slope[q], projection[q, :hidden])
    return out_mean, out_cov, cross, variances


@_compiled
def _gather(rows: Array, inputs: Array, gradient: Array, combined: Array, products: Array) -> None:
    """``combined = rows' inputs`` and ``products = rows gradient`` by one reading of ``rows``, four of them at a time.

    An index that is no loop's own variable could be negative for all numba knows, and what it does about that forbids
    vector instructions; so a neuron's rows come as a matrix of their own.
    """
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
def _two_layers_dense_scalar(
    mean: Array, first: Array, last: Array, between: Array, features: Array, per_row: int
) -> RowPass:
    """``_two_layers_dense`` for one output: ``Cov(w, u^2)`` is ``Sigma`` times the gradient of the mean output.

    So nothing is kept of ``Cov(w, u^1)``, and units that are off, in a signed start about a third of them, are left out
    of what covaries: they do not, to the last bit.
    """
    inputs = _with_one(features)
    k = inputs.size
    n = (mean.size - 1) // (k + 1)
    hidden = n * k
    weights, above, second = mean[:hidden].reshape(n, k), mean[hidden:], last.reshape(n + 1, n + 1)
    activation, spread, slope, curvature = np.empty(n + 1), np.empty(n), np.empty(n), np.empty(n)
    gradient, active, count = np.empty(hidden), np.empty(n, np.int64), 0
    _unit_variances(first, inputs, n, per_row, spread)
    activation[n], out_mean, variance = 1.0, above[n], 0.0
    for j in range(n):
        activation[j], spread[j], slope[j], curvature[j] = _relu_unit(_dot(weights[j], inputs), spread[j])
        out_mean += above[j] * activation[j]
        variance += spread[j] * (above[j] * above[j] + second[j, j])
        if slope[j] != 0.0:
            active[count] = j
            count += 1
        for p in range(k):
            gradient[j * k + p] = above[j] * slope[j] * inputs[p]

    cross, variances = np.zeros((1, mean.size)), np.empty(mean.size)
    combined, offset, upto, begin = np.empty(hidden), 0, 0, 0
    for j in range(n):
        begin = j if j == begin + per_row else begin  # the first neuron of the block row
        width = min(begin + per_row, n) * k
        rows = first[offset : offset + k * width].reshape(k, width)
        offset += k * width
        _gather(rows, inputs, gradient, combined, cross[0, j * k : (j + 1) * k])
        for p in range(k):
            variances[j * k + p] = rows[p, j * k + p]
        if slope[j] == 0.0:
            continue
        _axpy(cross[0, : begin * k], above[j] * slope[j], combined)
        for a in range(upto):
            i = active[a]
            entry = _dot(combined[i * k : (i + 1) * k], inputs)
            entry *= slope[j] * slope[i] + 0.5 * entry * (curvature[j] * curvature[i])
            variance += 2.0 * entry * (above[j] * above[i] + second[j, i])
        upto += 1

    for p in range(n + 1):
        projected = _dot(second[p], activation)
        cross[0, hidden + p], variances[hidden + p] = projected, second[p, p]
        variance += activation[p] * projected
    if between.size > 0:
        shared = np.zeros((n, n))
        for p in range(n + 1):
            row = between[p]
            _axpy(cross[0, :hidden], activation[p], row)
            coupled = _dot(row, gradient)
            cross[0, hidden + p] += coupled
            variance += 2.0 * activation[p] * coupled
            for a in range(count if p < n else 0):
                q = active[a]
                shared[p, q] = slope[q] * _dot(row[q * k : (q + 1) * k], inputs)
        for p in range(n):
            out_mean += shared[p, p]
            for q in range(n):
                variance += shared[p, q] * shared[q, p]
    means, out_cov = np.empty(1), np.empty((1, 1))
    means[0], out_cov[0, 0] = out_mean, variance
    return means, out_cov, cross, variances


@_compiled
def _slope_rows(shared: Array, slope: Array) -> None:
    """From ``Cov(w^2, u_q)`` in row ``q`` to ``Cov(w^2, z_q)``, by Stein's lemma."""
    for q in range(shared.shape[0]):
        for r in range(shared.shape[1]):
            shared[q, r] *= slope[q]


@_compiled
def _outputs(
    weights: Array, cov: Array, per_row: int, activation: Array, z_cov: Array, shared: Array,
    cross: Array, start: int, variances: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Mean and covariance of the last of two layers, for ``shared[q] = Cov(w^2, z_q)``, without entries if 0.

    On the way ``cross`` gets, from column ``start`` on, ``Sigma (I (x) z~)`` transposed, and ``variances`` the
    variances of the weights.
    """
    o = weights.shape[0]
    _project_triangle(cov, activation, o, per_row, cross, start, variances)
    out_mean = _matvec(weights, activation)
    out_cov = _logits_cov(cross, activation, start)
    _add_input_part(out_cov, weights, cov, z_cov, per_row)
    if shared.size > 0:
        _add_coupled_part(out_mean, out_cov, weights, shared, activation)
    return out_mean, out_cov


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


# Blocks here have a few numbers a row, and a slice, whose references are counted, costs as much as a row of them.


@_compiled
def _project_neurons(cov: Array, inputs: Array, out: Array, variances: Array) -> None:
    """``Sigma_j z~`` and variances of each neuron, ``(n, k)``, for blocks ``(n, k, k)`` or variances ``(n, k)``."""
    n, k = out.shape
    whole = k - k % 8
    for j in range(n):
        if cov.ndim == 3:
            for q in range(0, whole, 8):  # eight columns of the symmetric block at a time, summed in registers
                c0 = c1 = c2 = c3 = c4 = c5 = c6 = c7 = 0.0
                for p in range(k):
                    x = inputs[p]
                    c0, c1, c2, c3 = (
                        c0 + x * cov[j, p, q], c1 + x * cov[j, p, q + 1],
                        c2 + x * cov[j, p, q + 2], c3 + x * cov[j, p, q + 3],
                    )  # fmt: skip
                    c4, c5, c6, c7 = (
                        c4 + x * cov[j, p, q + 4], c5 + x * cov[j, p, q + 5],
                        c6 + x * cov[j, p, q + 6], c7 + x * cov[j, p, q + 7],
                    )  # fmt: skip
                out[j, q], out[j, q + 1], out[j, q + 2], out[j, q + 3] = c0, c1, c2, c3
                out[j, q + 4], out[j, q + 5], out[j, q + 6], out[j, q + 7] = c4, c5, c6, c7
            for q in range(whole, k):
                total = 0.0
                for p in range(k):
                    total += cov[j, q, p] * inputs[p]
                out[j, q] = total
            for q in range(k):
                variances[j, q] = cov[j, q, q]
        else:
            for q in range(k):
                out[j, q], variances[j, q] = cov[j, q] * inputs[q], cov[j, q]


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
        total = _dot(above[j], activation)
        for q in range(n):
            total += z_variance[q] * (last[j, q, q] if last.ndim == 3 else last[j, q])
        out_cov[j, j] += total
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


@_compiled
def _scalar_step(
    mean: float, variance: float, cross: Array, variances: Array, label: float, noise: float, replacing: bool,
    kept: float, moved: Array, moves: Array,
) -> tuple[ScalarRecord, float]:  # fmt: skip
    """``output.measure`` or ``output.replace`` and ``weight_step`` for one output.

    Args:
        mean: Of the output.
        variance: Of the output.
        cross: ``Cov(w, u)``, ``(P,)``.
        variances: Of the weights before, ``(P,)``; afterwards ``kept`` times that plus the change.
        label: In the head's own units.
        noise: Variance of the label.
        replacing: Whether the rule is ``replace``.
        kept: See ``record.kept``.
        moved: Receives ``X dm``, ``(P,)``.
        moves: Receives ``(X F)'``, ``(1, P)``.

    Returns:
        The record, whose ``done`` says whether the step may be taken, and the sign of ``dC``.
    """
    inverted = variance if replacing else variance + noise
    # dC = S^-1 (Sigma_data - S) S^-1 for `replace`, -(S + R)^-1 for `measure`.
    change = (noise - inverted) / (inverted * inverted) if replacing else -1.0 / inverted
    gain, root = (label - mean) / inverted, math.sqrt(abs(change))
    for r in range(variances.size):
        move = root * cross[r]
        moved[r] = gain * cross[r]
        moves[0, r] = _normal(move)
        variances[r] = kept * variances[r] + change * (cross[r] * cross[r])
    step, smallest = _sum(moved), _smallest(variances)
    # One sum finds any NaN or infinity; inf - inf is NaN.
    total = step + gain * gain + variance
    done = inverted > 0.0 and smallest >= 0.0 and total - total == 0.0 and abs(step) <= _LARGEST
    return (mean, variance, smallest, 1.0 if done else 0.0), math.copysign(1.0, change)


@_compiled
def _commit_dense(covs: tuple[Array, ...], between: Array, shapes: Shapes, moves: Array, signs: Array) -> None:
    start = np.int64(0)
    for depth in range(len(covs)):
        n, k, per_row = shapes[depth]
        _downdate_triangle(covs[depth], moves, start, signs, n, k, per_row)
        start += n * k
    above = start - between.shape[0]
    for r in range(between.shape[0]):
        for q in range(signs.size):
            _axpy(between[r], signs[q] * moves[q, above + r], moves[q, :above])


@_compiled
def _downdate_neurons(cov: Array, moves: Array, sign: float) -> None:
    """Add ``sign v_j v_j'`` to each neuron's block, or to its variances, for moves ``(n k,)``."""
    if cov.ndim == 3:
        n, k = cov.shape[0], cov.shape[1]
        own = moves.reshape(n, k)
        for j in range(n):
            for p in range(k):
                scale = sign * own[j, p]
                for q in range(k):
                    cov[j, p, q] += scale * own[j, q]
    else:
        flat = cov.reshape(moves.size)
        for r in range(moves.size):
            flat[r] += sign * moves[r] * moves[r]


@_compiled
def _commit_neurons(covs: tuple[Array, ...], moves: Array, signs: Array) -> None:
    """What is not stored is dropped."""
    start = 0
    for cov in covs:
        stop = start + cov.shape[0] * cov.shape[1]
        for q in range(signs.size):
            _downdate_neurons(cov, moves[q, start:stop], signs[q])
        start = stop


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
        if len(covs) == 2 and o == 1:
            row = _two_layers_dense_scalar(mean, first, covs[1], between, features, shapes[0][2])
        elif len(covs) == 2:
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
    first: Array, last: Array, hidden_form: Array, coupling: Array, centre: Array, scale: Array, rows: Array
) -> Array:
    """``acting.view_mean`` of a two-layer view for rows ``(N, d)`` in the encoder's units; ``(N, o)``."""
    out = np.empty((rows.shape[0], last.shape[0]))
    for b in range(rows.shape[0]):
        _act_row(first, last, hidden_form, coupling, _inputs(centre, scale, rows[b]), out[b])
    return out


@_compiled
def _act_row(first: Array, last: Array, hidden_form: Array, coupling: Array, inputs: Array, out: Array) -> None:
    """``act`` of one row, into ``out`` ``(o,)``."""
    n, k = first.shape
    o = last.shape[0]
    variance = np.zeros(n)
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


@_compiled
def pair_form(cov: Array, n: int, k: int, per_row: int, form: Array) -> None:
    """``z~' Sigma_ji z~`` of each pair ``i <= j`` of hidden units as a form on ``z~_p z~_q`` with ``q <= p``.

    Two entries of a block share one coefficient, so that ``form``, ``(n (n + 1) / 2, k (k + 1) / 2)``, is half as large
    as the triangle that it is made of.
    """
    offset, first, pair = 0, 0, 0
    while first < n:
        last = min(first + per_row, n)
        width = last * k
        for j in range(first, last):
            rows = cov[offset : offset + k * width].reshape(k, width)
            for i in range(j + 1):
                at = 0
                for p in range(k):
                    for q in range(p):
                        form[pair, at] = rows[p, i * k + q] + rows[q, i * k + p]
                        at += 1
                    form[pair, at] = rows[p, i * k + p]
                    at += 1
                pair += 1
            offset += k * width
        first = last


@_compiled
def predict(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes, workspace: Array,
    form: Array, centre: Array, scale: Array, outputs: Array, rows: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Mean ``(N, o)`` and covariance ``(N, o, o)`` of the output, times ``outputs``, for rows in the encoder's units.

    By ``form``, see ``pair_form``, if it is not empty; else by ``propagate``.
    """
    o = outputs.size
    means, out_covs = np.empty((rows.shape[0], o)), np.empty((rows.shape[0], o, o))
    for b in range(rows.shape[0]):
        inputs = _inputs(centre, scale, rows[b])
        if first.ndim == 1 and len(covs) == 2 and form.size > 0:
            out_mean, out_cov = _row_moments(mean, form, covs[1], between, o, shapes[1][2], inputs)
        else:
            row = propagate(mean, covs, first, between, shapes, workspace, inputs[:-1], o)
            out_mean, out_cov = row[0], row[1]
        for j in range(o):
            means[b, j] = out_mean[j] * outputs[j]
            for i in range(o):
                out_covs[b, j, i] = out_cov[j, i] * (outputs[j] * outputs[i])
    return means, out_covs


@_compiled
def _inputs(centre: Array, scale: Array, features: Array) -> Array:
    """``z~`` of a row ``(d,)`` as it comes from the encoder, ``(d + 1,)``."""
    inputs = np.empty(features.size + 1)
    for p in range(features.size):
        inputs[p] = (features[p] - centre[p]) / scale[p]
    inputs[features.size] = 1.0
    return inputs


@_compiled
def _row_moments(
    mean: Array, form: Array, cov: Array, between: Array, o: int, per_row: int, inputs: Array
) -> tuple[Array, Array]:
    """``predict`` for one row, ``(o,)`` and ``(o, o)``.

    Units that are off, in a signed start about a third of them, covary with nothing to the last bit, and are left out.
    """
    k = inputs.size
    n = (mean.size - o) // (k + o)
    products = np.empty(form.shape[1])
    at = 0
    for p in range(k):
        for q in range(p + 1):
            products[at] = inputs[p] * inputs[q]
            at += 1
    logits, z_mean, z_cov = _matvec(mean[: n * k].reshape(n, k), inputs), np.empty(n), np.zeros((n, n))
    slope, curvature, active, count = np.empty(n), np.empty(n), np.empty(n, np.int64), 0
    for j in range(n):
        variance = max(_dot(form[j * (j + 3) // 2], products), 0.0)  # rounding may leave one of 0 a little below
        z_mean[j], z_cov[j, j], slope[j], curvature[j] = _relu_unit(logits[j], variance)
        if slope[j] != 0.0:
            active[count] = j
            count += 1
    for a in range(count):
        j = active[a]
        for e in range(a):
            i = active[e]
            entry = _dot(form[j * (j + 1) // 2 + i], products)
            entry *= slope[j] * slope[i] + 0.5 * entry * (curvature[j] * curvature[i])
            z_cov[j, i] = z_cov[i, j] = entry
    shared, by_unit = np.zeros((n, between.shape[0])), between.reshape(between.shape[0], n, k)
    for r in range(between.shape[0]):
        for a in range(count):
            total = 0.0
            for p in range(k):
                total += by_unit[r, active[a], p] * inputs[p]
            shared[active[a], r] = slope[active[a]] * total
    weights = mean[n * k :].reshape(o, n + 1)
    cross, variances, start = np.empty((o, weights.size)), np.empty(weights.size), np.int64(0)
    out_mean, out_cov = _outputs(weights, cov, per_row, _with_one(z_mean), z_cov, shared, cross, start, variances)
    return out_mean, out_cov


@_compiled
def _unit_variances(cov: Array, inputs: Array, n: int, per_row: int, out: Array) -> None:
    """``z~' Sigma_j z~`` of each hidden unit, ``(n,)``."""
    k, offset, begin = inputs.size, 0, 0
    for j in range(n):
        variance = 0.0
        if cov.ndim == 1:
            if j == begin + per_row:  # the next block row of the triangle
                offset += (begin + per_row) * k * per_row * k
                begin = j
            width = min(begin + per_row, n) * k
            for p in range(k):
                start = offset + ((j - begin) * k + p) * width + j * k
                variance += inputs[p] * _dot(cov[start : start + k], inputs)
        elif cov.ndim == 3:
            for p in range(k):
                total = 0.0
                for q in range(k):
                    total += cov[j, p, q] * inputs[q]
                variance += inputs[p] * total
        else:
            for p in range(k):
                variance += cov[j, p] * inputs[p] * inputs[p]
        out[j] = max(variance, 0.0)


@_compiled
def unit_moments(mean: Array, first: Array, shapes: Shapes, inputs: Array) -> tuple[Array, Array, Array, Array]:
    """``_relu_unit`` of each hidden unit for rows ``[z; 1]``, ``(B, k)``; four times ``(n, B)``."""
    (n, k, per_row), count = shapes[0], inputs.shape[0]
    spread = np.empty(n)
    out_mean, variance = np.empty((n, count)), np.empty((n, count))
    slope, curvature = np.empty((n, count)), np.empty((n, count))
    weights = mean[: n * k].reshape(n, k)
    for b in range(count):
        _unit_variances(first, inputs[b], n, per_row, spread)
        for j in range(n):
            logit = 0.0
            for p in range(k):
                logit += weights[j, p] * inputs[b, p]
            out_mean[j, b], variance[j, b], slope[j, b], curvature[j, b] = _relu_unit(logit, spread[j])
    return out_mean, variance, slope, curvature


@_compiled
def _resolved(
    mean: Array, covs: tuple[Array, ...], first: Array, shapes: Shapes, inputs: Array, cross: Array, variances: Array,
    least: float
) -> bool:  # fmt: skip
    """Whether ``resolution``'s quotient of a row ``[z; 1]``, for one output, is at least ``least``."""
    n, k, per_row = shapes[0]
    hidden, two, spreads = n * k, len(covs) == 2, np.empty(n)
    together = apart = 0.0
    if two:
        _unit_variances(first, inputs, n, per_row, spreads)
        together, apart = cross[hidden + n], variances[hidden + n]
    for unit in range(n):
        own, slope = unit * k, 1.0
        if two:
            activation, _, slope, _ = _relu_unit(_dot(mean[own : own + k], inputs), spreads[unit])
            slope *= mean[hidden + unit]
            together += activation * cross[hidden + unit]
            apart += activation * activation * variances[hidden + unit]
        for p in range(k):
            gradient = slope * inputs[p]
            together += gradient * cross[own + p]
            apart += gradient * gradient * variances[own + p]
    return together >= least * apart


@_compiled
def _step(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes, workspace: Array,
    inputs: Array, label: float, noise: float, replacing: bool, kept: float, least: float,
    moved: Array, moves: Array,
) -> tuple[ScalarRecord, float]:  # fmt: skip
    """Everything of an update of one output that can be refused, see ``_scalar_step``; ``inputs`` is ``[z; 1]``."""
    outputs = shapes[len(shapes) - 1][0]
    row = propagate(mean, covs, first, between, shapes, workspace, inputs[:-1], outputs)
    mean_out, variance, cross, variances = row[0][0], row[1][0, 0], row[2][0], row[3]
    resolved = least == 0.0 or _resolved(mean, covs, first, shapes, inputs, cross, variances, least)
    record, sign = _scalar_step(mean_out, variance, cross, variances, label, noise, replacing, kept, moved, moves)
    if not resolved or variance > _LARGEST * _LARGEST or abs(label) > _LARGEST:
        record = (record[0], record[1], record[2], 0.0)
    return record, sign


@_inlined
def _moved(cross: Array, variances: Array, change: float, root: float, kept: float) -> tuple[float, float]:
    """The sum of the covariances with the output, and the smallest variance after the step, see ``weight_step``.

    On the way covariances that ``_normal`` would drop become 0. The sum is NaN if a variance is NaN or infinite.
    """
    step, smallest, largest = 0.0, np.int64(_INFINITY_BITS), np.int64(0)
    for i in range(cross.size):
        cross[i] = 0.0 if abs(root * cross[i]) <= _SMALLEST_MOVE else cross[i]
    for i in range(cross.size):
        move = cross[i]
        step += move
        # See ``_smallest``.
        bits = np.float64(kept * variances[i] + change * move * move).view(np.int64)
        smallest = bits if bits < smallest else smallest
        largest = bits if bits > largest else largest
    return step if largest < _INFINITY_BITS else np.nan, np.int64(smallest).view(np.float64)


@_inlined
def _weighed(
    cross: Array, variances: Array, head: int, after: Array, change: float, kept: float
) -> tuple[float, float]:
    """As ``_moved`` for independent weights, whose ``cross`` is still to be multiplied by the variances of their head.

    ``after`` receives the variances after the step. What is NaN or infinite before it makes the sum so.
    """
    step, smallest, lost = 0.0, np.int64(_INFINITY_BITS), 1.0 - kept
    for i in range(cross.size):
        before = variances[head, i]
        move = cross[i] * before
        cross[i] = move
        after[i] = before + change * move * move
    for i in range(cross.size):
        step += cross[i]
        bits = np.float64(after[i] - lost * variances[head, i]).view(np.int64)  # see ``_smallest``
        smallest = bits if bits < smallest else smallest
    return step, np.int64(smallest).view(np.float64)


@_compiled
def _finite(values: Array) -> bool:
    total = _sum(values)
    found: bool = total - total == 0.0
    return found


@_compiled_nogil
def learn_neurons(
    means: Array, firsts: Array, lasts: Array, shapes: Shapes, centres: Array, scales: Array, labels_seen: Array,
    heads: Array, features: Array, labels: Array, noises: Array, replacing: bool, kept: float, least: float,
    plan: Array, records: Array,
) -> None:  # fmt: skip
    """``learn_many`` for heads of two layers of independent neurons, with one output.

    A head of a few hundred weights is learned in a microsecond or two, and handing its arrays from function to function
    would take as long again. So everything is in this one: ``_two_layers_neurons``, ``_scalar_step`` and ``commit``.

    ``means`` ``(H, P)``; ``firsts``, the hidden neurons' covariances, ``(H, n, k, k)`` or ``(H, n, k)``; ``lasts``, the
    outputs', ``(H, 1, n + 1, n + 1)`` or ``(H, 1, n + 1)``; ``least`` as in ``learn``, the rest as in ``learn_many``.
    """
    weights, n, k = means.shape[1], firsts.shape[1], firsts.shape[2]
    hidden, d = n * k, k - 1
    inputs, squares, activation, spread, gate = np.empty(k), np.empty(k), np.empty(n + 1), np.empty(n), np.empty(n)
    cross, variances = np.empty(weights), np.empty(weights)
    own, own_variances = cross[:hidden].reshape(n, k), variances[:hidden].reshape(n, k)
    own_above, variances_above = cross[hidden:].reshape(1, n + 1), variances[hidden:].reshape(1, n + 1)
    if firsts.ndim == 3:
        below, above = cross[:hidden], cross[hidden:]
        after_below, after_above = variances[:hidden], variances[hidden:]
        flat_firsts, flat_lasts = firsts.reshape(means.shape[0], hidden), lasts.reshape(means.shape[0], n + 1)
    inputs[d] = squares[d] = activation[n] = 1.0
    for r in range(heads.size):
        h = heads[r]
        for p in range(d):
            inputs[p] = (features[h, p] - centres[h, p]) / scales[h, p]
            squares[p] = inputs[p] * inputs[p]

        if firsts.ndim == 4:
            _project_neurons(firsts[h], inputs, own, own_variances)
        for j in range(n):
            at = j * k
            logit, total = means[h, at + d], 0.0
            if firsts.ndim == 4:
                for p in range(k):
                    total += own[j, p] * inputs[p]
                for p in range(d):
                    logit += means[h, at + p] * inputs[p]
            else:
                total = flat_firsts[h, at + d]
                for p in range(d):
                    logit += means[h, at + p] * inputs[p]
                    total += flat_firsts[h, at + p] * squares[p]
            activation[j], spread[j] = logit, total
        for j in range(n):
            activation[j], spread[j], gate[j], _ = _relu_unit(activation[j], spread[j])
        if firsts.ndim == 4:
            _project_neurons(lasts[h], activation, own_above, variances_above)
        else:
            for j in range(n + 1):
                own_above[0, j] = flat_lasts[h, j] * activation[j]
        out_mean, variance = means[h, hidden + n], own_above[0, n]
        for j in range(n):
            weight = means[h, hidden + j]
            out_mean += weight * activation[j]
            last_variance = lasts[h, 0, j, j] if firsts.ndim == 4 else flat_lasts[h, j]
            variance += own_above[0, j] * activation[j] + spread[j] * (weight * weight + last_variance)
        for j in range(n):
            gate[j] *= means[h, hidden + j]

        label, noise = labels[h], noises[h]
        inverted = variance if replacing else variance + noise
        change = (noise - inverted) / (inverted * inverted) if replacing else -1.0 / inverted
        gain, root = (label - out_mean) / inverted, math.sqrt(abs(change))
        done = inverted > 0.0 and variance <= _LARGEST * _LARGEST and abs(label) <= _LARGEST
        if firsts.ndim == 4:
            for j in range(n):
                factor = gate[j]
                for p in range(k):
                    own[j, p] *= factor
            if done and least > 0.0:  # ``diagonal`` has nothing to repair
                covs = firsts[h], lasts[h]
                done = _resolved(means[h], covs, firsts[h], shapes, inputs, cross, variances, least)
            step, smallest = _moved(cross, variances, change, root, kept)
        else:
            for j in range(n):
                gate[j] = 0.0 if abs(root * gate[j]) <= _SMALLEST_GATE else gate[j]
                own_above[0, j] = 0.0 if abs(root * activation[j]) <= _SMALLEST_GATE else activation[j]
            for j in range(n):
                factor = gate[j]
                for p in range(k):
                    own[j, p] = factor * inputs[p]
            own_above[0, n] = 1.0
            # From here on the weights are a row of numbers, whatever unit they belong to.
            step, smallest = _weighed(below, flat_firsts, h, after_below, change, kept)
            step_above, smallest_above = _weighed(above, flat_lasts, h, after_above, change, kept)
            step, smallest = step + step_above, min(smallest, smallest_above)
            done = done and (-_FAR < change < 0.0 or _finite(variances))
        step *= gain
        total = step + gain * gain + variance
        done = done and smallest >= 0.0 and total - total == 0.0 and abs(step) <= _LARGEST
        records[r, 0], records[r, 1], records[r, 2], records[r, 3] = out_mean, variance, smallest, 1.0 if done else 0.0
        if plan.size > 0:
            for i in range(weights):
                plan[r, i] = gain * cross[i]
            for i in range(weights):
                plan[r, weights + i] = root * cross[i]
            plan[r, 2 * weights] = math.copysign(1.0, change)
        elif done:
            for i in range(weights):
                means[h, i] += gain * cross[i]
            if firsts.ndim == 4:
                for i in range(weights):
                    cross[i] *= root  # so that both halves of a block get the same product
                _downdate_neurons(firsts[h], cross[:hidden], math.copysign(1.0, change))
                _downdate_neurons(lasts[h], cross[hidden:], math.copysign(1.0, change))
            else:
                for i in range(hidden):
                    flat_firsts[h, i] = variances[i]
                for j in range(n + 1):
                    flat_lasts[h, j] = variances[hidden + j]
            labels_seen[h] += 1


@_compiled_nogil
def enter_records(
    heads: Array, records: Array, labels: Array, noises: Array, innovation: Array, nis: Array, epistemic: Array,
    predictive: Array, smallest: Array, counts: Array, weights: Array, log_density: Array,
) -> int:  # fmt: skip
    """``rows.learn_row``'s record of those of ``heads`` ``(R,)`` that have learned, into arrays ``(H,)``; their number.

    ``records`` ``(R, 4)`` are those of ``learn_many``, ``labels`` and ``noises`` ``(H,)`` what it was given.
    """
    done = 0
    for r in range(heads.size):
        if records[r, 3] == 1.0:
            h = heads[r]
            error, variance = labels[h] - records[r, 0], records[r, 1] + noises[h]
            innovation[h], nis[h] = abs(error), error * error / variance
            epistemic[h], predictive[h], smallest[h] = records[r, 1], variance, records[r, 2]
            counts[h], weights[h] = 1, 1.0
            log_density[h] = -0.5 * (nis[h] + math.log(variance) + _LOG_TWO_PI)
            done += 1
    return done


@_compiled
def learn(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes, workspace: Array,
    centre: Array, scale: Array, labels_seen: Array,
    features: Array, label: float, noise: float, replacing: bool, kept: float, least: float,
) -> ScalarRecord:  # fmt: skip
    """A whole update by a row and the label of one output, in one call; or nothing changes.

    With ``least`` above 0 nor does it for a row that needs a repair, see ``resolution``.
    """
    record: ScalarRecord
    if first.ndim > 1 and len(covs) == 2:
        records, one = np.empty((1, 4)), np.empty(1)
        one[0] = label
        learn_neurons(
            mean.reshape(1, mean.size), first.reshape((1, *first.shape)), covs[1].reshape((1, *covs[1].shape)), shapes,
            centre.reshape(1, centre.size), scale.reshape(1, centre.size), labels_seen, np.zeros(1, np.int64),
            features.reshape(1, centre.size), one, np.full(1, noise), replacing, kept, least, np.empty((0, 0)), records,
        )  # fmt: skip
        return records[0, 0], records[0, 1], records[0, 2], records[0, 3]
    moved, moves = np.empty(mean.size), np.empty((1, mean.size))
    record, sign = _step(
        mean, covs, first, between, shapes, workspace, _inputs(centre, scale, features), label, noise, replacing, kept,
        least, moved, moves,
    )  # fmt: skip
    if record[3] == 1.0:
        signs = np.empty(1)
        signs[0] = sign
        commit(mean, covs, first, between, shapes, moved, moves, signs)
        labels_seen[0] += 1
    return record


# ------------------------------------------------------------------ many heads of the same shape

# Arrays of one head, stacked in front; these release Python's lock, so that threads may share the heads out.


@_compiled
def _layers_of(covs: tuple[Array, ...], head: int) -> tuple[Array, ...]:
    if len(covs) == 2:
        return covs[0][head], covs[1][head]
    else:  # noqa: RET505  numba prunes whole branches
        return (covs[0][head],)


@_compiled_nogil
def learn_many(
    means: Array, covs: tuple[Array, ...], between: Array, shapes: Shapes, workspace_shape: tuple[int, int],
    centres: Array, scales: Array, labels_seen: Array,
    heads: Array, features: Array, labels: Array, noises: Array, replacing: bool, kept: float,
    plan: Array, records: Array,
) -> None:  # fmt: skip
    """``learn`` for ``heads`` ``(R,)``, each with its row of ``features`` ``(H, d)`` and its label of ``(H,)``.

    With a ``plan`` ``(R, 2 P + 1)`` nothing changes, and it receives the steps for ``commit_many``; with an empty one
    each step is taken at once. ``records`` ``(R, 4)`` receives a ``ScalarRecord`` of each.
    """
    weights = means.shape[1]
    workspace, signs = np.empty(workspace_shape), np.empty(1)
    step = np.empty(2 * weights + 1)
    for r in range(heads.size):
        h = heads[r]
        own = _layers_of(covs, h)
        if plan.size > 0:
            step = plan[r]
        moved, moves = step[:weights], step[weights : 2 * weights].reshape(1, weights)
        inputs = _inputs(centres[h], scales[h], features[h])
        record, sign = _step(
            means[h], own, own[0], between[h], shapes, workspace, inputs, labels[h], noises[h], replacing, kept, 0.0,
            moved, moves,
        )  # fmt: skip
        for i in range(4):
            records[r, i] = record[i]
        step[2 * weights] = signs[0] = sign
        if plan.size == 0 and record[3] == 1.0:
            commit(means[h], own, own[0], between[h], shapes, moved, moves, signs)
            labels_seen[h] += 1


@_compiled_nogil
def commit_many(
    means: Array, covs: tuple[Array, ...], between: Array, shapes: Shapes, labels_seen: Array, heads: Array, plan: Array
) -> None:
    """Take the steps that ``learn_many`` has planned for ``heads``."""
    weights = means.shape[1]
    for r in range(heads.size):
        h, step = heads[r], plan[r]
        own = _layers_of(covs, h)
        moves = step[weights : 2 * weights].reshape(1, weights)
        commit(means[h], own, own[0], between[h], shapes, step[:weights], moves, step[2 * weights :])
        labels_seen[h] += 1


@_compiled_nogil
def moments_many(
    means: Array, covs: tuple[Array, ...], between: Array, shapes: Shapes, workspace_shape: tuple[int, int],
    centres: Array, scales: Array, heads: Array, features: Array, out_mean: Array, out_cov: Array,
) -> None:  # fmt: skip
    """Mean ``(R, o)`` and covariance ``(R, o, o)`` of the logits for ``R / H`` successive rows of each of ``heads``."""
    workspace = np.empty(workspace_shape)
    each = features.shape[0] // means.shape[0]
    for h in heads:
        own = _layers_of(covs, h)
        for r in range(h * each, (h + 1) * each):
            inputs = _inputs(centres[h], scales[h], features[r])[:-1]
            row = propagate(means[h], own, own[0], between[h], shapes, workspace, inputs, out_mean.shape[1])
            _copy(row[0], out_mean[r])
            _copy(row[1].reshape(row[1].size), out_cov[r].reshape(row[1].size))


@_compiled_nogil
def means_many(
    means: Array, covs: tuple[Array, ...], between: Array, shapes: Shapes, centres: Array, scales: Array,
    heads: Array, features: Array, out: Array,
) -> None:  # fmt: skip
    """Mean logits ``(H, o)`` for one row of each of ``heads``, as ``acting.view_mean``: without their covariance."""
    o, n = out.shape[1], shapes[0][0]
    variances = np.empty(n)
    for h in heads:
        inputs, mean = _inputs(centres[h], scales[h], features[h]), means[h]
        k = inputs.size
        weights = mean[: n * k].reshape(n, k)
        if len(covs) == 1:
            for j in range(o):
                out[h, j] = _dot(weights[j], inputs)
        else:
            above, coupling = mean[n * k :].reshape(o, n + 1), between[h]
            _unit_variances(covs[0][h], inputs, n, shapes[0][2], variances)
            for j in range(o):
                out[h, j] = above[j, n]
            for i in range(n):
                logit = 0.0
                for p in range(k):
                    logit += weights[i, p] * inputs[p]
                activation, _, slope, _ = _relu_unit(logit, variances[i])
                for j in range(o):
                    out[h, j] += above[j, i] * activation
                    if coupling.size > 0:
                        out[h, j] += slope * _dot(coupling[j * (n + 1) + i, i * k : (i + 1) * k], inputs)
