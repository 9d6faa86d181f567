"""One layer of independent classes under a softmax: a label by ``laplace`` or ``fisher``, ``likelihoods`` in one call.

A class has a variance for each weight (``diagonal``, ``rotated``), ``cov`` of shape ``(V, k)``, or a root (``neuron``),
``(V, k, k)``. Time and memory are linear in the number of classes ``V``.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.roots import dot, downdate, in_units, project

Array = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

_LARGEST = 1e25
_MOST_NEWTON_STEPS, _MOST_HALVINGS = 200, 60
_EPS = np.finfo(np.float64).eps


@compiled
def rotated(basis: Array, inputs: Array) -> None:
    """``z <- B' z`` in place for all but the constant 1; an empty basis leaves it."""
    if basis.size == 0:
        return
    d = basis.shape[0]
    out = np.zeros(d)
    for p in range(d):
        z = inputs[p]
        row = basis[p]
        for q in range(d):
            out[q] += z * row[q]
    for q in range(d):
        inputs[q] = out[q]


@compiled
def logits(mean: Array, cov: Array, inputs: Array, squares: Array, out_mean: Array, out_var: Array) -> None:
    """Mean and variance of each class's logit, ``(V,)`` each; variances only where ``cov`` is given."""
    phi = np.empty(inputs.size)
    for v in range(mean.shape[0]):
        out_mean[v] = dot(mean[v], inputs)
        if cov.size > 0:
            out_var[v] = project(cov[v], inputs, phi) if cov.ndim == 3 else dot(cov[v], squares)


@compiled
def predict(
    mean: Array, cov: Array, centre: Array, scale: Array, basis: Array, features: Array, out_mean: Array, out_var: Array
) -> None:  # fmt: skip
    """``logits`` for rows ``(N, d)`` as they come from the encoder, ``(N, V)`` each."""
    k = mean.shape[1]
    inputs, squares = np.empty(k), np.empty(k)
    for row in range(features.shape[0]):
        in_units(features[row], centre, scale, inputs)
        rotated(basis, inputs)
        for p in range(k):
            squares[p] = inputs[p] * inputs[p]
        logits(mean, cov, inputs, squares, out_mean[row], out_var[row])


@compiled
def _softmax(values: Array, shift: Array, out: Array) -> float:
    """Probabilities of ``values + shift``; returns the logarithm of the sum of exponentials."""
    largest = -math.inf
    for v in range(values.size):
        largest = max(largest, values[v] + shift[v])
    for v in range(values.size):
        out[v] = math.exp(values[v] + shift[v] - largest)
    total = 0.0
    for v in range(values.size):
        total += out[v]
    for v in range(values.size):
        out[v] /= total
    return largest + math.log(total)


@compiled
def _damped(probabilities: Array, variance: Array, step: Array, out: Array) -> None:
    """``(I + F S)^-1 step``, see ``likelihoods.softmax._damped_each``."""
    total = inner = 0.0
    for v in range(step.size):
        weight = probabilities[v] / (1.0 + variance[v] * probabilities[v])
        total += weight
        inner += variance[v] * weight * step[v]
    for v in range(step.size):
        damping = 1.0 + variance[v] * probabilities[v]
        out[v] = step[v] / damping + probabilities[v] / damping * (inner / total)


@compiled
def _objective(values: Array, shift: Array, step: Array, target: Array, log_total: float) -> float:
    """``dm' S dm / 2 - sum y log softmax(m + S dm)``, with ``shift = S dm``."""
    total = 0.0
    for v in range(step.size):
        total += 0.5 * step[v] * shift[v] - target[v] * (values[v] + shift[v] - log_total)
    return total


@compiled
def _mode(values: Array, variance: Array, target: Array, step: Array, at: Array) -> bool:
    """Newton's method for ``dm = y - softmax(m + S dm)``; fills ``step`` and the probabilities ``at`` the mode."""
    size = values.size
    shift, residual, direction, trial = np.zeros(size), np.empty(size), np.empty(size), np.empty(size)
    for v in range(size):
        step[v] = 0.0
    value = _objective(values, shift, step, target, _softmax(values, shift, at))
    for _ in range(_MOST_NEWTON_STEPS):
        worst = 0.0
        for v in range(size):
            residual[v] = target[v] - at[v] - step[v]
            worst = max(worst, abs(residual[v]))
        if worst < 1e-9:
            return True
        if not worst < math.inf:
            return False
        _damped(at, variance, residual, direction)
        length = 1.0
        for _ in range(_MOST_HALVINGS):
            for v in range(size):
                trial[v] = step[v] + length * direction[v]
                shift[v] = variance[v] * trial[v]
            reached = _objective(values, shift, trial, target, _softmax(values, shift, at))
            if reached <= value + 1e-12 * (1.0 + abs(value)):
                break
            length *= 0.5
        for v in range(size):
            step[v] = trial[v]
        value = reached
    return False


@compiled
def _contract(variances: Array, squares: Array, noise: float, spread: float, before: Array) -> None:
    """Take a measurement of one class with independent weights: ``v <- v (others + r) / (own + others + r)``.

    ``spread`` is the sum of what all weights contribute.
    """
    k, rate = variances.size, 1.0 / (spread + noise)
    if 2.0 * spread * rate < 1.0:  # 1 - x keeps its digits
        for p in range(k):
            variances[p] *= 1.0 - variances[p] * squares[p] * rate
        return
    running = 0.0
    for p in range(k):
        before[p] = running
        running += variances[p] * squares[p]
    running = noise
    for p in range(k - 1, -1, -1):
        own = variances[p] * squares[p]
        others = before[p] + running
        running += own
        variances[p] *= others / (others + own)


@compiled
def learn(
    mean: Array, cov: Array, centre: Array, scale: Array, basis: Array, features: Array, target: Array,
    newton: bool, active: float, drift: float, seen: Whole, record: Array,
) -> bool:  # fmt: skip
    """A whole update on one row; False, and nothing done, for what must be refused.

    Args:
        mean: Weight means ``(V, k)``.
        cov: Variances ``(V, k)`` or roots ``(V, k, k)``.
        centre: Of the features.
        scale: Of the features.
        basis: What features are rotated by, ``(d, d)`` or empty.
        features: The row, ``(d,)``.
        target: Distribution over the classes, ``(V,)``.
        newton: Whether the rule is ``laplace``, else ``fisher``.
        active: See ``HeadConfig.active_probability``.
        drift: Variance that each weight gains after the update; 0 with roots.
        seen: Counter of labelled rows, ``(1,)``.
        record: Receives mean square innovation, NIS, mean variance of the logits, log probability, and log ratio.
    """
    classes, k = mean.shape
    inputs, squares = np.empty(k), np.empty(k)
    square = in_units(features, centre, scale, inputs)
    if not square <= _LARGEST * _LARGEST:
        return False
    rotated(basis, inputs)
    for p in range(k):
        squares[p] = inputs[p] * inputs[p]
    values, variance, probabilities = np.empty(classes), np.empty(classes), np.empty(classes)
    error, first, step, nothing = np.empty(classes), np.empty(classes), np.empty(classes), np.zeros(classes)
    logits(mean, cov, inputs, squares, values, variance)
    log_total = _softmax(values, nothing, probabilities)
    density = error_square = epistemic = ratio = 0.0
    for v in range(classes):
        first[v] = -0.5 * values[v]
    half_total = _softmax(values, first, step)
    for v in range(classes):
        error[v] = target[v] - probabilities[v]
        density += target[v] * (values[v] - log_total) if target[v] > 0.0 else 0.0
        error_square += error[v] * error[v]
        epistemic += variance[v]
        ratio += target[v] * ((0.5 * values[v] - half_total) - (values[v] - log_total)) if target[v] > 0.0 else 0.0
    _damped(probabilities, variance, error, first)
    nis = 0.0
    for v in range(classes):
        nis += error[v] / max(probabilities[v], _EPS) * first[v]
    at = probabilities.copy()
    if newton:
        if not _mode(values, variance, target, step, at):
            return False
    else:
        step[:] = first
    finite, largest = nis + epistemic + density, 0.0
    for v in range(classes):
        finite += step[v]
        largest = max(largest, abs(step[v]) * variance[v])
    if finite - finite != 0.0 or largest > _LARGEST:
        return False

    weight, others = np.empty(classes), np.zeros(classes)
    for v in range(classes):
        weight[v] = at[v] / (1.0 + variance[v] * at[v])
    running = 0.0
    for v in range(classes):
        others[v] = running
        running += weight[v]
    total, running = running, 0.0
    for v in range(classes - 1, -1, -1):
        others[v] += running
        running += weight[v]
    phi, gain = np.empty(k), np.empty(k)
    for v in range(classes):
        information = at[v] * others[v] / total
        moved = information > 0.0 and (probabilities[v] > active or target[v] > 0.0)
        noise = (1.0 + variance[v] * at[v] * weight[v] / total) / information if moved else math.inf
        row = mean[v]
        if cov.ndim == 3:
            if moved:
                project(cov[v], inputs, phi)
                downdate(cov[v], phi, noise, gain)
            elif step[v] != 0.0:
                project(cov[v], inputs, phi)
                _gain(cov[v], phi, gain)
            for p in range(k):
                row[p] += step[v] * gain[p]
        else:
            own = cov[v]
            for p in range(k):
                row[p] += step[v] * own[p] * inputs[p]
            if moved:
                _contract(own, squares, noise, variance[v], phi)
            if drift > 0.0:
                for p in range(k):
                    own[p] += drift
    seen[0] += 1
    record[0], record[1], record[2], record[3] = error_square / classes, nis, epistemic / classes, density
    record[4] = ratio
    return True


@compiled
def _gain(root: Array, phi: Array, out: Array) -> None:
    """``out = R' phi``."""
    for p in range(phi.size):
        out[p] = 0.0
    for i in range(phi.size):
        row = root[i]
        for p in range(i + 1):
            out[p] += phi[i] * row[p]
