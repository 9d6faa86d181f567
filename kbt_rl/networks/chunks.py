"""Chunks of actions: a last layer that runs on several rows of features for one observation, such as ACT's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from torch import Tensor

from kbt_rl.networks.links import ActionLink, Array


class Chunked(ActionLink):
    """The rows of an observation together are one action; labels have its shape, NaN for steps without one.

    Args:
        row: What the outputs of one row stand for.
        space: Of the whole action, such as ``(chunk, a)``.
    """

    def __init__(self, row: ActionLink, space: spaces.Space[Any]) -> None:
        super().__init__(space, row.outputs)
        self.row, self.rows = row, int(np.prod(space.shape or ())) // row.outputs

    def decide(self, outputs: Array, masks: Array | None = None) -> Array:
        """See ``ActionLink``; from ``rows`` rows of outputs to one action."""
        return self.row.decide(outputs).reshape(-1, *self._shape)

    def targets(self, actions: Array, outputs: Array, units: Array) -> npt.NDArray[np.float64]:
        """See ``ActionLink``; from one action to ``rows`` rows of targets."""
        return self.row.targets(actions.reshape(len(outputs), -1), outputs, units)

    def moments(self, mean: Array, epistemic: Array, aleatoric: Array) -> tuple[Array, Array, Array]:
        """See ``ActionLink``; means ``(n, rows, o)`` and covariances ``(n, rows, o, o)`` of the outputs of a row."""
        first, second, third = (
            part.reshape(-1, self.rows, *part.shape[1:]) for part in self.row.moments(mean, epistemic, aleatoric)
        )
        return first, second, third

    def units(self, outputs: Array | None) -> npt.NDArray[np.float64]:
        """See ``ActionLink``."""
        return self.row.units(outputs)

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self.space.shape or ())

    def _action_shape(self, rows: int) -> tuple[int, ...]:
        return (rows // self.rows, *self._shape)


def action_shape(said: Tensor, made: Any, known: Iterable[Array]) -> tuple[int, ...]:
    """Shape of one action.

    Args:
        said: Outputs of the last layer for one observation, ``(1, ..., o)`` or ``(rows, o)``.
        made: What the module makes of them.
        known: ``said`` and the actions of them; if the module returns either in another shape, an action has that one.

    Raises:
        ValueError: The layer runs on several rows, and the module returns something else than a chunk of them.
    """
    first = 1 if len(said) == 1 else 0
    shape, several = tuple(said.shape[first:]), said.numel() > said.shape[-1]
    if not isinstance(made, Tensor):
        fits = True  # a tuple, of which nobody knows what acts
    elif len(made) == 1 and made.numel() == said.numel():
        values = made.detach().double().cpu().numpy()
        same = any(np.allclose(values, one.reshape(values.shape), 1e-4, 1e-5, equal_nan=True) for one in known)
        shape = tuple(made.shape[1:]) if same else shape
        fits = tuple(made.shape[1:]) == shape
    else:
        fits = False
    rows_first = first == 0 and said.ndim > 2
    if several and (rows_first or not fits):
        raise ValueError(
            f"the last layer makes {tuple(said.shape)} of one observation, and the module "
            f"{tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__}; a chunk of actions is "
            "(1, chunk, a) in both. If a single row acts, apply the layer to this row alone"
        )
    return shape
