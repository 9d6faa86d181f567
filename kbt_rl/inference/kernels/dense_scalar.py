"""As ``dense``, for two layers and one output: the hidden covariance is read once and nothing of it is kept."""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.relu import relu_entry, relu_unit
from kbt_rl.inference.kernels.row_blocks import gather, multiply
from kbt_rl.inference.kernels.terms import Array, RowPass
from kbt_rl.inference.kernels.units import unit_variances
from kbt_rl.inference.kernels.vectors import axpy, dot, with_one


@compiled
def two_layers_dense_scalar(
    mean: Array, first: Array, last: Array, between: Array, features: Array, per_row: int
) -> RowPass:
    """``two_layers_dense`` for one output: ``Cov(w, u^2)`` is ``Sigma`` times the gradient of the mean output.

    So nothing is kept of ``Cov(w, u^1)``, and units that are off, in a signed start about a third of them, are left out
    of what covaries: they do not, to the last bit.
    """
    inputs = with_one(features)
    k = inputs.size
    n = (mean.size - 1) // (k + 1)
    hidden = n * k
    weights, above, second = mean[:hidden].reshape(n, k), mean[hidden:], last.reshape(n + 1, n + 1)
    activation, spread, slope, curvature = np.empty(n + 1), np.empty(n), np.empty(n), np.empty(n)
    gradient, active, count = np.empty(hidden), np.empty(n, np.int64), 0
    unit_variances(first, inputs, n, per_row, spread)
    activation[n], out_mean, variance = 1.0, above[n], 0.0
    for j in range(n):
        activation[j], spread[j], slope[j], curvature[j] = relu_unit(dot(weights[j], inputs), spread[j])
        out_mean += above[j] * activation[j]
        weight = np.float64(above[j])  # of float32 too, here and below: a product of two would be one
        variance += spread[j] * (weight * weight + second[j, j])
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
        own = cross[0, j * k : (j + 1) * k]
        for p in range(k):
            variances[j * k + p] = rows[p, j * k + p]
        if slope[j] == 0.0:
            multiply(rows, gradient, own)
            continue
        gather(rows, inputs, gradient, combined, own)
        weight = np.float64(above[j])
        axpy(cross[0, : begin * k], weight * slope[j], combined)
        for a in range(upto):
            i = active[a]
            entry = dot(combined[i * k : (i + 1) * k], inputs)
            entry = relu_entry(entry, slope[j], curvature[j], slope[i], curvature[i])
            variance += 2.0 * entry * (weight * above[i] + second[j, i])
        upto += 1

    for p in range(n + 1):
        projected = dot(second[p], activation)
        cross[0, hidden + p], variances[hidden + p] = projected, second[p, p]
        variance += activation[p] * projected
    if between.size > 0:
        shared = np.zeros((n, n))
        for p in range(n + 1):
            row = between[p]
            axpy(cross[0, :hidden], activation[p], row)
            coupled = dot(row, gradient)
            cross[0, hidden + p] += coupled
            variance += 2.0 * activation[p] * coupled
            for a in range(count if p < n else 0):
                q = active[a]
                shared[p, q] = slope[q] * dot(row[q * k : (q + 1) * k], inputs)
        for p in range(n):
            out_mean += shared[p, p]
            for q in range(n):
                variance += shared[p, q] * shared[q, p]
    means, out_cov = np.empty(1), np.empty((1, 1))
    means[0], out_cov[0, 0] = out_mean, variance
    return means, out_cov, cross, variances
