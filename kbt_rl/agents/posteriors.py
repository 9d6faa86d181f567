"""One head for all environments, or one for each: the same questions asked of either.

With one head every row of features is its business. With several, row ``i`` belongs to head ``i``, which knows nothing
of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference.head import BayesianHead, Prediction
from kbt_rl.inference.interrupts import interrupts_deferred
from kbt_rl.inference.moments import Gaussian
from kbt_rl.inference.record import UpdateInfo, merge

Heads = Sequence[BayesianHead]


def check_rows(heads: Heads, rows: int, each: int = 1) -> None:
    """Raise ValueError unless there are ``each`` rows a head; a single head takes any number."""
    if len(heads) > 1 and rows != each * len(heads):
        raise ValueError(
            f"this policy has {len(heads)} posteriors, one for each environment, and needs {each * len(heads)} rows in "
            f"their order; got {rows}. policy.select(i) takes one of them out, as a policy for any number of rows"
        )


def mean(heads: Heads, features: Tensor) -> Tensor:
    """Predicted mean of the target, ``(n, o)``; class probabilities with softmax."""
    check_rows(heads, len(features))
    if len(heads) == 1:
        return heads[0](features)  # type: ignore[no-any-return]
    return torch.cat([head(row) for head, row in zip(heads, features.split(1), strict=True)])


def predict(heads: Heads, features: Tensor) -> Prediction:
    """Distribution of the target for each row."""
    check_rows(heads, len(features))
    if len(heads) == 1:
        return heads[0].predict(features)
    rows = [head.predict(row) for head, row in zip(heads, features.split(1), strict=True)]
    return Prediction(*(torch.cat(part) for part in zip(*rows, strict=True)))


def logits(heads: Heads, features: Tensor, each: int = 1) -> Gaussian:
    """Distribution of the last layer's output, in the heads' units, for ``each`` successive rows a head."""
    check_rows(heads, len(features), each)
    if len(heads) == 1:
        return heads[0].predict_logits(features)
    blocks = [head.predict_logits(block) for head, block in zip(heads, features.split(each), strict=True)]
    return Gaussian(torch.cat([block.mean for block in blocks]), torch.cat([block.cov for block in blocks]))


def update(heads: Heads, rows: npt.NDArray[np.intp], features: Tensor, target: npt.NDArray[np.float64]) -> UpdateInfo:
    """Condition the heads on labelled rows: one head on all of them jointly, of several each on its own.

    Either all complete or nothing changes.

    Args:
        heads: The posteriors.
        rows: Which head each row belongs to, ``(B,)``, in ascending order; a single head does not look at it.
        features: ``(B, d)``.
        target: ``(B, o)``.

    Returns:
        The record over all rows.

    Raises:
        ValueError: Wrong shape, or not finite.
        UpdateError: A result would not be a proper posterior.
    """
    if len(heads) == 1:
        return heads[0].update(features, target)
    steps = [
        (heads[row], heads[row].increment(features[index : index + 1], target[index : index + 1]))
        for index, row in enumerate(rows)
    ]
    with interrupts_deferred():
        for head, step in steps:
            head.apply_increment(step)
    records = [step.info for _, step in steps]
    return merge(records)._replace(smallest_variance=min(record.smallest_variance for record in records))


def rollback(heads: Heads, n: int) -> int:
    """Take back the last ``n`` updates of each head, all or none; returns the labelled rows that they had used."""
    undone = [(head, head.plan_rollback(n)) for head in heads]
    with interrupts_deferred():
        for head, undo in undone:
            head.apply_rollback(undo)
    return sum(undo.rows for _, undo in undone)
