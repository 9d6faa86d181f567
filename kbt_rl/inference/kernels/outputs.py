"""One layer with independent outputs: what it predicts for a row, and one label by Bayes' rule.

Outputs belong to groups that share a root, ``covariance.shared``; for ``neuron`` each is a group of its own.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.roots import dot, downdate, in_units, project

Array = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]

_LOG_TWO_PI = math.log(2.0 * math.pi)
# As in ``network``.
_LARGEST, _FARTHEST = 1e25, 1e6


@compiled
def predict(
    mean: Array, roots: Array, group: Whole, centre: Array, scale: Array, features: Array,
    out_mean: Array, out_var: Array,
) -> None:  # fmt: skip
    """Mean and variance of each output, both ``(N, o)``, for rows ``(N, d)`` as they come from the encoder.

    Args:
        mean: Weight means ``(o, k)``.
        roots: ``(g, k, k)``, or ``(0, k, k)`` for means only.
        group: Of each output, ``(o,)``.
        centre: Of the features.
        scale: Of the features.
        features: The rows.
        out_mean: Receives the means.
        out_var: Receives the variances.
    """
    inputs, phi, variance = np.empty(mean.shape[1]), np.empty(mean.shape[1]), np.empty(roots.shape[0])
    for row in range(features.shape[0]):
        in_units(features[row], centre, scale, inputs)
        for g in range(roots.shape[0]):
            variance[g] = project(roots[g], inputs, phi)
        for j in range(mean.shape[0]):
            out_mean[row, j] = dot(mean[j], inputs)
            if roots.shape[0] > 0:
                out_var[row, j] = variance[group[j]]


@compiled
def measured(
    mean: Array, roots: Array, group: Whole, centre: Array, scale: Array, outputs: Array, noise: Array, features: Array,
    label: Array, deviation: float, inputs: Array, phi: Array, variance: Array, own: Array, predicted: Array,
    error: Array,
) -> int:  # fmt: skip
    """What a label of one row measures; nothing changes but what receives the answer.

    Args:
        mean: See ``predict``.
        roots: See ``predict``.
        group: See ``predict``.
        centre: See ``predict``.
        scale: See ``predict``.
        outputs: Scale of the targets, ``(o,)``.
        noise: Variance of each output's label, ``(o,)``.
        features: The row, ``(d,)``.
        label: Of each output, ``(o,)``, in its own units; NaN for none.
        deviation: Largest prior standard deviation of a weight.
        inputs: Receives ``[z; 1]``, ``(k,)``.
        phi: Receives ``R h`` of each group, ``(g, k)``.
        variance: Receives ``h' P h`` of each group.
        own: Receives the noise of each group, infinite where it has no label.
        predicted: Receives the mean of each output that has a label, ``(o,)``.
        error: Receives label minus mean, 0 where there is no label, ``(o,)``.

    Returns:
        How many outputs have a label; 0 for all that the definition must do or refuse, such as labels that tell the
        outputs of a group apart.
    """
    count = roots.shape[0]
    square = in_units(features, centre, scale, inputs)
    lost = 64.0 * np.finfo(np.float64).eps ** 2 * deviation**2 * inputs.size * (square + 1.0)
    own[:] = -1.0
    for j in range(mean.shape[0]):  # one noise a group, and a label for all of its outputs or for none
        told = noise[j] if label[j] == label[j] else math.inf
        if own[group[j]] == -1.0:
            own[group[j]] = told
        elif own[group[j]] != told:
            return 0
    for g in range(count):
        variance[g] = project(roots[g], inputs, phi[g])
        total = variance[g] + own[g]
        if not total >= lost or not total > 0.0:
            return 0
    labels, nis, step, largest = 0, 0.0, 0.0, math.sqrt(square)
    for j in range(mean.shape[0]):
        g = group[j]
        error[j] = 0.0
        if own[g] < math.inf:
            total = variance[g] + own[g]
            predicted[j] = dot(mean[j], inputs)
            error[j] = label[j] / outputs[j] - predicted[j]
            labels += 1
            nis += error[j] * error[j] / total
            step += abs(error[j] / total) * variance[g]
            largest = max(largest, abs(label[j] / outputs[j]))
    if not nis <= _FARTHEST * _FARTHEST * labels or not step <= 0.5 * _LARGEST or not largest <= 0.5 * _LARGEST:
        return 0
    return labels


@compiled
def condition(
    mean: Array, roots: Array, group: Whole, phi: Array, variance: Array, own: Array, error: Array, seen: Whole
) -> None:
    """Learn what ``measured`` has found, and count it."""
    gain = np.empty(mean.shape[1])
    for g in range(roots.shape[0] - 1, -1, -1):  # what was read last is still in the processor's cache
        if own[g] < math.inf:
            downdate(roots[g], phi[g], own[g], gain)
            for j in range(mean.shape[0]):
                if group[j] == g:
                    rate = error[j] / (variance[g] + own[g])
                    row = mean[j]
                    for p in range(gain.size):
                        row[p] += rate * gain[p]
    seen[0] += 1


@compiled
def learn(
    mean: Array, roots: Array, group: Whole, centre: Array, scale: Array, outputs: Array, weights: Array, noise: Array,
    features: Array, label: Array, deviation: float, seen: Whole, record: Array,
) -> bool:  # fmt: skip
    """A whole update on one row by the rule ``measure`` with known noise; False, and nothing done, for any other.

    Args:
        mean: See ``predict``.
        roots: See ``predict``.
        group: See ``predict``.
        centre: See ``predict``.
        scale: See ``predict``.
        outputs: See ``measured``.
        weights: Of the outputs in the record's averages, ``(o,)``.
        noise: See ``measured``.
        features: See ``measured``.
        label: See ``measured``.
        deviation: See ``measured``.
        seen: Counter of labelled rows, ``(1,)``.
        record: Receives mean square innovation, NIS, epistemic and predictive variance, log density, and labels.
    """
    o, k = mean.shape
    count = roots.shape[0]
    inputs, phi, variance, own = np.empty(k), np.empty((count, k)), np.empty(count), np.empty(count)
    predicted, error = np.empty(o), np.empty(o)
    labels = measured(
        mean, roots, group, centre, scale, outputs, noise, features, label, deviation, inputs, phi, variance, own,
        predicted, error,
    )  # fmt: skip
    squares, nis, epistemic, spread, log_det = 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(o):
        g = group[j]
        if own[g] < math.inf:
            total = variance[g] + own[g]
            squares += weights[j] * error[j] * error[j]
            nis += error[j] * error[j] / total
            epistemic += weights[j] * variance[g]
            spread += weights[j] * own[g]
            log_det += math.log(total)
    finite = squares + epistemic + spread
    if labels == 0 or finite - finite != 0.0:
        return False
    condition(mean, roots, group, phi, variance, own, error, seen)
    record[0], record[1], record[2], record[3] = (
        squares / labels,
        nis,
        epistemic / labels,
        (epistemic + spread) / labels,
    )
    record[4], record[5] = -0.5 * (nis + log_det + labels * _LOG_TWO_PI), labels
    return True
