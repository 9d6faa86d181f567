"""What one layer of a deep head does to a row, see ``deep``."""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.terms import Array, Shapes
from kbt_rl.inference.kernels.vectors import axpy, dot


@compiled
def weigh_triangle(flat: Array, per_row: int, moments: Array, u_cov: Array, variances: Array) -> None:
    """Add ``sum_pq Sigma_jp,iq moments_pq`` to ``u_cov``; on the way the variances of the weights, ``(n k,)``."""
    n, k = u_cov.shape[0], moments.shape[0]
    start = 0
    for j in range(n):
        width = min((j // per_row) * per_row + per_row, n) * k
        for p in range(k):
            row = flat[start : start + width]
            for i in range(j + 1):
                u_cov[j, i] += dot(row[i * k : (i + 1) * k], moments[p])
            variances[j * k + p] = row[j * k + p]
            start += width
        for i in range(j):
            u_cov[i, j] = u_cov[j, i]


@compiled
def apply_triangle(flat: Array, n: int, k: int, per_row: int, start: int, gradients: Array, out: Array) -> None:
    """Add ``Sigma g`` to ``out`` for each row ``g`` of ``gradients``, ``(o, P)``, from column ``start`` on.

    Columns of a matrix, cut out, are to the compiler numbers anywhere in memory, and take six times as long.
    """
    at = 0
    for j in range(n):
        first = (j // per_row) * per_row
        before, width = first * k, min(first + per_row, n) * k
        for p in range(k):
            row, r = flat[at : at + width], start + j * k + p
            for a in range(gradients.shape[0]):
                out[a, r] += dot(row, gradients[a, start : start + width])
                axpy(out[a, start : start + before], gradients[a, r], row[:before])
            at += width


@compiled
def weigh_neurons(cov: Array, moments: Array, u_cov: Array, variances: Array) -> None:
    """As ``weigh_triangle``, for blocks ``(n, k, k)`` or variances ``(n, k)``."""
    k = moments.shape[0]
    for j in range(cov.shape[0]):
        for p in range(k):
            if cov.ndim == 3:
                u_cov[j, j] += dot(cov[j, p], moments[p])
                variances[j * k + p] = cov[j, p, p]
            else:
                u_cov[j, j] += cov[j, p] * moments[p, p]
                variances[j * k + p] = cov[j, p]


@compiled
def apply_neurons(cov: Array, start: int, gradients: Array, out: Array) -> None:
    """As ``apply_triangle``."""
    n, k = cov.shape[0], cov.shape[1]
    for a in range(gradients.shape[0]):
        for j in range(n):
            at = start + j * k
            for p in range(k):
                if cov.ndim == 3:
                    out[a, at + p] += dot(cov[j, p], gradients[a, at : at + k])
                else:
                    out[a, at + p] += cov[j, p] * gradients[a, at + p]


@compiled
def cov_with_inputs(
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
                total = dot(row[q], inputs[below, :k])
                for s in range(carried.shape[1]):
                    total += carried[r, s] * weights[q, s]
                found[r, q] = total * slopes[below, q]
        carried = found
    return carried


@compiled
def add_shared(weights: Array, inputs: Array, shared: Array, u_mean: Array, u_cov: Array) -> None:
    """What ``Cov(w_jp, z_q) = shared[j k + p, q]`` makes of mean and covariance (``joint._product_cov``)."""
    n, k = weights.shape
    m = k - 1
    one_sided, turned = np.zeros((n, n)), np.zeros(m)
    for j in range(n):
        for q in range(m):
            turned[q] = 0.0
        for p in range(k):
            axpy(turned, inputs[p], shared[j * k + p])
        for i in range(n):
            one_sided[j, i] = dot(turned, weights[i, :m])
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
                total += dot(facing[q], shared[i * k + q])
            u_cov[j, i] += total
            if i < j:
                u_cov[i, j] += total


@compiled
def add_input_part(weights: Array, z_cov: Array, u_cov: Array) -> None:
    """Add ``W Cov(z) W'``."""
    n, m = weights.shape[0], z_cov.shape[0]
    half = np.zeros(m)
    for j in range(n):
        for q in range(m):
            half[q] = 0.0
        for p in range(m):
            axpy(half, weights[j, p], z_cov[p])
        for i in range(n):
            u_cov[j, i] += dot(half, weights[i, :m])
