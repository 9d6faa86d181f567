"""Acting by the mean of a two-layer head, see ``acting``."""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.relu import relu_unit
from kbt_rl.inference.kernels.terms import Array, Shapes
from kbt_rl.inference.kernels.units import in_units, own_block
from kbt_rl.inference.kernels.vectors import axpy, copy, dot


@compiled
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


@compiled
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
    copy(mean[: n * k], weights.reshape(n * k))
    copy(mean[n * k :], above.reshape(o * (n + 1)))
    for unit in range(n):
        start, width = own_block(unit, n, k, per_row)
        pair = 0
        for p in range(k):
            for q in range(p, k):
                entry = _entry(first, unit, p, q, start + p * width + q)
                form[pair, unit] = entry if p == q else 2.0 * entry
                pair += 1
        for j in range(coupling.shape[0]):
            copy(between[j * (n + 1) + unit, unit * k : (unit + 1) * k], coupling[j, unit])
    return weights, above, form, coupling


@compiled
def _act_row(first: Array, last: Array, hidden_form: Array, coupling: Array, inputs: Array, out: Array) -> None:
    """``act`` of one row, into ``out`` ``(o,)``."""
    n, k = first.shape
    o = last.shape[0]
    variance = np.zeros(n)
    pair = 0
    for p in range(k):
        for q in range(p, k):
            axpy(variance, inputs[p] * inputs[q], hidden_form[pair])
            pair += 1
    for j in range(o):
        out[j] = last[j, n]
    for i in range(n):
        mean, _, slope, _ = relu_unit(dot(first[i], inputs), max(variance[i], 0.0))
        for j in range(o):
            out[j] += last[j, i] * mean
            if coupling.size > 0:
                out[j] += slope * dot(coupling[j, i], inputs)


@compiled
def act(
    first: Array, last: Array, hidden_form: Array, coupling: Array, centre: Array, scale: Array, rows: Array
) -> Array:
    """``acting.view_mean`` of a two-layer view for rows ``(N, d)`` in the encoder's units; ``(N, o)``."""
    out = np.empty((rows.shape[0], last.shape[0]))
    for b in range(rows.shape[0]):
        _act_row(first, last, hidden_form, coupling, in_units(centre, scale, rows[b]), out[b])
    return out
