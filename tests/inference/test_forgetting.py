"""Loosening a posterior: the covariance against dense arithmetic, what follows from it, and what may not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import STRUCTURES, dense, randn, random_state, smallest_eigenvalue
from torch import Tensor, nn
from wholeness.attacks import bits

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.forgetting import FORGETTING, reopened
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.types import HeadState

STRUCTURE = pytest.mark.parametrize("structure", STRUCTURES)
Remedy = Callable[[BayesianHead], None]
REMEDIES: dict[str, Remedy] = {
    "reopen": lambda head: head.reopen(),
    "partly": lambda head: head.reopen(0.3),
    "forget": lambda head: head.forget(0.9),
    "process noise": lambda head: head.add_process_noise(0.05),
    "towards the prior": lambda head: head.loosen("towards_prior", 0.1),
}
REMEDY = pytest.mark.parametrize("remedy", REMEDIES.values(), ids=REMEDIES)


def pair(structure: str, layers: int) -> tuple[HeadState, HeadState]:
    """A random posterior, and a random prior of the same form."""
    return (random_state(layers, structure, width=9, seed=seed) for seed in (0, 50))  # type: ignore[return-value]


def adapted_head(structure: str, **config: Any) -> BayesianHead:
    """A head that has seen twenty labels."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"layers": 2, "noise_variance": 0.1, "hidden_variance": 1e-2, **config}
    head = BayesianHead.from_linear(nn.Linear(3, 2, dtype=torch.float64), HeadConfig(structure=structure, **settings))
    head.update(randn(20, 3, seed=1), randn(20, 2, seed=2))
    return head


@STRUCTURE
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_covariance_is_that_of_dense_arithmetic(structure: str, layers: int) -> None:
    state, prior = pair(structure, layers)
    kept, expected, towards = state.clone(), dense(state), dense(prior)

    def check(found: HeadState, cov: Tensor, mean: Tensor = state.mean) -> HeadState:
        torch.testing.assert_close(dense(found), cov, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(found.mean, mean, rtol=1e-14, atol=1e-15)
        assert smallest_eigenvalue(dense(found)) > 0
        return found

    partly = check(reopened(state, prior, 0.25), 0.75 * expected + 0.25 * towards)
    faded = check(FORGETTING["fading"](partly, prior, 0.8), 1.25 * dense(partly))
    check(FORGETTING["process_noise"](faded, prior, 0.1), dense(faded) + 0.1 * towards)
    mean = 0.7 * state.mean + 0.3 * prior.mean
    check(FORGETTING["towards_prior"](state, prior, 0.3), 0.49 * expected + 0.51 * towards, mean)
    assert torch.equal(dense(reopened(state, prior)), towards)
    whole = FORGETTING["towards_prior"](state, prior, 1.0)
    assert torch.equal(dense(whole), towards)
    assert torch.equal(whole.mean, prior.mean)
    assert torch.equal(state.mean, kept.mean)
    assert all(torch.equal(mine, old) for mine, old in zip(state.cov, kept.cov, strict=True))


@STRUCTURE
def test_a_reopened_head_has_the_prior_of_a_new_one_and_its_own_means(structure: str) -> None:
    head, fresh = adapted_head(structure), adapted_head(structure)
    fresh.reset(torch.zeros(2, 3), torch.zeros(2))
    means = head.mean.clone()
    assert not torch.equal(head.covariance(), fresh.covariance())
    head.reopen()
    assert torch.equal(head.covariance(), fresh.covariance())
    assert torch.equal(dense(head.prior), fresh.covariance())
    assert torch.equal(head.mean, means)


def test_one_layer_after_forgetting_is_discounted_least_squares() -> None:
    """Exponentially weighted regularised least squares, solved in one go."""
    factor, noise, prior_variance = 0.9, 0.1, 2.0
    features, target = randn(30, 3, seed=3), randn(30, 1, seed=4)
    config = HeadConfig(layers=1, noise_variance=noise, last_variance=prior_variance)
    head = BayesianHead.from_linear(nn.Linear(3, 1, dtype=torch.float64), config)
    start = head.mean.clone()
    for row in range(30):
        head.update(features[row : row + 1], target[row : row + 1])
        head.forget(factor)
    design = torch.cat([features, torch.ones(30, 1, dtype=torch.float64)], dim=-1)
    weight = factor ** torch.arange(30, 0, -1, dtype=torch.float64)
    precision = (design.mT * weight) @ design / noise + factor**30 * torch.eye(4, dtype=torch.float64) / prior_variance
    information = (design.mT * weight) @ target[:, 0] / noise + factor**30 * start / prior_variance
    torch.testing.assert_close(head.mean, torch.linalg.solve(precision, information), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(head.covariance(), torch.linalg.inv(precision), rtol=1e-8, atol=1e-10)


def test_one_layer_with_process_noise_is_the_kalman_filter_of_a_random_walk() -> None:
    """The means of all weights at all times as one Gaussian, conditioned on all labels at once."""
    noise, variance, scale, steps = 0.1, 2.0, 0.05, 6
    features, target = randn(steps, 3, seed=5), randn(steps, 1, seed=6)
    config = HeadConfig(layers=1, noise_variance=noise, last_variance=variance)
    head = BayesianHead.from_linear(nn.Linear(3, 1, dtype=torch.float64), config)
    start = head.mean.clone()
    for row in range(steps):
        head.update(features[row : row + 1], target[row : row + 1])
        head.add_process_noise(scale)
    design = torch.cat([features, torch.ones(steps, 1, dtype=torch.float64)], dim=-1)
    times = torch.arange(steps, dtype=torch.float64)
    walk = variance * (1.0 + scale * torch.minimum(times[:, None], times[None, :]))  # Cov of a weight at two times
    label_cov = walk * (design @ design.mT) + noise * torch.eye(steps, dtype=torch.float64)
    cross = variance * (1.0 + scale * times) * design.mT  # Cov(weights after all steps, labels)
    gain = torch.linalg.solve(label_cov, cross, left=False)
    final = variance * (1.0 + scale * steps) * torch.eye(4, dtype=torch.float64)
    expected = start + gain @ (target[:, 0] - design @ start)
    torch.testing.assert_close(head.mean, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(head.covariance(), final - gain @ cross.mT, rtol=1e-9, atol=1e-11)


def test_one_layer_towards_the_prior_is_the_kalman_filter_of_an_ornstein_uhlenbeck_process() -> None:
    """Weights that wander and are pulled back: stationary, with the correlation ``g^n`` after ``n`` steps."""
    noise, variance, rate, steps = 0.1, 2.0, 0.2, 6
    features, target = randn(steps, 3, seed=5), randn(steps, 1, seed=6)
    config = HeadConfig(noise_variance=noise, last_variance=variance, forgetting="towards_prior", forgetting_rate=rate)
    head = BayesianHead.from_linear(nn.Linear(3, 1, dtype=torch.float64), config)
    start = head.mean.clone()
    for row in range(steps):
        head.update(features[row : row + 1], target[row : row + 1])
    design = torch.cat([features, torch.ones(steps, 1, dtype=torch.float64)], dim=-1)
    times = torch.arange(steps + 1, dtype=torch.float64)
    walk = variance * (1.0 - rate) ** (times[:, None] - times[None, :]).abs()  # Cov of a weight at two times
    label_cov = walk[:-1, :-1] * (design @ design.mT) + noise * torch.eye(steps, dtype=torch.float64)
    cross = walk[-1, :-1] * design.mT
    gain = torch.linalg.solve(label_cov, cross, left=False)
    expected = start + gain @ (target[:, 0] - design @ start)
    torch.testing.assert_close(head.mean, expected, rtol=1e-10, atol=1e-11)
    final = variance * torch.eye(4, dtype=torch.float64) - gain @ cross.mT
    torch.testing.assert_close(head.covariance(), final, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("noise", ["fixed", "learned"])
@REMEDY
def test_outputs_in_groups_are_loosened_one_by_one(noise: str, remedy: Remedy) -> None:
    """``shared`` with different labels of its outputs, as ``neuron`` with the same."""
    heads = [adapted_head(structure, layers=1, noise=noise) for structure in ("shared", "neuron")]
    target = torch.tensor([[1.0, torch.nan]])
    for head in heads[: 1 if noise == "learned" else 2]:
        head.update(torch.ones(1, 3), target)
        assert len(head.state.cov[0]) == 2
        before = head.covariance()
        remedy(head)
        assert not torch.equal(head.covariance(), before)
        head.update(torch.ones(1, 3), target)
    if noise == "fixed":
        torch.testing.assert_close(heads[0].mean, heads[1].mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(heads[0].covariance(), heads[1].covariance(), rtol=1e-12, atol=1e-14)


@STRUCTURE
@REMEDY
def test_the_mean_follows(structure: str, remedy: Remedy) -> None:
    """The mean of a deep head depends on its covariance too."""
    head, rows = adapted_head(structure), randn(5, 3, seed=7)
    old = head(rows)
    remedy(head)
    expected = head.predict_logits(rows).mean
    assert not torch.allclose(old, expected, rtol=1e-6)
    torch.testing.assert_close(head(rows), expected, rtol=1e-10, atol=1e-12)


@STRUCTURE
@REMEDY
def test_learning_goes_on_in_place(structure: str, remedy: Remedy) -> None:
    """No buffer is replaced, so machine code that is bound to them sees the change."""
    head, copy = adapted_head(structure), adapted_head(structure)
    before = {name: value.data_ptr() for name, value in head.state_dict().items()}
    head.update(randn(1, 3, seed=8), randn(1, 2, seed=9))
    copy.update(randn(1, 3, seed=8), randn(1, 2, seed=9))
    remedy(head)
    remedy(copy)
    assert {name: value.data_ptr() for name, value in head.state_dict().items()} == before
    rebuilt = adapted_head(structure)
    rebuilt.load_state_dict(copy.state_dict())
    for subject in (head, rebuilt):
        subject.update(randn(1, 3, seed=10), randn(1, 2, seed=11))
    torch.testing.assert_close(head.mean, rebuilt.mean, rtol=0.0, atol=0.0)
    assert torch.equal(head.covariance(), rebuilt.covariance())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda head: head.reopen(0.0), r"fraction is 0.0; it lies in \(0, 1\]"),
        (lambda head: head.reopen(1.1), "fraction is 1.1"),
        (lambda head: head.reopen(float("nan")), "fraction is nan"),
        (lambda head: head.forget(0.0), "forgetting factor is 0.0"),
        (lambda head: head.forget(1.01), "forgetting factor is 1.01"),
        (lambda head: head.add_process_noise(-1.0), "process noise is -1.0"),
        (lambda head: head.add_process_noise(float("inf")), "process noise is inf"),
        (lambda head: head.loosen("towards_prior", 1.5), "rate towards the prior is 1.5"),
        (lambda head: head.loosen("towards_prior", float("nan")), "rate towards the prior is nan"),
    ],
)
def test_bad_input_changes_nothing(change: Remedy, message: str) -> None:
    head = adapted_head("joint")
    before = bits(head)
    with pytest.raises(ValueError, match=message):
        change(head)
    assert bits(head) == before


def test_a_covariance_that_would_overflow_is_refused() -> None:
    head = adapted_head("layer")
    before = bits(head)
    with pytest.raises(UpdateError, match=r"would not be finite; the posterior is unchanged.*winds the covariance up"):
        head.forget(1e-320)
    assert bits(head) == before


def test_constant_forgetting_winds_up_and_steps_towards_the_prior_do_not() -> None:
    """The trap of method.md 9: labels at one point say nothing about most directions."""
    forgetful, bounded = adapted_head("joint"), adapted_head("joint")
    prior = bounded.config.hidden_variance
    row, target = randn(1, 3, seed=12), randn(1, 2, seed=13)
    for _ in range(300):
        forgetful.update(row, target)
        forgetful.forget(0.98)
        bounded.update(row, target)
        bounded.reopen(0.02)
    hidden = slice(0, bounded.spec.shapes[0].size)
    assert float(forgetful.variances()[hidden].max()) > 100 * prior
    assert float(bounded.variances()[hidden].max()) <= prior * (1 + 1e-12)


# ---------------------------------------------------------------------- a learned noise


def learning_head(outputs: int, **config: Any) -> BayesianHead:
    torch.manual_seed(0)
    return BayesianHead.from_linear(nn.Linear(4, outputs), HeadConfig(noise="learned", **config))


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_noise_is_put_back_with_the_trust_in_it(outputs: int, layers: int) -> None:
    head = learning_head(outputs, layers=layers, history=3)
    for index in range(20):
        head.update(randn(1, 4, seed=index), randn(1, outputs, seed=100 + index))
    before, cov = head.noise_estimate, head.noise_cov.clone()
    assert before is not None
    for index in range(5):
        head.update(randn(1, 4, seed=index), 50.0 * randn(1, outputs, seed=200 + index))
    start, means = head.noise_start_cov.clone(), head.mean.clone()
    assert float(head.noise_cov[0, 0]) > 10.0 * float(cov[0, 0])
    assert before.cov.tolist() == cov.tolist()  # a copy, which updates do not reach
    head.reopen(noise=before)
    assert torch.equal(head.noise_cov, cov)
    assert head.noise_labels.tolist() == before.labels.tolist()
    assert torch.equal(head.noise_start_cov, start)  # where a reset begins
    assert torch.equal(head.mean, means)
    assert head.undoable == 0
    head.reopen()
    assert torch.equal(head.noise_cov, cov)


def test_a_known_noise_is_not_put_back() -> None:
    learned, known = learning_head(1), BayesianHead(4, 1)
    assert known.noise_estimate is None
    before = bits(known)
    with pytest.raises(ValueError, match="noise of this head is not learned"):
        known.reopen(noise=learned.noise_estimate)
    assert bits(known) == before
