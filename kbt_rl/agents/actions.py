"""What a policy's output stands for: a continuous action, or the logits of discrete ones.

A policy, its pre-training and its learners ask the format of the action space wherever the two kinds differ: how an
output becomes an action, what the context remembers of it, which labels are valid and how far an output is from one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from torch import Tensor

from kbt_rl.inference.checks import SUM_TOLERANCE, are_distributions, as_array
from kbt_rl.inference.likelihoods.base import Link

Array = npt.NDArray[Any]


class ActionFormat(ABC):
    """How outputs ``(n, size)`` of a network, actions of the environment and labels relate.

    Attributes:
        size: Outputs of the network, and entries of a label and of an action in the context.
        degrees_of_freedom: Entries of a label that the others do not imply.
        link: Link of the output rules that fit.
    """

    size: int
    degrees_of_freedom: int
    link: Link

    @abstractmethod
    def mean(self, outputs: Tensor) -> Tensor:
        """Expected label for the network's outputs, both ``(n, size)``."""

    @abstractmethod
    def decide(self, means: Array) -> Array:
        """Actions in the space for expected labels ``(n, size)``."""

    @abstractmethod
    def remember(self, actions: Array) -> Array:
        """Actions of the environment as the context stores them, ``(n, size)``."""

    @abstractmethod
    def targets(self, target: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Labels as rows ``(n, size)``.

        Raises:
            ValueError: They are no labels for this action space.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        """What training minimises: mean over the rows ``(n, size)``; ``scale`` is the unit of a continuous action."""


class ContinuousActions(ActionFormat):
    """A flat ``Box``: the output is the action."""

    link: Link = "identity"

    def __init__(self, space: spaces.Box) -> None:
        self.space = space
        self.size = self.degrees_of_freedom = space.shape[0]

    def mean(self, outputs: Tensor) -> Tensor:
        """See ``ActionFormat``; the outputs themselves."""
        return outputs

    def decide(self, means: Array) -> Array:
        """See ``ActionFormat``; cut to the box, in its dtype."""
        return np.clip(means, self.space.low, self.space.high).astype(self.space.dtype)

    def remember(self, actions: Array) -> Array:
        """See ``ActionFormat``; the actions themselves."""
        return actions

    def targets(self, target: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """See ``ActionFormat``; any numbers, never clipped."""
        return np.atleast_2d(np.asarray(as_array(target), dtype=np.float64))

    def loss(self, outputs: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        """See ``ActionFormat``; the squared error in units of ``scale``."""
        return ((outputs - target) / scale).square().mean()


class DiscreteActions(ActionFormat):
    """A ``Discrete`` space of n actions: the outputs are n logits, and a label is a distribution over the actions."""

    link: Link = "softmax"

    def __init__(self, space: spaces.Discrete) -> None:
        if space.n < 2:
            raise ValueError(f"the action space is {space}; there is nothing to choose from fewer than 2 actions")
        self.size, self.first = int(space.n), int(space.start)
        self.degrees_of_freedom = self.size - 1

    def mean(self, outputs: Tensor) -> Tensor:
        """See ``ActionFormat``; the probabilities."""
        return torch.softmax(outputs, dim=-1)

    def decide(self, means: Array) -> Array:
        """See ``ActionFormat``; the most probable action, ``(n,)`` int64."""
        actions: Array = self.first + np.argmax(means, axis=-1)
        return actions

    def remember(self, actions: Array) -> Array:
        """See ``ActionFormat``; one-hot."""
        return self._one_hot(actions).astype(np.float32)

    def targets(self, target: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """See ``ActionFormat``.

        Whole numbers (of an integer type) ``(n,)`` or ``()`` are actions and become one-hot rows; floating-point rows
        ``(n, size)`` or ``(size,)`` are distributions, a row of NaN a missing label.
        """
        values = as_array(target)
        if values.dtype.kind in "iu":
            return self._one_hot(np.atleast_1d(values))
        rows = np.atleast_2d(np.asarray(values, dtype=np.float64))
        if rows.shape[-1] == self.size:
            tolerance = _tolerance(target, self.size)
            wrong = ~are_distributions(rows, tolerance) & ~np.isnan(rows).any(axis=-1)
            if wrong.any():
                raise ValueError(
                    f"target row {rows[np.flatnonzero(wrong)[0]]} is no distribution over {self.size} actions: entries "
                    "must be >= 0 and sum to 1; pass whole numbers for actions"
                )
            if tolerance > SUM_TOLERANCE:  # of a short dtype
                rows = np.where(np.isnan(rows), rows, rows / np.nansum(rows, axis=-1, keepdims=True))
        return rows

    def loss(self, outputs: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        """See ``ActionFormat``; the cross-entropy."""
        return torch.nn.functional.cross_entropy(outputs, target)

    def _one_hot(self, actions: Array) -> npt.NDArray[np.float64]:
        index = np.asarray(actions) - self.first
        if index.ndim != 1 or index.dtype.kind not in "iu" or ((index < 0) | (index >= self.size)).any():
            raise ValueError(
                f"actions {actions!r} are not among the whole numbers {self.first} to {self.first + self.size - 1} of "
                "the action space, one a row"
            )
        rows: npt.NDArray[np.float64] = np.eye(self.size)[index]
        return rows


def _tolerance(target: Any, size: int) -> float:
    """How far the sum of a distribution may be from 1 in the dtype that it came in."""
    eps = 0.0
    if isinstance(target, Tensor):
        eps = torch.finfo(target.dtype).eps if target.is_floating_point() else 0.0
    elif np.asarray(target).dtype.kind == "f":
        eps = float(np.finfo(np.asarray(target).dtype).eps)
    return max(SUM_TOLERANCE, 4.0 * eps * math.sqrt(size))


def action_format(space: spaces.Space[Any]) -> ActionFormat:
    """The format of an action space.

    Raises:
        ValueError: It is neither a flat ``Box`` nor ``Discrete``.
    """
    if isinstance(space, spaces.Discrete):
        return DiscreteActions(space)
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return ContinuousActions(space)
    raise ValueError(f"the action space is {space}; this policy needs a Box with one axis or a Discrete space")
