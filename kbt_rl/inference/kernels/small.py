"""Two layers with one output: the forward pass of ``network``, and one label by Bayes' rule, for one head or many.

Arrays of many heads have a leading axis ``H``; ``heads`` says which take part. ``firsts`` and ``lasts`` are what the
structure stores. For ``joint`` that is one root of all weights ``(H, P, P)``, given as ``firsts``, and nothing, ``(H,
0, 0)``; for ``layer`` two roots ``(H, n k, n k)`` and ``(H, n + 1, n + 1)``; for ``neuron`` roots ``(H, n, k, k)`` and
``(H, n + 1, n + 1)``; for ``diagonal`` variances ``(H, n, k)`` and ``(H, n + 1)``. numba compiles only the branch that
the dimensions leave.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.relu import relu_unit
from kbt_rl.inference.kernels.roots import dot, downdate, in_units, project, transposed

Array = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

_LOG_TWO_PI = math.log(2.0 * math.pi)
# As in ``network``.
_LARGEST, _FARTHEST = 1e25, 1e6


@compiled
def _project_units(root: Array, inputs: Array, n: int, out: Array) -> None:
    """``out[j] = R (e_j (x) z~)`` for each hidden unit, ``(n, rows of R)``; entries above ``j k`` are not written."""
    k, rows = inputs.size, root.shape[0]
    whole = rows - rows % 4
    for i in range(0, whole, 4):
        r0, r1, r2, r3 = root[i], root[i + 1], root[i + 2], root[i + 3]
        for j in range(min((i + 3) // k + 1, n)):
            s0, s1, s2, s3 = (
                r0[j * k : (j + 1) * k],
                r1[j * k : (j + 1) * k],
                r2[j * k : (j + 1) * k],
                r3[j * k : (j + 1) * k],
            )
            t0 = t1 = t2 = t3 = 0.0
            for q in range(k):
                z = inputs[q]
                t0 += s0[q] * z
                t1 += s1[q] * z
                t2 += s2[q] * z
                t3 += s3[q] * z
            own = out[j]
            own[i], own[i + 1], own[i + 2], own[i + 3] = t0, t1, t2, t3
    for i in range(whole, rows):
        row = root[i]
        for j in range(min(i // k + 1, n)):
            out[j, i] = dot(row[j * k : (j + 1) * k], inputs)


@compiled
def _covariances(units: Array, k: int, active: Whole, out: Array) -> None:
    """``out[a, b] = units[j] . units[i]`` for ``j, i = active[a], active[b]``, b < a, in tiles of two by four."""
    count = active.size
    for a in range(0, count, 2):
        c = min(a + 1, count - 1)
        first, whole = active[a] * k, a - a % 4
        left, right = units[active[a], first:], units[active[c], first:]
        for b in range(0, whole, 4):
            u0, u1 = units[active[b], first:], units[active[b + 1], first:]
            u2, u3 = units[active[b + 2], first:], units[active[b + 3], first:]
            s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = 0.0
            for r in range(left.size):
                s, t = left[r], right[r]
                s0 += s * u0[r]
                t0 += t * u0[r]
                s1 += s * u1[r]
                t1 += t * u1[r]
                s2 += s * u2[r]
                t2 += t * u2[r]
                s3 += s * u3[r]
                t3 += t * u3[r]
            out[a, b], out[a, b + 1], out[a, b + 2], out[a, b + 3] = s0, s1, s2, s3
            out[c, b], out[c, b + 1], out[c, b + 2], out[c, b + 3] = t0, t1, t2, t3
        for b in range(whole, c):
            other = units[active[b], first:]
            out[a, b], out[c, b] = dot(left, other), dot(right, other)


@compiled
def _dense(
    mean: Array, first: Array, last: Array, inputs: Array, n: int, wanted: bool,
    units: Array, activation: Array, slope: Array, phi: Array, above: Array,
) -> tuple[float, float, float]:  # fmt: skip
    """Mean of the output, its variance from the weights to first order, and the rest, for ``joint`` and ``layer``.

    Args:
        mean: Weight means ``(P,)``.
        first: See the module, of one head.
        last: See the module, of one head.
        inputs: ``z~`` of the features.
        n: Hidden units.
        wanted: Whether variances are wanted; else both are 0.
        units: Memory, ``(n, rows of first)``.
        activation: Receives ``[E z; 1]``, ``(n + 1,)``.
        slope: Receives ``Phi``, ``(n,)``.
        phi: Receives ``R g`` for the gradient ``g`` of the output by the weights that ``first`` covers.
        above: Receives the same for ``last``; for ``joint`` the last layer's own part.
    """
    k, rows, hidden = inputs.size, first.shape[0], n * inputs.size
    coupled = rows > hidden
    variance, curvature, curved = np.empty(n), np.empty(n), np.empty(n)
    active, count = np.empty(n, np.int64), 0
    _project_units(first, inputs, n, units)
    for j in range(n):
        logit, own = dot(mean[j * k : (j + 1) * k], inputs), units[j, j * k :]
        variance[j] = dot(own, own)
        activation[j], curved[j], slope[j], curvature[j] = relu_unit(logit, variance[j])
        if slope[j] != 0.0:  # a unit that is off covaries with nothing
            active[count] = j
            count += 1
    activation[n] = 1.0
    out = dot(mean[hidden:], activation)
    weights = mean[hidden : hidden + n]
    corner = first[hidden:, hidden:] if coupled else last
    shared = np.zeros((n, n))  # Cov(w_p, z_q) of the hidden weights and units
    if coupled:
        for a in range(count):
            q = active[a]
            transposed(corner, units[q, hidden:], 0, shared[q])
            for p in range(n):
                shared[q, p] *= slope[q]
        for q in range(n):
            out += shared[q, q]
    if not wanted:
        return out, 0.0, 0.0

    rest, entries = 0.0, np.empty((count, count))
    _covariances(units, k, active[:count], entries)
    linear, column = np.empty((n, n)), np.empty(n + 1)  # the last layer's own covariance of hidden weights
    for p in range(n):
        for i in range(p, n + 1):
            column[i] = corner[i, p]
        transposed(corner, column, p, linear[p])
    for j in range(n):
        rest += curved[j] * (weights[j] * weights[j] + linear[j, j])
        rest += linear[j, j] * slope[j] * slope[j] * variance[j]
    for a in range(count):
        j = active[a]
        for b in range(a):
            i, entry = active[b], entries[a, b]
            series = 0.5 * entry * entry * curvature[j] * curvature[i]
            rest += 2.0 * series * (weights[j] * weights[i] + linear[j, i])
            rest += 2.0 * linear[j, i] * slope[j] * slope[i] * entry
    if coupled:
        for p in range(n):
            for q in range(n):
                rest += shared[q, p] * shared[p, q]

    for r in range(rows):
        phi[r] = 0.0
    for a in range(count):
        j = active[a]
        scale, own, target = weights[j] * slope[j], units[j, j * k :], phi[j * k :]
        for r in range(rows - j * k):
            target[r] += scale * own[r]
    square = project(corner, activation, above)
    if coupled:
        for r in range(n + 1):
            phi[hidden + r] += above[r]
        return out, dot(phi, phi), max(rest, 0.0)  # rest is a variance, below 0 by rounding only
    return out, dot(phi, phi) + square, max(rest, 0.0)


@compiled
def _by_neuron(
    mean: Array, first: Array, last: Array, inputs: Array, activation: Array, slope: Array, own: Array, above: Array
) -> tuple[float, float, float]:
    """The same for ``neuron`` and ``diagonal``; ``own`` receives ``R (e_j (x) z~)`` of each unit, ``(n, k)``."""
    n, k = own.shape
    hidden = n * k
    curved, variance = np.empty(n), np.empty(n)
    for j in range(n):
        unit = own[j]
        activation[j] = dot(mean[j * k : (j + 1) * k], inputs)
        if first.ndim == 3:
            root = first[j]
            for i in range(k):
                unit[i] = dot(root[i, : i + 1], inputs[: i + 1])
        else:
            variances = first[j]
            for p in range(k):
                unit[p] = math.sqrt(variances[p]) * inputs[p]
        variance[j] = dot(unit, unit)
    for j in range(n):
        activation[j], curved[j], slope[j], _ = relu_unit(activation[j], variance[j])
    activation[n] = 1.0
    if first.ndim == 3:
        square = project(last, activation, above)
    else:
        for p in range(n + 1):
            above[p] = math.sqrt(last[p]) * activation[p]
        square = dot(above, above)
    out, rest, weights = dot(mean[hidden:], activation), 0.0, mean[hidden:]
    for j in range(n):
        weight, spread = weights[j], 0.0
        if first.ndim == 3:
            for i in range(j, n + 1):
                spread += last[i, j] * last[i, j]
        else:
            spread = last[j]
        linear = slope[j] * slope[j] * variance[j]
        rest += curved[j] * (weight * weight + spread) + spread * linear
        square += weight * weight * linear
    return out, square, rest


@compiled
def _record(out: float, square: float, rest: float, noise: float, label: float, inputs: float, record: Array) -> float:
    """Fill a record, see ``learn_dense``; returns the step of the output, 0 if it is refused."""
    error, total = label - out, square + rest + noise
    record[0], record[1], record[2] = out, square + rest, total
    finite = total + error + error / total if total > 0.0 else math.nan
    far = error * error > _FARTHEST * _FARTHEST * total
    # What the general way refuses: a label, features or a step of the weights beyond _LARGEST.
    huge = abs(label) > 1e-3 * _LARGEST or inputs > _LARGEST * _LARGEST or square > _LARGEST
    refused = far or huge or finite - finite != 0.0
    record[3] = 0.0 if refused else 1.0
    return 0.0 if refused else error / total


@compiled
def learn_dense(
    means: Array, firsts: Array, lasts: Array, centres: Array, scales: Array, heads: Whole, features: Array,
    labels: Array, noises: Array, change: bool, seen: Whole, records: Array, units: Array,
) -> None:  # fmt: skip
    """A whole update of each of ``heads`` ``(R,)`` on its row of ``features`` ``(H, d)`` and its label of ``(H,)``.

    Labels and noise variances are in the heads' own units. With ``change`` unset nothing is changed. ``seen`` ``(H,)``
    counts the labels. ``records`` ``(R, 4)`` receives the mean of the output before, its variance from the weights and
    with noise, and 1 if it was not refused. ``units`` is memory, ``(n, rows of a first root)``, at first 0.
    """
    k, weights, rows = centres.shape[1] + 1, means.shape[1], firsts.shape[1]
    n = (weights - 1) // (k + 1)
    inputs, activation, slope, above = np.empty(k), np.empty(n + 1), np.empty(n), np.empty(n + 1)
    phi, gain, upper = np.empty(rows), np.empty(rows), np.empty(n + 1)
    for r in range(heads.size):
        h = heads[r]
        mean, first, last = means[h], firsts[h], lasts[h]
        size = in_units(features[h], centres[h], scales[h], inputs)
        out, square, rest = _dense(mean, first, last, inputs, n, True, units, activation, slope, phi, above)
        rate = _record(out, square, rest, noises[h], labels[h], size, records[r])
        if not change or records[r, 3] == 0.0:
            continue
        noise = rest + noises[h]
        if rows < weights:  # to each root, what the other one contributes is noise
            lower = dot(phi, phi)
            downdate(first, phi, noise + dot(above, above), gain)
            downdate(last, above, noise + lower, upper)
            for p in range(n + 1):
                mean[rows + p] += rate * upper[p]
        else:
            downdate(first, phi, noise, gain)
        for p in range(rows):
            mean[p] += rate * gain[p]
        seen[h] += 1


@compiled
def learn_neurons(
    means: Array, firsts: Array, lasts: Array, centres: Array, scales: Array, heads: Whole, features: Array,
    labels: Array, noises: Array, change: bool, seen: Whole, records: Array, own: Array,
) -> None:  # fmt: skip
    """``learn_dense`` for ``neuron`` and ``diagonal``; ``own`` is memory, ``(n, k)``."""
    k, weights = centres.shape[1] + 1, means.shape[1]
    n = (weights - 1) // (k + 1)
    inputs, activation, slope, above = np.empty(k), np.empty(n + 1), np.empty(n), np.empty(n + 1)
    gain, factor = np.empty(max(k, n + 1)), np.empty(n)
    for r in range(heads.size):
        h = heads[r]
        mean, first, last = means[h], firsts[h], lasts[h]
        size = in_units(features[h], centres[h], scales[h], inputs)
        out, square, rest = _by_neuron(mean, first, last, inputs, activation, slope, own, above)
        rate = _record(out, square, rest, noises[h], labels[h], size, records[r])
        if not change or records[r, 3] == 0.0:
            continue
        for j in range(n):
            factor[j] = mean[n * k + j] * slope[j]
            for p in range(k):
                own[j, p] *= factor[j]
        _take(mean, first, last, inputs, activation, own, above, factor, square, rest + noises[h], rate, gain)
        seen[h] += 1


@compiled
def _take(
    mean: Array, first: Array, last: Array, inputs: Array, activation: Array, own: Array, above: Array, factor: Array,
    square: float, noise: float, rate: float, gain: Array,
) -> None:  # fmt: skip
    if first.ndim == 3:
        _take_neurons(mean, first, last, own, above, factor, noise, rate, gain)
    else:
        _take_weights(mean, first, last, inputs, activation, own, above, factor, square, noise, rate)


@compiled
def _take_neurons(
    mean: Array, first: Array, last: Array, own: Array, above: Array, factor: Array, noise: float, rate: float,
    gain: Array,
) -> None:  # fmt: skip
    """The measurement of independent neurons: to each, what the others contribute is noise."""
    n, k = own.shape
    hidden, before = n * k, np.empty(n + 1)
    before[0] = 0.0
    for j in range(n):
        before[j + 1] = before[j] + dot(own[j], own[j])
    running = dot(above, above)
    downdate(last, above, float(noise + before[n]), gain)
    for p in range(n + 1):
        mean[hidden + p] += rate * gain[p]
    for j in range(n - 1, -1, -1):
        others = noise + before[j] + running
        running += dot(own[j], own[j])
        if factor[j] != 0.0:
            downdate(first[j], own[j], others, gain)
            row = mean[j * k : (j + 1) * k]
            for p in range(k):
                row[p] += rate * gain[p]


@compiled
def _take_weights(
    mean: Array, first: Array, last: Array, inputs: Array, activation: Array, own: Array, above: Array, factor: Array,
    square: float, noise: float, rate: float,
) -> None:  # fmt: skip
    """The measurement of independent weights: ``v <- v (others + r) / (own + others + r)``."""
    n, k = own.shape
    hidden, total = n * k, square + noise
    for j in range(n + 1):
        variances, parts = (first[j], own[j]) if j < n else (last, above)
        for p in range(parts.size):
            part, variance = parts[p] * parts[p], variances[p]
            if j < n:
                mean[j * k + p] += rate * factor[j] * variance * inputs[p]
            else:
                mean[hidden + p] += rate * variance * activation[p]
            if 2.0 * part < total:  # 1 - x keeps its digits
                variances[p] = variance * (1.0 - part / total)
            else:  # at most one weight explains more than half
                parts[p] = 0.0
                others = noise + dot(above, above)
                for i in range(n):
                    others += dot(own[i], own[i])
                variances[p] = variance * (others / (others + part))
                parts[p] = math.sqrt(part)


@compiled
def predict_dense(
    means: Array, firsts: Array, lasts: Array, centres: Array, scales: Array, features: Array, wanted: bool,
    out_mean: Array, out_var: Array,
) -> None:  # fmt: skip
    """Mean and, if ``wanted``, variance of the output ``(R,)`` for ``R / H`` successive rows a head."""
    k, weights, rows = centres.shape[1] + 1, means.shape[1], firsts.shape[1]
    n, each = (weights - 1) // (k + 1), features.shape[0] // means.shape[0]
    inputs, activation, slope, above = np.empty(k), np.empty(n + 1), np.empty(n), np.empty(n + 1)
    units, phi = np.zeros((n, rows)), np.empty(rows)
    for r in range(features.shape[0]):
        h = r // each
        in_units(features[r], centres[h], scales[h], inputs)
        out_mean[r], square, rest = _dense(
            means[h], firsts[h], lasts[h], inputs, n, wanted, units, activation, slope, phi, above
        )
        out_var[r] = square + rest


@compiled
def predict_neurons(
    means: Array, firsts: Array, lasts: Array, centres: Array, scales: Array, features: Array, wanted: bool,
    out_mean: Array, out_var: Array,
) -> None:  # fmt: skip
    """``predict_dense`` for ``neuron`` and ``diagonal``."""
    k, weights = centres.shape[1] + 1, means.shape[1]
    n, each = (weights - 1) // (k + 1), features.shape[0] // means.shape[0]
    inputs, activation, slope, above = np.empty(k), np.empty(n + 1), np.empty(n), np.empty(n + 1)
    own = np.empty((n, k))
    for r in range(features.shape[0]):
        h = r // each
        in_units(features[r], centres[h], scales[h], inputs)
        out_mean[r], square, rest = _by_neuron(means[h], firsts[h], lasts[h], inputs, activation, slope, own, above)
        out_var[r] = square + rest
