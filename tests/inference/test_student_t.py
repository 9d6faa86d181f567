"""Student's t noise against quadrature, sampling and SciPy's distributions, and what a wild label does to a head."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randn, random_cov
from scipy import integrate, stats
from torch import Tensor, nn

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.noise.learned import NoiseModel
from kbt_rl.inference.student_t import StudentNoise
from kbt_rl.inference.types import NoiseEstimate

FEATURES = 3


def student_noise(dof: float, outputs: int = 1) -> NoiseModel:
    made = NoiseModel.of(HeadConfig(robust_dof=dof), outputs)
    assert made is not None
    return made


# The posterior


def posterior_by_quadrature(error: float, variance: float, noise: float, dof: float) -> tuple[float, float]:
    """Mean and variance of the output's shift under Student's t noise, by integrating over the output itself."""
    sd, scale = math.sqrt(variance), math.sqrt(noise)
    grid = np.union1d(np.linspace(-12 * sd, 12 * sd, 40_001), error + scale * np.linspace(-60.0, 60.0, 40_001))
    weights = stats.norm.pdf(grid, scale=sd) * stats.t.pdf((error - grid) / scale, dof)
    weights /= integrate.trapezoid(weights, grid)
    mean = float(integrate.trapezoid(grid * weights, grid))
    return mean, float(integrate.trapezoid((grid - mean) ** 2 * weights, grid))


@pytest.mark.parametrize("dof", [1.5, 4.0, 12.0])
@pytest.mark.parametrize("variance", [1e-2, 1.0, 50.0])
@pytest.mark.parametrize("error", [0.0, 0.3, -2.0, 6.0, 30.0])
def test_the_posterior_is_that_of_students_t(dof: float, variance: float, error: float) -> None:
    """Exactly, but for a variance that would grow, which stays."""
    noise = 0.7
    move, precision, weight, _, _ = student_noise(dof).judge_scalar(error, variance, noise, math.inf)
    info = precision / (1.0 + precision * variance)
    mean, left = posterior_by_quadrature(error, variance, noise, dof)
    assert variance * move == pytest.approx(mean, rel=2e-5, abs=1e-9)
    assert variance - variance**2 * info == pytest.approx(min(left, variance), rel=2e-5)
    assert weight >= 0.0
    assert precision == pytest.approx(weight / noise)


@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("square", [0.0, 1.0, 40.0, 1e10, 1e24, 1e50])
def test_without_epistemic_variance_the_step_is_the_closed_form_of_students_t(outputs: int, square: float) -> None:
    """``tau`` is Gamma((dof + o) / 2, (dof + e' R^-1 e) / 2), so that ``dm = E[tau] R^-1 e``."""
    dof, noise = 3.0, random_cov(outputs, seed=9).numpy()
    direction = randn(outputs, seed=10).numpy()
    error = direction * math.sqrt(square / (direction @ np.linalg.solve(noise, direction)))
    site = StudentNoise(dof, outputs).site(error, np.zeros((outputs, outputs)), noise)
    shape, rate = 0.5 * (dof + outputs), 0.5 * (dof + square)
    white = np.linalg.solve(noise, error)
    np.testing.assert_allclose(site.shift, shape / rate * white, rtol=1e-6, atol=1e-15)
    info = shape / rate * np.linalg.inv(noise) - shape / rate**2 * np.outer(white, white)
    root = np.linalg.cholesky(noise)
    values, axes = np.linalg.eigh(root.T @ info @ root)
    half = np.linalg.inv(root).T @ (axes * np.sqrt(np.maximum(values, 0.0)))
    np.testing.assert_allclose(site.root @ site.root.T, half @ half.T, rtol=1e-5, atol=1e-6 * shape / rate)


def test_several_outputs_share_one_precision_factor_by_adaptive_quadrature() -> None:
    dof, outputs = 4.0, 2
    noise, cov, error = random_cov(2, seed=11).numpy(), 3.0 * random_cov(2, seed=12).numpy(), np.array([1.0, -0.8])

    def weighted(function: Callable[[np.ndarray], float]) -> float:
        def integrand(log_tau: float) -> float:
            tau = math.exp(log_tau)
            total = cov + noise / tau
            density = stats.gamma.pdf(tau, 0.5 * dof, scale=2.0 / dof) * tau
            return float(density * stats.multivariate_normal.pdf(error, cov=total) * function(np.linalg.inv(total)))

        return float(integrate.quad(integrand, -30.0, 5.0, epsabs=1e-14, limit=400)[0])

    evidence = weighted(lambda a: 1.0)
    moves = np.array([weighted(lambda a, j=j: (a @ error)[j]) for j in range(outputs)]) / evidence
    second, gain = np.empty((2, 2)), np.empty((2, 2))
    for j, k in itertools.product(range(outputs), repeat=2):
        second[j, k] = weighted(lambda a, j=j, k=k: (a @ error)[j] * (a @ error)[k]) / evidence
        gain[j, k] = weighted(lambda a, j=j, k=k: a[j, k]) / evidence
    info = gain - second + np.outer(moves, moves)
    assert np.linalg.eigvalsh(info)[0] > 0.0  # nothing to cut off here
    judged = student_noise(dof, outputs).judge(error[None], cov, NoiseEstimate(noise, math.inf))
    np.testing.assert_allclose(judged.mean_step, moves, rtol=1e-7)
    after = np.linalg.inv(judged.directions.T @ cov @ judged.directions + np.eye(outputs))
    np.testing.assert_allclose(judged.directions @ after @ judged.directions.T, info, rtol=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
def test_clipped_errors_of_gaussian_labels_have_their_own_variance(outputs: int) -> None:
    """By sampling, and the largest contribution of any label is bounded."""
    student = StudentNoise(4.0, outputs)
    squares = np.random.default_rng(1).chisquare(outputs, 200_000)
    clipped = np.array([student.clip(q) * q for q in squares[:50_000]])
    assert abs(clipped.mean() - outputs) < 6 * clipped.std() / math.sqrt(len(clipped))
    assert student.clip(1e12) * 1e12 < 3.0 * (4.0 + outputs)


@pytest.mark.parametrize("error", [1.0, 1e4, 1e8, 1e9, 1e15, 1e25])
@pytest.mark.parametrize("dof", [1.0, 4.0])
def test_the_density_of_a_wild_label_is_students_t_however_far_it_is(dof: float, error: float) -> None:
    expected = stats.t.logpdf(error, dof, scale=0.3)
    noise, nothing = np.array([[0.09]]), np.zeros((1, 1))
    student = StudentNoise(dof, 1)
    assert student.scalar_log_density(error, 0.0, 0.09) == pytest.approx(expected, abs=1e-8, rel=1e-12)
    assert student.log_density(np.array([[error]]), nothing, noise) == pytest.approx(expected, abs=1e-8, rel=1e-12)


@pytest.mark.parametrize("error", [1e8, 1e9, 1e15, 1e25])
def test_a_wild_label_moves_the_less_the_farther_it_is(error: float) -> None:
    # For e far beyond S and R the score of Student's t is (dof + 1) / e.
    move, information = StudentNoise(4.0, 1).scalar(error, 2.0, 0.09)
    assert move == pytest.approx(5.0 / error, rel=1e-6)
    assert information == 0.0
    site = StudentNoise(4.0, 1).site(np.array([error]), np.array([[2.0]]), np.array([[0.09]]))
    assert site.shift[0] == pytest.approx(5.0 / error, rel=1e-6)


# The predictive density


@pytest.mark.parametrize("dof", [1.5, 4.0, 12.0])
@pytest.mark.parametrize("variance", [1e-2, 1.0, 50.0])
@pytest.mark.parametrize("error", [0.0, -2.0, 30.0])
def test_students_noise_on_a_gaussian_by_quadrature(dof: float, variance: float, error: float) -> None:
    noise = 0.7
    sd, scale = math.sqrt(variance), math.sqrt(noise)
    grid = np.union1d(np.linspace(-12 * sd, 12 * sd, 40_001), error + scale * np.linspace(-60.0, 60.0, 40_001))
    density = stats.norm.pdf(grid, scale=sd) * stats.t.pdf((error - grid) / scale, dof) / scale
    expected = math.log(integrate.trapezoid(density, grid))
    model = student_noise(dof)
    assert model.log_density_scalar(error, variance, noise) == pytest.approx(expected, abs=1e-5)
    matrix = model.log_density(np.array([[error]]), np.array([[variance]]), np.array([[noise]]))
    assert matrix == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("outputs", [1, 2])
def test_without_epistemic_variance_it_is_students_t(rows: int, outputs: int) -> None:
    noise, errors = random_cov(outputs, seed=5).numpy(), 3.0 * randn(rows, outputs, seed=6).numpy()
    expected = sum(stats.multivariate_t.logpdf(error, shape=noise, df=4.0) for error in errors)
    nothing = np.zeros((rows * outputs, rows * outputs))
    assert StudentNoise(4.0, outputs).log_density(errors, nothing, noise) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("outputs", [1, 2])
def test_with_gaussian_tails_several_rows_have_the_joint_gaussian_density(outputs: int) -> None:
    rows, noise = 3, random_cov(outputs, seed=7).numpy()
    cov, errors = random_cov(rows * outputs, seed=8).numpy(), randn(rows, outputs, seed=9).numpy()
    expected = stats.multivariate_normal.logpdf(errors.ravel(), cov=cov + np.kron(np.eye(rows), noise))
    assert StudentNoise(1e7, outputs).log_density(errors, cov, noise) == pytest.approx(expected, rel=1e-6)


def test_of_two_rows_it_is_a_density_and_close_to_the_exact_one() -> None:
    dof, noise, cov = 4.0, np.array([[0.5]]), np.array([[1.0, 0.8], [0.8, 1.2]])
    subject = StudentNoise(dof, 1)
    # A change of variables keeps the heavy tails in a finite square.
    nodes, weights = np.polynomial.legendre.leggauss(60)
    places, stretch = np.tan(0.5 * np.pi * nodes), 0.5 * np.pi / np.cos(0.5 * np.pi * nodes) ** 2
    densities = np.array(
        [[math.exp(subject.log_density(np.array([[a], [b]]), cov, noise)) for b in places] for a in places]
    )
    assert (weights * stretch) @ densities @ (weights * stretch) == pytest.approx(1.0, abs=2e-3)

    def exact(errors: tuple[float, float]) -> float:
        def integrand(second: float, first: float) -> float:
            precisions = np.exp([first, second])
            prior = np.prod(stats.gamma.pdf(precisions, 0.5 * dof, scale=2.0 / dof) * precisions)
            return float(prior * stats.multivariate_normal.pdf(errors, cov=cov + np.diag(0.5 / precisions)))

        grid = np.linspace(-8.0, 3.0, 56)
        values = np.array([[integrand(b, a) for b in grid] for a in grid])
        return math.log(integrate.trapezoid(integrate.trapezoid(values, grid), grid))

    for errors in ((0.3, -0.2), (1.0, 1.5), (0.5, 6.0)):
        found = subject.log_density(np.array(errors)[:, None], cov, noise)
        assert found == pytest.approx(exact(errors), abs=0.15)


# Heads


def robust_head(outputs: int = 1, **config: Any) -> BayesianHead:
    linear = nn.Linear(FEATURES, outputs, dtype=torch.float64)
    settings = {"layers": 2, "hidden_variance": 1e-3, "noise_variance": 0.25, **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear.reset_parameters()
    return BayesianHead.from_linear(linear, HeadConfig(**settings))


def stream(count: int, outputs: int = 1) -> tuple[Tensor, Tensor]:
    """Labels of another linear map with noise."""
    features, weight = randn(count, FEATURES, seed=10), randn(FEATURES, outputs, seed=11)
    return features, features @ weight + 0.5 * randn(count, outputs, seed=12)


def test_a_wild_label_hardly_moves_a_learned_head_and_a_plain_one_far() -> None:
    features, target = stream(200)
    plain, robust = robust_head(), robust_head(robust_dof=4.0)
    for learner in (plain, robust):
        for i in range(200):
            learner.update(features[i : i + 1], target[i : i + 1])
    before = [learner(features) for learner in (plain, robust)]
    wild = target[:1] + 1e4
    info = [learner.update(features[:1], wild) for learner in (plain, robust)]
    moved = [float((learner(features) - old).abs().max()) for learner, old in zip((plain, robust), before, strict=True)]
    assert moved[1] < 1e-4 * moved[0]
    assert info[0].label_weight == 1.0
    assert 0.0 <= info[1].label_weight < 1e-6
    assert info[1].nis > 1e8  # the record tells how surprising it was


@pytest.mark.parametrize("outputs", [1, 2])
def test_rows_of_one_update_are_weighed_one_by_one(outputs: int) -> None:
    """Of several rows the wild one is left out, as if it had come without a label."""
    config = {"robust_dof": 4.0, "last_variance": 0.1}
    with_wild, without = robust_head(outputs, **config), robust_head(outputs, **config)
    features, target = stream(6, outputs)
    for learner in (with_wild, without):
        learner.update(*stream(30, outputs))
    wild = target.clone()
    wild[2] += 1e5
    rest = [0, 1, 3, 4, 5]
    with_wild.update(features, wild)
    without.update(features[rest], target[rest])
    torch.testing.assert_close(with_wild.mean, without.mean, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(with_wild.mean, robust_head(outputs, **config).mean, atol=1e-2)
