"""The log predictive density of each update against the densities of PyTorch's distributions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MACHINE_CODE, STRUCTURES, linear, randn, random_cov
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from kbt_rl.inference import head as heads
from kbt_rl.inference import network
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.student_t import StudentNoise
from kbt_rl.inference.types import Gaussian

FEATURES = 3
IDENTITY_RULES, SOFTMAX_RULES = ("measure", "replace"), ("fisher", "laplace", "taylor", "replace_softmax")


def make_head(outputs: int = 1, **config: Any) -> BayesianHead:
    """A head in units of its own: scaled targets, shifted features, and correlated noise where it can have that."""
    layer = linear(FEATURES, outputs, seed=0)
    settings = {"layers": 2, "hidden_variance": 1e-2, **config}
    scale = {} if "softmax" in settings.pop("link", "") else {"target_scale": 0.2 + randn(outputs, seed=2).square()}
    head = BayesianHead.from_linear(layer, HeadConfig(**settings), feature_mean=randn(FEATURES, seed=3), **scale)
    if scale:
        noise = 0.3 * random_cov(outputs, seed=4)
        head.set_noise(noise.diagonal().diag() if head.spec.structure == "shared" else noise)
    return head


def in_units(head: BayesianHead, features: Tensor) -> Gaussian:
    """Of the outputs of all rows jointly, before an update."""
    return network.forward(head.state, (features - head.feature_mean) / head.feature_scale).gaussian


def joint_distribution(head: BayesianHead, features: Tensor) -> MultivariateNormal:
    """Of all entries of all labels, in units of the targets, before an update."""
    logits, rows = in_units(head, features), len(features)
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
        monkeypatch.setattr(heads.engines, "engine_for", lambda kind: None)
    if rule == "replace" and rows * outputs > 3:
        rows = 2  # the covariance of the outputs, which it inverts, is then well-conditioned
    head = make_head(outputs, structure=structure, rule=rule, layers=layers)
    for seed in range(3):
        features, target = randn(rows, FEATURES, seed=10 + seed), randn(rows, outputs, seed=20 + seed)
        expected = float(joint_distribution(head, features).log_prob(target.flatten()))
        info = head.update(features, target)
        assert in_target_units(head, info.log_density, rows) == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize(("structure", "layers"), [*((name, 2) for name in STRUCTURES), ("shared", 1)])
def test_of_one_row_it_is_what_predict_says(structure: str, layers: int) -> None:
    head = make_head(2, structure=structure, layers=layers)
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


@pytest.mark.parametrize(("outputs", "rows"), [(1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("noise", ["fixed", "learned"])
def test_a_robust_head_tells_the_density_with_students_noise(outputs: int, rows: int, noise: str) -> None:
    head = make_head(outputs, noise=noise, robust_dof=4.0)
    features, target = randn(rows, FEATURES, seed=10), randn(rows, outputs, seed=11)
    logits = in_units(head, features)
    error = (target / head.target_scale).flatten() - logits.mean
    expected = StudentNoise(4.0, outputs).log_density(
        error.view(rows, outputs).numpy(), logits.cov.numpy(), head.noise_cov.clone().numpy()
    )
    assert head.update(features, target).log_density == pytest.approx(expected, rel=1e-9)
    wild = head.update(features, target + 1e3).log_density
    assert -60.0 * rows * outputs < wild < expected  # a Gaussian would say about minus a million


# ---------------------------------------------------------------------- softmax


@pytest.mark.filterwarnings("ignore:the posterior runs away")  # the printed rule does
@pytest.mark.parametrize(("rule", "layers"), [*((rule, 2) for rule in SOFTMAX_RULES), ("fisher", 1), ("laplace", 1)])
def test_of_classes_it_is_the_log_probability_that_the_head_predicts(rule: str, layers: int) -> None:
    head = make_head(3, rule=rule, layers=layers, link="softmax", noise_variance=0.1)
    for rows, seed in ((1, 10), (1, 11), (layers, 12)):  # rows of a single layer are learned one after another
        features = randn(rows, FEATURES, seed=seed)
        labels = torch.eye(3, dtype=torch.float64)[torch.arange(rows) % 3]
        expected = (labels * head.predict(features).mean).sum(-1).log().sum()
        assert head.update(features, labels).log_density == pytest.approx(float(expected), rel=1e-9)


def test_of_a_distribution_it_is_minus_the_cross_entropy() -> None:
    head = make_head(3, rule="fisher", link="softmax")
    features, labels = randn(1, FEATURES, seed=10), torch.softmax(randn(1, 3, seed=11), dim=-1)
    expected = -nn.functional.cross_entropy(head(features), labels)
    assert head.update(features, labels).log_density == pytest.approx(float(expected), rel=1e-9)


def test_a_label_in_part_has_the_marginal_density() -> None:
    for structure, layers in (("joint", 2), ("neuron", 2), ("shared", 1)):
        head, features, target = make_head(3, structure=structure, layers=layers), randn(1, FEATURES, seed=10), None
        mean, epistemic, aleatoric = (part[0] for part in head.predict(features))
        target, given = randn(1, 3, seed=11), torch.tensor([0, 2])
        cov = (epistemic + aleatoric)[given][:, given]
        expected = MultivariateNormal(mean[given], cov).log_prob(target[0, given])
        target[0, 1] = torch.nan
        found = head.update(features, target).log_density - float(head.target_scale[given].log().sum())
        assert found == pytest.approx(float(expected), rel=1e-9)


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
