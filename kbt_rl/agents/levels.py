"""Force levels as classes: which level stands for a force, and how probable each level is for an uncertain choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kbt_rl.arguments import between
from kbt_rl.envs.discrete import check_forces, largest

FloatArray = npt.NDArray[np.float64]
# Of the largest level. Labels much softer or harder than this teach more slowly, see studies/discrete.py.
_DEFAULT_TEMPERATURE = 4.0 / 3.0


@dataclass(frozen=True)
class ForceLevels:
    """Force levels and the temperature of the labels that are made of a force.

    The label of a force ``u`` is the distribution ``p_i ~ exp(-(u - f_i)^2 / (2 T^2))`` over the levels ``f_i``. Its
    log-odds ``((f_i - f_j) u - (f_i^2 - f_j^2) / 2) / T^2`` are linear in the force, hence in the state under linear
    feedback, and its most probable level is the nearest one at every temperature.

    Attributes:
        forces: The levels, N, increasing.
        temperature: T, N; at 0 the label is the nearest level alone.
    """

    forces: tuple[float, ...]
    temperature: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "forces", check_forces(self.forces))
        expected = "a number of newtons, 0 for the nearest level alone"
        object.__setattr__(self, "temperature", between("temperature", self.temperature, 0.0, expected=expected))

    @classmethod
    def soft(cls, forces: Sequence[float]) -> ForceLevels:
        """Levels with the temperature that online learning was measured best with, 4/3 of the largest level."""
        return cls(tuple(forces), _DEFAULT_TEMPERATURE * largest(forces))

    def nearest(self, force: FloatArray) -> npt.NDArray[np.int64]:
        """Index of the level nearest to each force, of the shape of ``force``; the lower one half-way between two."""
        levels = np.array(self.forces)
        return np.searchsorted((levels[1:] + levels[:-1]) / 2, force, side="left")

    def label(self, force: FloatArray) -> FloatArray:
        """Probability of each level for forces ``(...)``, ``(..., levels)``."""
        if self.temperature == 0.0:
            return np.eye(len(self.forces))[self.nearest(force)]
        levels = np.array(self.forces)
        exponent = (force[..., None] * levels - levels**2 / 2) / self.temperature**2
        weight = np.exp(exponent - exponent.max(axis=-1, keepdims=True))
        probabilities: FloatArray = weight / weight.sum(axis=-1, keepdims=True)
        return probabilities
