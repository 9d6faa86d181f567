"""One head for all environments, or one for each: the same questions asked of either.

With one head every row of features is its business. With several, row ``i`` belongs to head ``i``, which knows nothing
of the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.head import BayesianHead, Prediction
from kbt_rl.inference.interrupts import interrupts_deferred
from kbt_rl.inference.memory import as_array
from kbt_rl.inference.moments import Gaussian
from kbt_rl.inference.record import UpdateInfo

# One head, or a head for each environment.
Heads: TypeAlias = tuple[BayesianHead] | HeadBatch


def _asked(heads: Heads) -> BayesianHead | HeadBatch:
    return heads if isinstance(heads, HeadBatch) else heads[0]


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
    return _asked(heads)(features)  # type: ignore[no-any-return]


def predict(heads: Heads, features: Tensor) -> Prediction:
    """Distribution of the target for each row."""
    check_rows(heads, len(features))
    return _asked(heads).predict(features)


def logits(heads: Heads, features: Tensor, each: int = 1) -> Gaussian:
    """Distribution of the last layer's output, in the heads' units, for ``each`` successive rows a head."""
    check_rows(heads, len(features), each)
    if isinstance(heads, HeadBatch):
        return heads.predict_logits(features, each)
    return heads[0].predict_logits(features)


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
    if not isinstance(heads, HeadBatch):
        return heads[0].update(features, target)
    inputs, labels = np.zeros((len(heads), features.shape[1])), np.full((len(heads), target.shape[1]), np.nan)
    inputs[rows], labels[rows] = as_array(features), target
    return heads.update(inputs, labels, together=True).merged()


def rollback(heads: Iterable[BayesianHead], n: int) -> int:
    """Take back the last ``n`` updates of each head, all or none; returns the labelled rows that they had used."""
    undone = [(head, head.plan_rollback(n)) for head in heads]
    with interrupts_deferred():
        for head, undo in undone:
            head.apply_rollback(undo)
    return sum(undo.rows for _, undo in undone)
