"""The values that the inference passes around: what a posterior is, what an update adds to it and what it saw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array: TypeAlias = npt.NDArray[np.float64]
Rows: TypeAlias = Tensor | npt.NDArray[Any]
# Buffers of a module by name.
Tensors: TypeAlias = dict[str, Any]


class Gaussian(NamedTuple):
    """A mean ``(..., n)`` and a covariance ``(..., n, n)``."""

    mean: Tensor
    cov: Tensor


class LayerShape(NamedTuple):
    """Outputs ``n`` and inputs with bias ``k`` of a layer; its weights are vectorised neuron by neuron, bias last."""

    n: int
    k: int

    @property
    def size(self) -> int:
        """Number of weights, bias included."""
        return self.n * self.k


class Part(NamedTuple):
    """What units owe to the weights of one layer: ``dE[u_bm] / d w_jp = G_bmj z~_bp`` for its neurons j, in row b.

    Attributes:
        inputs: ``z~``, the layer's own inputs, ``(..., B, k)``.
        factor: ``G``, the mean Jacobian of the units by the layer's logits, ``(..., B, m, n)``; None where they are
            these logits.
    """

    inputs: Tensor
    factor: Tensor | None


# Of ``m`` units in each of ``B`` rows by the weights, a part for each layer; leading dimensions are independent
# problems. In factors, a hidden layer of any width costs no more than its covariance.
Jacobian: TypeAlias = Mapping[int, Part]


@dataclass(frozen=True)
class HeadSpec:
    """What of a posterior never changes: its layers, how the covariance is stored, how moments are propagated.

    Attributes:
        shapes: Outputs and inputs (bias included) of each layer. Any other module has one layer of one neuron.
        structure: A name of ``covariance.STRUCTURES``.
        feature_variance: Variance of each feature (the paper's epsilon in line 13 of Algorithm 2).
        relu_order: Terms of the ReLU's covariance series.
        largest_deviation: Largest prior standard deviation of a weight, beside which rounding is judged.
        in_noise_units: Whether the covariance is stored in units of the noise, which is learned with it.
    """

    shapes: tuple[LayerShape, ...]
    structure: str
    feature_variance: float = 0.0
    relu_order: int = 2
    largest_deviation: float = 1.0
    in_noise_units: bool = False

    @property
    def sizes(self) -> list[int]:
        """Number of weights of each layer."""
        return [shape.size for shape in self.shapes]

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

    def clone(self) -> HeadState:
        """An independent copy."""
        return HeadState(self.spec, self.mean.clone(), tuple(block.clone() for block in self.cov))


class NoiseEstimate(NamedTuple):
    """Noise covariance ``(o, o)`` and the labels' worth of information it rests on (degrees of freedom).

    The information is one number, or one for each output ``(o,)`` where they may have had different labels.
    """

    cov: Array
    labels: Any


class UpdateInfo(NamedTuple):
    """What one update saw, in the head's own units. Variances are those of the targets before the update, averaged.

    Averages over outputs weigh each by its squared ``target_scale``, so that times ``Posterior.mean_square_scale`` they
    are the averages in units of the target.

    Attributes:
        innovation: Root mean square of target minus predicted mean.
        nis: Normalised innovation squared, chi-square with ``labels`` degrees of freedom when calibrated.
        epistemic_variance: Variance from the weights.
        predictive_variance: Variance from the weights and the noise.
        labels: Number of scalar targets used; 0 when every label was missing.
        label_weight: What the labels counted for where wild ones are expected: about 1 if ordinary, near 0 if wild.
        log_density: Logarithm of the predictive density of the targets before the update, all entries jointly, in
            nats: Gaussian, or Student's t where the noise has heavy tails or is learned in closed form. With the
            softmax link the log probability of the labels at the mean logits. NaN where it was not computed.
        repairs: Times a learned noise was raised to what float64 can hold after a wild label.
        dof: Degrees of freedom of a predictive Student's t distribution; infinite where it is Gaussian.
        log_ratio: With the softmax link, how much more probable the labels are under flattened probabilities
            ``sqrt(p) / sum sqrt(p)`` than under the predicted ones: the sum of log ratios, negative on average while
            the predictions are right. What change detection sums. NaN otherwise.
    """

    innovation: float
    nis: float
    epistemic_variance: float
    predictive_variance: float
    labels: int
    label_weight: float = 1.0
    log_density: float = math.nan
    repairs: int = 0
    dof: float = math.inf
    log_ratio: float = math.nan

    @classmethod
    def without_labels(cls) -> UpdateInfo:
        """The record of an update all of whose labels were missing: nothing was learned."""
        return cls(math.nan, 0.0, math.nan, math.nan, 0, log_density=0.0)


class Increment(NamedTuple):
    """What one update adds to a posterior.

    Attributes:
        mean_step: What is added to the means, ``(P,)``.
        moves: The change of the covariance as its structure takes it, see ``covariance.Structure.apply``.
        info: The record.
        noise: What the label noise is thought to be afterwards, None where it is known.
        rows: Labelled rows used.
    """

    mean_step: Tensor
    moves: Any
    info: UpdateInfo
    noise: NoiseEstimate | None = None
    rows: int = 1


def merge(records: Sequence[UpdateInfo]) -> UpdateInfo:
    """One record of successive updates: sums of NIS, log density and labels; averages of what is an average."""
    used = [record for record in records if record.labels]
    labels = sum(record.labels for record in used)
    if not labels:
        return UpdateInfo.without_labels()

    def average(values: Iterable[float]) -> float:
        return sum(value * record.labels for value, record in zip(values, used, strict=True)) / labels

    return UpdateInfo(
        innovation=math.sqrt(average(record.innovation**2 for record in used)),
        nis=sum(record.nis for record in used),
        epistemic_variance=average(record.epistemic_variance for record in used),
        predictive_variance=average(record.predictive_variance for record in used),
        labels=labels,
        label_weight=average(record.label_weight for record in used),
        log_density=sum(record.log_density for record in used),
        repairs=sum(record.repairs for record in used),
        dof=min(record.dof for record in used),
        log_ratio=sum(record.log_ratio for record in used),
    )
