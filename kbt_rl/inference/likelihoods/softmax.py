"""Rules for the softmax link: a class, or a distribution over classes, was seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kbt_rl.inference.covariance.roots import eye, inverse_root, signed_root, sums_of_others
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.likelihoods.base import Conditioning, EachConditioning, Likelihood, Link
from kbt_rl.inference.moments import softmax_jacobian
from kbt_rl.inference.types import Gaussian


class Fisher(Likelihood):
    """Kalman update of the exponential family: ``S+ = (S^-1 + F)^-1``, ``m+ = m + S+ (y-p)``, ``F = diag(p) - p p'``.

    Neither ``S`` nor ``F`` is inverted, and there is no noise to choose.
    """

    link: Link = "softmax"
    has_each = True

    def condition(self, predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
        """See ``Likelihood``; ``noise_cov`` is not used."""
        probabilities = torch.softmax(predicted.mean.view_as(target), dim=-1)
        innovation = (target - probabilities).flatten()
        step = _damped(_information_root(probabilities), predicted.cov, innovation)
        return _softmax_conditioning(predicted, target, probabilities, step, step)

    def each(self, mean: Tensor, variance: Tensor, target: Tensor, noise: Tensor, active: float) -> EachConditioning:
        """See ``Likelihood``."""
        probabilities = torch.softmax(mean, dim=-1)
        innovation = target - probabilities
        step = _damped_each(probabilities, variance, innovation)
        return _each_class(mean, variance, target, probabilities, innovation, step, step, active)


# Newton steps until the mode is found; from the prior mean it takes 4 to 20, halvings of the step included.
_MOST_NEWTON_STEPS = 200


class Laplace(Likelihood):
    """Laplace's approximation: ``m+`` is the posterior mode of the logits, and ``S+ = (S^-1 + F(m+))^-1``.

    ``fisher`` is its first Newton step. Where the prediction is confident and wrong, ``F(m)`` is nearly 0 and that step
    is far too long; the mode lies where the target begins to be believed. It solves ``dm = y - softmax(m + S dm)`` and
    is found by Newton's method with halved steps on the convex ``dm' S dm / 2 + cross-entropy(y, m + S dm)``.
    """

    link: Link = "softmax"
    has_each = True

    def condition(self, predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
        """See ``Likelihood``; ``noise_cov`` is not used."""
        probabilities = torch.softmax(predicted.mean.view_as(target), dim=-1)
        first = _damped(_information_root(probabilities), predicted.cov, (target - probabilities).flatten())

        def moved(step: Tensor) -> Tensor:
            return predicted.cov @ step

        def damped(at: Tensor, residual: Tensor) -> Tensor:
            return _damped(_information_root(at), predicted.cov, residual)

        step, at_mode = _mode(predicted.mean, target, moved, damped)
        return _softmax_conditioning(predicted, target, at_mode, step, first)

    def each(self, mean: Tensor, variance: Tensor, target: Tensor, noise: Tensor, active: float) -> EachConditioning:
        """See ``Likelihood``."""
        probabilities = torch.softmax(mean, dim=-1)
        innovation = target - probabilities
        first = _damped_each(probabilities, variance, innovation)

        def moved(step: Tensor) -> Tensor:
            return variance * step

        def damped(at: Tensor, residual: Tensor) -> Tensor:
            return _damped_each(at[0], variance, residual)

        step, at_mode = _mode(mean, target.unsqueeze(0), moved, damped)
        return _each_class(mean, variance, target, at_mode[0], innovation, step, first, active)


def _mode(mean: Tensor, target: Tensor, moved: Any, damped: Any) -> tuple[Tensor, Tensor]:
    """``dm`` at the mode and the class probabilities there, ``(B, o)``.

    Args:
        mean: ``m``, ``(B o,)``.
        target: ``(B, o)``.
        moved: ``S dm``.
        damped: ``(I + F S)^-1 r`` for the ``F`` of class probabilities ``(B, o)``.

    Raises:
        UpdateError: The mode was not found.
    """

    def objective(step: Tensor, shift: Tensor) -> float:
        log_probabilities = torch.log_softmax((mean + shift).view_as(target), dim=-1)
        return float(0.5 * step @ shift - (target * log_probabilities).sum())

    step = torch.zeros_like(mean)
    shift = moved(step)
    value = objective(step, shift)
    for _ in range(_MOST_NEWTON_STEPS):
        probabilities = torch.softmax((mean + shift).view_as(target), dim=-1)
        residual = (target - probabilities).flatten() - step
        if float(residual.abs().max()) < 1e-9:
            return step, probabilities
        direction = damped(probabilities, residual)
        for halving in range(60):
            trial = step + direction * 0.5**halving
            shift = moved(trial)
            reached = objective(trial, shift)
            if reached <= value + 1e-12 * (1.0 + abs(value)):  # it is flat to rounding at the mode
                break
        step, value = trial, reached
    raise UpdateError(
        f"no mode after {_MOST_NEWTON_STEPS} Newton steps (residual {float(residual.abs().max()):.3g}); the posterior "
        "is unchanged. Lower the prior variances."
    )


class Taylor(Likelihood):
    """``softmax(u)`` measured to first order with noise: ``dm = J' (J S J' + R)^-1 (y-p)``, Eqs. (24)-(33), (37)."""

    link: Link = "softmax"

    def condition(self, predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
        """See ``Likelihood``."""
        probabilities = torch.softmax(predicted.mean.view_as(target), dim=-1)
        innovation = (target - probabilities).flatten()
        jacobian = torch.block_diag(*softmax_jacobian(probabilities))
        total = jacobian @ predicted.cov @ jacobian.mT + noise_cov
        root = inverse_root(total, "J S J' + R of the softmax, which the rule 'taylor' inverts")
        step = jacobian.mT @ (root.mT @ (root @ innovation))
        nis = _softmax_nis(predicted, probabilities, innovation)
        density = _log_probability(predicted, target)
        ratio = _log_ratio(predicted.mean.view_as(target), target)
        return Conditioning(step, jacobian.mT, noise_cov, innovation, nis, density, ratio)


# Added to the singular J S J' by the printed softmax rule, the paper's epsilon "that prevents singularity".
_PRINTED_SOFTMAX_RIDGE = 1e-6


class ReplaceSoftmax(Likelihood):
    """The printed softmax rule: force ``p`` to ``N(y, Sigma_data)``, with ``P = J S J' + epsilon I``; an ablation."""

    link: Link = "softmax"

    def condition(self, predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
        """See ``Likelihood``; ``noise_cov`` is ``Sigma_data``."""
        probabilities = torch.softmax(predicted.mean.view_as(target), dim=-1)
        innovation = (target - probabilities).flatten()
        jacobian = torch.block_diag(*softmax_jacobian(probabilities))
        predicted_cov = jacobian @ predicted.cov @ jacobian.mT
        predicted_cov.diagonal().add_(_PRINTED_SOFTMAX_RIDGE)
        root = inverse_root(predicted_cov, "J S J' + epsilon I of the softmax")
        gain = jacobian.mT @ root.mT @ root
        change = signed_root(gain @ (noise_cov - predicted_cov) @ gain.mT)
        nis = _softmax_nis(predicted, probabilities, innovation)
        density = _log_probability(predicted, target)
        ratio = _log_ratio(predicted.mean.view_as(target), target)
        return Conditioning(gain @ innovation, jacobian.mT, noise_cov, innovation, nis, density, ratio, change)


def _information_root(probabilities: Tensor) -> Tensor:
    """``T`` with ``T T' = F``, block-diagonal over the rows of class probabilities ``(B, o)``."""
    half = probabilities.sqrt()
    # F = diag(sqrt p) (I - sqrt p sqrt p') diag(sqrt p), and the bracket is a projector, hence its own square.
    eye = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device)
    projector = eye - half.unsqueeze(-1) * half.unsqueeze(-2)
    root: Tensor = torch.block_diag(*(half.unsqueeze(-1) * projector))
    return root


def _damped(root: Tensor, cov: Tensor, step: Tensor) -> Tensor:
    """``(I + F S)^-1 step`` for ``F = T T'``: only ``I + T' S T`` is inverted."""
    inner = root.mT @ cov @ root
    inner.diagonal().add_(1.0)
    half = inverse_root(inner, "I + T' S T of the softmax")
    return step - root @ (half.mT @ (half @ (root.mT @ (cov @ step))))


def _softmax_conditioning(
    predicted: Gaussian, target: Tensor, information_at: Tensor, step: Tensor, first: Tensor
) -> Conditioning:
    """The answer of ``fisher`` and ``laplace``: the information of the class probabilities ``information_at``.

    ``first`` is ``(I + F S)^-1 (y-p)`` at the predicted mean.
    """
    probabilities = torch.softmax(predicted.mean.view_as(target), dim=-1)
    innovation = (target - probabilities).flatten()
    root = _information_root(information_at)
    nis = _nis_from_step(probabilities.flatten(), innovation, first)
    ratio = _log_ratio(predicted.mean.view_as(target), target)
    density = _log_probability(predicted, target)
    return Conditioning(step, root, eye(innovation), innovation, nis, density, ratio)


def _softmax_nis(predicted: Gaussian, probabilities: Tensor, innovation: Tensor) -> Tensor:
    """``e' (F + F S F)^- e`` of all rows."""
    first = _damped(_information_root(probabilities), predicted.cov, innovation)
    return _nis_from_step(probabilities.flatten(), innovation, first)


def _nis_from_step(probabilities: Tensor, innovation: Tensor, step: Tensor) -> Tensor:
    """``e' (F + F S F)^- e`` from ``step = (I + F S)^-1 e``, since ``e = F (e / p)``.

    A probability has rounding errors, so it counts as at least one rounding unit: the NIS of a class whose probability
    is 0 to rounding is huge (1e16) but a number.
    """
    least = torch.finfo(probabilities.dtype).eps
    return (innovation / probabilities.clamp_min(least)) @ step


def _log_ratio(logits: Tensor, target: Tensor) -> float:
    """``sum_b y_b' (log q_b - log p_b)`` for ``q = sqrt(p) / sum sqrt(p)``, with logits and target ``(B, o)``."""
    flattened = torch.log_softmax(0.5 * logits, dim=-1) - torch.log_softmax(logits, dim=-1)
    return float((target * flattened).sum())


def _log_probability(predicted: Gaussian, target: Tensor) -> Tensor:
    """``sum_b y_b' log softmax(m_b)``: of one-hot rows the log probability of the labels at the mean logits."""
    return (target * torch.log_softmax(predicted.mean.view_as(target), dim=-1)).sum()


def _damped_each(probabilities: Tensor, variance: Tensor, step: Tensor) -> Tensor:
    """``(I + F S)^-1 r``, ``S = diag(s)``: ``r / (1 + s p) + q sum(s q r) / sum q`` with ``q = p / (1 + s p)``."""
    damping = 1.0 + variance * probabilities
    weight = probabilities / damping
    return step / damping + weight * ((variance * weight * step).sum() / weight.sum())


def _each_class(
    mean: Tensor,
    variance: Tensor,
    target: Tensor,
    information_at: Tensor,
    innovation: Tensor,
    step: Tensor,
    first: Tensor,
    active: float,
) -> EachConditioning:
    """The diagonal of ``-(I + F S)^-1 F`` is ``-q + q^2 / sum q``; here as the noise of a measurement of each class."""
    damping = 1.0 + variance * information_at
    weight = information_at / damping
    total = weight.sum()
    # 1 - q / sum q: of a class that has nearly all of the probability, the others' share, not what is left of 1.
    share = sums_of_others(weight) / total
    information = information_at * share
    probabilities = torch.softmax(mean, dim=-1)
    moved = (information > 0.0) & ((probabilities > active) | (target > 0.0))
    noise = torch.where(moved, (1.0 + variance * information_at * weight / total) / information, torch.inf)
    nis = _nis_from_step(probabilities, innovation, first)
    density = (target * torch.log_softmax(mean, dim=-1)).sum()
    return EachConditioning(step, noise, innovation, nis, density, _log_ratio(mean, target))
