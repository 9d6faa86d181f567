"""A labelled sample and what an update tells of it: the one signature that all learners share.

``learner.update(sample) -> info`` is all that a stream, a callback or a robot's loop needs to know of a method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kbt_rl.models.context import ContextWindow


class Sample(NamedTuple):
    """Contexts and the actions an expert would have taken in them.

    Attributes:
        context: The ``state`` that ``predict`` returned, or plain observations ``(n, observation size)`` or
            ``(observation size,)``, which stand for the first step of an episode.
        target: Expert actions ``(n, action size)`` or ``(action size,)``, in the units of the action space and never
            clipped. A row with NaN has no label. With discrete actions: actions ``(n,)`` or ``()`` of an integer type,
            or distributions over the actions, ``(n, actions)`` or ``(actions,)``.
        mask: Rows to learn from, ``(n,)``; None for all that have a label.
        features: Encoded ``context``, ``(n, width)``, where the caller has it; saves the encoder's forward pass.
    """

    context: ContextWindow | npt.NDArray[Any]
    target: npt.NDArray[Any]
    mask: npt.NDArray[np.bool_] | None = None
    features: Tensor | None = None


@dataclass(frozen=True)
class LearnerInfo:
    """What every learner tells of an update, in action units, or in probabilities of discrete actions.

    Attributes:
        labels: Rows that had a label and were used.
        innovation: Root mean square of label minus prediction before the update; NaN without labels.
    """

    labels: int
    innovation: float


def labelled_rows(
    target: npt.NDArray[Any], mask: npt.NDArray[np.bool_] | None, rows: int, size: int
) -> npt.NDArray[Any]:
    """Check a target against ``rows`` contexts and ``size`` action entries; returns indices of the labelled rows.

    Raises:
        ValueError: Wrong shape, an infinite label, or a row that is NaN in part.
    """
    if target.shape != (rows, size):
        raise ValueError(f"target has shape {target.shape}; expected {(rows, size)}, one row a context")
    if mask is not None and mask.shape != (rows,):
        raise ValueError(f"mask has shape {mask.shape}; expected {(rows,)}, one entry a context")
    if mask is None and np.isfinite(target.sum()):  # the usual case: every row has its label
        return np.arange(rows)
    missing = np.isnan(target)
    present = ~missing.any(axis=1)
    if np.isinf(target).any():
        raise ValueError("target holds an infinite label; use NaN where there is no label")
    if (missing.any(axis=1) & ~missing.all(axis=1)).any():
        raise ValueError("a target row is NaN in some entries only; a label is complete or missing")
    return np.flatnonzero(present if mask is None else present & mask)
