"""Forward pass of a row where a layer's weights covary with each other: ``joint`` and ``layer``.

What ``joint``, ``smoother`` and ``triangle`` define. They allocate nothing of the covariance's size and read it once.
"""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.relu import relu_dense
from kbt_rl.inference.kernels.terms import Array, RowPass
from kbt_rl.inference.kernels.vectors import axpy, dot, matvec, row_dots, with_one


@compiled
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
                row_dots(row, inputs, last, out, start + a * k + p)
                variances[start + a * k + p] = row[a * k + p]
                offset += width
        first = last


@compiled
def _logits_cov(projection: Array, inputs: Array, start: int) -> Array:
    """``z~' Sigma_ji z~`` from ``Sigma (I (x) z~)``, whose columns of this layer begin at ``start``; ``(n, n)``."""
    n, k = projection.shape[0], inputs.size
    out = np.empty((n, n))
    for j in range(n):
        own = slice(start + j * k, start + (j + 1) * k)
        for i in range(j + 1):
            out[j, i] = out[i, j] = dot(projection[i, own], inputs)
    return out


@compiled
def linear_dense(mean: Array, cov: Array, features: Array, o: int, per_row: int) -> RowPass:
    """One layer, see ``RowPass``."""
    inputs = with_one(features)
    cross, variances = np.empty((o, mean.size)), np.empty(mean.size)
    _project_triangle(cov, inputs, o, per_row, cross, np.int64(0), variances)
    return matvec(mean.reshape(o, inputs.size), inputs), _logits_cov(cross, inputs, np.int64(0)), cross, variances


@compiled
def two_layers_dense(
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
    inputs, weights = with_one(features), mean[hidden:].reshape(o, n + 1)

    variances = np.empty(mean.size)
    start = np.int64(0)
    _project_triangle(first, inputs, n, per_row_first, projection, start, variances)
    u_cov = _logits_cov(projection, inputs, start)
    z_mean, z_cov, slope = relu_dense(matvec(mean[:hidden].reshape(n, k), inputs), u_cov)

    activation = with_one(z_mean)
    cross = np.zeros((o, mean.size))
    for r in range(between.shape[0]):
        row_dots(between[r], inputs, n, projection, hidden + r)
        axpy(cross[r // (n + 1), :hidden], activation[r % (n + 1)], between[r])
    # Columns cut out of it would be to the compiler numbers anywhere in memory.
    _slope_rows(projection, hidden, slope)
    out_mean, out_cov = add_outputs(
        weights, last, per_row_last, activation, z_cov, projection, hidden, cross, hidden, variances
    )
    for j in range(o):
        for q in range(n):
            if coupled:
                axpy(cross[j, hidden:], weights[j, q], projection[q, hidden:])
            axpy(cross[j, :hidden], weights[j, q] * slope[q], projection[q, :hidden])
    return out_mean, out_cov, cross, variances


@compiled
def _slope_rows(shared: Array, first: int, slope: Array) -> None:
    """From ``Cov(w^2, u_q)`` in row ``q``, from column ``first`` on, to ``Cov(w^2, z_q)``, by Stein's lemma."""
    for q in range(shared.shape[0]):
        for r in range(first, shared.shape[1]):
            shared[q, r] *= slope[q]


@compiled
def add_outputs(
    weights: Array, cov: Array, per_row: int, activation: Array, z_cov: Array, shared: Array, first: int,
    cross: Array, start: int, variances: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Mean and covariance of the last of two layers, for ``shared[q, first:] = Cov(w^2, z_q)``, without entries if 0.

    On the way ``cross`` gets, from column ``start`` on, ``Sigma (I (x) z~)`` transposed, and ``variances`` the
    variances of the weights.
    """
    o = weights.shape[0]
    _project_triangle(cov, activation, o, per_row, cross, start, variances)
    out_mean = matvec(weights, activation)
    out_cov = _logits_cov(cross, activation, start)
    _add_input_part(out_cov, weights, cov, z_cov, per_row)
    if shared.shape[1] > first:
        _add_coupled_part(out_mean, out_cov, weights, shared, first, activation)
    return out_mean, out_cov


@compiled
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
                    total += dot(row, z_cov[p]) + weights[j, p] * dot(weights[i, :n], z_cov[p])
                out_cov[j, i] += total
                if i < j:
                    out_cov[i, j] += total
            offset += k * width
        start = stop


@compiled
def _add_coupled_part(
    out_mean: Array, out_cov: Array, weights: Array, shared: Array, first: int, activation: Array
) -> None:
    """Add what ``Cov(w_jp, z_q) = shared[q, first + j k + p]`` makes of the moments (``joint._product_cov``)."""
    o, k = weights.shape
    n = k - 1
    one_sided, facing = np.zeros((o, o)), np.empty((n, n))
    for j in range(o):
        own = first + j * k
        for q in range(n):
            out_mean[j] += shared[q, own + q]
            turned = dot(shared[q, own : own + k], activation)
            for i in range(o):
                one_sided[j, i] += turned * weights[i, q]
    for j in range(o):
        for p in range(n):
            for q in range(n):
                facing[p, q] = shared[q, first + j * k + p]
        for i in range(o):
            both, other = 0.0, first + i * k
            for p in range(n):
                both += dot(shared[p, other : other + n], facing[p])
            out_cov[j, i] += one_sided[j, i] + one_sided[i, j] + both
