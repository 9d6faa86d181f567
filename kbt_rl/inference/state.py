"""What a posterior is: the layers of a head, the means of its weights and their covariance as it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kbt_rl.inference import compiled, joint
from kbt_rl.inference.compiled import Engine
from kbt_rl.inference.structures import LAYERWISE
from kbt_rl.inference.triangle import LayerShape

# A margin of 64 over the rounding of one entry of a covariance in float32.
_LEAST_QUOTIENT = 64.0 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class HeadSpec:
    """What of a head never changes: its layers, how the covariance is stored, how moments are propagated.

    Attributes:
        shapes: Outputs and inputs (bias included) of each layer.
        structure: ``joint``, ``layer``, ``neuron`` or ``diagonal``.
        feature_variance: Variance of each feature (the paper's epsilon in line 13 of Algorithm 2).
        relu_order: Terms of the ReLU's covariance series.
    """

    shapes: tuple[LayerShape, ...]
    structure: str
    feature_variance: float = 0.0
    relu_order: int = 2

    @property
    def sizes(self) -> list[int]:
        """Number of weights of each layer."""
        return [shape.size for shape in self.shapes]

    @property
    def plain_moments(self) -> bool:
        """Whether the features are exact and the series has two terms, which the machine code knows."""
        return self.relu_order == 2 and self.feature_variance == 0.0

    @property
    def outputs(self) -> int:
        """Number of outputs of the last layer."""
        return self.shapes[-1].n


@dataclass(frozen=True, eq=False)
class HeadState:
    """The posterior: weight means ``(P,)``, layer after layer and neuron by neuron, and the stored covariance."""

    spec: HeadSpec
    mean: Tensor
    cov: tuple[Tensor, ...]

    @property
    def weights(self) -> list[Tensor]:
        """Views of the means as one matrix ``(n_i, k_i)`` a layer."""
        parts = self.mean.split(self.spec.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.spec.shapes, strict=True)]

    @cached_property
    def engine(self) -> Engine | None:
        """Machine code bound to this posterior's memory; None where there is none."""
        return compiled.engine(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "engine"}

    def clone(self) -> HeadState:
        """An independent copy."""
        return HeadState(self.spec, self.mean.clone(), tuple(block.clone() for block in self.cov))

    @property
    def least_quotient(self) -> float:
        """Below which rows are learned after a repair, see ``resolution``; 0 where every row is learned as it comes."""
        narrow = self.mean.dtype == torch.float32 and self.spec.structure != "diagonal"
        return _LEAST_QUOTIENT if narrow else 0.0

    def wide(self) -> HeadState:
        """The posterior in float64: itself, or a copy of one that is stored in float32."""
        if self.mean.dtype == torch.float64:
            return self
        return HeadState(self.spec, self.mean.double(), tuple(block.double() for block in self.cov))

    def variances(self) -> Tensor:
        """Variance of each weight, ``(P,)``."""
        ops = LAYERWISE["layer" if self.spec.structure == "joint" else self.spec.structure]
        layers = zip(self.cov, self.spec.shapes, strict=False)  # what joint stores beyond is between layers
        return torch.cat([ops.variances(block, shape) for block, shape in layers])

    def correlated_blocks(self) -> list[Tensor]:
        """Covariances ``(..., m, m)`` of the weights that may be correlated; no two blocks share a weight."""
        if self.spec.structure == "joint":
            return [self.dense_cov()]
        ops = LAYERWISE[self.spec.structure]
        blocks = ops.dense if self.spec.structure == "layer" else ops.neuron_blocks
        return [blocks(block, shape) for block, shape in zip(self.cov, self.spec.shapes, strict=True)]

    def dense_cov(self) -> Tensor:
        """The full covariance ``(P, P)``, zero where the structure stores nothing; for tests, plots and small heads."""
        if self.spec.structure == "joint":
            return joint.unpack(self.cov, self.spec.shapes)
        ops = LAYERWISE[self.spec.structure]
        full: Tensor = torch.block_diag(
            *(ops.dense(block, shape) for block, shape in zip(self.cov, self.spec.shapes, strict=True))
        )
        return full
