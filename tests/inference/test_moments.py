"""Moments of the ReLU and the softmax against identities, quadrature and autodiff."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import mpmath
import numpy as np
import pytest
import torch
from conftest import randn, random_cov, smallest_eigenvalue
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from kbt_rl.inference.moments import (
    gaussian_cdf,
    gaussian_pdf,
    relu_mean,
    relu_moments,
    softmax_jacobian,
    softmax_moments,
    softmax_variances,
)
from kbt_rl.inference.types import Gaussian

ORDERS = (1, 2, 3, 4, 5)
# Means and standard deviations, from the far lower tail to the far upper one.
TAILS = [(-37.0, 1.0), (-30.0, 1.0), (-20.0, 1.0), (-8.0, 1.0), (-8e-5, 1e-5), (-2.0, 1.0), (0.0, 1.0), (3.0, 1.0)]
TAILS += [(8.0, 1.0), (100.0, 1e-6), (1e6, 1e-3)]


def one(mean: float, sd: float) -> Gaussian:
    variance = torch.tensor([[sd * sd]], dtype=torch.float64)
    return Gaussian(torch.tensor([mean], dtype=torch.float64), variance)


def pair(means: tuple[float, float], correlation: float, sds: tuple[float, float] = (1.0, 1.0)) -> Gaussian:
    root = torch.tensor(sds, dtype=torch.float64)
    correlations = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    return Gaussian(torch.tensor(means, dtype=torch.float64), root[:, None] * correlations * root)


def exact_relu(mean: float, sd: float) -> tuple[float, float, float]:
    """Mean, variance and slope of ``max(0, u)`` in 150 digits."""
    with mpmath.workdps(150):
        m, s = mpmath.mpf(mean), mpmath.sqrt(mpmath.mpf(sd * sd))
        upper, density = mpmath.ncdf(m / s), mpmath.npdf(m / s)
        first = m * upper + s * density
        return float(first), float((m * m + s * s) * upper + m * s * density - first**2), float(upper)


def expectation(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray], inputs: Gaussian, *, first_is_clipped: bool = True
) -> float:
    """``E f(u_0, u_1)`` by Gauss-Legendre quadrature; ``f`` is smooth where ``u_1 > 0`` and is 0 elsewhere.

    With ``first_is_clipped`` the same holds for ``u_0``.
    """
    mean, cov = inputs.mean.numpy(), inputs.cov.numpy()
    nodes, weights = np.polynomial.legendre.leggauss(80)

    def grid(index: int, clipped: bool) -> tuple[np.ndarray, np.ndarray]:
        reach = 10.0 * np.sqrt(cov[index, index])
        low, high = mean[index] - reach, mean[index] + reach
        low = max(low, 0.0) if clipped else low
        return 0.5 * (high + low) + 0.5 * (high - low) * nodes, 0.5 * (high - low) * weights

    (x, wx), (y, wy) = grid(0, first_is_clipped), grid(1, True)
    X, Y = np.meshgrid(x, y, indexing="ij")
    precision = np.linalg.inv(cov)
    dx, dy = X - mean[0], Y - mean[1]
    form = precision[0, 0] * dx**2 + 2.0 * precision[0, 1] * dx * dy + precision[1, 1] * dy**2
    density = np.exp(-0.5 * form) / (2.0 * np.pi * np.sqrt(np.linalg.det(cov)))
    return float(wx @ (function(X, Y) * density) @ wy)


def exact_relu_cov(inputs: Gaussian) -> float:
    mean, sd = inputs.mean.numpy(), inputs.cov.diagonal().sqrt().numpy()
    first, second = mean * norm.cdf(mean / sd) + sd * norm.pdf(mean / sd)
    return expectation(lambda x, y: x * y, inputs) - float(first * second)


# Gaussian distribution function


@pytest.mark.parametrize("x", [-37.0, -30.0, -20.0, -8.0, -1.0, 0.0, 1.0, 8.0, 40.0])
def test_cdf_keeps_its_relative_accuracy_in_the_lower_tail(x: float) -> None:
    with mpmath.workdps(50):
        expected = float(mpmath.ncdf(x))
    assert float(gaussian_cdf(torch.tensor(x, dtype=torch.float64))) == pytest.approx(expected, rel=1e-12, abs=0.0)


@pytest.mark.parametrize("function", [gaussian_pdf, gaussian_cdf])
def test_what_nears_the_smallest_numbers_is_0(function: Callable[[Tensor], Tensor]) -> None:
    points = torch.cat([torch.linspace(-60.0, 0.0, 60_001, dtype=torch.float64), torch.tensor([-1e300, -math.inf])])
    values = function(points)
    assert float(values[values > 0].min()) >= 1e-304
    assert not values[points < -37.5].any()
    assert (values[points > -37.2] > 0).all()
    assert function(torch.tensor([math.nan], dtype=torch.float64)).isnan().all()


# ReLU: identities and limits


@pytest.mark.parametrize("order", [*ORDERS, 6])
def test_zero_variance_is_the_deterministic_relu(order: int) -> None:
    mean = torch.tensor([-2.0, -1e-300, 0.0, 0.0, 1e-3, 3.0], dtype=torch.float64)
    output, slope, _ = relu_moments(Gaussian(mean, torch.zeros(6, 6, dtype=torch.float64)), order=order)
    torch.testing.assert_close(output.mean, mean.clamp_min(0.0), rtol=0.0, atol=1e-150)
    assert torch.equal(output.cov, torch.zeros_like(output.cov))
    assert torch.equal(slope[[0, 2, 3, 4, 5]], torch.tensor([0.0, 0.5, 0.5, 1.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("order", [*ORDERS, 6])
def test_a_certain_unit_does_not_disturb_an_uncertain_one(order: int) -> None:
    cov = torch.diag(torch.tensor([0.0, 2.0], dtype=torch.float64))
    mixed = relu_moments(Gaussian(torch.tensor([0.0, 0.7], dtype=torch.float64), cov), order=order)
    alone = relu_moments(one(0.7, 2.0**0.5), order=order)
    torch.testing.assert_close(mixed.output.mean[1:], alone.output.mean)
    torch.testing.assert_close(mixed.output.cov[1:, 1:], alone.output.cov)
    assert torch.equal(mixed.output.cov[0], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("order", [*ORDERS, 6])
@pytest.mark.parametrize("scale", [1e-140, 1e-60, 1e-30, 1e30])
def test_relu_moments_scale_with_their_input(order: int, scale: float) -> None:
    inputs = Gaussian(randn(4, seed=0), random_cov(4, seed=1))
    scaled = relu_moments(Gaussian(inputs.mean * scale, inputs.cov * scale**2), order=order)
    plain = relu_moments(inputs, order=order)
    torch.testing.assert_close(scaled.output.mean / scale, plain.output.mean, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(scaled.output.cov / scale**2, plain.output.cov, rtol=1e-11, atol=0.0)
    torch.testing.assert_close(scaled.slope, plain.slope, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("order", ORDERS)
def test_relu_is_the_identity_far_right_and_zero_far_left(order: int) -> None:
    cov = random_cov(4, seed=2)
    far = torch.tensor([60.0, 80.0, -60.0, -80.0], dtype=torch.float64)
    output, slope, _ = relu_moments(Gaussian(far, cov), order=order)
    assert torch.equal(output.mean, far.clamp_min(0.0))
    torch.testing.assert_close(output.cov[:2, :2], cov[:2, :2], rtol=1e-14, atol=0.0)
    assert torch.equal(output.cov[2:], torch.zeros(2, 4, dtype=torch.float64))
    assert torch.equal(slope, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(("mean", "sd"), TAILS)
def test_relu_mean_variance_and_slope_keep_their_relative_accuracy(mean: float, sd: float) -> None:
    output, slope, _ = relu_moments(one(mean, sd))
    first, variance, upper = exact_relu(mean, sd)
    assert float(output.mean) == pytest.approx(first, rel=1e-8, abs=0.0)
    assert float(output.cov) == pytest.approx(variance, rel=1e-6, abs=0.0)
    assert float(slope) == pytest.approx(upper, rel=1e-10, abs=0.0)


@pytest.mark.parametrize(("mean", "sd"), TAILS)
def test_mean_and_slope_alone_equal_those_of_the_full_moments(mean: float, sd: float) -> None:
    inputs = one(mean, sd)
    output, slope, _ = relu_moments(inputs)
    mean, own_slope = relu_mean(inputs.mean, inputs.cov[0])
    torch.testing.assert_close(mean, output.mean, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(own_slope, slope, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("sd", [1e-150, 1e-6, 1.0, 1e6])
def test_relu_variance_is_never_negative(sd: float) -> None:
    ratio = torch.cat([torch.linspace(-45.0, 45.0, 90_001, dtype=torch.float64), randn(1000, seed=3) * 1e10])
    cov = torch.full((len(ratio), 1, 1), sd * sd, dtype=torch.float64)
    assert float(relu_moments(Gaussian((ratio * sd).unsqueeze(-1), cov)).output.cov.min()) >= 0.0


@pytest.mark.parametrize("order", ORDERS)
def test_relu_batch_equals_loop(order: int) -> None:
    mean = randn(2, 3, 4, seed=4)
    cov = torch.stack([random_cov(4, seed=10 + i) for i in range(6)]).view(2, 3, 4, 4)
    batch = relu_moments(Gaussian(mean, cov), order=order)
    for i in range(2):
        for j in range(3):
            single = relu_moments(Gaussian(mean[i, j], cov[i, j]), order=order)
            torch.testing.assert_close(batch.output.mean[i, j], single.output.mean, rtol=1e-14, atol=0.0)
            torch.testing.assert_close(batch.output.cov[i, j], single.output.cov, rtol=1e-13, atol=1e-16)
            torch.testing.assert_close(batch.slope[i, j], single.slope, rtol=1e-14, atol=0.0)


def test_relu_moments_leave_their_input_alone() -> None:
    mean, cov = randn(4, seed=5), random_cov(4, seed=6)
    kept = mean.clone(), cov.clone()
    relu_moments(Gaussian(mean, cov), cov)
    relu_mean(mean, cov.diagonal())
    assert torch.equal(mean, kept[0])
    assert torch.equal(cov, kept[1])


@pytest.mark.parametrize("order", [0, -1])
def test_relu_order_below_one_is_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"order is {order}; .* at least 1"):
        relu_moments(one(0.0, 1.0), order=order)


# ReLU: covariances


@pytest.mark.parametrize("means", [(0.3, -0.7), (-1.5, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize("correlation", [-0.8, 0.5])
def test_relu_cross_cov_matches_stein(means: tuple[float, float], correlation: float) -> None:
    """``Cov(u, relu(u)) = Cov(u) Phi`` for all entries; Eq. (47) prints the density for its first ``Phi``."""
    inputs = pair(means, correlation, (1.3, 0.6))
    slope = relu_moments(inputs).slope
    off_diagonal = expectation(lambda x, y: (x - means[0]) * y, inputs, first_is_clipped=False)
    diagonal = expectation(lambda x, y: (y - means[1]) * y, inputs, first_is_clipped=False)
    assert float(inputs.cov[0, 1] * slope[1]) == pytest.approx(off_diagonal, rel=1e-9, abs=1e-12)
    assert float(inputs.cov[1, 1] * slope[1]) == pytest.approx(diagonal, rel=1e-9)

    m, v = means[1], float(inputs.cov[1, 1])
    density_at_zero = norm.pdf(0.0, m, np.sqrt(v))
    rest = m * v * density_at_zero - m * exact_relu(m, np.sqrt(v))[0]
    assert (m * m + v) * norm.cdf(m / np.sqrt(v)) + rest == pytest.approx(diagonal, rel=1e-9)
    assert (m * m + v) * norm.pdf(m / np.sqrt(v)) + rest != pytest.approx(diagonal, rel=0.05)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_relu_cov_needs_the_square_in_the_second_term(scale: float) -> None:
    """As printed the second term of Eq. (23) has another unit than the first, and errs at every scale but by chance."""
    inputs = pair((0.2 * scale, -0.1 * scale), 0.4, (scale, scale))
    exact = exact_relu_cov(inputs) / scale**2
    ours = float(relu_moments(inputs, order=2).output.cov[0, 1]) / scale**2
    a, entry = inputs.mean.numpy() / scale, float(inputs.cov[0, 1])
    first, second = norm.cdf(a).prod() * entry, norm.pdf(a).prod() / (2.0 * scale * scale)
    assert ours == pytest.approx((first + second * entry**2) / scale**2, rel=1e-12)
    assert abs(ours - exact) < 1e-3
    assert abs((first + second * entry) / scale**2 - exact) > 10 * abs(ours - exact)


@cache
def exact_covs_on_a_grid(correlation: float) -> tuple[Gaussian, Tensor]:
    axis = np.linspace(-2.5, 2.5, 9)
    inputs = [pair((a, b), correlation) for a in axis for b in axis if a <= b]
    stacked = Gaussian(torch.stack([i.mean for i in inputs]), torch.stack([i.cov for i in inputs]))
    return stacked, torch.tensor([exact_relu_cov(i) for i in inputs], dtype=torch.float64)


def worst_series_error(order: int, correlation: float) -> float:
    """Largest error over a grid of means, in units of the standard deviations, which are 1."""
    inputs, exact = exact_covs_on_a_grid(correlation)
    return float((relu_moments(inputs, order=order).output.cov[:, 0, 1] - exact).abs().max())


@pytest.mark.parametrize(("order", "figure"), [(1, 0.030), (2, 0.0023), (3, 0.0010), (4, 0.0002)])
def test_more_terms_of_the_series_reduce_the_error(order: int, figure: float) -> None:
    assert worst_series_error(order, correlation=0.6) == pytest.approx(figure, rel=0.25)


def test_the_series_converges_to_the_exact_covariance() -> None:
    errors = [worst_series_error(order, correlation=-0.3) for order in (1, 2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10


@given(
    order=st.integers(1, 5),
    size=st.integers(2, 6),
    rank=st.integers(1, 6),
    shift=st.floats(-3.0, 3.0),
    spread=st.floats(0.0, 3.0),
    log_scale=st.floats(-12.0, 3.0),
    seed=st.integers(0, 2**20),
)
def test_relu_never_claims_to_know_more_than_its_linear_part(
    order: int, size: int, rank: int, shift: float, spread: float, log_scale: float, seed: int
) -> None:
    """``Cov z - A Cov(u) A`` is positive semi-definite at every order, also for a singular ``Cov(u)``."""
    scale = 10.0**log_scale
    root = randn(size, rank, seed=seed)
    cov = root @ root.mT * scale
    mean = (shift + spread * randn(size, seed=seed + 1)) * scale**0.5
    output, slope, excess = relu_moments(Gaussian(mean, cov), order=order)
    rest = output.cov - slope[:, None] * cov * slope
    torch.testing.assert_close(output.cov, output.cov.mT, rtol=1e-14, atol=1e-16 * scale)
    torch.testing.assert_close(excess, rest, rtol=0.0, atol=1e-15 * float(cov.diagonal().max()))
    assert smallest_eigenvalue(rest) >= -1e-14 * float(cov.diagonal().max())


def test_what_is_not_linear_in_the_weights_passes_with_the_slopes() -> None:
    """However ``Cov(u)`` is split into a linear part ``C`` and the rest, ``Cov(z)`` is the same and loses ``A C A``."""
    mean, linear, rest = randn(4, seed=60), random_cov(4, seed=61), random_cov(4, seed=62)
    whole = relu_moments(Gaussian(mean, linear + rest), order=3)
    split = relu_moments(Gaussian(mean, linear), rest, order=3)
    torch.testing.assert_close(split.output.mean, whole.output.mean, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(split.output.cov, whole.output.cov, rtol=1e-13, atol=1e-15)
    expected = whole.output.cov - split.slope[:, None] * linear * split.slope
    torch.testing.assert_close(split.excess, expected, rtol=0.0, atol=1e-14)


def test_relu_covariance_of_three_units_agrees_with_sampling() -> None:
    inputs = Gaussian(torch.tensor([0.3, -0.4, 0.0], dtype=torch.float64), random_cov(3, seed=7))
    samples = randn(400_000, 3, seed=8) @ torch.linalg.cholesky(inputs.cov).mT + inputs.mean
    z = samples.clamp_min(0.0)
    moments = relu_moments(inputs, order=5).output
    assert_within_standard_errors(moments.mean, z)
    centred = z - z.mean(0)
    assert_within_standard_errors(moments.cov, centred[:, :, None] * centred[:, None, :])


def assert_within_standard_errors(value: Tensor, samples: Tensor, count: float = 6.0) -> None:
    error = samples.std(0) / len(samples) ** 0.5
    assert float(((value - samples.mean(0)).abs() / error).max()) < count


# Softmax


@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
@pytest.mark.parametrize("outputs", [2, 5])
def test_softmax_covariance_times_ones_is_zero(spread: float, outputs: int) -> None:
    moments = softmax_moments(Gaussian(spread * randn(outputs, seed=33), random_cov(outputs, seed=34)))
    ones = torch.ones(outputs, dtype=torch.float64)
    for matrix in (moments.cov, moments.cov.mT, moments.cross_cov, moments.jacobian, moments.jacobian.mT):
        assert float((matrix @ ones).abs().max()) < 1e-15
    assert float(moments.mean.sum()) == pytest.approx(1.0, abs=1e-15)
    assert smallest_eigenvalue(moments.cov) > -1e-16


def test_softmax_jacobian_matches_autodiff() -> None:
    logits, cov = randn(4, seed=35), random_cov(4, seed=36)
    expected = torch.func.jacrev(lambda u: torch.softmax(u, dim=-1))(logits)
    moments = softmax_moments(Gaussian(logits, cov))
    torch.testing.assert_close(moments.mean, torch.softmax(logits, dim=-1), rtol=1e-15, atol=0.0)
    torch.testing.assert_close(softmax_jacobian(moments.mean), expected, rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(moments.jacobian, expected, rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(moments.cross_cov, cov @ expected.mT, rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(moments.cov, expected @ cov @ expected.mT, rtol=1e-13, atol=1e-16)
    variances = cov.diagonal()
    alone = (expected * variances @ expected.mT).diagonal()
    torch.testing.assert_close(softmax_variances(moments.mean, variances), alone, rtol=1e-13, atol=1e-16)


def test_softmax_moments_agree_with_sampling_for_a_small_covariance() -> None:
    inputs = Gaussian(randn(3, seed=37), 1e-6 * random_cov(3, seed=38))
    samples = randn(200_000, 3, seed=39) @ torch.linalg.cholesky(inputs.cov).mT + inputs.mean
    p = torch.softmax(samples, dim=-1) - torch.softmax(inputs.mean, dim=-1)
    moments = softmax_moments(inputs)
    assert_within_standard_errors(moments.cov, p[:, :, None] * p[:, None, :])
    centred = samples - inputs.mean
    assert_within_standard_errors(moments.cross_cov, centred[:, :, None] * p[:, None, :])


def test_softmax_batch_equals_loop() -> None:
    mean = randn(3, 4, seed=40)
    cov = torch.stack([random_cov(4, seed=50 + i) for i in range(3)])
    batch = softmax_moments(Gaussian(mean, cov))
    for i in range(3):
        single = softmax_moments(Gaussian(mean[i], cov[i]))
        for together, alone in zip(batch, single, strict=True):
            torch.testing.assert_close(together[i], alone, rtol=1e-13, atol=1e-16)
