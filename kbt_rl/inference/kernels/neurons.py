"""Independent neurons, ``neuron`` and ``diagonal``: the forward pass of a row, and the change of a covariance.

Blocks here have a few numbers a row, and a slice, whose references are counted, costs as much as a row of them.
"""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.relu import relu_unit
from kbt_rl.inference.kernels.terms import Array, RowPass
from kbt_rl.inference.kernels.vectors import axpy, dot, matvec, with_one


@compiled
def project_neurons(cov: Array, inputs: Array, out: Array, variances: Array) -> None:
    """``Sigma_j z~`` and variances of each neuron, ``(n, k)``, for blocks ``(n, k, k)`` or variances ``(n, k)``."""
    n, k = out.shape
    for j in range(n):
        if cov.ndim == 3:
            for q in range(k):
                total = 0.0
                for p in range(k):
                    total += cov[j, q, p] * inputs[p]
                out[j, q], variances[j, q] = total, cov[j, q, q]
        else:
            for q in range(k):
                out[j, q], variances[j, q] = cov[j, q] * inputs[q], cov[j, q]


@compiled
def linear_neurons(mean: Array, cov: Array, features: Array, o: int) -> RowPass:
    """As ``linear_dense``, for independent neurons."""
    inputs = with_one(features)
    k = inputs.size
    projection, cross, out_cov = np.empty((o, k)), np.zeros((o, mean.size)), np.zeros((o, o))
    variances = np.empty(mean.size)
    project_neurons(cov, inputs, projection, variances.reshape(o, k))
    for j in range(o):
        axpy(cross[j, j * k : (j + 1) * k], 1.0, projection[j])
        out_cov[j, j] = dot(projection[j], inputs)
    return matvec(mean.reshape(o, k), inputs), out_cov, cross, variances


@compiled
def two_layers_neurons(mean: Array, first: Array, last: Array, features: Array, o: int) -> RowPass:
    """As ``two_layers_dense``, for independent neurons."""
    inputs = with_one(features)
    n, k = first.shape[0], inputs.size
    hidden = n * k
    weights = mean[hidden:].reshape(o, n + 1)
    projection, slope, variances = np.empty((n, k)), np.empty(n), np.empty(mean.size)
    project_neurons(first, inputs, projection, variances[:hidden].reshape(n, k))
    logits = matvec(mean[:hidden].reshape(n, k), inputs)
    activation, z_variance = np.empty(n + 1), np.empty(n)
    activation[n] = 1.0
    for j in range(n):
        activation[j], z_variance[j], slope[j], _ = relu_unit(logits[j], max(dot(projection[j], inputs), 0.0))

    above = np.empty((o, n + 1))
    project_neurons(last, activation, above, variances[hidden:].reshape(o, n + 1))
    cross, out_cov = np.zeros((o, mean.size)), np.empty((o, o))
    for j in range(o):
        for q in range(n):
            axpy(cross[j, q * k : (q + 1) * k], weights[j, q] * slope[q], projection[q])
        axpy(cross[j, hidden + j * (n + 1) : hidden + (j + 1) * (n + 1)], 1.0, above[j])
        for i in range(j + 1):
            total = 0.0
            for q in range(n):
                total += np.float64(weights[j, q]) * weights[i, q] * z_variance[q]
            out_cov[j, i] = out_cov[i, j] = total
        total = dot(above[j], activation)
        for q in range(n):
            total += z_variance[q] * (last[j, q, q] if last.ndim == 3 else last[j, q])
        out_cov[j, j] += total
    return matvec(weights, activation), out_cov, cross, variances


@compiled
def downdate_neurons(cov: Array, moves: Array, sign: float) -> None:
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
