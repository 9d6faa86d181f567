"""A whole update of heads of two layers of independent neurons, with one output."""

from __future__ import annotations

import math

import numpy as np

from kbt_rl.inference.kernels.jit import compiled_nogil, inlined
from kbt_rl.inference.kernels.neurons import downdate_neurons, project_neurons
from kbt_rl.inference.kernels.relu import relu_unit
from kbt_rl.inference.kernels.terms import FAR, FARTHEST, INFINITY_BITS, LARGEST, SMALLEST_MOVE, Array
from kbt_rl.inference.kernels.units import resolves
from kbt_rl.inference.kernels.vectors import is_finite, sum_of

# As ``SMALLEST_MOVE``, for all weights of a unit at once, whose moves are some variances times this.
_SMALLEST_GATE = 1e-140


@inlined
def _moved(cross: Array, variances: Array, change: float, root: float, kept: float) -> tuple[float, float]:
    """The sum of the covariances with the output, and the smallest variance after the step, see ``weight_step``.

    On the way covariances that ``normal`` would drop become 0. The sum is NaN if a variance is NaN or infinite.
    """
    step, smallest, largest = 0.0, np.int64(INFINITY_BITS), np.int64(0)
    for i in range(cross.size):
        cross[i] = 0.0 if abs(root * cross[i]) <= SMALLEST_MOVE else cross[i]
    for i in range(cross.size):
        move = cross[i]
        step += move
        # See ``smallest_of``.
        bits = np.float64(kept * variances[i] + change * move * move).view(np.int64)
        smallest = bits if bits < smallest else smallest
        largest = bits if bits > largest else largest
    return step if largest < INFINITY_BITS else np.nan, np.int64(smallest).view(np.float64)


@inlined
def _smallest_after(gradient: Array, variances: Array, head: int, change: float, kept: float) -> float:
    """As the second of ``_moved``, for independent weights and the output's gradient by them."""
    smallest, lost = np.int64(INFINITY_BITS), 1.0 - kept
    for i in range(gradient.size):
        before = variances[head, i]
        move = gradient[i] * before
        bits = np.float64(before + change * move * move - lost * before).view(np.int64)  # see ``smallest_of``
        smallest = bits if bits < smallest else smallest
    variance: float = np.int64(smallest).view(np.float64)
    return variance


@inlined
def _take(gradient: Array, means: Array, variances: Array, head: int, start: int, gain: float, change: float) -> None:
    """The step of independent weights, whose means begin at ``start``."""
    for i in range(gradient.size):
        before = variances[head, i]
        move = gradient[i] * before
        means[head, start + i] += gain * move
        variances[head, i] = before + change * move * move


@compiled_nogil
def learn_neurons(
    means: Array, firsts: Array, lasts: Array, centres: Array, scales: Array, labels_seen: Array,
    heads: Array, features: Array, labels: Array, noises: Array, replacing: bool, kept: float, least: float,
    plan: Array, records: Array,
) -> None:  # fmt: skip
    """``learn_many`` for heads of two layers of independent neurons, with one output.

    A head of a few hundred weights is learned in a microsecond or two, and handing its arrays from function to function
    would take as long again. So everything is in this one: ``two_layers_neurons``, ``scalar_step`` and ``commit``.

    ``means`` ``(H, P)``; ``firsts``, the hidden neurons' covariances, ``(H, n, k, k)`` or ``(H, n, k)``; ``lasts``, the
    outputs', ``(H, 1, n + 1, n + 1)`` or ``(H, 1, n + 1)``; ``least`` as in ``learn``, the rest as in ``learn_many``.
    """
    weights, n, k = means.shape[1], firsts.shape[1], firsts.shape[2]
    hidden, d = n * k, k - 1
    inputs, squares, activation, spread, gate = np.empty(k), np.empty(k), np.empty(n + 1), np.empty(n), np.empty(n)
    cross, variances = np.empty(weights), np.empty(weights)
    own, own_variances = cross[:hidden].reshape(n, k), variances[:hidden].reshape(n, k)
    own_above, variances_above = cross[hidden:].reshape(1, n + 1), variances[hidden:].reshape(1, n + 1)
    if firsts.ndim == 3:
        below, above, pulls = cross[:hidden], cross[hidden:], np.empty(n)
        flat_firsts, flat_lasts = firsts.reshape(means.shape[0], hidden), lasts.reshape(means.shape[0], n + 1)
    inputs[d] = squares[d] = activation[n] = 1.0
    for r in range(heads.size):
        h = heads[r]
        for p in range(d):
            inputs[p] = (features[h, p] - centres[h, p]) / scales[h, p]
            squares[p] = inputs[p] * inputs[p]

        if firsts.ndim == 4:
            project_neurons(firsts[h], inputs, own, own_variances)
        for j in range(n):
            at = j * k
            logit, total = means[h, at + d], 0.0
            if firsts.ndim == 4:
                for p in range(k):
                    total += own[j, p] * inputs[p]
                for p in range(d):
                    logit += means[h, at + p] * inputs[p]
            else:
                total = pull = flat_firsts[h, at + d]
                for p in range(d):
                    logit += means[h, at + p] * inputs[p]
                    total += flat_firsts[h, at + p] * squares[p]
                    pull += flat_firsts[h, at + p] * inputs[p]
                pulls[j] = pull
            activation[j], spread[j] = logit, max(total, 0.0)
        for j in range(n):
            activation[j], spread[j], gate[j], _ = relu_unit(activation[j], spread[j])
        if firsts.ndim == 4:
            project_neurons(lasts[h], activation, own_above, variances_above)
        else:
            for j in range(n + 1):
                own_above[0, j] = flat_lasts[h, j] * activation[j]
        out_mean, variance = means[h, hidden + n], own_above[0, n]
        for j in range(n):
            weight = np.float64(means[h, hidden + j])
            out_mean += weight * activation[j]
            last_variance = lasts[h, 0, j, j] if firsts.ndim == 4 else flat_lasts[h, j]
            variance += own_above[0, j] * activation[j] + spread[j] * (weight * weight + last_variance)
        for j in range(n):
            gate[j] *= means[h, hidden + j]

        label, noise = labels[h], noises[h]
        inverted = variance if replacing else variance + noise
        change = (noise - inverted) / (inverted * inverted) if replacing else -1.0 / inverted
        error, root = label - out_mean, math.sqrt(abs(change))
        gain = error / inverted
        done = inverted > 0.0 and variance <= LARGEST * LARGEST and abs(label) <= LARGEST
        done = done and sum_of(squares) <= LARGEST * LARGEST
        done = done and error * error <= FARTHEST * FARTHEST * (variance + noise)
        if firsts.ndim == 4:
            for j in range(n):
                factor = gate[j]
                for p in range(k):
                    own[j, p] *= factor
            if done and least > 0.0:  # ``diagonal`` has nothing to repair
                done = resolves(gate, activation, inputs, cross, variances, least)
            step, smallest = _moved(cross, variances, change, root, kept)
        else:
            step = own_above[0, n]
            for j in range(n):
                step += gate[j] * pulls[j] + own_above[0, j]
            for j in range(n):
                gate[j] = 0.0 if abs(root * gate[j]) <= _SMALLEST_GATE else gate[j]
                own_above[0, j] = 0.0 if abs(root * activation[j]) <= _SMALLEST_GATE else activation[j]
            for j in range(n):
                factor = gate[j]
                for p in range(k):
                    own[j, p] = factor * inputs[p]
            own_above[0, n] = 1.0
            # From here on the weights are a row of numbers, whatever unit they belong to.
            smallest = _smallest_after(below, flat_firsts, h, change, kept)
            smallest = min(smallest, _smallest_after(above, flat_lasts, h, change, kept))
            if not -FAR < change < 0.0:  # `replace` may make a variance larger than any number
                for i in range(hidden):
                    before = flat_firsts[h, i]
                    variances[i] = before + change * (below[i] * before) * (below[i] * before)
                for j in range(n + 1):
                    before = flat_lasts[h, j]
                    variances[hidden + j] = before + change * (above[j] * before) * (above[j] * before)
                done = done and is_finite(variances)
        step *= gain
        total = step + gain * gain + variance
        done = done and smallest >= 0.0 and total - total == 0.0 and abs(step) <= LARGEST
        records[r, 0], records[r, 1], records[r, 2], records[r, 3] = out_mean, variance, smallest, 1.0 if done else 0.0
        if plan.size > 0:
            if firsts.ndim == 3:
                for i in range(hidden):
                    below[i] *= flat_firsts[h, i]
                for j in range(n + 1):
                    above[j] *= flat_lasts[h, j]
            for i in range(weights):
                plan[r, i] = gain * cross[i]
            for i in range(weights):
                plan[r, weights + i] = root * cross[i]
            plan[r, 2 * weights] = math.copysign(1.0, change)
        elif done:
            if firsts.ndim == 4:
                for i in range(weights):
                    means[h, i] += gain * cross[i]
                for i in range(weights):
                    cross[i] *= root  # so that both halves of a block get the same product
                downdate_neurons(firsts[h], cross[:hidden], math.copysign(1.0, change))
                downdate_neurons(lasts[h], cross[hidden:], math.copysign(1.0, change))
            else:
                _take(below, means, flat_firsts, h, 0, gain, change)
                _take(above, means, flat_lasts, h, hidden, gain, change)
            labels_seen[h] += 1
