"""The buffers of a head as its updates use them: NumPy arrays on their memory on the CPU, tensors elsewhere.

At the size of the paper's head a PyTorch call costs more than its arithmetic, and NumPy's cost a third of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference.noise import NoiseEstimate, NoiseModel
from kbt_rl.inference.output import RULES
from kbt_rl.inference.prior import layer_shapes, prior_cov
from kbt_rl.inference.update import HeadSpec, HeadState, NoiseBelief, row_step

Array = npt.NDArray[Any]


class Memory:
    """The buffers of a head on their device: the posterior, and the units as arrays (CPU) or tensors."""

    def __init__(
        self,
        spec: HeadSpec,
        cov_names: tuple[str, ...],
        buffers: Mapping[str, Tensor | None],
        noise_model: NoiseModel | None = None,
    ) -> None:
        held = {name: buffer for name, buffer in buffers.items() if buffer is not None}
        self.buffers = tuple(held.values())
        self.state = HeadState(spec, held["mean"], tuple(held[name] for name in cov_names))
        self.device = held["mean"].device
        self.on_cpu = self.device.type == "cpu"
        self.noise_cov = held["noise_cov"]
        names = ("feature_mean", "feature_scale", "target_scale", "labels_seen")
        local = ((held[name].numpy() if self.on_cpu else held[name]) for name in names)
        self.centre, self.scale, self.outputs, self.labels_seen = local
        self.noise_model = noise_model
        self._noise: tuple[Any, ...] = tuple(
            held[name].numpy() if self.on_cpu else held[name] for name in ("noise_cov", "noise_labels") if name in held
        )

    def belief(self) -> NoiseBelief | None:
        """What is thought of the noise, as a copy; None where it is known and Gaussian."""
        if self.noise_model is None:
            return None
        cov, labels = self._noise[0], self._noise[1] if self.noise_model.learned else math.inf
        return NoiseBelief(self.noise_model, NoiseEstimate(_copy(cov), float(labels)))

    def keep(self, estimate: NoiseEstimate | None) -> None:
        """Store what an update has made of the noise; nothing changes where it is not learned."""
        if estimate is None or self.noise_model is None or not self.noise_model.learned:
            return
        cov, labels = self._noise
        cov[:] = estimate.cov if self.on_cpu else torch.from_numpy(estimate.cov).to(self.device)
        labels[...] = estimate.labels

    def take(self, values: Tensor | Array) -> Any:
        """Values as this memory computes with them, detached, so that nothing is recorded for a gradient."""
        if not self.on_cpu:
            return torch.as_tensor(values).detach().to(self.device, torch.float64)
        if not isinstance(values, Tensor):
            return np.asarray(values)
        try:
            return values.numpy()
        except (TypeError, RuntimeError):  # it needs a gradient, is elsewhere, or has a dtype that NumPy lacks
            return values.detach().to("cpu", torch.float64).numpy()

    def finite(self, features: Any, target: Any) -> bool:
        """Whether no entry is NaN or infinite."""
        if self.on_cpu and math.isfinite(np.vdot(features, features) + np.vdot(target, target)):
            return True  # the usual case; a huge but finite entry is looked at again
        total = float(abs(features).max()) + float(abs(target).max())
        return math.isfinite(total)


def _copy(cov: Any) -> Array:
    return cov.copy() if isinstance(cov, np.ndarray) else np.array(cov.cpu())


@lru_cache(maxsize=16)
def prepare(structure: str, layers: int) -> None:
    """Load the machine code for heads of this kind (the first time on a machine: compile it), so no update waits."""
    shapes = layer_shapes(1, 1, layers, None)
    cov = prior_cov(shapes, structure, hidden_variance=1.0, last_variance=1.0, rho=0.0)
    mean = torch.zeros(sum(shape.size for shape in shapes), dtype=torch.float64)
    engine = HeadState(HeadSpec(shapes, structure), mean, cov).engine
    if engine is not None:
        step = row_step(engine, np.zeros(1), np.zeros((1, 1)), RULES["measure"], torch.ones(1, 1, dtype=torch.float64))
        engine.commit(step.mean_step, step.factor, step.signs)
