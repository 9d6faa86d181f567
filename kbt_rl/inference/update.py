"""One update of the posterior: an increment computed by pure functions, and the one function that applies it.

``increment`` does everything that can fail and changes nothing; ``apply`` is the only mutation and is one in-place
product of low rank. An increment is small enough to log, send or take back.
"""

from __future__ import annotations

# What the module signal wraps: turning handlers into enums and back, it takes 15 us for what takes half a microsecond.
import _signal  # type: ignore[import-not-found, unused-ignore]
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference import compiled, joint, smoother
from kbt_rl.inference.compiled import RowEngine, Units
from kbt_rl.inference.density import scalar_log_density
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.moments import Gaussian
from kbt_rl.inference.noise import Judgement, NoiseEstimate, NoiseModel
from kbt_rl.inference.output import Conditioning, OutputRule
from kbt_rl.inference.structures import LAYERWISE
from kbt_rl.inference.triangle import LayerShape

Array = npt.NDArray[np.float64]

if TYPE_CHECKING:
    from kbt_rl.inference.kernels import RowPass

# Rows of one exact joint update: the ReLU covariance has (rows x width)^2 entries.
MAX_JOINT_ROWS = 32
_LARGEST_ROW_RANK = 4
# Rows are predicted one by one in machine code, unless they are many and the covariance has more entries than the
# cache holds: then they share the reading of it.
_FEW_ROWS = 16
_CACHED_ENTRIES = 2**18
# A variance counts as what is left of it after rounding, so that a downdate to nothing is refused, not left below 0.
_KEPT = 1.0 - 8.0 * torch.finfo(torch.float64).eps
_DOWNDATE = np.array([-1.0])


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
    def engine(self) -> RowEngine | None:
        """Machine code for one row at a time, bound to this posterior's memory; None where there is none."""
        return compiled.engine(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "engine"}

    def clone(self) -> HeadState:
        """An independent copy."""
        return HeadState(self.spec, self.mean.clone(), tuple(block.clone() for block in self.cov))

    def variances(self) -> Tensor:
        """Variance of each weight, ``(P,)``."""
        ops = LAYERWISE["layer" if self.spec.structure == "joint" else self.spec.structure]
        layers = zip(self.cov, self.spec.shapes, strict=False)  # what joint stores beyond is between layers
        return torch.cat([ops.variances(block, shape) for block, shape in layers])

    def dense_cov(self) -> Tensor:
        """The full covariance ``(P, P)``, zero where the structure stores nothing; for tests, plots and small heads."""
        if self.spec.structure == "joint":
            return joint.unpack(self.cov, self.spec.shapes)
        ops = LAYERWISE[self.spec.structure]
        full: Tensor = torch.block_diag(
            *(ops.dense(block, shape) for block, shape in zip(self.cov, self.spec.shapes, strict=True))
        )
        return full


class UpdateInfo(NamedTuple):
    """What one update saw, in target units. Variances are those of the targets before the update, averaged.

    Attributes:
        innovation: Root mean square of target minus predicted mean.
        nis: Normalised innovation squared, chi-square with ``labels`` degrees of freedom when calibrated.
        epistemic_variance: Variance from the weights.
        predictive_variance: Variance from the weights and the noise.
        smallest_variance: Smallest variance of a weight after the update.
        labels: Number of scalar targets used; 0 when every label was missing.
        label_weight: What the labels counted for where wild ones are expected: about 1 if ordinary, near 0 if wild.
        log_density: Logarithm of the predictive density of the targets before the update, all entries jointly, in
            nats: Gaussian, or with Student's t noise where wild labels are expected. With the softmax link the log
            probability of the labels at the mean logits. NaN where it was not computed.
    """

    innovation: float
    nis: float
    epistemic_variance: float
    predictive_variance: float
    smallest_variance: float
    labels: int
    label_weight: float = 1.0
    log_density: float = math.nan


class Increment(NamedTuple):
    """``mean += mean_step``, ``cov += V diag(signs) V'``; shapes ``(P,)``, ``(P, q)``, ``(q,)``.

    ``noise`` is what the label noise is thought to be afterwards, None where it is known.
    """

    mean_step: Tensor
    cov_factor: Tensor
    signs: Tensor
    info: UpdateInfo
    noise: NoiseEstimate | None = None


class NoiseBelief(NamedTuple):
    """How the noise is judged, and what it is thought to be before an update."""

    model: NoiseModel
    estimate: NoiseEstimate


def propagate(state: HeadState, features: Tensor) -> tuple[Gaussian, Tensor]:
    """Distribution of the logits of rows ``(..., B, d)`` jointly, and ``Cov(w, u^L)`` of shape ``(..., P, B o)``."""
    spec, weights = state.spec, state.weights
    options = {"feature_variance": spec.feature_variance, "relu_order": spec.relu_order}
    if spec.structure == "joint":
        return joint.forward(weights, state.cov, features, **options)  # type: ignore[arg-type]
    ops = LAYERWISE[spec.structure]
    passed = smoother.forward(ops, weights, state.cov, features, **options)  # type: ignore[arg-type]
    return passed.output, smoother.cross_cov(ops, weights, passed)


def predict_logits(state: HeadState, features: Tensor, chunk: int = 128) -> Gaussian:
    """Distribution of the logits of each row on its own: mean ``(N, o)`` and covariance ``(N, o, o)``."""
    few = len(features) <= _FEW_ROWS or sum(block.numel() for block in state.cov) <= _CACHED_ENTRIES
    if few and len(features) and state.engine is not None and state.engine.propagates:
        passes = [state.engine.propagate(row)[:2] for row in features.numpy()]
        means, covs = (torch.from_numpy(np.stack(values)) for values in zip(*passes, strict=True))
        return Gaussian(means, covs)
    parts = [propagate(state, part.unsqueeze(-2))[0] for part in features.split(chunk)]
    return Gaussian(torch.cat([part.mean for part in parts]), torch.cat([part.cov for part in parts]))


def increment(
    state: HeadState,
    features: Tensor,
    target: Tensor,
    rule: OutputRule,
    noise_cov: Tensor,
    belief: NoiseBelief | None = None,
) -> Increment:
    """What one joint update on rows ``(B, d)`` with targets ``(B, o)`` would add to the posterior.

    Args:
        state: The posterior.
        features: In the head's own units.
        target: In the head's own units.
        rule: How the target conditions the output.
        noise_cov: Covariance of the label noise before the update, ``(o, o)``.
        belief: Where the noise is learned or has heavy tails, the model and the same covariance as its estimate.

    Raises:
        UpdateError: The update would not be finite or would make a variance negative. Nothing has changed.
    """
    engine = state.engine if len(features) == 1 else None
    if engine is not None and engine.propagates:
        return row_step(engine, features[0].numpy(), target.numpy(), rule, noise_cov, belief).as_increment()
    output, cross_cov = propagate(state, features)
    judged = None if belief is None else _judge(output, target, belief)
    step = rule.condition(output, target, noise_cov) if judged is None else _conditioning(output, target, judged)
    # One pass over the cross-covariance for the mean and the covariance.
    moves = cross_cov @ torch.cat([step.mean_step.unsqueeze(-1), step.cov_factor], dim=-1)
    mean_step, factor = moves[:, 0], moves[:, 1:]
    variances = _KEPT * state.variances() + (factor * factor) @ step.signs
    info = _describe(output, step, noise_cov, judged)._replace(smallest_variance=float(variances.min()))
    # One sum finds any NaN or infinity of a vector; inf - inf is NaN.
    _check(float(mean_step.sum()), info)
    return Increment(mean_step, factor, step.signs, info, None if judged is None else judged.estimate)


def _judge(output: Gaussian, target: Tensor, belief: NoiseBelief) -> Judgement:
    """What the noise model makes of the target, before anything is conditioned on it."""
    error = (target - output.mean.view_as(target)).cpu().numpy()
    return belief.model.judge(error, output.cov.cpu().numpy(), belief.estimate)


def _conditioning(output: Gaussian, target: Tensor, judged: Judgement) -> Conditioning:
    """A judgement in the form in which the output rules answer."""
    mean_step, factor = (torch.from_numpy(array).to(target) for array in (judged.mean_step, judged.cov_factor))
    innovation = target.flatten() - output.mean
    nis, log_density = (torch.tensor(value, dtype=target.dtype) for value in (judged.nis, judged.log_density))
    return Conditioning(mean_step, factor, -torch.ones_like(innovation), innovation, nis, log_density)


class RowStep(NamedTuple):
    """An ``Increment`` as arrays, with the factor as ``V'`` of shape ``(q, P)``."""

    mean_step: Array
    factor: Array
    signs: Array
    info: UpdateInfo
    noise: NoiseEstimate | None = None

    def as_increment(self) -> Increment:
        """The same as tensors on the same memory."""
        mean_step, factor, signs = (torch.from_numpy(array) for array in self[:3])
        return Increment(mean_step, factor.mT, signs, self.info, self.noise)


def row_step(
    engine: RowEngine,
    features: Array,
    target: Array,
    rule: OutputRule,
    noise_cov: Tensor,
    belief: NoiseBelief | None = None,
) -> RowStep:
    """``increment`` for one row ``(d,)`` and its target ``(1, o)``, with the forward pass in machine code."""
    row = engine.propagate(features)
    if target.shape[1] == 1 and belief is not None:
        return _judged_scalar_step(engine, row, float(target[0, 0]), belief)
    output = Gaussian(torch.from_numpy(row[0]), torch.from_numpy(row[1]))
    label_rows = torch.from_numpy(target)
    judged = None if belief is None else _judge(output, label_rows, belief)
    step = (
        rule.condition(output, label_rows, noise_cov) if judged is None else _conditioning(output, label_rows, judged)
    )
    factor = np.ascontiguousarray(step.cov_factor.numpy())
    moved, moves, total, smallest = engine.weight_step(row, step.mean_step.numpy(), factor, step.signs.numpy(), _KEPT)
    info = _describe(output, step, noise_cov, judged)._replace(smallest_variance=smallest)
    _check(total, info)
    return RowStep(moved, moves, step.signs.numpy(), info, None if judged is None else judged.estimate)


def _judged_scalar_step(engine: RowEngine, row: RowPass, target: float, belief: NoiseBelief) -> RowStep:
    """The rule ``measure`` for one row and one output with a noise that is learned or has heavy tails."""
    estimate = belief.estimate
    noise = float(estimate.cov[0, 0])
    error, variance = target - float(row[0][0]), float(row[1][0, 0])
    move, gained, weight, learned, labels = belief.model.judge_scalar(error, variance, noise, estimate.labels)
    factor = np.array([[math.sqrt(gained)]])
    moved, moves, total, smallest = engine.weight_step(row, np.array([move]), factor, _DOWNDATE, _KEPT)
    predictive = variance + noise
    info = UpdateInfo(abs(error), error * error / predictive, variance, predictive, smallest, 1, weight)
    _check(total + learned, info)
    info = info._replace(log_density=belief.model.log_density_scalar(error, variance, noise))
    return RowStep(moved, moves, _DOWNDATE, info, NoiseEstimate(np.array([[learned]]), labels))


def learn_row(
    engine: RowEngine, units: Units, features: Array, label: float, noise: float, replacing: bool
) -> UpdateInfo | None:
    """A whole update by the rule ``measure`` or ``replace`` on one row and one output, in one call of machine code.

    Args:
        engine: Bound to the posterior.
        units: See ``compiled.Units``.
        features: ``(d,)``, float64, as they come from the encoder.
        label: In the head's own units.
        noise: Variance of the label.
        replacing: Whether the rule is ``replace``.

    Returns:
        The record; None where the step must be refused: nothing has changed, and ``increment`` says why.
    """
    mean, variance, smallest, done = engine.learn(units, features, label, noise, replacing, _KEPT)
    if not done:
        return None
    innovation, predictive = label - mean, variance + noise
    nis = innovation * innovation / predictive
    density = scalar_log_density(nis, predictive)
    return UpdateInfo(abs(innovation), nis, variance, predictive, smallest, 1, 1.0, density)


def _describe(output: Gaussian, step: Conditioning, noise_cov: Tensor, judged: Judgement | None) -> UpdateInfo:
    """The record of the update, as floats; the smallest variance is still to come."""
    labels = step.innovation.numel()
    epistemic = float(output.cov.trace()) / labels
    return UpdateInfo(
        innovation=math.sqrt(float(step.innovation @ step.innovation) / labels),
        nis=float(step.nis),
        epistemic_variance=epistemic,
        predictive_variance=epistemic + float(noise_cov.trace()) / len(noise_cov),
        smallest_variance=math.nan,
        labels=labels,
        label_weight=1.0 if judged is None else judged.weight,
        log_density=float(step.log_density),
    )


def merge(records: Sequence[UpdateInfo]) -> UpdateInfo:
    """One record of successive blocks: sums of NIS, log density and labels; averages of what is an average."""
    labels = sum(record.labels for record in records)

    def average(values: Iterable[float]) -> float:
        return sum(value * record.labels for value, record in zip(values, records, strict=True)) / labels

    return UpdateInfo(
        innovation=math.sqrt(average(record.innovation**2 for record in records)),
        nis=sum(record.nis for record in records),
        epistemic_variance=average(record.epistemic_variance for record in records),
        predictive_variance=average(record.predictive_variance for record in records),
        smallest_variance=records[-1].smallest_variance,
        labels=labels,
        label_weight=average(record.label_weight for record in records),
        log_density=sum(record.log_density for record in records),
    )


def _check(mean_step: float, info: UpdateInfo) -> None:
    total = mean_step + info.nis + info.epistemic_variance + info.smallest_variance
    if total - total != 0.0:
        raise UpdateError(
            f"the update is not finite (sum of mean steps {mean_step}, NIS {info.nis}, predicted variance "
            f"{info.epistemic_variance}, smallest weight variance {info.smallest_variance}); the posterior is "
            "unchanged. Check features and target for huge values."
        )
    if info.smallest_variance < 0.0:
        raise UpdateError(
            f"the update would make a weight variance negative ({info.smallest_variance:.3g}); the posterior is "
            "unchanged. The noise variance is too small for the prior variance in float64: raise it."
        )


def apply(state: HeadState, step: Increment) -> None:
    """Move the posterior in place; an interrupt that arrives meanwhile is delivered afterwards.

    What has to be allocated is allocated before the first change.
    """
    # From some rank on, a matrix product is faster.
    if len(step.signs) <= _LARGEST_ROW_RANK and state.engine is not None:
        moves = np.ascontiguousarray(step.cov_factor.mT.numpy())
        state.engine.commit(step.mean_step.numpy(), moves, step.signs.numpy())
        return
    signed, sizes = step.cov_factor * step.signs, state.spec.sizes
    with interrupts_deferred():
        state.mean.add_(step.mean_step)
        if state.spec.structure == "joint":
            joint.downdate_(state.cov, state.spec.shapes, step.cov_factor, signed)
            return
        ops = LAYERWISE[state.spec.structure]
        parts = zip(state.cov, state.spec.shapes, step.cov_factor.split(sizes), signed.split(sizes), strict=True)
        for block, shape, factor, signed_factor in parts:
            ops.downdate_(block, shape, factor, signed_factor)


def overwrite(state: HeadState, new: HeadState) -> None:
    """Replace the posterior in place; an interrupt that arrives meanwhile is delivered afterwards."""
    with interrupts_deferred():
        for mine, other in zip((state.mean, *state.cov), (new.mean, *new.cov), strict=True):
            mine.copy_(other)


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold back SIGINT, which Python raises in the main thread only, until the block is done."""
    foreign = _signal.getsignal(signal.SIGINT) is None  # a handler that C code installed cannot be put back
    if foreign or threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    before = _signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        _signal.signal(signal.SIGINT, before)
    if pending and callable(before):
        before(*pending[0])
    elif pending and before == signal.SIG_DFL:
        signal.raise_signal(signal.SIGINT)
