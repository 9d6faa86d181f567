"""One layer whose outputs are conditioned each on its own label: the definition, without a covariance between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kbt_rl.inference import network
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.likelihoods.base import EachConditioning, Likelihood
from kbt_rl.inference.noise.conjugate import ConjugateNoise
from kbt_rl.inference.noise.registry import NoiseBelief
from kbt_rl.inference.types import HeadState, Increment, UpdateInfo


def increment(
    state: HeadState,
    features: Tensor,
    target: Tensor,
    likelihood: Likelihood,
    noise: Tensor,
    belief: NoiseBelief | None = None,
    weights: Tensor | None = None,
    active: float = 0.0,
) -> Increment:
    """``network.increment`` for one row of a single layer with independent outputs, in time linear in their number.

    Args:
        state: The posterior, of a structure with ``independent_outputs``.
        features: ``(1, d)``.
        target: ``(1, o)``.
        likelihood: With ``each``.
        noise: Variance of each label, ``(o,)``.
        belief: Where the noise is learned in closed form, its model and estimate; ``noise`` is then not used.
        weights: See ``network.increment``.
        active: With the softmax link, the probability up to which a class that is not the label's keeps its covariance.
    """
    structure, inputs, label = STRUCTURES[state.spec.structure], network.augment(features), target[0]
    mean, variance = network.weights_of(state)[0] @ inputs[0], structure.output_variances(state, inputs)[0]
    if likelihood.link == "identity":
        network.check_digits(state, inputs[0], variance + noise, label)
    learned = None
    if belief is not None:
        assert isinstance(belief.model, ConjugateNoise)
        group = state.cov[1]
        judged = belief.model.judge_each(label - mean, variance, group, belief.estimate)
        answer, learned = judged.answer, judged.estimate
        noise, variance, dof = judged.scale, variance * judged.scale, judged.dof
    else:
        found = likelihood.each(mean, variance, label, noise, active)
        if found is None:
            raise ValueError(f"{type(likelihood).__name__} conditions on all outputs jointly; use structure='neuron'")
        answer, dof = found, math.inf
    info = _described(answer, variance, noise, label, weights, dof)
    if likelihood.link == "identity" and math.isinf(dof):
        network.check_distance(info.nis, info.labels)
    mean_step, moves = structure.output_step(state, inputs[0], answer.mean_step, answer.noise)
    network.check_step(float(mean_step.sum()), info)
    return Increment(mean_step, moves, info, learned)


def _described(
    answer: EachConditioning, variance: Tensor, noise: Tensor, label: Tensor, weights: Tensor | None, dof: float
) -> UpdateInfo:
    """The record of the update, as floats."""
    given = ~torch.isnan(label)
    share = given.to(variance) if weights is None else given * weights
    labels = int(given.sum())
    if not labels:
        raise ValueError("no entry of the target has a label")
    epistemic = float(variance @ share) / labels
    return UpdateInfo(
        innovation=math.sqrt(float(answer.innovation.square() @ share) / labels),
        nis=float(answer.nis),
        epistemic_variance=epistemic,
        predictive_variance=epistemic + float(noise @ share) / labels,
        labels=labels,
        log_density=float(answer.log_density),
        dof=dof,
        log_ratio=answer.log_ratio,
    )
