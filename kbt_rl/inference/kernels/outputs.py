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
def learn(
    mean: Array, roots: Array, group: Whole, centre: Array, scale: Array, outputs: Array, weights: Array, noise: Array,
    features: Array, label: Array, deviation: float, seen: Whole, record: Array,
) -> bool:  # fmt: skip
    """A whole update on one row by the rule ``measure`` with known noise; False, and nothing done, for any other.

    Others are labels that tell the outputs of a group apart, and all that must be refused.

    Args:
        mean: See ``predict``.
        roots: See ``predict``.
        group: See ``predict``.
        centre: See ``predict``.
        scale: See ``predict``.
        outputs: Scale of the targets, ``(o,)``.
        weights: Of the outputs in the record's averages, ``(o,)``.
        noise: Variance of each output's label, ``(o,)``.
        features: The row, ``(d,)``.
        label: Of each output, ``(o,)``, in its own units; NaN for none.
        deviation: Largest prior standard deviation of a weight.
        seen: Counter of labelled rows, ``(1,)``.
        record: Receives mean square innovation, NIS, epistemic and predictive variance, log density, and labels.
    """
    o, k = mean.shape
    count = roots.shape[0]
    inputs, phi, variance = np.empty(k), np.empty((count, k)), np.empty(count)
    own, total = np.full(count, -1.0), np.empty(count)
    square = in_units(features, centre, scale, inputs)
    lost = 64.0 * np.finfo(np.float64).eps ** 2 * deviation**2 * k * (square + 1.0)
    for j in range(o):  # one noise a group, and a label for all of its outputs or for none
        told = noise[j] if label[j] == label[j] else math.inf
        if own[group[j]] == -1.0:
            own[group[j]] = told
        elif own[group[j]] != told:
            return False
    labels, squares, nis, epistemic, spread, log_det = 0, 0.0, 0.0, 0.0, 0.0, 0.0
    largest, step = math.sqrt(square), 0.0
    for g in range(count):
        variance[g] = project(roots[g], inputs, phi[g])
        total[g] = variance[g] + own[g]
        if not total[g] >= lost or not total[g] > 0.0:
            return False
    error = np.zeros(o)
    for j in range(o):
        g = group[j]
        if own[g] < math.inf:
            error[j] = label[j] / outputs[j] - dot(mean[j], inputs)
            labels += 1
            squares += weights[j] * error[j] * error[j]
            nis += error[j] * error[j] / total[g]
            epistemic += weights[j] * variance[g]
            spread += weights[j] * own[g]
            log_det += math.log(total[g])
            step += abs(error[j] / total[g]) * variance[g]
            largest = max(largest, abs(label[j] / outputs[j]))
    finite = nis + epistemic + spread + step + squares
    if labels == 0 or finite - finite != 0.0 or nis > _FARTHEST * _FARTHEST * labels:
        return False
    if largest > 0.5 * _LARGEST or step > 0.5 * _LARGEST:
        return False
    gain = np.empty(k)
    for g in range(count):
        if own[g] < math.inf:
            downdate(roots[g], phi[g], own[g], gain)
            for j in range(o):
                if group[j] == g:
                    rate = error[j] / total[g]
                    row = mean[j]
                    for p in range(k):
                        row[p] += rate * gain[p]
    seen[0] += 1
    record[0], record[1], record[2], record[3] = (
        squares / labels,
        nis,
        epistemic / labels,
        (epistemic + spread) / labels,
    )
    record[4], record[5] = -0.5 * (nis + log_det + labels * _LOG_TWO_PI), labels
    return True
