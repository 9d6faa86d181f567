"""One row through heads of any depth in machine code (numba), for those that are too deep for ``kernels``.

What ``joint``, ``smoother`` and ``structures`` define for any number of rows. The covariance of a layer is read once
for ``Cov(u)``, as ``sum_pq Sigma_jp,iq (z~_p z~_q + Cov(z_p, z_q))``, and once for ``Cov(w, u^L)``, which is ``Sigma``
times the gradient of the mean output; what lies between is of the size of the layers. ``tests/test_compiled.py`` holds
the two definitions together.

Nothing here calls a function of ``kernels``, see ``kernels_rows``.

Sizes: layer ``l`` has ``n`` outputs and ``k`` inputs, bias included; ``o`` outputs of the head, ``P`` weights.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]
# As in ``kernels``.
RowPass: TypeAlias = tuple[Array, Array, Array, Array]
Shapes: TypeAlias = tuple[tuple[int, int, int], ...]

_INV_SQRT2 = 1.0 / math.sqrt(2.0)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
_SMALLEST_SD = math.sqrt(np.finfo(np.float64).tiny)
_FAR = 0.5 * math.sqrt(np.finfo(np.float64).max)

# Sums may be reordered, so that they use vector instructions; NaN and infinity keep their meaning.
_compiled = njit(cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")


@_compiled
def _dot(left: Array, right: Array) -> float:
    total = 0.0
    for i in range(left.size):
        total += left[i] * right[i]
    return total


@_compiled
def _add(out: Array, scale: float, vector: Array) -> None:
    for i in range(out.size):
        out[i] += scale * vector[i]


# ------------------------------------------------------------------ a layer's own covariance


@_compiled
def _weigh_triangle(flat: Array, per_row: int, moments: Array, u_cov: Array, variances: Array) -> None:
    """Add ``sum_pq Sigma_jp,iq moments_pq`` to ``u_cov``; on the way the variances of the weights, ``(n k,)``."""
    n, k = u_cov.shape[0], moments.shape[0]
    start = 0
    for j in range(n):
        width = min((j // per_row) * per_row + per_row, n) * k
        for p in range(k):
            row = flat[start : start + width]
            for i in range(j + 1):
                u_cov[j, i] += _dot(row[i * k : (i + 1) * k], moments[p])
            variances[j * k + p] = row[j * k + p]
            start += width
        for i in range(j):
            u_cov[i, j] = u_cov[j, i]


@_compiled
def _apply_triangle(flat: Array, k: int, per_row: int, gradients: Array, out: Array) -> None:
    """Add ``Sigma g`` to ``out`` for each row ``g`` of ``gradients``, ``(o, n k)``."""
    n = gradients.shape[1] // k
    start = 0
    for j in range(n):
        first = (j // per_row) * per_row
        before, width = first * k, min(first + per_row, n) * k
        for p in range(k):
            row, r = flat[start : start + width], j * k + p
            for a in range(gradients.shape[0]):
                out[a, r] += _dot(row, gradients[a, :width])
                _add(out[a, :before], gradients[a, r], row[:before])
            start += width


@_compiled
def _weigh_neurons(cov: Array, moments: Array, u_cov: Array, variances: Array) -> None:
    """As ``_weigh_triangle``, for blocks ``(n, k, k)`` or variances ``(n, k)``."""
    k = moments.shape[0]
    for j in range(cov.shape[0]):
        for p in range(k):
            if cov.ndim == 3:
                u_cov[j, j] += _dot(cov[j, p], moments[p])
                variances[j * k + p] = cov[j, p, p]
            else:
                u_cov[j, j] += cov[j, p] * moments[p, p]
                variances[j * k + p] = cov[j, p]


@_compiled
def _apply_neurons(cov: Array, gradients: Array, out: Array) -> None:
    """As ``_apply_triangle``."""
    n, k = cov.shape[0], cov.shape[1]
    for a in range(gradients.shape[0]):
        for j in range(n):
            for p in range(k):
                if cov.ndim == 3:
                    out[a, j * k + p] += _dot(cov[j, p], gradients[a, j * k : (j + 1) * k])
                else:
                    out[a, j * k + p] += cov[j, p] * gradients[a, j * k + p]


# ------------------------------------------------------------------ between layers


@_compiled
def _shared(
    betweens: tuple[Array, ...], depth: int, mean: Array, starts: Array, shapes: Shapes, inputs: Array, slopes: Array
) -> Array:
    """``Cov(w^depth, z)`` of the layer's own weights and inputs, ``(n k, k - 1)``, carried up from the features."""
    size = shapes[depth][0] * shapes[depth][1]
    carried = np.empty((size, 0))
    for below in range(depth):
        n, k, _ = shapes[below]
        pair = betweens[depth * (depth - 1) // 2 + below]
        weights = mean[starts[below] : starts[below + 1]].reshape(n, k)
        found = np.empty((size, n))
        for r in range(size):
            row = pair[r].reshape(n, k)
            for q in range(n):
                total = _dot(row[q], inputs[below, :k])
                for s in range(carried.shape[1]):
                    total += carried[r, s] * weights[q, s]
                found[r, q] = total * slopes[below, q]
        carried = found
    return carried


@_compiled
def _add_shared(weights: Array, inputs: Array, shared: Array, u_mean: Array, u_cov: Array) -> None:
    """What ``Cov(w_jp, z_q) = shared[j k + p, q]`` makes of mean and covariance (``joint._product_cov``)."""
    n, k = weights.shape
    m = k - 1
    one_sided, turned = np.zeros((n, n)), np.zeros(m)
    for j in range(n):
        for q in range(m):
            turned[q] = 0.0
        for p in range(k):
            _add(turned, inputs[p], shared[j * k + p])
        for i in range(n):
            one_sided[j, i] = _dot(turned, weights[i, :m])
        total = 0.0
        for p in range(m):
            total += shared[j * k + p, p]
        u_mean[j] += total
    facing = np.empty((m, m))
    for j in range(n):
        for q in range(m):
            for p in range(m):
                facing[q, p] = shared[j * k + p, q]
        for i in range(j + 1):
            total = one_sided[j, i] + one_sided[i, j]
            for q in range(m):
                total += _dot(facing[q], shared[i * k + q])
            u_cov[j, i] += total
            if i < j:
                u_cov[i, j] += total


# ------------------------------------------------------------------ the row


@_compiled
def _relu(mean: Array, cov: Array, out: Array, slope: Array) -> None:
    """``moments.relu_moments`` with a series of two terms: the mean to ``out``, the covariance in place."""
    n = mean.size
    curvature = np.empty(n)
    for j in range(n):
        variance = max(cov[j, j], 0.0)
        sd = max(math.sqrt(variance), _SMALLEST_SD)
        ratio = min(max(mean[j] / sd, -_FAR), _FAR) if mean[j] == mean[j] else mean[j]
        upper, lower = 0.5 * math.erfc(-ratio * _INV_SQRT2), 0.5 * math.erfc(ratio * _INV_SQRT2)
        density = math.exp(-0.5 * ratio * ratio) * _INV_SQRT_2PI
        spread = upper + ratio * (ratio * (upper * lower) - density * (upper - lower)) - density * density
        out[j], slope[j], curvature[j] = mean[j] * upper + sd * density, upper, density / sd
        for i in range(j):
            entry = cov[j, i]
            entry *= slope[j] * slope[i] + 0.5 * entry * (curvature[j] * curvature[i])
            cov[j, i] = cov[i, j] = entry
        cov[j, j] = variance * max(spread, 0.0) if spread == spread else spread


@_compiled
def _add_input_part(weights: Array, z_cov: Array, u_cov: Array) -> None:
    """Add ``W Cov(z) W'``."""
    n, m = weights.shape[0], z_cov.shape[0]
    half = np.zeros(m)
    for j in range(n):
        for q in range(m):
            half[q] = 0.0
        for p in range(m):
            _add(half, weights[j, p], z_cov[p])
        for i in range(n):
            u_cov[j, i] += _dot(half, weights[i, :m])


@_compiled
def _forward(
    mean: Array, covs: tuple[Array, ...], first: Array, betweens: tuple[Array, ...], shapes: Shapes, features: Array
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Moments of the output, where each layer's weights begin, each layer's ``[z; 1]`` and slopes, all variances."""
    layers, widest = len(covs), 0
    starts = np.zeros(layers + 1, np.int64)
    for depth in range(layers):
        n, k, _ = shapes[depth]
        starts[depth + 1], widest = starts[depth] + n * k, max(widest, n, k)
    inputs, slopes, variances = np.ones((layers, widest)), np.zeros((layers, widest)), np.empty(mean.size)
    for p in range(features.size):
        inputs[0, p] = features[p]
    u_mean, u_cov = np.empty(0), np.empty((0, 0))
    for depth in range(layers):
        n, k, per_row = shapes[depth]
        own, z = slice(starts[depth], starts[depth + 1]), inputs[depth, :k]
        weights, z_cov, u_cov = mean[own].reshape(n, k), u_cov, np.zeros((n, n))
        u_mean, moments = np.empty(n), np.empty((k, k))
        for p in range(k):
            for q in range(k):
                moments[p, q] = z[p] * z[q]
        for p in range(z_cov.shape[0]):
            _add(moments[p, : z_cov.shape[0]], 1.0, z_cov[p])
        if first.ndim == 1:
            _weigh_triangle(covs[depth], per_row, moments, u_cov, variances[own])
        else:
            _weigh_neurons(covs[depth], moments, u_cov, variances[own])
        for j in range(n):
            u_mean[j] = _dot(weights[j], z)
        if depth > 0:
            _add_input_part(weights, z_cov, u_cov)
            if betweens[0].size > 0:
                shared = _shared(betweens, depth, mean, starts, shapes, inputs, slopes)
                _add_shared(weights, z, shared, u_mean, u_cov)
        if depth < layers - 1:
            _relu(u_mean, u_cov, inputs[depth + 1, :n], slopes[depth, :n])
    return u_mean, u_cov, starts, inputs, slopes, variances


@_compiled
def _cross_cov(
    mean: Array, covs: tuple[Array, ...], first: Array, betweens: tuple[Array, ...], shapes: Shapes, starts: Array,
    inputs: Array, slopes: Array,
) -> Array:  # fmt: skip
    """``Cov(w, u^L)`` transposed, ``(o, P)``: ``Sigma`` times the gradients of the mean outputs."""
    layers = len(covs)
    o = shapes[layers - 1][0]
    gradients, out, jacobian = np.empty((o, mean.size)), np.zeros((o, mean.size)), np.eye(o)
    for back in range(layers):
        depth = layers - 1 - back
        n, k, _ = shapes[depth]
        start, weights = starts[depth], mean[starts[depth] : starts[depth + 1]].reshape(n, k)
        below = np.zeros((o, k - 1))
        for a in range(o):
            for j in range(n):
                for p in range(k):
                    gradients[a, start + j * k + p] = jacobian[a, j] * inputs[depth, p]
                _add(below[a], jacobian[a, j], weights[j, : k - 1])
            if depth > 0:
                for p in range(k - 1):
                    below[a, p] *= slopes[depth - 1, p]
        jacobian = below
    for depth in range(layers):
        _, k, per_row = shapes[depth]
        own = slice(starts[depth], starts[depth + 1])
        if first.ndim == 1:
            _apply_triangle(covs[depth], k, per_row, gradients[:, own], out[:, own])
        else:
            _apply_neurons(covs[depth], gradients[:, own], out[:, own])
    if betweens[0].size > 0:
        pair = 0
        for above in range(layers):
            for below_it in range(above):
                low, high = starts[below_it], starts[below_it + 1]
                for r in range(starts[above + 1] - starts[above]):
                    row, at = betweens[pair][r], starts[above] + r
                    for a in range(o):
                        out[a, at] += _dot(row, gradients[a, low:high])
                        _add(out[a, low:high], gradients[a, at], row)
                pair += 1
    return out


@_compiled
def propagate(
    mean: Array, covs: tuple[Array, ...], first: Array, betweens: tuple[Array, ...], shapes: Shapes, features: Array
) -> RowPass:
    """Forward pass of a row ``(d,)``.

    Args:
        mean: ``(P,)``.
        covs: Of each layer, as it is stored.
        first: ``covs[0]``.
        betweens: ``Cov(w^l, w^i)`` in the order of ``joint``; one empty matrix for the other structures.
        shapes: Neurons, inputs with bias, and neurons a block row of each layer.
        features: In the head's own units.
    """
    out_mean, out_cov, starts, inputs, slopes, variances = _forward(mean, covs, first, betweens, shapes, features)
    cross = _cross_cov(mean, covs, first, betweens, shapes, starts, inputs, slopes)
    return out_mean, out_cov, cross, variances


@_compiled
def predict(
    mean: Array, covs: tuple[Array, ...], first: Array, betweens: tuple[Array, ...], shapes: Shapes,
    centre: Array, scale: Array, outputs: Array, rows: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Mean ``(N, o)`` and covariance ``(N, o, o)`` of the output, times ``outputs``, for rows of the encoder."""
    o, features = outputs.size, np.empty(centre.size)
    means, out_covs = np.empty((rows.shape[0], o)), np.empty((rows.shape[0], o, o))
    for b in range(rows.shape[0]):
        for p in range(centre.size):
            features[p] = (rows[b, p] - centre[p]) / scale[p]
        found = _forward(mean, covs, first, betweens, shapes, features)
        for j in range(o):
            means[b, j] = found[0][j] * outputs[j]
            for i in range(o):
                out_covs[b, j, i] = found[1][j, i] * (outputs[j] * outputs[i])
    return means, out_covs


# ------------------------------------------------------------------ the step


@_compiled
def commit(
    mean: Array, covs: tuple[Array, ...], first: Array, betweens: tuple[Array, ...], shapes: Shapes, moved: Array,
    moves: Array, signs: Array,
) -> None:  # fmt: skip
    """``mean += moved``, ``Sigma += V diag(signs) V'`` for ``V'`` of shape ``(q, P)``, in one call."""
    _add(mean, 1.0, moved)
    start = pair = 0
    for depth in range(len(covs)):
        n, k, per_row = shapes[depth]
        at = 0
        for j in range(n):
            width = min((j // per_row) * per_row + per_row, n) * k
            for p in range(k):
                r = start + j * k + p
                total = 0.0
                for q in range(signs.size):
                    scale = signs[q] * moves[q, r]
                    if first.ndim == 1:
                        _add(covs[depth][at : at + width], scale, moves[q, start : start + width])
                    elif first.ndim == 3:
                        _add(covs[depth][j, p], scale, moves[q, start + j * k : start + (j + 1) * k])
                    else:
                        total += scale * moves[q, r]
                if first.ndim == 2:
                    covs[depth][j, p] += total
                at += width
        if betweens[0].size > 0:
            low = 0
            for below in range(depth):
                high = low + shapes[below][0] * shapes[below][1]
                for r in range(n * k):
                    for q in range(signs.size):
                        _add(betweens[pair][r], signs[q] * moves[q, start + r], moves[q, low:high])
                low = high
                pair += 1
        start += n * k
