"""What a target makes of the predicted output: the rules that condition the logits of the last layer.

Every rule answers with the same small record: ``dm = S^-1 (m+ - m)`` and ``dC = S^-1 (S+ - S) S^-1`` for the predicted
mean ``m`` and covariance ``S`` of the logits, all rows jointly. The smoother turns it into ``mean += X dm`` and
``cov += X dC X'`` with ``X = Cov(w, u^L)``. ``dC`` is returned as ``F diag(signs) F'``, so that the covariance is moved
by a symmetric product.

Rules for the identity link are ``measure`` (Bayes' rule with Gaussian noise) and ``replace`` (Algorithm 2, lines 23 and
24, as printed). For the softmax link they are ``fisher``, ``laplace``, ``taylor`` and ``replace_softmax`` (as printed).

Beside the step every rule tells how probable the target was before it was seen. With the identity link that is the
Gaussian density of all target entries jointly, mean ``m`` and covariance ``S + R``. With the softmax link it is the
probability of the labels at the mean logits, ``sum y log softmax(m)``, which is what the head predicts to first order:
rows count as independent, and the spread of the logits is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kbt_rl.inference.density import LOG_TWO_PI
from kbt_rl.inference.errors import NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.moments import Gaussian, softmax_jacobian

Link = Literal["identity", "softmax"]
# How far the sum of a target distribution, often float32, may be from 1.
_SUM_TOLERANCE = 1e-5


def are_distributions(targets: Any) -> Any:
    """Whether each row of targets ``(B, o)``, an array or a tensor, may be one of the softmax link: >= 0, sum 1."""
    return (targets >= 0.0).all(-1) & (abs(targets.sum(-1) - 1.0) < _SUM_TOLERANCE)


class Conditioning(NamedTuple):
    """``dm`` of shape ``(r,)``, ``dC = F diag(signs) F'`` with ``F`` of shape ``(r, q)``, and the squared innovation.

    ``nis`` is the normalised innovation squared ``e' P^-1 e`` with the predictive covariance ``P`` of the target:
    chi-square with as many degrees of freedom as free target entries if the prediction is calibrated. ``log_density``
    is the logarithm of the predictive density or probability of the target, see the module.
    """

    mean_step: Tensor
    cov_factor: Tensor
    signs: Tensor
    innovation: Tensor
    nis: Tensor
    log_density: Tensor


class OutputRule(NamedTuple):
    """A link and the function that conditions on the target of rows ``(B, o)`` with noise covariance ``(o, o)``."""

    link: Link
    condition: Callable[[Gaussian, Tensor, Tensor], Conditioning]


def measure(predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
    """Bayes' rule for ``y = u + noise``: ``dm = (S+R)^-1 (y-m)``, ``dC = -(S+R)^-1``."""
    innovation = target.flatten() - predicted.mean
    root = _inverse_root(predicted.cov + _per_row(noise_cov, len(target)), "predicted covariance plus noise")
    white = root @ innovation
    nis = white @ white
    log_density = _gaussian_log_density(root, nis)
    return Conditioning(root.mT @ white, root.mT, _minus_ones(innovation), innovation, nis, log_density)


def replace(predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
    """Force the output to ``N(y, Sigma_data)`` as Algorithm 2 prints it: ``dm = S^-1 (y-m)``, ``dC`` by difference.

    This is not Bayes' rule: the covariance grows where ``Sigma_data > S``, and the mean keeps chasing the noise.
    """
    innovation = target.flatten() - predicted.mean
    data_cov = _per_row(noise_cov, len(target))
    root = _inverse_root(predicted.cov, "predicted covariance, which the rule 'replace' inverts without noise")
    inverse = root.mT @ root
    factor, signs = _signed_root(inverse @ data_cov @ inverse - inverse)
    predictive = _inverse_root(predicted.cov + data_cov, "predicted covariance plus noise")
    white = predictive @ innovation
    nis = white @ white
    return Conditioning(inverse @ innovation, factor, signs, innovation, nis, _gaussian_log_density(predictive, nis))


def fisher(predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
    """Kalman update of the exponential family: ``S+ = (S^-1 + F)^-1``, ``m+ = m + S+ (y-p)``, ``F = diag(p) - p p'``.

    With ``F = T T'`` everything follows from ``I + T' S T``, so neither ``S`` nor ``F`` is inverted. There is no noise
    to choose; ``noise_cov`` is not used.
    """
    probabilities, jacobian = _softmax_rows(predicted, target)
    innovation = target.flatten() - probabilities.flatten()
    factor = _information_factor(probabilities, predicted.cov)
    mean_step = _damped(factor, predicted.cov, innovation)
    nis = _softmax_nis(predicted, jacobian, innovation)
    return Conditioning(
        mean_step, factor, _minus_ones(innovation), innovation, nis, _log_probability(predicted, target)
    )


# Newton steps until the mode is found; from the prior mean it takes 4 to 20, halvings of the step included.
_MOST_NEWTON_STEPS = 200


def laplace(predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
    """Laplace's approximation: ``m+`` is the posterior mode of the logits, and ``S+ = (S^-1 + F(m+))^-1``.

    ``fisher`` is its first Newton step. Where the prediction is confident and wrong, ``F(m)`` is nearly 0 and that step
    is far too long; the mode lies where the target begins to be believed. It solves ``dm = y - softmax(m + S dm)`` and
    is found by Newton's method with halved steps on the convex ``dm' S dm / 2 + cross-entropy(y, m + S dm)``, a problem
    of the size of the target. ``noise_cov`` is not used.

    Raises:
        UpdateError: The mode was not found.
    """
    probabilities, jacobian = _softmax_rows(predicted, target)
    innovation = target.flatten() - probabilities.flatten()
    nis = _softmax_nis(predicted, jacobian, innovation)
    step, value = torch.zeros_like(innovation), _mode_objective(predicted, target, torch.zeros_like(innovation))
    for _ in range(_MOST_NEWTON_STEPS):
        logits = predicted.mean + predicted.cov @ step
        probabilities = torch.softmax(logits.view_as(target), dim=-1)
        factor = _information_factor(probabilities, predicted.cov)
        residual = target.flatten() - probabilities.flatten() - step
        if float(residual.abs().max()) < 1e-9:
            log_density = _log_probability(predicted, target)
            return Conditioning(step, factor, _minus_ones(innovation), innovation, nis, log_density)
        direction = _damped(factor, predicted.cov, residual)
        for halving in range(60):
            trial = step + direction * 0.5**halving
            reached = _mode_objective(predicted, target, trial)
            if reached <= value + 1e-12 * (1.0 + abs(value)):  # it is flat to rounding at the mode
                break
        step, value = trial, reached
    raise UpdateError(
        f"no mode after {_MOST_NEWTON_STEPS} Newton steps (residual {float(residual.abs().max()):.3g}); the posterior "
        "is unchanged. Lower the prior variances."
    )


def _mode_objective(predicted: Gaussian, target: Tensor, step: Tensor) -> float:
    """``dm' S dm / 2 - sum_b y_b' log softmax(m + S dm)_b``, minus the log posterior up to a constant."""
    moved = predicted.cov @ step
    log_probabilities = torch.log_softmax((predicted.mean + moved).view_as(target), dim=-1)
    return float(0.5 * step @ moved - (target * log_probabilities).sum())


def _information_factor(probabilities: Tensor, cov: Tensor) -> Tensor:
    """``V`` with ``V V' = (I + F S)^-1 F`` for class probabilities ``(B, o)`` and the logits' covariance ``S``."""
    half = probabilities.sqrt()
    # F = diag(sqrt p) (I - sqrt p sqrt p') diag(sqrt p), and the bracket is a projector, hence its own square.
    projector = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device) - half.unsqueeze(-1) * half.unsqueeze(
        -2
    )
    info_root = torch.block_diag(*(half.unsqueeze(-1) * projector))
    inner = info_root.mT @ cov @ info_root
    inner.diagonal().add_(1.0)
    factor: Tensor = info_root @ _inverse_root(inner, "I + T' S T of the softmax").mT
    return factor


def _damped(factor: Tensor, cov: Tensor, step: Tensor) -> Tensor:
    """``(I + F S)^-1 step`` by ``factor factor' = (I + F S)^-1 F``."""
    return step - factor @ (factor.mT @ (cov @ step))


def taylor(predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
    """``softmax(u)`` measured to first order with noise: ``dm = J' (J S J' + R)^-1 (y-p)``, Eqs. (24)-(33), (37)."""
    probabilities, jacobian = _softmax_rows(predicted, target)
    innovation = target.flatten() - probabilities.flatten()
    full_jacobian = torch.block_diag(*jacobian)
    predicted_cov = full_jacobian @ predicted.cov @ full_jacobian.mT + _per_row(noise_cov, len(target))
    root = _inverse_root(predicted_cov, "J S J' + R of the softmax, which the rule 'taylor' inverts")
    factor = full_jacobian.mT @ root.mT
    return Conditioning(
        factor @ (root @ innovation),
        factor,
        _minus_ones(innovation),
        innovation,
        _softmax_nis(predicted, jacobian, innovation),
        _log_probability(predicted, target),
    )


# Added to the singular J S J' by the printed softmax rule, the paper's epsilon "that prevents singularity".
_PRINTED_SOFTMAX_RIDGE = 1e-6


def replace_softmax(predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
    """The printed softmax rule: force ``p`` to ``N(y, Sigma_data)``, with ``P = J S J' + epsilon I``; an ablation."""
    probabilities, jacobian = _softmax_rows(predicted, target)
    innovation = target.flatten() - probabilities.flatten()
    full_jacobian = torch.block_diag(*jacobian)
    predicted_cov = full_jacobian @ predicted.cov @ full_jacobian.mT
    predicted_cov.diagonal().add_(_PRINTED_SOFTMAX_RIDGE)
    root = _inverse_root(predicted_cov, "J S J' + epsilon I of the softmax")
    inverse = root.mT @ root
    gain = full_jacobian.mT @ inverse
    change = gain @ (_per_row(noise_cov, len(target)) - predicted_cov) @ gain.mT
    factor, signs = _signed_root(change)
    nis = _softmax_nis(predicted, jacobian, innovation)
    return Conditioning(gain @ innovation, factor, signs, innovation, nis, _log_probability(predicted, target))


RULES: dict[str, OutputRule] = {
    "measure": OutputRule("identity", measure),
    "replace": OutputRule("identity", replace),
    "fisher": OutputRule("softmax", fisher),
    "laplace": OutputRule("softmax", laplace),
    "taylor": OutputRule("softmax", taylor),
    "replace_softmax": OutputRule("softmax", replace_softmax),
}


def _per_row(cov: Tensor, rows: int) -> Tensor:
    """``I_B (x) R``."""
    return cov if rows == 1 else torch.block_diag(*([cov] * rows))


def _minus_ones(like: Tensor) -> Tensor:
    return torch.full_like(like, -1.0)


def lost_pivot(size: int, dtype: torch.dtype = torch.float64) -> float:
    """Relative to the diagonal entry of a ``size`` x ``size`` matrix, the largest pivot that may be rounding."""
    return 64.0 * size * torch.finfo(dtype).eps


def _inverse_root(matrix: Tensor, name: str) -> Tensor:
    """``L^-1`` for ``matrix = L L'``; says what is wrong instead of repairing it."""
    if matrix.shape[-1] == 1:
        value = float(matrix)
        if not value > 0.0:
            raise NotPositiveDefiniteError(name, value)
        return matrix.rsqrt()
    root, failed = torch.linalg.cholesky_ex(matrix)
    # A singular matrix often factorises by rounding; its last pivot is then noise, and its inverse too.
    lost = lost_pivot(len(matrix), matrix.dtype)
    if int(failed) or bool((root.diagonal().square() <= lost * matrix.diagonal()).any()):
        finite = bool(torch.isfinite(matrix).all())
        raise NotPositiveDefiniteError(name, float(torch.linalg.eigvalsh(matrix)[0]) if finite else float("nan"))
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse: Tensor = torch.linalg.solve_triangular(root, identity, upper=False)
    return inverse


def _signed_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``F, signs`` with ``F diag(signs) F'`` equal to the symmetric, possibly indefinite matrix."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return vectors * values.abs().sqrt(), values.sign()


def _gaussian_log_density(inverse_root: Tensor, nis: Tensor) -> Tensor:
    """Of a vector with the squared innovation ``nis`` and the covariance ``P``, given ``L^-1`` for ``P = L L'``."""
    # log det P = -2 sum log diag(L^-1).
    return inverse_root.diagonal().log().sum() - 0.5 * (nis + len(inverse_root) * LOG_TWO_PI)


def _log_probability(predicted: Gaussian, target: Tensor) -> Tensor:
    """``sum_b y_b' log softmax(m_b)``: of one-hot rows the log probability of the labels at the mean logits."""
    return (target * torch.log_softmax(predicted.mean.view_as(target), dim=-1)).sum()


def _softmax_rows(predicted: Gaussian, target: Tensor) -> tuple[Tensor, Tensor]:
    """Class probabilities ``(B, o)`` and Jacobians ``(B, o, o)`` at the mean logits."""
    probabilities = torch.softmax(predicted.mean.view_as(target), dim=-1)
    return probabilities, softmax_jacobian(probabilities)


def _softmax_nis(predicted: Gaussian, jacobian: Tensor, innovation: Tensor) -> Tensor:
    """``e' (F + J S J')^-1 e``: the last class of each row is implied by the others and left out.

    A probability has rounding errors, so its variance counts as at least one rounding unit. The NIS of a class whose
    probability is 0 to rounding is thereby huge (1e16) but a number.
    """
    full_jacobian = torch.block_diag(*jacobian)
    cov = full_jacobian + full_jacobian @ predicted.cov @ full_jacobian.mT
    outputs = jacobian.shape[-1]
    free = torch.arange(len(innovation), device=innovation.device) % outputs != outputs - 1
    reduced = cov[free][:, free]
    reduced.diagonal().add_(torch.finfo(reduced.dtype).eps)
    weighed, failed = torch.linalg.solve_ex(reduced, innovation[free])
    if int(failed) and bool(torch.isfinite(reduced).all()):
        # Huge variances meet probabilities of 0: the matrix is singular to rounding, and only part of it says anything.
        weighed = torch.linalg.pinv(reduced, hermitian=True) @ innovation[free]
    nis: Tensor = innovation[free] @ weighed
    return nis
