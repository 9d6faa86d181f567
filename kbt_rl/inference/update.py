"""One update of the posterior, as it is defined: an increment computed by pure functions, and how it is applied.

``increment`` does everything that can fail and changes nothing; ``apply`` adds it in place, by a product of low rank.
An increment is small enough to log, send or take back. On the CPU the forward pass is machine code (``rows.row_step``;
of several rows, up to two layers), and the commonest update, one row with one label through one or two layers, is so as
a whole (``rows.learn_row``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kbt_rl.inference import joint, resolution, smoother
from kbt_rl.inference.conditioning import NoiseBelief, condition
from kbt_rl.inference.errors import NegativeVarianceError, NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.interrupts import interrupts_deferred
from kbt_rl.inference.moments import Gaussian
from kbt_rl.inference.output import OutputRule
from kbt_rl.inference.record import Increment, check, kept
from kbt_rl.inference.rows import row_step
from kbt_rl.inference.state import HeadState
from kbt_rl.inference.structures import LAYERWISE

if TYPE_CHECKING:
    from kbt_rl.inference.kernels.terms import RowPass

# Rows of one exact joint update: the ReLU covariance has (rows x width)^2 entries.
MAX_JOINT_ROWS = 32
# Up to this rank machine code moves the covariance; from there on a matrix product is faster.
_MAX_ROW_RANK = {"joint": 8, "layer": 8, "neuron": 16, "diagonal": 32}


def propagate(state: HeadState, features: Tensor) -> tuple[Gaussian, Tensor]:
    """Distribution of the logits of rows ``(..., B, d)`` jointly, and ``Cov(w, u^L)`` of shape ``(..., P, B o)``.

    Computed in float64; a posterior in float32 is copied for it.
    """
    state = state.wide()
    spec, weights = state.spec, state.weights
    options = {"feature_variance": spec.feature_variance, "relu_order": spec.relu_order}
    if spec.structure == "joint":
        return joint.forward(weights, state.cov, features, **options)  # type: ignore[arg-type]
    ops = LAYERWISE[spec.structure]
    passed = smoother.forward(ops, weights, state.cov, features, **options)  # type: ignore[arg-type]
    return passed.output, smoother.cross_cov(ops, weights, passed)


def predict_logits(state: HeadState, features: Tensor, chunk: int = 128) -> Gaussian:
    """Distribution of the logits of each row on its own: mean ``(N, o)`` and covariance ``(N, o, o)``."""
    state = state.wide()
    parts = [propagate(state, part.unsqueeze(-2))[0] for part in features.split(chunk)]
    return Gaussian(torch.cat([part.mean for part in parts]), torch.cat([part.cov for part in parts]))


def increment(
    state: HeadState,
    features: Tensor,
    target: Tensor,
    rule: OutputRule,
    noise_cov: Tensor,
    belief: NoiseBelief | None = None,
    weights: Tensor | None = None,
) -> Increment:
    """What one joint update on rows ``(B, d)`` with targets ``(B, o)`` would add to the posterior.

    Args:
        state: The posterior.
        features: In the head's own units.
        target: In the head's own units.
        rule: How the target conditions the output.
        noise_cov: Covariance of the label noise before the update, ``(o, o)``.
        belief: Where the noise is learned or has heavy tails, the model and the same covariance as its estimate.
        weights: Of the outputs in the record's averages, ``(o,)``, 1 on average; None for equal ones.

    Raises:
        UpdateError: The update would not be finite or would make a variance negative. Nothing has changed.
    """
    labels = features, target, rule, noise_cov, belief, weights
    limit, passed = state.least_quotient, _forward(state, features, target)
    forgotten = resolution.shrinkage(state, features, *_covariances(state, passed)) if limit else 0.0
    while True:
        try:
            if forgotten == 0.0:
                return _increment(state, passed, *labels)
            repaired = resolution.repaired(state, forgotten)
            step = _increment(repaired, _forward(repaired, features, target), *labels)
            return step._replace(correlation=1.0 - forgotten, info=step.info._replace(repairs=1 + step.info.repairs))
        except (NegativeVarianceError, NotPositiveDefiniteError):
            # The rows' own variance may be in order and their covariance with the weights not yet.
            if limit == 0.0 or not forgotten < 1.0:  # not a number neither, which no repair makes one
                raise
            forgotten = min(max(2.0 * forgotten, limit), 1.0)


def _forward(state: HeadState, features: Tensor, target: Tensor) -> RowPass | tuple[Gaussian, Tensor]:
    """By machine code where it is made for so many labels, else ``propagate``."""
    engine = state.engine
    if engine is not None and engine.takes(*target.shape):
        return engine.propagate(features.numpy())
    return propagate(state, features)


def _covariances(state: HeadState, passed: RowPass | tuple[Gaussian, Tensor]) -> tuple[Tensor, Tensor]:
    """``Cov(w, u^L)``, ``(P, B o)``, and the variances of the weights, ``(P,)``."""
    if len(passed) == 4:
        return torch.from_numpy(passed[2]).mT, torch.from_numpy(passed[3])
    return passed[1], state.variances().double()


def _increment(
    state: HeadState,
    passed: RowPass | tuple[Gaussian, Tensor],
    features: Tensor,
    target: Tensor,
    rule: OutputRule,
    noise_cov: Tensor,
    belief: NoiseBelief | None,
    weights: Tensor | None,
) -> Increment:
    """``increment`` of a posterior as it is, after the forward pass, which is used up."""
    if len(passed) == 4:
        assert state.engine is not None
        rows = features.numpy(), target.numpy()
        return row_step(state.engine, *rows, rule, noise_cov, belief, weights, passed).as_increment()
    output, cross_cov = passed
    step, info, noise = condition(output, target, rule, noise_cov, belief, weights)
    # One pass over the cross-covariance for the mean and the covariance.
    moves = cross_cov @ torch.cat([step.mean_step.unsqueeze(-1), step.cov_factor], dim=-1)
    mean_step, factor = moves[:, 0], moves[:, 1:]
    variances = kept(state.mean.dtype) * state.variances().double() + (factor * factor) @ step.signs
    info = info._replace(smallest_variance=float(variances.min()))
    check(float(mean_step.sum()), info)
    return Increment(mean_step, factor, step.signs, info, noise)


def check_fits(state: HeadState, step: Increment) -> None:
    """Raise ValueError for an increment of another head, and UpdateError if a variance would be negative after it."""
    weights, rank = len(state.mean), len(step.signs)
    if step.mean_step.shape != (weights,) or step.cov_factor.shape != (weights, rank):
        raise ValueError(
            f"the increment has steps of shape {tuple(step.mean_step.shape)} and {tuple(step.cov_factor.shape)}; "
            f"expected {(weights,)} and {(weights, rank)}: it is of another head"
        )
    factor = step.cov_factor.double()
    smallest = float((state.variances().double() + (factor * factor) @ step.signs.double()).min())
    if not smallest >= 0.0:
        raise UpdateError(
            f"the increment would leave a weight with the variance {smallest:.3g}: it was computed for another state "
            "of the posterior, which is unchanged; compute it anew"
        )


def is_moved_by_rows(state: HeadState, rank: int) -> bool:
    """Whether machine code, where there is any, takes a step of this rank as fast as a matrix product."""
    return rank <= _MAX_ROW_RANK[state.spec.structure]


def apply(state: HeadState, step: Increment) -> None:
    """Move the posterior in place; an interrupt that arrives meanwhile is delivered afterwards.

    What has to be allocated is allocated before the first change.
    """
    if is_moved_by_rows(state, len(step.signs)) and state.engine is not None:
        change = step.mean_step.numpy(), np.ascontiguousarray(step.cov_factor.mT.numpy()), step.signs.numpy()
        if step.correlation == 1.0:
            state.engine.commit(*change)
            return
        variances = state.variances()
        with interrupts_deferred():
            resolution.scale_correlations_(state, step.correlation, variances)
            state.engine.commit(*change)
        return
    whole, sizes = step.cov_factor.to(state.mean.dtype), state.spec.sizes
    signed, variances = whole * step.signs.to(whole.dtype), state.variances()
    with interrupts_deferred():
        if step.correlation != 1.0:
            resolution.scale_correlations_(state, step.correlation, variances)
        state.mean.add_(step.mean_step)
        if state.spec.structure == "joint":
            joint.downdate_(state.cov, state.spec.shapes, whole, signed)
            return
        ops = LAYERWISE[state.spec.structure]
        parts = zip(state.cov, state.spec.shapes, whole.split(sizes), signed.split(sizes), strict=True)
        for block, shape, factor, signed_factor in parts:
            ops.downdate_(block, shape, factor, signed_factor)


def overwrite(state: HeadState, new: HeadState) -> None:
    """Replace the posterior in place; an interrupt that arrives meanwhile is delivered afterwards."""
    with interrupts_deferred():
        for mine, other in zip((state.mean, *state.cov), (new.mean, *new.cov), strict=True):
            mine.copy_(other)
