"""The log predictive density of each update against PyTorch's and SciPy's distributions, and what is logged of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MACHINE_CODE, STRUCTURES, randn, random_cov
from learners import SHIFTED, Updates, expert, kbt, states
from scipy import integrate, stats
from test_callbacks import curve, events
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from kbt_rl import KBT, KalmanAdapter, Sample
from kbt_rl.inference import compiled
from kbt_rl.inference import update as functional
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.noise import NoiseModel
from kbt_rl.inference.robust import StudentNoise

FEATURES = 3
IDENTITY_RULES, SOFTMAX_RULES = ("measure", "replace"), ("fisher", "laplace", "taylor", "replace_softmax")


def make_head(outputs: int = 1, **config: Any) -> BayesianHead:
    """A head in units of its own: scaled targets, shifted features, and correlated noise."""
    layer = nn.Linear(FEATURES, outputs, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(outputs, FEATURES, seed=0))
        layer.bias.copy_(randn(outputs, seed=1))
    settings = {"hidden_variance": 1e-2, **config}
    scale = {} if "softmax" in settings.pop("link", "") else {"target_scale": 0.2 + randn(outputs, seed=2).square()}
    head = BayesianHead.from_linear(layer, HeadConfig(**settings), feature_mean=randn(FEATURES, seed=3), **scale)
    if scale:
        head.set_noise(0.3 * random_cov(outputs, seed=4))
    return head


def joint_distribution(head: BayesianHead, features: Tensor) -> MultivariateNormal:
    """Of all entries of all labels, in units of the targets, before an update."""
    logits, _ = functional.propagate(head.state, head.standardise(features))
    rows = len(features)
    cov = logits.cov + torch.block_diag(*[head.noise_cov] * rows)
    scale = head.target_scale.repeat(rows)
    return MultivariateNormal(logits.mean * scale, cov * scale.unsqueeze(-1) * scale)


def in_target_units(head: BayesianHead, log_density: float, rows: int) -> float:
    return log_density - rows * head.log_scale


@pytest.mark.parametrize("machine_code", [pytest.param(True, marks=MACHINE_CODE), False])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rule", IDENTITY_RULES)
@pytest.mark.parametrize(("layers", "outputs", "rows"), [(2, 1, 1), (1, 1, 1), (2, 2, 1), (2, 1, 4), (3, 2, 3)])
def test_it_is_the_gaussian_density_of_the_labels(
    machine_code: bool, structure: str, rule: str, layers: int, outputs: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not machine_code:
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    if rule == "replace" and rows * outputs > 3:
        rows = 2  # the covariance of the outputs, which it inverts, is then well-conditioned
    head = make_head(outputs, structure=structure, rule=rule, layers=layers)
    for seed in range(3):
        features, target = randn(rows, FEATURES, seed=10 + seed), randn(rows, outputs, seed=20 + seed)
        expected = float(joint_distribution(head, features).log_prob(target.flatten()))
        info = head.update(features, target)
        assert in_target_units(head, info.log_density, rows) == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_of_one_row_it_is_what_predict_says(structure: str) -> None:
    head = make_head(2, structure=structure)
    features, target = randn(1, FEATURES, seed=10), randn(1, 2, seed=11)
    mean, epistemic, aleatoric = head.predict(features)
    expected = MultivariateNormal(mean[0], (epistemic + aleatoric)[0]).log_prob(target[0])
    assert in_target_units(head, head.update(features, target).log_density, 1) == pytest.approx(float(expected))


@pytest.mark.parametrize("config", [{}, {"noise": "learned"}])
def test_long_batches_add_up_by_the_chain_rule(config: dict[str, Any]) -> None:
    whole, parts = make_head(2, **config), make_head(2, **config)
    features, target = randn(70, FEATURES, seed=10), randn(70, 2, seed=11)
    blocks = zip(features.split(32), target.split(32), strict=True)
    expected = sum(parts.update(rows, labels).log_density for rows, labels in blocks)
    assert whole.update(features, target).log_density == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("statistic", ["innovation", "variational"])
@pytest.mark.parametrize(("outputs", "rows"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_learned_noise_counts_as_it_was_before_the_labels(statistic: str, outputs: int, rows: int) -> None:
    head = make_head(outputs, noise="learned", noise_statistic=statistic)
    for seed in range(4):
        features, target = randn(rows, FEATURES, seed=10 + seed), randn(rows, outputs, seed=20 + seed)
        before = head.noise_cov.clone()
        expected = float(joint_distribution(head, features).log_prob(target.flatten()))
        info = head.update(features, target)
        assert in_target_units(head, info.log_density, rows) == pytest.approx(expected, rel=1e-9)
        assert not torch.equal(head.noise_cov, before)


# ---------------------------------------------------------------------- Student's t


def student(dof: float, outputs: int = 1) -> NoiseModel:
    made = NoiseModel.of(HeadConfig(robust_dof=dof), outputs)
    assert made is not None
    return made


@pytest.mark.parametrize("dof", [1.5, 4.0, 12.0])
@pytest.mark.parametrize("variance", [1e-2, 1.0, 50.0])
@pytest.mark.parametrize("error", [0.0, -2.0, 30.0])
def test_students_noise_on_a_gaussian_by_quadrature(dof: float, variance: float, error: float) -> None:
    noise = 0.7
    sd, scale = math.sqrt(variance), math.sqrt(noise)
    grid = np.union1d(np.linspace(-12 * sd, 12 * sd, 40_001), error + scale * np.linspace(-60.0, 60.0, 40_001))
    density = stats.norm.pdf(grid, scale=sd) * stats.t.pdf((error - grid) / scale, dof) / scale
    expected = math.log(np.trapezoid(density, grid))
    model = student(dof)
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
        return math.log(np.trapezoid(np.trapezoid(values, grid), grid))

    for errors in ((0.3, -0.2), (1.0, 1.5), (0.5, 6.0)):
        found = subject.log_density(np.array(errors)[:, None], cov, noise)
        assert found == pytest.approx(exact(errors), abs=0.15)


@pytest.mark.parametrize(("outputs", "rows"), [(1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("noise", ["fixed", "learned"])
def test_a_robust_head_tells_the_density_with_students_noise(outputs: int, rows: int, noise: str) -> None:
    head = make_head(outputs, noise=noise, robust_dof=4.0)
    features, target = randn(rows, FEATURES, seed=10), randn(rows, outputs, seed=11)
    logits, _ = functional.propagate(head.state, head.standardise(features))
    error = (target / head.target_scale).flatten() - logits.mean
    expected = StudentNoise(4.0, outputs).log_density(
        error.view(rows, outputs).numpy(), logits.cov.numpy(), head.noise_cov.clone().numpy()
    )
    assert head.update(features, target).log_density == pytest.approx(expected, rel=1e-9)
    wild = head.update(features, target + 1e3).log_density
    assert -60.0 * rows * outputs < wild < expected  # a Gaussian would say about minus a million


# ---------------------------------------------------------------------- softmax


@pytest.mark.parametrize("rule", SOFTMAX_RULES)
def test_of_classes_it_is_the_log_probability_that_the_head_predicts(rule: str) -> None:
    head = make_head(3, rule=rule, link="softmax", noise_variance=0.1)
    for rows, seed in ((1, 10), (1, 11), (2, 12)):
        features = randn(rows, FEATURES, seed=seed)
        labels = torch.eye(3, dtype=torch.float64)[torch.arange(rows) % 3]
        expected = (labels * head(features)).sum(-1).log().sum()
        assert head.update(features, labels).log_density == pytest.approx(float(expected), rel=1e-9)


def test_of_a_distribution_it_is_minus_the_cross_entropy() -> None:
    head = make_head(3, rule="fisher", link="softmax")
    features, labels = randn(1, FEATURES, seed=10), torch.softmax(randn(1, 3, seed=11), dim=-1)
    expected = -nn.functional.cross_entropy(head(features).log(), labels)
    assert head.update(features, labels).log_density == pytest.approx(float(expected), rel=1e-9)


# ---------------------------------------------------------------------- learners and logs


def test_the_learner_tells_it_in_action_units() -> None:
    model = kbt()
    assert abs(model.policy.head.log_scale) > 0.1
    for rows in (1, 3):
        observations, target = states(rows, seed=rows), np.linspace(-0.5, 0.8, rows)[:, None]
        before = copy.deepcopy(model.policy.head)
        info: Any = model.update(Sample(observations, target))
        features = model.policy.encode(model.policy.start(observations))
        expected = joint_distribution(before, features).log_prob(torch.from_numpy(target).flatten())
        assert info.log_density == pytest.approx(float(expected), rel=1e-6)
    mean, epistemic, aleatoric = model.policy.predict_moments(states(1, seed=9))
    predicted = stats.norm(mean[0, 0], math.sqrt((epistemic + aleatoric)[0, 0, 0]))
    info = model.update(Sample(states(1, seed=9), np.array([[0.1]])))
    assert info.log_density == pytest.approx(float(predicted.logpdf(0.1)), rel=1e-6)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_tensorboard_shows_density_and_coverage(n_envs: int, tmp_path: Path) -> None:
    rng, teacher = np.random.default_rng(0), expert()

    def noisy(observations: Any) -> Any:
        # Twice the standard deviation that the head assumes, so that labels fall inside and outside.
        return teacher.predict(observations)[0] + 2.0 * noise_sd * rng.standard_normal((len(observations), 1))

    model = kbt(n_envs=n_envs, tensorboard_log=str(tmp_path), n_steps=20)
    noise_sd = math.sqrt(float(model.policy.head.noise_cov[0, 0]) * model.policy.head.mean_square_scale)
    seen = Updates(model)
    model.learn(60 * n_envs, callback=KalmanAdapter(noisy))
    log = events(tmp_path)
    density = np.array(seen.means("log_density", 20))
    np.testing.assert_allclose(list(curve(log, "kalman/nlpd").values()), -density / n_envs, rtol=1e-5)
    inside = [info.nis <= stats.chi2.ppf(0.95, n_envs) for info in seen.infos]
    expected = [float(np.mean(inside[i : i + 20])) for i in range(0, 60, 20)]
    shown = curve(log, "kalman/coverage_95")
    np.testing.assert_allclose(list(shown.values()), expected, rtol=1e-6)
    assert list(shown) == [20 * n_envs, 40 * n_envs, 60 * n_envs]
    assert 0 < sum(inside) < len(inside)


def test_discrete_actions_have_a_density_and_no_region(tmp_path: Path) -> None:
    model = KBT(env=gym.make("kbt_rl/ShiftedDiscreteInvertedPendulum-v0"), seed=0, tensorboard_log=str(tmp_path))
    seen = Updates(model)
    model.learn(10, callback=KalmanAdapter(lambda observations: np.zeros(len(observations), dtype=np.int64)))
    log = events(tmp_path)
    shown = list(curve(log, "kalman/nlpd").values())
    np.testing.assert_allclose(shown, -np.array(seen.means("log_density", 10)), rtol=1e-5)
    assert shown[0] > 0.0
    assert "kalman/coverage_95" not in log.Tags()["scalars"]


def test_without_labels_there_is_nothing_to_tell() -> None:
    info: Any = kbt(SHIFTED).update(Sample(states(1), np.array([[np.nan]])))
    assert info.labels == 0
    assert math.isnan(info.log_density)


def test_the_noise_of_known_gaussian_labels_gives_minus_the_entropy_on_average() -> None:
    """Of labels drawn from the prediction itself, within six standard errors."""
    head = make_head(2)
    features = randn(1, FEATURES, seed=10)
    predicted = joint_distribution(head, features)
    draws = np.random.default_rng(0).multivariate_normal(
        predicted.mean.numpy(), predicted.covariance_matrix.numpy(), 400
    )
    densities = [head.increment(features, torch.from_numpy(draw[None])).info.log_density for draw in draws]
    in_units = np.array(densities) - head.log_scale
    error = abs(in_units.mean() + float(predicted.entropy()))
    assert error < 6.0 * in_units.std() / math.sqrt(len(draws))


def test_integration_of_the_scalar_density_is_one() -> None:
    model = student(3.0)
    total, _ = integrate.quad(lambda e: math.exp(model.log_density_scalar(e, 0.4, 0.7)), -np.inf, np.inf)
    assert total == pytest.approx(1.0, abs=1e-6)
