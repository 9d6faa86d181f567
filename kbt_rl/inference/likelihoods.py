"""What a target says about the output: the rules that condition the outputs of the last layer.

Every rule answers in the same form: the step ``dm = S^-1 (m+ - m)`` for the predicted mean ``m`` and covariance ``S``
of the outputs, all rows jointly, and a measurement of ``W' u`` with noise that leaves of ``S`` what the rule leaves.
The weights then move by ``Cov(w, u) dm``, and their covariance by the same measurement.

For the identity link there are ``measure`` (Bayes' rule with Gaussian noise) and ``replace`` (Algorithm 2, lines 23 and
24, as printed); for the softmax link ``laplace``, ``fisher``, ``taylor``, and ``replace_softmax`` (as printed). Where
the outputs are independent, ``each`` does the same in time and memory proportional to their number.

Beside the step every rule tells how probable the target was before it was seen. With the identity link that is the
Gaussian density of all target entries jointly. With the softmax link it is the probability of the labels at the mean
logits, ``sum y log softmax(m)``, which is what the head predicts to first order: rows count as independent, and the
spread of the logits is left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kbt_rl.inference.covariance.roots import sums_of_others
from kbt_rl.inference.density import LOG_TWO_PI
from kbt_rl.inference.errors import NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.moments import softmax_jacobian
from kbt_rl.inference.types import Gaussian

Link = Literal["identity", "softmax"]


class Conditioning(NamedTuple):
    """The answer of a rule for all rows jointly, ``r`` outputs.

    Attributes:
        mean_step: ``dm``, ``(r,)``.
        directions: ``W``, what is measured of the outputs, ``(r, q)``.
        noise_cov: Of that measurement, ``(q, q)``.
        innovation: Target minus prediction, ``(r,)``.
        nis: Normalised innovation squared: chi-square with as many degrees of freedom as free target entries if the
            prediction is calibrated.
        log_density: Logarithm of the predictive density or probability of the target.
        log_ratio: See ``UpdateInfo``.
        change: ``F`` ``(r, q)`` and signs ``(q,)`` with ``S^-1 (S+ - S) S^-1 = F diag(signs) F'``, for a rule that is
            no measurement; ``directions`` and ``noise_cov`` are then not used.
    """

    mean_step: Tensor
    directions: Tensor
    noise_cov: Tensor
    innovation: Tensor
    nis: Tensor
    log_density: Tensor
    log_ratio: float = math.nan
    change: tuple[Tensor, Tensor] | None = None


class EachConditioning(NamedTuple):
    """As ``Conditioning`` for the independent outputs of one row: a measurement of each, with noise ``(o,)``.

    Infinite noise stands for none.
    """

    mean_step: Tensor
    noise: Tensor
    innovation: Tensor
    nis: Tensor
    log_density: Tensor
    log_ratio: float = math.nan


class Likelihood(ABC):
    """A link, and how a target conditions the outputs. Stateless.

    Attributes:
        link: What the outputs are.
        has_each: Whether ``each`` is there.
    """

    link: Link
    has_each = False

    @abstractmethod
    def condition(self, predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
        """Condition on the targets of rows.

        Args:
            predicted: Of all rows jointly, mean ``(B o,)`` and covariance ``(B o, B o)``.
            target: ``(B, o)``.
            noise_cov: Of all rows jointly, ``(B o, B o)``; for rules that have a noise.
        """

    def each(
        self, mean: Tensor, variance: Tensor, target: Tensor, noise: Tensor, active: float
    ) -> EachConditioning | None:
        """The same for one row with independent outputs, all ``(o,)``; None for a rule that has no such form.

        ``active`` is the probability up to which a class keeps its covariance, if it is not the label's.
        """
        return None


class Measure(Likelihood):
    """Bayes' rule for ``y = u + noise``: ``dm = (S+R)^-1 (y-m)``."""

    link: Link = "identity"
    has_each = True

    def condition(self, predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
        """See ``Likelihood``."""
        innovation = target.flatten() - predicted.mean
        root = inverse_root(predicted.cov + noise_cov, "the predicted covariance plus noise")
        white = root @ innovation
        nis = white @ white
        density = _gaussian_log_density(root, nis)
        return Conditioning(root.mT @ white, _eye(innovation), noise_cov, innovation, nis, density)

    def each(self, mean: Tensor, variance: Tensor, target: Tensor, noise: Tensor, active: float) -> EachConditioning:
        """See ``Likelihood``; an entry of NaN has no label."""
        given = ~torch.isnan(target)
        innovation = torch.where(given, target - mean, 0.0)
        total = variance + noise
        if not bool((total > 0.0).all()):
            raise NotPositiveDefiniteError("the predicted variance plus noise", float(total.min()))
        step = innovation / total
        nis = innovation @ step
        density = -0.5 * (nis + torch.where(given, total.log() + LOG_TWO_PI, 0.0).sum())
        return EachConditioning(step, torch.where(given, noise, torch.inf), innovation, nis, density)


class Replace(Likelihood):
    """Force the output to ``N(y, Sigma_data)`` as Algorithm 2 prints it: ``dm = S^-1 (y-m)``.

    This is not Bayes' rule: the covariance grows where ``Sigma_data > S``, and the mean keeps chasing the noise.
    """

    link: Link = "identity"

    def condition(self, predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
        """See ``Likelihood``; ``noise_cov`` is ``Sigma_data``."""
        innovation = target.flatten() - predicted.mean
        root = inverse_root(predicted.cov, "the predicted covariance, which the rule 'replace' inverts without noise")
        inverse = root.mT @ root
        change = _signed_root(inverse @ noise_cov @ inverse - inverse)
        predictive = inverse_root(predicted.cov + noise_cov, "the predicted covariance plus noise")
        white = predictive @ innovation
        nis = white @ white
        density = _gaussian_log_density(predictive, nis)
        return Conditioning(inverse @ innovation, _eye(innovation), noise_cov, innovation, nis, density, change=change)


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
        change = _signed_root(gain @ (noise_cov - predicted_cov) @ gain.mT)
        nis = _softmax_nis(predicted, probabilities, innovation)
        density = _log_probability(predicted, target)
        ratio = _log_ratio(predicted.mean.view_as(target), target)
        return Conditioning(gain @ innovation, jacobian.mT, noise_cov, innovation, nis, density, ratio, change)


LIKELIHOODS: dict[str, Likelihood] = {
    "measure": Measure(),
    "replace": Replace(),
    "laplace": Laplace(),
    "fisher": Fisher(),
    "taylor": Taylor(),
    "replace_softmax": ReplaceSoftmax(),
}


# ---------------------------------------------------------------------- the softmax, all rows jointly


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
    return Conditioning(step, root, _eye(innovation), innovation, nis, density, ratio)


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


# ---------------------------------------------------------------------- the softmax of independent classes


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


# ---------------------------------------------------------------------- matrices


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def inverse_root(matrix: Tensor, name: str) -> Tensor:
    """``L^-1`` for ``matrix = L L'``; says what is wrong instead of repairing it."""
    if matrix.shape[-1] == 1:
        value = float(matrix)
        if not value > 0.0:
            raise NotPositiveDefiniteError(name, value)
        return matrix.rsqrt()
    root, failed = torch.linalg.cholesky_ex(matrix)
    # A singular matrix often factorises by rounding; its last pivot is then noise, and its inverse too.
    lost = 64.0 * len(matrix) * torch.finfo(matrix.dtype).eps
    if int(failed) or bool((root.diagonal().square() <= lost * matrix.diagonal()).any()):
        finite = bool(torch.isfinite(matrix).all())
        values = torch.linalg.eigvalsh(matrix) if finite else torch.full((1,), float("nan"))
        raise NotPositiveDefiniteError(name, float(values[0]), float(values[-1]))
    inverse: Tensor = torch.linalg.solve_triangular(root, _eye(matrix), upper=False)
    return inverse


def _signed_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``F, signs`` with ``F diag(signs) F'`` equal to the symmetric, possibly indefinite matrix."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return vectors * values.abs().sqrt(), values.sign()


def _gaussian_log_density(root: Tensor, nis: Tensor) -> Tensor:
    """Of a vector with the squared innovation ``nis`` and the covariance ``P``, given ``L^-1`` for ``P = L L'``."""
    # log det P = -2 sum log diag(L^-1).
    return root.diagonal().log().sum() - 0.5 * (nis + len(root) * LOG_TWO_PI)
