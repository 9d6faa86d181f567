"""Mean and covariance of the output for rows one by one, from a form of the covariance that serves many of them."""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.dense import add_outputs
from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.relu import relu_entry, relu_unit
from kbt_rl.inference.kernels.row import propagate
from kbt_rl.inference.kernels.terms import Array, Shapes
from kbt_rl.inference.kernels.units import in_units
from kbt_rl.inference.kernels.vectors import dot, matvec, with_one


@compiled
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
                        form[pair, at] = np.float64(rows[p, i * k + q]) + rows[q, i * k + p]  # of float32 too
                        at += 1
                    form[pair, at] = rows[p, i * k + p]
                    at += 1
                pair += 1
            offset += k * width
        first = last


@compiled
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
    logits, z_mean, z_cov = matvec(mean[: n * k].reshape(n, k), inputs), np.empty(n), np.zeros((n, n))
    slope, curvature, active, count = np.empty(n), np.empty(n), np.empty(n, np.int64), 0
    for j in range(n):
        variance = max(dot(form[j * (j + 3) // 2], products), 0.0)  # rounding may leave one of 0 a little below
        z_mean[j], z_cov[j, j], slope[j], curvature[j] = relu_unit(logits[j], variance)
        if slope[j] != 0.0:
            active[count] = j
            count += 1
    for a in range(count):
        j = active[a]
        for e in range(a):
            i = active[e]
            entry = dot(form[j * (j + 1) // 2 + i], products)
            entry = relu_entry(entry, slope[j], curvature[j], slope[i], curvature[i])
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
    out_mean, out_cov = add_outputs(
        weights, cov, per_row, with_one(z_mean), z_cov, shared, start, cross, start, variances
    )
    return out_mean, out_cov


@compiled
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
        inputs = in_units(centre, scale, rows[b])
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
