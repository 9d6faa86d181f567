"""From an action to a label of the linear output, and back: what the outputs of a policy's last layer stand for.

Bounds lose information: a label at a bound says that the output should be there or beyond. Where the output is beyond
the bound already, there is nothing to learn from it, which a NaN tells the head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

Array = npt.NDArray[Any]
LabelKind = Literal["action", "output", "probabilities"]
LinkName = Literal["auto", "clipped", "squashed", "scores"]

# How near a squashed action may come to its bound, of half its range: beyond, its inverse says little.
SQUASHED_MARGIN = 0.01
# By how much the score of the label's action is to exceed the others, in units of the scores.
SCORE_MARGIN = 1.0
SMALLEST_PROBABILITY = 1e-3


class ActionLink(ABC):
    """How outputs ``(n, o)`` of the last layer, actions of the environment and labels relate.

    Attributes:
        outputs: ``o``.
        kinds: Which labels there are.
    """

    kinds: tuple[LabelKind, ...] = ("action", "output")

    def __init__(self, space: spaces.Space[Any], outputs: int) -> None:
        self.space, self.outputs = space, outputs

    @abstractmethod
    def decide(self, outputs: Array, masks: Array | None = None) -> Array:
        """Actions ``(n, ...)`` of the environment for outputs ``(n, o)``, as the policy decides without noise."""

    @abstractmethod
    def targets(self, actions: Array, outputs: Array, units: Array) -> npt.NDArray[np.float64]:
        """What the outputs should have been for actions that would have been right, ``(n, o)``, NaN for no label.

        Args:
            actions: ``(n, ...)``.
            outputs: What they are, ``(n, o)``.
            units: Scale of each, ``(o,)``.
        """

    def moments(self, mean: Array, epistemic: Array, aleatoric: Array) -> tuple[Array, Array, Array]:
        """Mean ``(n, o)`` and covariances ``(n, o, o)`` of the outputs as those of actions without bounds."""
        return mean, epistemic, aleatoric

    def units(self, outputs: Array | None) -> npt.NDArray[np.float64]:
        """Scale of each output, ``(o,)``, given outputs on nominal states if there are any."""
        return np.ones(self.outputs)

    def label(self, label: Any, kind: LabelKind, outputs: Array, units: Array) -> npt.NDArray[np.float64]:
        """Labels of any kind as targets of the outputs ``(n, o)``.

        Raises:
            ValueError: Not a label of this kind.
        """
        if not isinstance(kind, str) or kind not in self.kinds:
            raise ValueError(f"kind is {kind!r}; labels of this policy are {' or '.join(map(repr, self.kinds))}")
        try:
            values = np.asanyarray(label)
        except ValueError as error:
            raise ValueError("the label is no array: its rows differ in length") from error
        if values.dtype.kind not in "fiub" or isinstance(values, np.ma.MaskedArray):
            kind_found = "masked values" if isinstance(values, np.ma.MaskedArray) else values.dtype
            raise ValueError(f"the label holds {kind_found}; expected real numbers, NaN where there is no label")
        if np.isinf(values).any():
            raise ValueError("the label is infinite; use NaN where there is no label")
        whole = self._action_shape(len(outputs))
        if kind == "output" and np.prod(whole) == outputs.size and values.shape in (whole, whole[int(whole[0] == 1) :]):
            values = values.reshape(outputs.shape)  # in the shape of actions that have several axes
        if kind == "action":
            found = self.targets(self._shaped(values, whole, kind), outputs, units)
        else:
            rows = self._shaped(values, (len(outputs), self.outputs), kind).astype(np.float64)
            found = self.from_outputs(self._from_probabilities(rows) if kind == "probabilities" else rows, outputs)
        return found

    def from_outputs(self, labels: Array, outputs: Array) -> npt.NDArray[np.float64]:
        """Labels ``(n, o)`` that are outputs of another policy, as targets of these."""
        return labels

    def _action_shape(self, rows: int) -> tuple[int, ...]:
        return (rows, *(self.space.shape or ()))

    def _from_probabilities(self, rows: Array) -> Array:
        raise ValueError("labels of this policy are actions, not probabilities")

    @staticmethod
    def _shaped(values: Array, shape: tuple[int, ...], kind: str) -> Array:
        if values.shape == shape[1:] and shape[0] == 1:
            values = values[np.newaxis]
        if values.shape != shape:
            alone = f" or {shape[1:]}" if shape[0] == 1 else ", one row an observation"
            raise ValueError(f"a label of kind {kind!r} has shape {values.shape}; expected {shape}{alone}")
        return values


class Clipped(ActionLink):
    """The outputs are the action, cut to the box: PPO, A2C, TRPO."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, int(np.prod(space.shape)))
        self.low, self.high = (bound.reshape(-1).astype(np.float64) for bound in (space.low, space.high))

    def decide(self, outputs: Array, masks: Array | None = None) -> Array:
        """See ``ActionLink``."""
        actions = outputs.reshape(-1, *self.space.shape).astype(np.float32)  # type: ignore[misc]
        clipped: Array = np.clip(actions, self.space.low, self.space.high)  # type: ignore[attr-defined]
        return clipped

    def targets(self, actions: Array, outputs: Array, units: Array) -> npt.NDArray[np.float64]:
        """See ``ActionLink``; actions beyond the bounds are labels as they are."""
        labels = actions.reshape(len(outputs), -1).astype(np.float64)
        known = ((labels == self.high) & (outputs >= self.high)) | ((labels == self.low) & (outputs <= self.low))
        return np.where(known, np.nan, labels)

    def units(self, outputs: Array | None) -> npt.NDArray[np.float64]:
        """See ``ActionLink``; half the range of the action, or as large as nominal outputs where there is no bound."""
        half = 0.5 * (self.high - self.low)
        return np.where(half < 1e6, half, _spread(outputs, self.outputs))


class Squashed(ActionLink):
    """The action is the tanh of the outputs, scaled to the box: SAC, TD3, DDPG, TQC.

    Args:
        space: Bounded.
        limit: Where the outputs are cut before the tanh; None for nowhere.
    """

    def __init__(self, space: spaces.Box, limit: float | None = None) -> None:
        super().__init__(space, int(np.prod(space.shape)))
        self.limit = limit

    def decide(self, outputs: Array, masks: Array | None = None) -> Array:
        """See ``ActionLink``."""
        inner = outputs.astype(np.float32)
        if self.limit is not None:
            inner = np.clip(inner, -self.limit, self.limit)
        low, high = self.space.low, self.space.high  # type: ignore[attr-defined]
        actions: Array = low + 0.5 * (np.tanh(inner).reshape(-1, *self.space.shape) + 1.0) * (high - low)  # type: ignore[misc]
        return actions

    def moments(self, mean: Array, epistemic: Array, aleatoric: Array) -> tuple[Array, Array, Array]:
        """See ``ActionLink``; to first order at the mean."""
        low, high = self.space.low.reshape(-1), self.space.high.reshape(-1)  # type: ignore[attr-defined]
        inner = np.tanh(mean if self.limit is None else np.clip(mean, -self.limit, self.limit))
        slopes = 0.5 * (high - low) * (1.0 - inner**2)
        if self.limit is not None:
            slopes = np.where(np.abs(mean) < self.limit, slopes, 0.0)
        both = slopes[:, :, None] * slopes[:, None, :]
        return low + 0.5 * (inner + 1.0) * (high - low), epistemic * both, aleatoric * both

    def targets(self, actions: Array, outputs: Array, units: Array) -> npt.NDArray[np.float64]:
        """See ``ActionLink``; the inverse of the tanh, cut where it says little. Actions beyond a bound are at it."""
        low, high = (
            bound.reshape(-1).astype(np.float64)
            for bound in (self.space.low, self.space.high)  # type: ignore[attr-defined]
        )
        shares = 2.0 * (actions.reshape(len(outputs), -1).astype(np.float64) - low) / (high - low) - 1.0
        inner = np.arctanh(np.clip(shares, SQUASHED_MARGIN - 1.0, 1.0 - SQUASHED_MARGIN))
        beyond = (np.abs(shares) >= 1.0 - SQUASHED_MARGIN) & (np.abs(outputs) >= np.abs(inner))
        return np.where(beyond & (np.sign(outputs) == np.sign(inner)), np.nan, inner)


class Scores(ActionLink):
    """One output an action, of which the largest decides: logits of PPO and A2C, values of DQN and QR-DQN.

    With ``MultiDiscrete`` actions each entry has scores of its own. A label that is an action says that its score
    should exceed the others by a margin; where it does, there is nothing to learn.
    """

    kinds = ("action", "output", "probabilities")

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete) -> None:
        sizes, starts = (space.n, space.start) if isinstance(space, spaces.Discrete) else (space.nvec, space.start)
        self.sizes, self.starts = np.ravel(sizes).astype(int), np.ravel(starts).astype(int)
        super().__init__(space, int(self.sizes.sum()))
        ends = self.sizes.cumsum()
        self._groups = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def decide(self, outputs: Array, masks: Array | None = None) -> Array:
        """See ``ActionLink``."""
        scores = outputs.astype(np.float32)
        if masks is not None:
            scores = np.where(np.asarray(masks, dtype=bool).reshape(scores.shape), scores, -np.inf)
        chosen = np.stack([scores[:, group].argmax(axis=1) for group in self._groups], axis=1)
        actions: Array = (self.starts + chosen).reshape(self._action_shape(len(outputs)))
        return actions

    def targets(self, actions: Array, outputs: Array, units: Array) -> npt.NDArray[np.float64]:
        """See ``ActionLink``; the score of the label's action and its rival's move, half the way each."""
        found, labels = np.full(outputs.shape, np.nan), actions.reshape(len(outputs), -1)
        for entry, group in enumerate(self._groups):
            found[:, group] = self._passing(labels[:, entry], outputs[:, group], float(units[group][0]), entry)
        return found

    def _passing(self, actions: Array, scores: Array, unit: float, entry: int) -> Array:
        """What the scores ``(n, size)`` of one entry should be, given its label ``(n,)``."""
        rows = np.arange(len(scores))
        known = ~np.isnan(actions) if actions.dtype.kind == "f" else np.ones(len(rows), dtype=bool)
        chosen = self._indices(np.where(known, actions, self.starts[entry]), entry)
        others = scores.astype(np.float64).copy()
        own = others[rows, chosen].copy()
        others[rows, chosen] = -np.inf
        rival = others.argmax(axis=1)
        short = np.maximum(others[rows, rival] + SCORE_MARGIN * unit - own, 0.0)
        found = np.full(scores.shape, np.nan)
        moved = (short > 0.0) & known
        found[rows[moved], chosen[moved]] = (own + 0.5 * short)[moved]
        found[rows[moved], rival[moved]] = (others[rows, rival] - 0.5 * short)[moved]
        return found

    def from_outputs(self, labels: Array, outputs: Array) -> npt.NDArray[np.float64]:
        """See ``ActionLink``; what all scores have in common decides nothing, and is left as it is."""
        aligned: npt.NDArray[np.float64] = labels.copy()
        for group in self._groups:
            aligned[:, group] += (outputs - labels)[:, group].mean(axis=1, keepdims=True)
        return aligned

    def units(self, outputs: Array | None) -> npt.NDArray[np.float64]:
        """See ``ActionLink``; one for all of an entry, since its scores are compared."""
        spread = _spread(outputs, self.outputs) ** 2
        return np.concatenate([np.full(part.stop - part.start, spread[part].mean() ** 0.5) for part in self._groups])

    def _indices(self, actions: Array, entry: int) -> npt.NDArray[np.intp]:
        first, size = self.starts[entry], self.sizes[entry]
        index = actions - first
        if (index != np.round(index)).any() or ((index < 0) | (index >= size)).any():
            raise ValueError(
                f"actions {actions!r} are not among the whole numbers {first} to {first + size - 1}; pass "
                "kind='output' for scores, kind='probabilities' for a distribution"
            )
        whole: npt.NDArray[np.intp] = index.astype(np.intp)
        return whole

    def _from_probabilities(self, rows: Array) -> Array:
        given = ~np.isnan(rows).any(axis=1)
        for size, group in zip(self.sizes, self._groups, strict=True):
            wrong = (rows[:, group] < 0.0).any(axis=1) | (np.abs(rows[:, group].sum(axis=1) - 1.0) > 1e-4)
            if (wrong & given).any():
                raise ValueError(f"the label {rows[wrong & given][0][group]} is no distribution over {size} actions")
        logs: Array = np.log(np.maximum(rows, SMALLEST_PROBABILITY))
        return logs


class Switches(ActionLink):
    """One output a switch, which is on where it is positive: logits of ``MultiBinary`` actions.

    A label says that the output should be on its side of 0 by a margin; where it is, there is nothing to learn.
    """

    def __init__(self, space: spaces.MultiBinary) -> None:
        super().__init__(space, int(np.prod(space.shape)))

    def decide(self, outputs: Array, masks: Array | None = None) -> Array:
        """See ``ActionLink``."""
        actions: Array = (outputs > 0.0).astype(np.float32).reshape(self._action_shape(len(outputs)))
        return actions

    def targets(self, actions: Array, outputs: Array, units: Array) -> npt.NDArray[np.float64]:
        """See ``ActionLink``."""
        labels = actions.reshape(len(outputs), -1).astype(np.float64)
        if (~np.isnan(labels) & (labels != 0.0) & (labels != 1.0)).any():
            raise ValueError(f"the label {actions!r} is neither 0 nor 1 everywhere; pass kind='output' for logits")
        wanted = np.where(labels > 0.0, 1.0, -1.0) * SCORE_MARGIN * units
        there = np.isnan(labels) | (outputs * np.sign(wanted) >= np.abs(wanted))
        return np.where(there, np.nan, wanted)

    def units(self, outputs: Array | None) -> npt.NDArray[np.float64]:
        """See ``ActionLink``."""
        return _spread(outputs, self.outputs)


def _spread(outputs: Array | None, count: int) -> npt.NDArray[np.float64]:
    """Standard deviation of nominal outputs, 1 where there are none or they do not vary."""
    if outputs is None or len(outputs) < 2:
        return np.ones(count)
    spread = outputs.astype(np.float64).std(axis=0)
    return np.where(spread > 1e-6, spread, 1.0)


def link_for(space: spaces.Space[Any], squashed: bool, limit: float | None = None) -> ActionLink:
    """The link of a policy with these actions.

    Raises:
        ValueError: There is none for such actions.
    """
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        return Scores(space)
    if isinstance(space, spaces.MultiBinary):
        return Switches(space)
    if isinstance(space, spaces.Box):
        return Squashed(space, limit) if squashed else Clipped(space)
    raise ValueError(f"the action space is {space}; adapt() serves all that SB3 does")
