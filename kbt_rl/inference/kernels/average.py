"""One layer under several label noises: the evidence of ``mixture`` and the labels of ``outputs``, in one call."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.outputs import condition, measured
from kbt_rl.inference.kernels.roots import dot

Array = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


@compiled
def log_sum(logs: Array) -> float:
    """Logarithm of the sum of what has these logarithms."""
    largest = -math.inf
    for m in range(logs.size):
        largest = max(largest, logs[m])
    total = 0.0
    for m in range(logs.size):
        total += math.exp(logs[m] - largest)
    return largest + math.log(total)


@compiled
def layer(mean: Array, logs: Array, outputs: Array, centre: Array, scale: Array, weight: Array, bias: Array) -> None:
    """``ModelAverage._layer``: ``weight`` ``(o, d)`` and ``bias`` ``(o,)`` receive it; see ``learn`` for the others."""
    shares, mixed = np.exp(logs - log_sum(logs)), np.empty(mean.shape[1])
    for j in range(bias.size):
        mixed[:] = 0.0
        for m in range(logs.size):
            share, row = outputs[j] * shares[m], mean[m * bias.size + j]
            for p in range(mixed.size):
                mixed[p] += share * row[p]
        for p in range(scale.size):
            weight[j, p] = mixed[p] / scale[p]
        bias[j] = mixed[scale.size] - dot(weight[j], centre)


@compiled
def novelty(inputs: Array, last: Array, spread: float, first: float) -> float:
    """What the evidence of a row ``[z; 1]`` counts for, given the features of the label before, NaN for none."""
    step = 0.0
    for p in range(last.size):
        step += (inputs[p] - last[p]) * (inputs[p] - last[p])
    return first if step != step else min(1.0, step / spread)


@compiled
def densities(squares: Array, total: Array, misfit: Array, dof: Array, label: Array, out: Array) -> None:
    """``mixture.Evidence.densities`` of one label, for squared errors over the variances ``total``, both ``(m, o)``."""
    out[:] = 0.0
    for j in range(dof.size):
        if label[j] == label[j]:
            n = dof[j]
            same = math.lgamma(0.5 * (n + 1.0)) - math.lgamma(0.5 * n) - 0.5 * math.log(math.pi * n)
            for m in range(out.size):
                out[m] += same - 0.5 * math.log(misfit[m, j] / n * total[m, j])
                out[m] -= 0.5 * (n + 1.0) * math.log1p(squares[m, j] / misfit[m, j])


@compiled
def summarise(
    means: Array, own: Array, squares: Array, ratios: Array, logs: Array, misfit: Array, dof: Array, outputs: Array,
    label: Array, labels: int, record: Array,
) -> None:  # fmt: skip
    """What the mixture made of a label before: ``record`` of ``learn``, for means and variances of each ``(m, o)``."""
    shares = np.exp(logs - log_sum(logs))
    likeliest, mean_square = logs.argmax(), 0.0
    for j in range(dof.size):
        mean_square += outputs[j] * outputs[j] / dof.size
    record[:4] = 0.0
    for j in range(dof.size):
        if label[j] == label[j]:
            weight, mean = outputs[j] * outputs[j] / (mean_square * labels), 0.0
            for m in range(shares.size):
                mean += shares[m] * means[m, j]
            innovation = label[j] / outputs[j] - mean
            record[0] += weight * innovation * innovation
            record[1] += squares[likeliest, j] * dof[j] / misfit[likeliest, j]
            for m in range(shares.size):
                scale, off = misfit[m, j] / dof[j], means[m, j] - mean
                record[2] += weight * shares[m] * (own[m, j] * scale + off * off)
                record[3] += weight * shares[m] * ((own[m, j] + ratios[m, 0]) * scale + off * off)


@compiled
def learn(
    mean: Array, roots: Array, group: Whole, centre: Array, scale: Array, outputs: Array, noise: Array, ratios: Array,
    logs: Array, misfit: Array, dof: Array, last: Array, features: Array, label: Array, deviation: float,
    spread: float, first: float, seen: Whole, record: Array,
) -> bool:  # fmt: skip
    """A whole update of ``ModelAverage`` on one row; False, and nothing done, for all that ``measured`` leaves.

    Args:
        mean: Of all models one after another ``(m o, k)``, see ``outputs.predict``.
        roots: See ``outputs.predict``.
        group: See ``outputs.predict``.
        centre: See ``outputs.predict``.
        scale: See ``outputs.predict``.
        outputs: See ``outputs.measured``.
        noise: See ``outputs.measured``.
        ratios: Of each model, ``(m, 1)``.
        logs: See ``mixture.Evidence``.
        misfit: See ``mixture.Evidence``.
        dof: See ``mixture.Evidence``.
        last: Scaled features of the label before.
        features: The row, ``(d,)``.
        label: Of each output ``(o,)``, in its own units; NaN for none.
        deviation: See ``outputs.measured``.
        spread: See ``ModelAverage.reset``.
        first: See ``ModelAverage``.
        seen: Counter of labelled rows, ``(1,)``.
        record: Receives mean square innovation, NIS, epistemic and predictive variance, log density, degrees of
            freedom, and labels.
    """
    (models, o), (count, k) = misfit.shape, roots.shape[:2]
    inputs, phi, variance, noises = np.empty(k), np.empty((count, k)), np.empty(count), np.empty(count)
    tiled, predicted, error = np.empty(models * o), np.empty(models * o), np.empty(models * o)
    for i in range(tiled.size):
        tiled[i] = label[i % o]
    labels = measured(
        mean, roots, group, centre, scale, outputs, noise, features, tiled, deviation, inputs, phi, variance, noises,
        predicted, error,
    )  # fmt: skip
    if labels == 0:
        return False
    means, own = predicted.reshape(models, o), variance[group].reshape(models, o)
    total, each = own + ratios, np.empty(models)
    squares = error.reshape(models, o) ** 2 / total
    densities(squares, total, misfit, dof, label, each)
    weight = novelty(inputs, last, spread, first)
    new_logs, new_misfit, new_dof = logs + weight * each, misfit + weight * squares, dof.copy()
    new_logs -= log_sum(new_logs)
    for j in range(o):
        new_dof[j] += weight if label[j] == label[j] else 0.0
    finite = new_logs.sum() + new_misfit.sum() + new_dof.sum()
    if finite - finite != 0.0:
        return False
    summarise(means, own, squares, ratios, logs, misfit, dof, outputs, label, labels // models, record)
    record[4], record[5], record[6] = log_sum(logs + each), dof.min(), labels // models
    condition(mean, roots, group, phi, variance, noises, error, seen)
    logs[:], misfit[:], dof[:], last[:] = new_logs, new_misfit, new_dof, inputs[: last.size]
    return True
