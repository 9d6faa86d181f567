"""Moments of a Gaussian through the three maps of the head: linear layer, ReLU, softmax.

Each function takes the mean and covariance of its input and returns those of its output. Vectors of several rows
(positions of a sequence, environments) are stacked row by row: entry ``b * n + j`` is neuron ``j`` of row ``b``. Any
number of leading batch dimensions is allowed and means independent problems.

Equation numbers refer to the paper (arXiv:2509.10695).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_INV_SQRT2 = 1.0 / math.sqrt(2.0)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
# What is smaller counts as 0, as in ``kernels``: exp and erfc take ten times as long where their result is a subnormal
# number or 0, and most units of a head are that far from their kink. The others are where both still are normal.
_SMALLEST = 1e-304
_LEAST_EXPONENT, _LEAST_POINT = -702.0, -37.4


class Gaussian(NamedTuple):
    """A mean ``(..., n)`` and a covariance ``(..., n, n)``."""

    mean: Tensor
    cov: Tensor


class ActivationMoments(NamedTuple):
    """Moments of an activation and its mean slope.

    ``slope`` is ``E relu'(u) = Phi(mean / sd)``, shape ``(..., n)``. By Stein's lemma ``Cov(x, relu(u_k)) =
    Cov(x, u_k) slope_k`` for every ``x`` jointly Gaussian with ``u``.
    """

    output: Gaussian
    slope: Tensor


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


def linear_cov(weights: Tensor, weight_term: Tensor, input_cov: Tensor | None) -> Tensor:
    """Covariance of ``u = W [z; 1]`` for all rows jointly, Eqs. (20), (21).

    Args:
        weights: Mean of ``W``, bias last, ``(n, k)``.
        weight_term: What the weights' own uncertainty contributes, ``(..., B n, B n)``.
        input_cov: Covariance of the stacked inputs without the constant 1, ``(..., B (k-1), B (k-1))``, or None for
            deterministic inputs.

    Returns:
        Covariance ``(..., B n, B n)``.
    """
    if input_cov is None:
        return weight_term
    return weight_term + propagate_rows(weights[:, :-1], input_cov)


def propagate_rows(matrix: Tensor, cov: Tensor) -> Tensor:
    """``(I_B (x) A) C (I_B (x) A)'`` for ``A`` of shape ``(n, k)`` and ``C`` of shape ``(..., B k, B k)``."""
    n, k = matrix.shape
    rows = cov.shape[-1] // k
    if rows == 1:
        return matrix @ cov @ matrix.mT
    lead = cov.shape[:-2]
    half = cov.reshape(*lead, rows * k, rows, k) @ matrix.mT
    half = half.reshape(*lead, rows * k, rows * n).mT
    full = half.reshape(*lead, rows * n, rows, k) @ matrix.mT
    return full.reshape(*lead, rows * n, rows * n).mT


def without_negative_variances(inputs: Gaussian) -> Gaussian:
    """Makes 0, in place, of variances that rounding has left a little below it, as a ReLU asks for their root."""
    torch.diagonal(inputs.cov, dim1=-2, dim2=-1).clamp_min_(0.0)
    return inputs


def relu_moments(inputs: Gaussian, order: int = 2) -> ActivationMoments:
    """Moments of ``z = max(0, u)`` for Gaussian ``u``, Eqs. (22), (23).

    The mean and the variances are exact. Covariances are Price's series ``sum_n S^n / n! E relu^(n)(u_j) E
    relu^(n)(u_k)`` cut after ``order`` terms; every cut leaves the result positive semi-definite, since the diagonal
    is exact.

    Note:
        Eq. (23) prints the covariance entry of its second term without the square. The square is meant; see
        ``tests/test_moments.py::test_relu_cov_needs_the_square_in_the_second_term``.

    Args:
        inputs: Distribution of ``u``, mean ``(..., n)`` and covariance ``(..., n, n)``.
        order: Number of terms of the series for the covariances, at least 1. The paper prints 2.

    Returns:
        Distribution of ``z`` and the mean slope ``Phi(mean / sd)``. Where the variance is zero the slope is that of
        the deterministic ReLU, 1/2 at exactly 0.
    """
    mean, cov = inputs
    variance = torch.diagonal(cov, dim1=-2, dim2=-1)
    sd, ratio = _standardise(mean, variance)
    upper, lower, density = gaussian_cdf(ratio), gaussian_cdf(-ratio), gaussian_pdf(ratio)
    out_cov = _relu_series(cov, sd, ratio, upper, density, order)
    torch.diagonal(out_cov, dim1=-2, dim2=-1).copy_(_relu_variance(variance, ratio, upper, lower, density))
    return ActivationMoments(Gaussian(torch.addcmul(mean * upper, sd, density), out_cov), upper)


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


def _relu_variance(variance: Tensor, ratio: Tensor, upper: Tensor, lower: Tensor, density: Tensor) -> Tensor:
    """Variance of ``max(0, u)`` in a form that does not cancel for far means.

    ``sd^2 [P + a^2 P Q - a phi (P - Q) - phi^2]`` equals the printed ``(mean^2 + sd^2) P + mean sd phi - (E z)^2``,
    which has a relative error of 0.8 at mean 100 and sd 1e-6.
    """
    slope_part = ratio * (upper * lower) - density * (upper - lower)
    spread = torch.addcmul(upper, ratio, slope_part).addcmul_(density, density, value=-1.0)
    # Where density and distribution function are subnormal, near -38, the bracket is rounding of either sign.
    return spread.mul_(variance).clamp_min_(0.0)


def _relu_series(cov: Tensor, sd: Tensor, ratio: Tensor, upper: Tensor, density: Tensor, order: int) -> Tensor:
    """Price's series ``sum_n S^n / n! E relu^(n)(u_j) E relu^(n)(u_k)``; the diagonal is left to the caller."""
    if order < 1:
        raise ValueError(f"relu order is {order}; the covariance series needs at least 1 term (the paper prints 2)")
    # E relu' = Phi(a), and for n >= 2 E relu^(n) = (-1)^n He_{n-2}(a) phi(a) / sd^(n-1). The powers of sd go into the
    # correlation r, since they would overflow. By Horner's rule: S (d1 d1' + r/2 (d2 d2' + r/3 (d3 d3' + ...))).
    inverse = sd.reciprocal()
    correlation = cov * (inverse.unsqueeze(-1) * inverse.unsqueeze(-2))
    derivatives = [upper, density]
    hermite_before, hermite = torch.zeros_like(ratio), torch.ones_like(ratio)
    for n in range(3, order + 1):
        hermite_before, hermite = hermite, ratio * hermite - (n - 3) * hermite_before
        derivatives.append(torch.where(density > 0, hermite, 0.0) * density)
    total = torch.zeros_like(cov)
    for n in range(order, 0, -1):
        factor = derivatives[n - 1]
        total = torch.addcmul(total * (correlation / (n + 1)), factor.unsqueeze(-1), factor.unsqueeze(-2))
    return total.mul_(cov)


def softmax_jacobian(probabilities: Tensor) -> Tensor:
    """``J = diag(p) - p p'``, shape ``(..., o, o)``, which is also the Fisher information of the logits."""
    return torch.diag_embed(probabilities) - probabilities.unsqueeze(-1) * probabilities.unsqueeze(-2)


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
