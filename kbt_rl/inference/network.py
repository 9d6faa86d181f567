"""The definition: moments of a network with Gaussian weights, from the features to the output, for every structure.

The activations of each layer are carried as a mean, their Jacobian by all weights below, and an excess covariance
``D``, so that ``Cov(u) = J Sigma J' + D`` and ``Cov(weights, u) = Sigma J'``. ``D`` holds what is not linear in the
weights: uncertain features, products of two uncertain numbers, the curvature of the ReLU. At the output ``D`` is to the
weights as label noise is, and nothing is left to do but to condition on the label.

For layers that are independent this equals the paper's backward pass (37) to (45), layer by layer with an inverse at
each step: with the exact ``Cov(u, relu(u)) = Cov(u) diag(Phi)`` every inverse meets its own matrix. The literal
smoother is in ``paper``. With the structure ``joint`` the weights of a layer and its inputs are correlated, and their
product has ``E wz = E w E z + Cov(w, z)`` and a covariance by Isserlis' theorem; where layers are independent that
coupling is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.likelihoods.base import Conditioning, Likelihood
from kbt_rl.inference.moments import relu_moments
from kbt_rl.inference.noise.base import huge_values_refused
from kbt_rl.inference.noise.learned import NoiseModel
from kbt_rl.inference.noise.registry import NoiseBelief
from kbt_rl.inference.types import Gaussian, HeadState, Increment, Jacobian, NoiseEstimate, Part, UpdateInfo

# Of a feature, a label or the step of a weight, in the head's own units. The variance of a prediction of L layers has
# products of 2 (L + 1) of them, which must stay in float64 (up to four layers), also when several such labels came.
LARGEST = 1e25
# Standard deviations from its prediction up to which a label is learned where the noise is Gaussian. Such noise takes
# every label at its word, and the step of a farther one is so far beyond where a network is linear that what follows it
# could not be learned either.
FARTHEST = 1e6


class Forward(NamedTuple):
    """Outputs of all rows jointly: mean ``(..., r)``, what they owe to the weights, and the rest of their covariance.

    ``projected`` is ``Sigma^(1/2) J'`` in the structure's own form, ``linear`` is ``J Sigma J'`` and ``excess``
    the rest, ``(..., r, r)``; ``r`` counts rows, then outputs.
    """

    mean: Tensor
    projected: Any
    linear: Tensor
    excess: Tensor

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance."""
        return Gaussian(self.mean, self.linear + self.excess)


class Spread(NamedTuple):
    """Covariance of the inputs of a layer in all rows, ``(..., B m, B m)``, and the part that is not linear in weights.

    With ``apart``, of inputs that are independent of each other: ``(..., m, B, B)``.
    """

    cov: Tensor
    excess: Tensor
    apart: bool = False


def augment(inputs: Tensor) -> Tensor:
    """``z~ = [z; 1]``: append the constant of the bias, ``(..., B, m)`` to ``(..., B, m + 1)``."""
    return functional.pad(inputs, (0, 1), value=1.0)


def weights_of(state: HeadState) -> list[Tensor]:
    """Views of the means as one matrix ``(n_i, k_i)`` a layer."""
    parts = state.mean.split([shape.n * shape.k for shape in state.spec.shapes])
    return [part.view(shape) for part, shape in zip(parts, state.spec.shapes, strict=True)]


Propagation = Callable[[HeadState, Tensor], Forward]


def forward(state: HeadState, features: Tensor) -> Forward:
    """Propagate rows ``(..., B, d)``, which share the weights and are therefore correlated; Eqs. (18) to (23)."""
    structure, rows, weights = STRUCTURES[state.spec.structure], features.shape[-2], weights_of(state)
    inputs, spread = augment(features), _uncertain(features, state.spec.feature_variance)
    below: Jacobian = {}
    slope = inputs
    for depth, weight in enumerate(weights):
        mean, excess = inputs @ weight.mT, None
        if spread is not None:
            excess = _through(weight[:, :-1], spread, rows)
            excess = excess + structure.input_part(state, depth, spread.cov, rows, spread.apart)
        if below:
            coupling = structure.coupling(state, below, depth)
            if coupling is not None and excess is not None:
                width = weight.shape[1] - 1
                shared = coupling.reshape(*coupling.shape[:-2], *weight.shape, rows, width)  # Cov(w_jp, u_bq)
                shared = shared[..., :-1, :, :] * slope.unsqueeze(-3).unsqueeze(-3)
                mean = mean + shared.diagonal(dim1=-3, dim2=-1).sum(-1).mT
                excess = excess + torch.einsum("...jpcq,...lqbp->...bjcl", shared, shared).reshape(excess.shape)
        if excess is not None:
            excess = _without_rounding(excess)
        jacobian = {depth: Part(inputs, None), **_times(below, weight[:, :-1], slope)}
        if depth == len(weights) - 1:
            projected = structure.project(state, jacobian)
            linear = structure.gram(projected)
            return Forward(mean.flatten(-2), projected, linear, torch.zeros_like(linear) if excess is None else excess)
        if structure.independent_outputs and excess is None:
            # Units that share no weights and no input of which anything is unknown are independent of each other.
            units = Gaussian(mean.mT, structure.unit_blocks(state, depth, inputs))
            output, slope, curved = relu_moments(units, None, state.spec.relu_order)
            inputs, slope, spread = augment(output.mean.mT), slope.mT, Spread(output.cov, curved, apart=True)
        else:
            units = Gaussian(mean.flatten(-2), structure.covariance(state, jacobian))
            output, slope, curved = relu_moments(units, excess, state.spec.relu_order)
            inputs, slope = (part.unflatten(-1, (rows, len(weight))) for part in (output.mean, slope))
            inputs, spread = augment(inputs), Spread(output.cov, curved)
        below = jacobian
    raise ValueError("the head has no layers; it needs at least one linear layer")


def linearised(state: HeadState, features: Tensor) -> Forward:
    """The network at its mean weights and its Jacobian there, the propagation of the extended Kalman filter."""
    inputs = slope = augment(features)
    below: Jacobian = {}
    for depth, weight in enumerate(weights_of(state)):
        mean = inputs @ weight.mT
        jacobian = {depth: Part(inputs, None), **_times(below, weight[:, :-1], slope)}
        inputs, slope, below = augment(mean.clamp_min(0.0)), (mean > 0.0).to(mean), jacobian
    return exact(state, mean.flatten(-2), jacobian)


def exact(state: HeadState, mean: Tensor, jacobian: Jacobian) -> Forward:
    """Outputs that are linear in the weights."""
    structure = STRUCTURES[state.spec.structure]
    projected = structure.project(state, jacobian)
    linear = structure.gram(projected)
    return Forward(mean, projected, linear, torch.zeros_like(linear))


PROPAGATIONS: dict[str, Propagation] = {"moments": forward, "linearised": linearised}


def predict_logits(state: HeadState, features: Tensor, propagate: Propagation = forward, chunk: int = 128) -> Gaussian:
    """Distribution of the outputs of each row ``(N, d)`` on its own: mean ``(N, o)`` and covariance ``(N, o, o)``."""
    parts = [propagate(state, part.unsqueeze(-2)).gaussian for part in features.split(chunk)]
    return Gaussian(torch.cat([part.mean for part in parts]), torch.cat([part.cov for part in parts]))


# ---------------------------------------------------------------------- one update


def increment(
    state: HeadState,
    features: Tensor,
    target: Tensor,
    likelihood: Likelihood,
    noise_cov: Tensor,
    belief: NoiseBelief | None = None,
    weights: Tensor | None = None,
    propagate: Propagation = forward,
) -> Increment:
    """What one joint update on rows ``(B, d)`` with targets ``(B, o)`` would add to the posterior; changes nothing.

    Everything that can fail happens here: propagate, condition, and find the move of the weights.

    Args:
        state: The posterior.
        features: In the head's own units.
        target: In the head's own units; NaN entries have no label.
        likelihood: How the target conditions the output.
        noise_cov: Covariance of the label noise, ``(o, o)``, or one for each row ``(B, o, o)``.
        belief: Where the noise is learned or has heavy tails, its model, and the same covariance as its estimate.
        weights: Of the outputs in the record's averages, ``(o,)``, 1 on average; None for equal ones.
        propagate: Distribution of the outputs; the moments of a ReLU network by default.

    Raises:
        UpdateError: There would be no proper posterior. Nothing has changed.
    """
    structure = STRUCTURES[state.spec.structure]
    passed = propagate(state, features)
    output, labels = passed.gaussian, target.flatten()
    given = ~torch.isnan(labels)
    if (
        propagate is forward
        and len(state.spec.shapes) == 1
        and len(target) == 1
        and likelihood.link == "identity"
        and belief is None
    ):
        check_digits(state, augment(features)[0], (output.cov + _of_rows(noise_cov, 1)).diagonal(), labels)
    if belief is not None:
        answer, info, learned = _judged(output, target, belief, weights)
    else:
        noise = _of_rows(noise_cov, len(target))
        if bool(given.all()):
            answer = likelihood.condition(output, target, noise)
        else:
            answer = _observed(output, target, noise, likelihood, given)
        info, learned = _described(output, target, answer, noise, weights), None
    if likelihood.link == "identity" and (belief is None or belief.model.robust_dof is None):
        check_distance(info.nis, info.labels)
    if answer.change is None:
        inner = answer.directions.mT @ passed.excess @ answer.directions
        moves = structure.measured(state, passed.projected, answer.directions, answer.noise_cov + inner)
    else:
        moves = structure.replaced(state, passed.projected, *answer.change)
    mean_step = structure.cross(state, passed.projected, answer.mean_step)
    check_step(float(mean_step.sum()), info)
    return Increment(mean_step, moves, info, learned, len(target))


def apply(state: HeadState, step: Increment) -> HeadState:
    """The posterior after an increment; new tensors, so that nothing has changed if this fails."""
    cov = STRUCTURES[state.spec.structure].apply(state.cov, step.moves)
    return HeadState(state.spec, state.mean + step.mean_step, cov)


def check_distance(nis: float, labels: int) -> None:
    """Raise UpdateError for labels that Gaussian noise cannot account for, see ``FARTHEST``."""
    if nis > FARTHEST * FARTHEST * labels:
        raise UpdateError(
            f"the target is {math.sqrt(nis / labels):.3g} standard deviations from its prediction, where at most "
            f"{FARTHEST:.0e} are learned; the posterior is unchanged. Check the target's units, raise the noise "
            "variance if it is meant, or expect wild labels with robust_dof=4"
        )


def check_step(mean_step: float, info: UpdateInfo) -> None:
    """Raise UpdateError for a step, given as the sum of what would be added to the means, that leaves float64."""
    if abs(mean_step) > LARGEST and math.isfinite(mean_step):
        raise UpdateError(
            f"the update would move the weights by {mean_step:.3g}, and products of such numbers leave float64; the "
            "posterior is unchanged. Check features and target for huge values."
        )
    total = mean_step + info.nis + info.epistemic_variance
    if total - total != 0.0:  # NaN or infinite: one sum finds any, as inf - inf is NaN
        raise UpdateError(
            f"the update is not finite (sum of mean steps {mean_step}, NIS {info.nis}, predicted variance "
            f"{info.epistemic_variance}); the posterior is unchanged. Check features and target for huge values."
        )


def check_digits(state: HeadState, inputs: Tensor, total: Tensor, label: Tensor) -> None:
    """Raise UpdateError where a predicted variance, noise included, is below the rounding of its terms.

    A repeated label with all but no noise comes to that; what would be learned from it is that rounding.

    Args:
        state: Of one layer.
        inputs: ``z~``, ``(k,)``.
        total: Variance of each label, ``(o,)``.
        label: ``(o,)``, NaN where there is none.
    """
    scale = 8.0 * torch.finfo(inputs.dtype).eps * state.spec.largest_deviation
    lost = scale * scale * len(inputs) * float(inputs @ inputs)
    smallest = float(torch.where(torch.isnan(label), torch.inf, total).min())
    if not smallest >= lost:
        raise UpdateError(
            f"the label's predicted variance is {smallest:.3g}, noise included, and float64 resolves {lost:.3g} beside "
            "this prior and these features; the posterior is unchanged. Raise the noise variance"
        )


def _of_rows(cov: Tensor, rows: int) -> Tensor:
    """``(o, o)`` for each of the rows, or ``(B, o, o)``, as one matrix ``(B o, B o)``."""
    if rows == 1:
        return cov if cov.ndim == 2 else cov[0]
    full: Tensor = torch.block_diag(*([cov] * rows if cov.ndim == 2 else cov))
    return full


def _observed(output: Gaussian, target: Tensor, noise: Tensor, likelihood: Likelihood, given: Tensor) -> Conditioning:
    """Condition on the entries that have a label; the others are not measured."""
    if likelihood.link != "identity" or not bool(given.any()):
        raise ValueError("a label of NaN is for the identity link, where at least one entry of the update has a label")
    rows = torch.nonzero(given).flatten()
    seen = Gaussian(output.mean[rows], output.cov[rows][:, rows])
    answer = likelihood.condition(seen, target.flatten()[rows].unsqueeze(0), noise[rows][:, rows])
    embed = torch.eye(len(given), dtype=noise.dtype, device=noise.device)[:, rows]
    change = None if answer.change is None else (embed @ answer.change[0], answer.change[1])
    return answer._replace(
        mean_step=embed @ answer.mean_step,
        directions=embed @ answer.directions,
        innovation=embed @ answer.innovation,
        change=change,
    )


def _judged(
    output: Gaussian, target: Tensor, belief: NoiseBelief, weights: Tensor | None
) -> tuple[Conditioning, UpdateInfo, NoiseEstimate]:
    """Condition where the noise is learned or has heavy tails."""
    if bool(torch.isnan(target).any()):
        raise ValueError(
            "a label with NaN in some entries needs noise that is known and Gaussian, or structure='shared'"
        )
    assert isinstance(belief.model, NoiseModel)
    innovation = target.flatten() - output.mean
    with huge_values_refused():
        judged = belief.model.judge(innovation.view_as(target).cpu().numpy(), output.cov.cpu().numpy(), belief.estimate)
    if not np.isfinite(judged.estimate.cov).all():
        raise UpdateError(
            "the learned noise is not finite; the posterior is unchanged. Check the target for huge values"
        )
    mean_step, directions = (torch.from_numpy(array).to(target) for array in (judged.mean_step, judged.directions))
    nis, log_density = (torch.tensor(value, dtype=target.dtype) for value in (judged.nis, judged.log_density))
    noise = torch.eye(directions.shape[-1], dtype=target.dtype, device=target.device)
    answer = Conditioning(mean_step, directions, noise, innovation, nis, log_density)
    before = _of_rows(torch.from_numpy(belief.estimate.cov).to(target), len(target))
    info = _described(output, target, answer, before, weights)
    return answer, info._replace(label_weight=judged.weight, repairs=judged.repairs), judged.estimate


def _described(
    output: Gaussian, target: Tensor, answer: Conditioning, noise: Tensor, weights: Tensor | None
) -> UpdateInfo:
    """The record of the update, as floats."""
    variance, given = output.cov.diagonal().view_as(target), ~torch.isnan(target)
    share = given.to(variance) if weights is None else given * weights
    labels = int(given.sum())
    epistemic = float((variance * share).sum()) / labels
    return UpdateInfo(
        innovation=math.sqrt(float((answer.innovation.square().view_as(target) * share).sum()) / labels),
        nis=float(answer.nis),
        epistemic_variance=epistemic,
        predictive_variance=epistemic + float((noise.diagonal().view_as(target) * share).sum()) / labels,
        labels=labels,
        log_density=float(answer.log_density),
        log_ratio=answer.log_ratio,
    )


# ---------------------------------------------------------------------- parts of the forward pass


def _times(jacobian: Jacobian, weight: Tensor, slope: Tensor) -> Jacobian:
    """Of ``u' = W diag(slope) u`` in each row, for ``W`` of shape ``(n, m)`` and slopes ``(..., B, m)``."""
    step = weight * slope.unsqueeze(-2) if jacobian else weight
    return {
        layer: Part(inputs, step if factor is None else step @ factor) for layer, (inputs, factor) in jacobian.items()
    }


def _uncertain(features: Tensor, variance: float) -> Spread | None:
    """Covariance of the features of all rows, none of which comes from the weights (Algorithm 2, line 13)."""
    if variance == 0.0:
        return None
    size = features.shape[-1] * features.shape[-2]
    cov = (variance * torch.eye(size, dtype=features.dtype, device=features.device)).expand(
        *features.shape[:-2], size, size
    )
    return Spread(cov, cov)


def _through(matrix: Tensor, spread: Spread, rows: int) -> Tensor:
    """``(I_B (x) A) C (I_B (x) A)'`` for the excess ``C`` of the inputs and ``A`` of shape ``(n, m)``."""
    cov = spread.excess
    if spread.apart:
        gram = torch.einsum("mj,...jbc,lj->...bmcl", matrix, cov, matrix)
        return gram.flatten(-4, -3).flatten(-2)
    if rows == 1:
        return matrix @ cov @ matrix.mT
    (n, m), lead = matrix.shape, cov.shape[:-2]
    half = (cov.reshape(*lead, rows * m, rows, m) @ matrix.mT).reshape(*lead, rows * m, rows * n).mT
    full = (half.reshape(*lead, rows * n, rows, m) @ matrix.mT).reshape(*lead, rows * n, rows * n)
    return full.mT


def _without_rounding(excess: Tensor) -> Tensor:
    """Makes 0 of variances, sums of products that may cancel, which rounding has left a little below it."""
    torch.diagonal(excess, dim1=-2, dim2=-1).clamp_min_(0.0)
    return excess
