"""One row through heads of any depth, and a whole update by it, for those that are too deep for ``row``.

What ``joint``, ``smoother`` and ``structures`` define for any number of rows. The covariance of a layer is read once
for ``Cov(u)``, as ``sum_pq Sigma_jp,iq (z~_p z~_q + Cov(z_p, z_q))``, and once for ``Cov(w, u^L)``, which is ``Sigma``
times the gradient of the mean output; what lies between is of the size of the layers.

Sizes: layer ``l`` has ``n`` outputs and ``k`` inputs, bias included; ``o`` outputs of the head, ``P`` weights.
"""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.deep_layer import (
    add_input_part,
    add_shared,
    apply_neurons,
    apply_triangle,
    cov_with_inputs,
    weigh_neurons,
    weigh_triangle,
)
from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.relu import relu_dense
from kbt_rl.inference.kernels.step import scalar_step
from kbt_rl.inference.kernels.terms import Array, RowPass, ScalarRecord, Shapes
from kbt_rl.inference.kernels.units import in_units
from kbt_rl.inference.kernels.vectors import axpy, copy, dot


@compiled
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
            axpy(moments[p, : z_cov.shape[0]], 1.0, z_cov[p])
        if first.ndim == 1:
            weigh_triangle(covs[depth], per_row, moments, u_cov, variances[own])
        else:
            weigh_neurons(covs[depth], moments, u_cov, variances[own])
        for j in range(n):
            u_mean[j] = dot(weights[j], z)
        if depth > 0:
            add_input_part(weights, z_cov, u_cov)
            if betweens[0].size > 0:
                shared = cov_with_inputs(betweens, depth, mean, starts, shapes, inputs, slopes)
                add_shared(weights, z, shared, u_mean, u_cov)
        if depth < layers - 1:
            z_mean, u_cov, slope = relu_dense(u_mean, u_cov)
            copy(z_mean, inputs[depth + 1, :n])
            copy(slope, slopes[depth, :n])
    return u_mean, u_cov, starts, inputs, slopes, variances


@compiled
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
                axpy(below[a], jacobian[a, j], weights[j, : k - 1])
            if depth > 0:
                for p in range(k - 1):
                    below[a, p] *= slopes[depth - 1, p]
        jacobian = below
    for depth in range(layers):
        n, k, per_row = shapes[depth]
        if first.ndim == 1:
            apply_triangle(covs[depth], n, k, per_row, starts[depth], gradients, out)
        else:
            apply_neurons(covs[depth], starts[depth], gradients, out)
    if betweens[0].size > 0:
        pair = 0
        for above in range(layers):
            for below_it in range(above):
                low, high = starts[below_it], starts[below_it + 1]
                for r in range(starts[above + 1] - starts[above]):
                    row, at = betweens[pair][r], starts[above] + r
                    for a in range(o):
                        out[a, at] += dot(row, gradients[a, low:high])
                        axpy(out[a, low:high], gradients[a, at], row)
                pair += 1
    return out


@compiled
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


@compiled
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


@compiled
def commit(
    mean: Array, covs: tuple[Array, ...], first: Array, betweens: tuple[Array, ...], shapes: Shapes, moved: Array,
    moves: Array, signs: Array,
) -> None:  # fmt: skip
    """``mean += moved``, ``Sigma += V diag(signs) V'`` for ``V'`` of shape ``(q, P)``, in one call."""
    axpy(mean, 1.0, moved)
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
                        axpy(covs[depth][at : at + width], scale, moves[q, start : start + width])
                    elif first.ndim == 3:
                        axpy(covs[depth][j, p], scale, moves[q, start + j * k : start + (j + 1) * k])
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
                        axpy(betweens[pair][r], signs[q] * moves[q, start + r], moves[q, low:high])
                low = high
                pair += 1
        start += n * k


@compiled
def learn(
    mean: Array, covs: tuple[Array, ...], first: Array, betweens: tuple[Array, ...], shapes: Shapes,
    centre: Array, scale: Array, labels_seen: Array,
    features: Array, label: float, noise: float, replacing: bool, kept: float,
) -> ScalarRecord:  # fmt: skip
    """A whole update by a row and the label of one output, in one call; or nothing changes."""
    inputs = in_units(centre, scale, features)
    out_mean, out_cov, cross, variances = propagate(mean, covs, first, betweens, shapes, inputs[:-1])
    moved, moves, signs = np.empty(mean.size), np.empty((1, mean.size)), np.empty(1)
    record: ScalarRecord = scalar_step(
        out_mean[0], out_cov[0, 0], cross[0], variances, inputs, label, noise, replacing, kept, True, moved, moves,
        signs,
    )  # fmt: skip
    if record[3] == 1.0:
        commit(mean, covs, first, betweens, shapes, moved, moves, signs)
        labels_seen[0] += 1
    return record
