"""A labelled sample and what an update tells of it: the one signature that all learners share.

``learner.update(sample) -> info`` is all that a stream, a callback or a robot's loop needs to know of a method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kbt_rl.agents.actions import ActionFormat
from kbt_rl.arguments import shown
from kbt_rl.inference.checks import as_array
from kbt_rl.models.context import ContextWindow
from kbt_rl.networks.links import LabelKind

if TYPE_CHECKING:
    from kbt_rl.agents.transformer_policy import TransformerPolicy


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
        kind: What the target is; anything but an ``action`` is for policies that ``adapt`` has made.
    """

    context: Any
    target: npt.NDArray[Any]
    mask: npt.NDArray[np.bool_] | None = None
    features: Tensor | None = None
    kind: LabelKind = "action"


@dataclass(frozen=True)
class LearnerInfo:
    """What every learner tells of an update, in action units, or in probabilities of discrete actions.

    Attributes:
        labels: Rows that had a label and were used.
        innovation: Root mean square of label minus prediction before the update; NaN without labels.
    """

    labels: int
    innovation: float


class Labelled(NamedTuple):
    """The rows of a sample that have a label, checked; what the others hold does not matter.

    Attributes:
        context: Of these rows.
        target: ``(n, action size)``.
        features: ``(n, width)`` where the caller has encoded the context already.
        rows: Which rows of the sample they are, ``(n,)``, ascending.
        of: Rows of the sample.
    """

    context: ContextWindow
    target: npt.NDArray[np.float64]
    features: Tensor | None
    rows: npt.NDArray[np.intp]
    of: int


def labelled(policy: TransformerPolicy, sample: Sample) -> Labelled:
    """What a policy can learn from in a sample.

    Raises:
        ValueError: Wrong shape, an infinite label, one that is NaN in part, or a labelled state that is no observation.
    """
    if not isinstance(sample, Sample):
        raise TypeError(f"sample is {shown(sample)}; expected a Sample(context, target)")
    if not isinstance(sample.kind, str) or sample.kind != "action":
        raise ValueError(f"kind is {shown(sample.kind)}; this policy learns from labels of the kind 'action'")
    context, size = sample.context, policy.action_size
    if isinstance(context, ContextWindow):
        policy.check_context(context)
        count = len(context.timesteps)
    else:
        context = np.atleast_2d(as_array(context))
        policy.check_size(context)
        count = len(context)
    target = _targets(policy.actions, sample.target, sample.mask, count)
    rows = _labelled_rows(target, count, size)
    features, whole = sample.features, len(rows) == count
    shape = count, policy.feature_size
    if features is not None and not isinstance(features, Tensor):
        raise TypeError(f"features is {shown(features)}; expected the Tensor of policy.encode(context)")
    if features is not None and features.shape != shape:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected {shape}, one row a context")
    if not isinstance(context, ContextWindow):
        context = policy.start(context[rows])
    else:
        context = context if whole else context.rows(rows)
        if features is None:  # else it was checked when it was encoded
            policy.check_observations(context.newest)
    if features is not None and not whole:
        features = features[rows]
    return Labelled(context, target if whole else target[rows], features, rows, count)


def _targets(actions: ActionFormat, target: Any, mask: Any, rows: int) -> npt.NDArray[np.float64]:
    """Labels as rows ``(n, action size)``, NaN where the mask leaves a row out."""
    if mask is None:
        return actions.targets(target)
    kept = as_array(mask, "the entries of mask")
    if kept.shape != (rows,):
        raise ValueError(f"mask has shape {kept.shape}; expected {(rows,)}, one entry a context")
    if not ((kept == 0) | (kept == 1)).all():
        raise TypeError(f"mask is {shown(mask)}; expected True or False for each row")
    kept = kept.astype(bool)
    if len(np.shape(target)) == 0 or len(target) != rows:
        return actions.targets(target)
    labels = np.full((rows, actions.size), np.nan)
    if kept.any():
        some = actions.targets(target[kept])
        if some.shape != (int(kept.sum()), actions.size):
            raise ValueError(f"target has shape {np.shape(target)}; expected {(rows, actions.size)}, one row a context")
        labels[kept] = some
    return labels


def _labelled_rows(target: npt.NDArray[Any], rows: int, size: int) -> npt.NDArray[Any]:
    """Indices of the rows that have a label, ``(n,)``."""
    if target.shape != (rows, size):
        raise ValueError(f"target has shape {target.shape}; expected {(rows, size)}, one row a context")
    if np.isfinite(target.sum()):  # the usual case: every row has its label
        return np.arange(rows)
    missing = np.isnan(target)
    if np.isinf(target).any():
        raise ValueError("target holds an infinite label; use NaN where there is no label")
    if (missing.any(axis=1) & ~missing.all(axis=1)).any():
        raise ValueError("a target row is NaN in some entries only; a label is complete or missing")
    return np.flatnonzero(~missing.any(axis=1))
