"""The units of a first layer for a row: its features in the head's units, variances, moments after the ReLU."""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.relu import relu_unit
from kbt_rl.inference.kernels.terms import Array, Shapes
from kbt_rl.inference.kernels.vectors import dot


@compiled
def in_units(centre: Array, scale: Array, features: Array) -> Array:
    """``z~`` of a row ``(d,)`` as it comes from the encoder, ``(d + 1,)``."""
    inputs = np.empty(features.size + 1)
    for p in range(features.size):
        inputs[p] = (features[p] - centre[p]) / scale[p]
    inputs[features.size] = 1.0
    return inputs


@compiled
def unit_variances(cov: Array, inputs: Array, n: int, per_row: int, out: Array) -> None:
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
                variance += inputs[p] * dot(cov[start : start + k], inputs)
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


@compiled
def unit_moments(mean: Array, first: Array, shapes: Shapes, inputs: Array) -> tuple[Array, Array, Array, Array]:
    """``relu_unit`` of each hidden unit for rows ``[z; 1]``, ``(B, k)``; four times ``(n, B)``."""
    (n, k, per_row), count = shapes[0], inputs.shape[0]
    spread = np.empty(n)
    out_mean, variance = np.empty((n, count)), np.empty((n, count))
    slope, curvature = np.empty((n, count)), np.empty((n, count))
    weights = mean[: n * k].reshape(n, k)
    for b in range(count):
        unit_variances(first, inputs[b], n, per_row, spread)
        for j in range(n):
            logit = 0.0
            for p in range(k):
                logit += weights[j, p] * inputs[b, p]
            out_mean[j, b], variance[j, b], slope[j, b], curvature[j, b] = relu_unit(logit, spread[j])
    return out_mean, variance, slope, curvature


@compiled
def is_resolved(
    mean: Array, covs: tuple[Array, ...], first: Array, shapes: Shapes, inputs: Array, cross: Array, variances: Array,
    least: float
) -> bool:  # fmt: skip
    """Whether ``resolution``'s quotient of a row ``[z; 1]``, for one output, is at least ``least``."""
    n, k, per_row = shapes[0]
    hidden, two, spreads = n * k, len(covs) == 2, np.empty(n)
    together = apart = 0.0
    if two:
        unit_variances(first, inputs, n, per_row, spreads)
        together, apart = cross[hidden + n], variances[hidden + n]
    for unit in range(n):
        own, slope = unit * k, 1.0
        if two:
            activation, _, slope, _ = relu_unit(dot(mean[own : own + k], inputs), spreads[unit])
            slope *= mean[hidden + unit]
            together += activation * cross[hidden + unit]
            apart += activation * activation * variances[hidden + unit]
        for p in range(k):
            gradient = slope * inputs[p]
            together += gradient * cross[own + p]
            apart += gradient * gradient * variances[own + p]
    return together >= least * apart
