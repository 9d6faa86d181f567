"""One row through any head of one or two layers, and a whole update by it."""

from __future__ import annotations

import numpy as np

from kbt_rl.inference.kernels.dense import linear_dense, two_layers_dense
from kbt_rl.inference.kernels.dense_scalar import two_layers_dense_scalar
from kbt_rl.inference.kernels.jit import compiled
from kbt_rl.inference.kernels.neurons import linear_neurons, two_layers_neurons
from kbt_rl.inference.kernels.neurons_update import learn_neurons
from kbt_rl.inference.kernels.step import commit, scalar_step
from kbt_rl.inference.kernels.terms import Array, RowPass, ScalarRecord, Shapes
from kbt_rl.inference.kernels.units import in_units, is_resolved


# numba compiles only the branch that the types leave: a triangle is flat, blocks of neurons are not.
@compiled
def propagate(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes, workspace: Array,
    features: Array, o: int,
) -> RowPass:  # fmt: skip
    """Forward pass of a row ``(d,)``; ``first`` is ``covs[0]``, the rest as in ``two_layers_dense``."""
    row: RowPass
    if first.ndim == 1:
        if len(covs) == 2 and o == 1:
            row = two_layers_dense_scalar(mean, first, covs[1], between, features, shapes[0][2])
        elif len(covs) == 2:
            per_row = shapes[0][2], shapes[1][2]
            row = two_layers_dense(mean, first, covs[1], between, features, o, per_row[0], per_row[1], workspace)
        else:
            row = linear_dense(mean, first, features, o, shapes[0][2])
    elif len(covs) == 2:
        row = two_layers_neurons(mean, first, covs[1], features, o)
    else:
        row = linear_neurons(mean, first, features, o)
    return row


@compiled
def row_step(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes, workspace: Array,
    inputs: Array, label: float, noise: float, replacing: bool, kept: float, least: float,
    moved: Array, moves: Array, signs: Array,
) -> ScalarRecord:  # fmt: skip
    """Everything of an update of one output that can be refused, see ``scalar_step``; ``inputs`` is ``[z; 1]``."""
    outputs = shapes[len(shapes) - 1][0]
    row = propagate(mean, covs, first, between, shapes, workspace, inputs[:-1], outputs)
    mean_out, variance, cross, variances = row[0][0], row[1][0, 0], row[2][0], row[3]
    resolved = least == 0.0 or is_resolved(mean, covs, first, shapes, inputs, cross, variances, least)
    record: ScalarRecord = scalar_step(
        mean_out, variance, cross, variances, inputs, label, noise, replacing, kept, resolved, moved, moves, signs
    )
    return record


@compiled
def learn(
    mean: Array, covs: tuple[Array, ...], first: Array, between: Array, shapes: Shapes, workspace: Array,
    centre: Array, scale: Array, labels_seen: Array,
    features: Array, label: float, noise: float, replacing: bool, kept: float, least: float,
) -> ScalarRecord:  # fmt: skip
    """A whole update by a row and the label of one output, in one call; or nothing changes.

    With ``least`` above 0 nor does it for a row that needs a repair, see ``resolution``.
    """
    record: ScalarRecord
    if first.ndim > 1 and len(covs) == 2:
        records, one = np.empty((1, 4)), np.empty(1)
        one[0] = label
        learn_neurons(
            mean.reshape(1, mean.size), first.reshape((1, *first.shape)), covs[1].reshape((1, *covs[1].shape)),
            centre.reshape(1, centre.size), scale.reshape(1, centre.size), labels_seen, np.zeros(1, np.int64),
            features.reshape(1, centre.size), one, np.full(1, noise), replacing, kept, least, np.empty((0, 0)), records,
        )  # fmt: skip
        return records[0, 0], records[0, 1], records[0, 2], records[0, 3]
    moved, moves, signs = np.empty(mean.size), np.empty((1, mean.size)), np.empty(1)
    record = row_step(
        mean, covs, first, between, shapes, workspace, in_units(centre, scale, features), label, noise, replacing, kept,
        least, moved, moves, signs,
    )  # fmt: skip
    if record[3] == 1.0:
        commit(mean, covs, first, between, shapes, moved, moves, signs)
        labels_seen[0] += 1
    return record
