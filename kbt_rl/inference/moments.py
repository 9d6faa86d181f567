"""Moments of a Gaussian through the three maps of the head: linear layer, ReLU, softmax.

Each function takes the mean and covariance of its input and returns those of its output. Vectors of several rows
(positions of a sequence, environments) are stacked row by row: entry ``b * n + j`` is neuron ``j`` of row ``b``. Any
number of leading batch dimensions is allowed and means independent problems.

Equation numbers refer to the paper (arXiv:2509.10695).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kbt_rl.inference.machine_code import kernels
from kbt_rl.inference.types import Gaussian

_INV_SQRT2 = 1.0 / math.sqrt(2.0)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
# What is smaller counts as 0, as in ``kernels``: exp and erfc take ten times as long where their result is a subnormal
# number or 0, and most units of a head are that far from their kink. The others are where both still are normal.
_SMALLEST = 1e-304
_LEAST_EXPONENT, _LEAST_POINT = -702.0, -37.4


class ActivationMoments(NamedTuple):
    """Moments of an activation, its mean slope, and the part of its covariance that is not linear in the input.

    ``slope`` is ``E relu'(u) = Phi(mean / sd)``, shape ``(..., n)``. By Stein's lemma ``Cov(x, relu(u_k)) =
    Cov(x, u_k) slope_k`` for every ``x`` jointly Gaussian with ``u``. ``excess`` is ``(..., n, n)``.
    """

    output: Gaussian
    slope: Tensor
    excess: Tensor


class SoftmaxMoments(NamedTuple):
    """First-order moments of ``p = softmax(u)``: mean, covariance, ``Cov(u, p)`` and the Jacobian."""

    mean: Tensor
    cov: Tensor
    cross_cov: Tensor
    jacobian: Tensor


def gaussian_pdf(x: Tensor) -> Tensor:
    """Density of the standard normal distribution; 0 below 1e-304."""
    density = (-0.5 * x * x).clamp_min_(_LEAST_EXPONENT).exp_().mul_(_INV_SQRT_2PI)
    return functional.threshold(density, _SMALLEST, 0.0)


def gaussian_cdf(x: Tensor) -> Tensor:
    """Distribution function of the standard normal, accurate in the lower tail; 0 below 1e-304.

    ``torch.special.ndtr`` is 1.8 % off at -8 and 0 at -10, which makes variances negative there; ``erfc`` is not.
    """
    below = x.clamp_min(_LEAST_POINT).mul_(-_INV_SQRT2).erfc_().mul_(0.5)
    return functional.threshold(below, _SMALLEST, 0.0)


def relu_moments(inputs: Gaussian, excess: Tensor | None = None, order: int = 2) -> ActivationMoments:
    """Moments of ``z = max(0, u)`` for Gaussian ``u``, Eqs. (22), (23).

    The mean and the variances are exact. Covariances are Price's series ``sum_n S^n / n! E relu^(n)(u_j) E
    relu^(n)(u_k)`` cut after ``order`` terms; every cut leaves the result positive semi-definite, since the diagonal
    is exact, and so it leaves ``Cov(z) - A Cov(u) A`` with the slopes ``A``.

    Note:
        Eq. (23) prints the covariance entry of its second term without the square. The square is meant; see
        ``tests/inference/test_moments.py::test_relu_cov_needs_the_square_in_the_second_term``.

    Args:
        inputs: Distribution of ``u``, mean ``(..., n)`` and the covariance ``(..., n, n)`` that is linear in whatever
            ``u`` is a function of.
        excess: The rest of its covariance, ``D``; None for none.
        order: Number of terms of the series for the covariances, at least 1. The paper prints 2.

    Returns:
        Distribution of ``z``, the mean slope ``Phi(mean / sd)``, and ``Cov(z) - A C A`` for the linear part ``C`` of
        ``Cov(u)``. Where the variance is zero the slope is that of the deterministic ReLU, 1/2 at exactly 0.
    """
    mean, linear = inputs
    code = kernels()
    if order == 2 and code is not None and linear.device.type == "cpu" and not torch.is_grad_enabled():
        return _by_machine_code(code, mean, linear, excess)
    cov = linear if excess is None else linear + excess
    variance = torch.diagonal(cov, dim1=-2, dim2=-1)
    sd, ratio = _standardise(mean, variance)
    upper, lower, density = gaussian_cdf(ratio), gaussian_cdf(-ratio), gaussian_pdf(ratio)
    curved = _relu_series(cov, sd, ratio, density, order)
    torch.diagonal(curved, dim1=-2, dim2=-1).copy_(_curved_variance(variance, ratio, upper, lower, density))
    slopes = upper.unsqueeze(-1) * upper.unsqueeze(-2)
    rest = curved if excess is None else curved.addcmul_(slopes, excess)
    output = Gaussian(torch.addcmul(mean * upper, sd, density), torch.addcmul(rest, slopes, linear))
    return ActivationMoments(output, upper, rest)


def _by_machine_code(code: Any, mean: Tensor, linear: Tensor, excess: Tensor | None) -> ActivationMoments:
    """``relu_moments``, two terms."""
    size, none = mean.shape[-1], linear.new_empty(0, 0, 0)
    out, slope, cov, rest = (torch.empty(part.shape, dtype=part.dtype) for part in (mean, mean, linear, linear))
    rows = [part.reshape(-1, size).contiguous().numpy() for part in (mean, out, slope)]
    given = [part.reshape(-1, size, size).contiguous().numpy() for part in (linear, none if excess is None else excess)]
    found = [part.view(-1, size, size).numpy() for part in (cov, rest)]
    code.relu.relu_moments(rows[0], *given, rows[1], found[0], rows[2], found[1])
    return ActivationMoments(Gaussian(out, cov), slope, rest)


def relu_mean(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of ``max(0, u)``, Eq. (22), and ``E relu'(u) = Phi(mean / sd)``, elementwise for equal shapes."""
    sd, ratio = _standardise(mean, variance)
    slope = gaussian_cdf(ratio)
    return torch.addcmul(mean * slope, sd, gaussian_pdf(ratio)), slope


def _standardise(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """``sd`` and ``mean / sd``, with the deterministic limit where the variance is 0.

    There the smallest useful number stands in for ``sd``: the ratio becomes a far point of the mean's sign, or 0 at 0,
    and whatever is divided by ``sd`` stays finite and is multiplied by a covariance of 0. Far points are cut where
    their square would overflow; ``Phi`` and ``phi`` reached their limits long before.
    """
    limits = torch.finfo(mean.dtype)
    sd = variance.sqrt().clamp_min_(math.sqrt(limits.tiny))
    far = 0.5 * math.sqrt(limits.max)
    return sd, (mean / sd).clamp_(-far, far)


def _curved_variance(variance: Tensor, ratio: Tensor, upper: Tensor, lower: Tensor, density: Tensor) -> Tensor:
    """Variance of ``max(0, u)`` beyond ``Phi^2 Var u``, in a form that does not cancel for far means.

    ``sd^2 [(1 + a^2) P Q - a phi (P - Q) - phi^2]`` and ``sd^2 P^2`` add up to the printed ``(mean^2 + sd^2) P + mean
    sd phi - (E z)^2``, which has a relative error of 0.8 at mean 100 and sd 1e-6.
    """
    slope_part = ratio * (upper * lower) - density * (upper - lower)
    spread = torch.addcmul(upper * lower, ratio, slope_part).addcmul_(density, density, value=-1.0)
    # Far from the kink the bracket is rounding of either sign.
    return spread.clamp_min_(0.0).mul_(variance)


def _relu_series(cov: Tensor, sd: Tensor, ratio: Tensor, density: Tensor, order: int) -> Tensor:
    """Price's series from its second term on, ``sum_{n > 1} S^n / n! E relu^(n)(u_j) E relu^(n)(u_k)``.

    The diagonal is left to the caller.
    """
    if order < 1:
        raise ValueError(f"relu order is {order}; the covariance series needs at least 1 term (the paper prints 2)")
    # For n >= 2, E relu^(n) = (-1)^n He_{n-2}(a) phi(a) / sd^(n-1). The powers of sd go into the correlation r, since
    # they would overflow. By Horner's rule: S r/2 (d2 d2' + r/3 (d3 d3' + ...)).
    inverse = sd.reciprocal()
    correlation = (cov * inverse.unsqueeze(-1)).mul_(inverse.unsqueeze(-2))
    derivatives = [density]
    hermite_before, hermite = torch.zeros_like(ratio), torch.ones_like(ratio)
    for n in range(3, order + 1):
        hermite_before, hermite = hermite, ratio * hermite - (n - 3) * hermite_before
        derivatives.append(torch.where(density > 0, hermite, 0.0) * density)
    total = torch.zeros_like(cov) if order == 1 else derivatives[-1].unsqueeze(-1) * derivatives[-1].unsqueeze(-2)
    for n in range(order, 1, -1):  # in place, as of many rows these matrices are large
        factor = derivatives[n - 3]
        total.mul_(correlation).div_(n)
        if n > 2:
            total.addcmul_(factor.unsqueeze(-1), factor.unsqueeze(-2))
    return total.mul_(cov)


def softmax_jacobian(probabilities: Tensor) -> Tensor:
    """``J = diag(p) - p p'``, shape ``(..., o, o)``, which is also the Fisher information of the logits."""
    return torch.diag_embed(probabilities) - probabilities.unsqueeze(-1) * probabilities.unsqueeze(-2)


def softmax_variances(probabilities: Tensor, variances: Tensor) -> Tensor:
    """Diagonal of ``J S J'`` for independent logits, ``S = diag(s)``, both ``(..., o)``."""
    square = probabilities.square()
    return square * ((1.0 - 2.0 * probabilities) * variances + (square * variances).sum(-1, keepdim=True))


def softmax_moments(inputs: Gaussian) -> SoftmaxMoments:
    """First-order moments of the softmax about the mean of its logits, Eqs. (24) to (33).

    Args:
        inputs: Distribution of the logits of one row, mean ``(..., o)`` and covariance ``(..., o, o)``.

    Returns:
        ``softmax(mean)``, ``J S J'``, ``S J'`` and ``J``. The covariance is singular by construction: ``J 1 = 0``.
    """
    probabilities = torch.softmax(inputs.mean, dim=-1)
    jacobian = softmax_jacobian(probabilities)
    cross_cov = inputs.cov @ jacobian
    return SoftmaxMoments(probabilities, jacobian @ cross_cov, cross_cov, jacobian)
