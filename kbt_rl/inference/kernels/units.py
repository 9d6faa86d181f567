"""The units of a first layer for a row: its features in the head's units, variances, moments after the ReLU."""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.relu import relu_unit
from kbt_rl.inference.kernels.terms import Array, Shapes, UnitMoments
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
def own_block(unit: int, n: int, k: int, per_row: int) -> tuple[int, int]:
    """Where in a triangle (``triangle.py``) a unit's own block begins, and how far its rows are from each other."""
    block_row = unit // per_row
    begin = block_row * per_row
    width = min(begin + per_row, n) * k
    above = per_row * k * per_row * k * (block_row * (block_row + 1) // 2)
    return above + (unit - begin) * k * width + unit * k, width


@compiled
def unit_variances(cov: Array, inputs: Array, n: int, per_row: int, out: Array) -> None:
    """``z~' Sigma_j z~`` of each hidden unit, ``(n,)``."""
    k = inputs.size
    for j in range(n):
        variance = 0.0
        if cov.ndim == 1:
            start, width = own_block(j, n, k, per_row)
            for p in range(k):
                variance += inputs[p] * dot(cov[start + p * width : start + p * width + k], inputs)
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
def gradients(mean: Array, shapes: Shapes, inputs: Array, moments: UnitMoments, o: int) -> Array:
    """Derivatives of the mean outputs by the weights for rows ``[z; 1]``, ``(B o, P)``; ``moments`` as in ``rows``."""
    count, k = inputs.shape
    out = np.zeros((count * o, mean.size))
    for b in range(count):
        for a in range(o):
            row, at = out[b * o + a], a * k
            if len(shapes) == 2:
                n = shapes[0][0]
                above = n * k + a * (n + 1)
                for j in range(n):
                    factor, at = mean[above + j] * moments[2][j, b], j * k
                    for p in range(k):
                        row[at + p] = factor * inputs[b, p]
                    row[above + j] = moments[0][j, b]
                row[above + n] = 1.0
            else:
                for p in range(k):
                    row[at + p] = inputs[b, p]
    return out


@compiled
def resolves(gate: Array, activation: Array, inputs: Array, cross: Array, variances: Array, least: float) -> bool:
    """Whether ``resolution``'s quotient is at least ``least``, for one output.

    Args:
        gate: Derivative of the output by each logit of the first layer, ``(n,)``.
        activation: Of the second layer, ``(n + 1,)``; empty if there is none.
        inputs: ``[z; 1]``, ``(k,)``.
        cross: ``Cov(w, u)``, ``(P,)``.
        variances: Of the weights, ``(P,)``.
        least: The limit.
    """
    n, k, hidden = gate.size, inputs.size, gate.size * inputs.size
    own, own_variances = cross[:hidden].reshape(n, k), variances[:hidden].reshape(n, k)
    above, above_variances = cross[hidden:], variances[hidden:]
    together = apart = 0.0
    for unit in range(n):
        for p in range(k):
            gradient = gate[unit] * inputs[p]
            together += gradient * own[unit, p]
            apart += gradient * gradient * own_variances[unit, p]
    for q in range(activation.size):
        together += activation[q] * above[q]
        apart += activation[q] * activation[q] * above_variances[q]
    return together >= least * apart


@compiled
def is_resolved(
    mean: Array, covs: tuple[Array, ...], first: Array, shapes: Shapes, inputs: Array, cross: Array, variances: Array,
    least: float
) -> bool:  # fmt: skip
    """``resolves`` for a row ``[z; 1]``, from the posterior."""
    n, k, per_row = shapes[0]
    if len(covs) == 1:
        return resolves(np.ones(1), np.empty(0), inputs, cross, variances, least)
    spreads, gate, activation = np.empty(n), np.empty(n), np.empty(n + 1)
    unit_variances(first, inputs, n, per_row, spreads)
    activation[n] = 1.0
    for unit in range(n):
        logit = dot(mean[unit * k : (unit + 1) * k], inputs)
        activation[unit], _, slope, _ = relu_unit(logit, spreads[unit])
        gate[unit] = slope * mean[n * k + unit]
    return resolves(gate, activation, inputs, cross, variances, least)
