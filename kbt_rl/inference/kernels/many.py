"""Many heads of the same shape: arrays of one head, stacked in front.

These release Python's lock, so that threads may share the heads out.
"""

from __future__ import annotations

import math

import numpy as np

from kbt_rl.inference.kernels.jit import compiled, compiled_nogil
from kbt_rl.inference.kernels.relu import relu_unit
from kbt_rl.inference.kernels.row import propagate, row_step
from kbt_rl.inference.kernels.step import commit
from kbt_rl.inference.kernels.terms import Array, Shapes
from kbt_rl.inference.kernels.units import in_units, unit_variances
from kbt_rl.inference.kernels.vectors import copy, dot

_LOG_TWO_PI = math.log(2.0 * math.pi)


@compiled
def _layers_of(covs: tuple[Array, ...], head: int) -> tuple[Array, ...]:
    if len(covs) == 2:
        return covs[0][head], covs[1][head]
    else:  # noqa: RET505  numba prunes whole branches
        return (covs[0][head],)


@compiled_nogil
def learn_many(
    means: Array, covs: tuple[Array, ...], between: Array, shapes: Shapes, workspace_shape: tuple[int, int],
    centres: Array, scales: Array, labels_seen: Array,
    heads: Array, features: Array, labels: Array, noises: Array, replacing: bool, kept: float,
    least: float, plan: Array, records: Array,
) -> None:  # fmt: skip
    """``learn`` for ``heads`` ``(R,)``, each with its row of ``features`` ``(H, d)`` and its label of ``(H,)``.

    With a ``plan`` ``(R, 2 P + 1)`` nothing changes, and it receives the steps for ``commit_many``; with an empty one
    each step is taken at once. ``records`` ``(R, 4)`` receives a ``ScalarRecord`` of each.
    """
    weights = means.shape[1]
    workspace, step = np.empty(workspace_shape), np.empty(2 * weights + 1)
    for r in range(heads.size):
        h = heads[r]
        own = _layers_of(covs, h)
        if plan.size > 0:
            step = plan[r]
        moved, moves = step[:weights], step[weights : 2 * weights].reshape(1, weights)
        inputs = in_units(centres[h], scales[h], features[h])
        signs = step[2 * weights :]
        record = row_step(
            means[h], own, own[0], between[h], shapes, workspace, inputs, labels[h], noises[h], replacing, kept,
            least, moved, moves, signs,
        )  # fmt: skip
        for i in range(4):
            records[r, i] = record[i]
        if plan.size == 0 and record[3] == 1.0:
            commit(means[h], own, own[0], between[h], shapes, moved, moves, signs)
            labels_seen[h] += 1


@compiled_nogil
def enter_records(
    heads: Array, records: Array, labels: Array, noises: Array, innovation: Array, nis: Array, epistemic: Array,
    predictive: Array, smallest: Array, counts: Array, weights: Array, log_density: Array,
) -> int:  # fmt: skip
    """What ``learn_row`` records of those of ``heads`` ``(R,)`` that have learned, into arrays ``(H,)``; their number.

    ``records`` ``(R, 4)`` are those of ``learn_many``, ``labels`` and ``noises`` ``(H,)`` what it was given.
    """
    done = 0
    for r in range(heads.size):
        if records[r, 3] == 1.0:
            h = heads[r]
            error, variance = labels[h] - records[r, 0], records[r, 1] + noises[h]
            innovation[h], nis[h] = abs(error), error * error / variance
            epistemic[h], predictive[h], smallest[h] = records[r, 1], variance, records[r, 2]
            counts[h], weights[h] = 1, 1.0
            log_density[h] = -0.5 * (nis[h] + math.log(variance) + _LOG_TWO_PI)
            done += 1
    return done


@compiled_nogil
def commit_many(
    means: Array, covs: tuple[Array, ...], between: Array, shapes: Shapes, labels_seen: Array, heads: Array, plan: Array
) -> None:
    """Take the steps that ``learn_many`` has planned for ``heads``."""
    weights = means.shape[1]
    for r in range(heads.size):
        h, step = heads[r], plan[r]
        own = _layers_of(covs, h)
        moves = step[weights : 2 * weights].reshape(1, weights)
        commit(means[h], own, own[0], between[h], shapes, step[:weights], moves, step[2 * weights :])
        labels_seen[h] += 1


@compiled_nogil
def moments_many(
    means: Array, covs: tuple[Array, ...], between: Array, shapes: Shapes, workspace_shape: tuple[int, int],
    centres: Array, scales: Array, heads: Array, features: Array, out_mean: Array, out_cov: Array,
) -> None:  # fmt: skip
    """Mean ``(R, o)`` and covariance ``(R, o, o)`` of the logits for ``R / H`` successive rows of each of ``heads``."""
    workspace = np.empty(workspace_shape)
    each = features.shape[0] // means.shape[0]
    for h in heads:
        own = _layers_of(covs, h)
        for r in range(h * each, (h + 1) * each):
            inputs = in_units(centres[h], scales[h], features[r])[:-1]
            row = propagate(means[h], own, own[0], between[h], shapes, workspace, inputs, out_mean.shape[1])
            copy(row[0], out_mean[r])
            copy(row[1].reshape(row[1].size), out_cov[r].reshape(row[1].size))


@compiled_nogil
def means_many(
    means: Array, covs: tuple[Array, ...], between: Array, shapes: Shapes, centres: Array, scales: Array,
    heads: Array, features: Array, out: Array,
) -> None:  # fmt: skip
    """Mean logits ``(H, o)`` for one row of each of ``heads``, as ``acting.view_mean``: without their covariance."""
    o, n = out.shape[1], shapes[0][0]
    variances = np.empty(n)
    for h in heads:
        inputs, mean = in_units(centres[h], scales[h], features[h]), means[h]
        k = inputs.size
        weights = mean[: n * k].reshape(n, k)
        if len(covs) == 1:
            for j in range(o):
                out[h, j] = dot(weights[j], inputs)
        else:
            above, coupling = mean[n * k :].reshape(o, n + 1), between[h]
            unit_variances(covs[0][h], inputs, n, shapes[0][2], variances)
            for j in range(o):
                out[h, j] = above[j, n]
            for i in range(n):
                logit = 0.0
                for p in range(k):
                    logit += weights[i, p] * inputs[p]
                activation, _, slope, _ = relu_unit(logit, variances[i])
                for j in range(o):
                    out[h, j] += above[j, i] * activation
                    if coupling.size > 0:
                        out[h, j] += slope * dot(coupling[j * (n + 1) + i, i * k : (i + 1) * k], inputs)
