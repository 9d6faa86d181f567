"""How the noise is judged, by name. A new model is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kbt_rl.inference.noise.base import NoiseSettings
from kbt_rl.inference.noise.conjugate import ConjugateNoise
from kbt_rl.inference.noise.learned import NoiseModel
from kbt_rl.inference.types import NoiseEstimate


class NoiseBelief(NamedTuple):
    """How the noise is judged, and what it is thought to be before an update."""

    model: NoiseModel | ConjugateNoise
    estimate: NoiseEstimate


# How a noise is judged, by name: None for one that is known and Gaussian.
NOISES: dict[str, Callable[[NoiseSettings, int, bool], NoiseModel | ConjugateNoise | None]] = {
    "fixed": lambda config, outputs, conjugate: NoiseModel.of(config, outputs),
    "learned": lambda config, outputs, conjugate: (
        ConjugateNoise(config.noise_memory, config.noise_floor) if conjugate else NoiseModel.of(config, outputs)
    ),
}
