"""Loosening a posterior: the covariance against dense arithmetic, what follows from it, and what may not change."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import STRUCTURES, randn, random_state, smallest_eigenvalue
from torch import Tensor, nn

from kbt_rl.inference import revision
from kbt_rl.inference.acting import view_mean
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.state import HeadState
from kbt_rl.inference.structures import LAYERWISE

STRUCTURE = pytest.mark.parametrize("structure", STRUCTURES)
Remedy = Callable[[BayesianHead], None]
REMEDIES: dict[str, Remedy] = {
    "reopen": lambda head: head.reopen(),
    "towards the prior": lambda head: head.reopen(0.3),
    "forget": lambda head: head.forget(0.9),
    "process noise": lambda head: head.add_process_noise(0.05),
}
REMEDY = pytest.mark.parametrize("remedy", REMEDIES.values(), ids=REMEDIES)


def pair(structure: str, layers: int) -> tuple[HeadState, HeadState]:
    """A random posterior, and a random prior of the same form."""
    return (random_state(layers, structure, width=9, seed=seed) for seed in (0, 50))  # type: ignore[return-value]


def adapted_head(structure: str, **config: Any) -> BayesianHead:
    """A head that has seen twenty labels."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"noise_variance": 0.1, "hidden_variance": 1e-2, "structure": structure, **config}
    head = BayesianHead.from_linear(nn.Linear(3, 2, dtype=torch.float64), HeadConfig(**settings))
    head.update(randn(20, 3, seed=1), randn(20, 2, seed=2))
    return head


def buffers(head: BayesianHead) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


@STRUCTURE
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.usefixtures("_short_block_rows")
def test_the_covariance_is_that_of_dense_arithmetic(structure: str, layers: int) -> None:
    state, prior = pair(structure, layers)
    before, towards, mean = state.dense_cov(), prior.dense_cov(), state.mean.clone()
    revision.reopen(state, prior.cov, 0.25)
    expected = 0.75 * before + 0.25 * towards
    torch.testing.assert_close(state.dense_cov(), expected, rtol=1e-13, atol=1e-15)
    revision.forget(state, 0.8)
    torch.testing.assert_close(state.dense_cov(), 1.25 * expected, rtol=1e-13, atol=1e-15)
    revision.diffuse(state, prior.cov, 0.1)
    expected = 1.25 * expected + 0.1 * towards
    torch.testing.assert_close(state.dense_cov(), expected, rtol=1e-13, atol=1e-15)
    assert smallest_eigenvalue(state.dense_cov()) > 0
    revision.reopen(state, prior.cov)
    assert torch.equal(state.dense_cov(), towards)
    assert torch.equal(state.mean, mean)


@STRUCTURE
def test_a_reopened_head_has_the_prior_of_a_new_one_and_its_own_means(structure: str) -> None:
    head, fresh = adapted_head(structure), adapted_head(structure)
    fresh.reset(torch.zeros(2, 3), torch.zeros(2))
    means = head.mean.clone()
    assert not torch.equal(head.state.dense_cov(), fresh.state.dense_cov())
    head.reopen()
    assert torch.equal(head.state.dense_cov(), fresh.state.dense_cov())
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
    torch.testing.assert_close(head.state.dense_cov(), torch.linalg.inv(precision), rtol=1e-8, atol=1e-10)


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
    torch.testing.assert_close(head.state.dense_cov(), final - gain @ cross.mT, rtol=1e-9, atol=1e-11)


@STRUCTURE
@REMEDY
def test_a_cached_view_follows(structure: str, remedy: Remedy) -> None:
    head, rows = adapted_head(structure), randn(5, 3, seed=7)
    old, stale = view_mean(head.view(), rows), head._publish(head._memory())
    assert stale is head._publish(head._memory())
    remedy(head)
    assert head._publish(head._memory()) is not stale
    expected = head.predict_logits(rows).mean
    assert not torch.allclose(old, expected, rtol=1e-6)  # a stale view would be noticed
    torch.testing.assert_close(view_mean(head.view(), rows), expected, rtol=1e-10, atol=1e-12)


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
    assert torch.equal(head.state.dense_cov(), rebuilt.state.dense_cov())


class InterruptedByCopy(Tensor):
    """A buffer that receives SIGINT as soon as it has been overwritten."""

    def copy_(self, *args: Any, **kwargs: Any) -> Tensor:
        result = super().copy_(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)
        return result


@pytest.mark.parametrize("structure", ["joint", "layer"])
def test_an_interrupt_waits_until_the_posterior_is_whole(structure: str) -> None:
    state, prior = pair(structure, 2)
    first = state.cov[0].as_subclass(InterruptedByCopy)
    interrupted = HeadState(state.spec, state.mean, (first, *state.cov[1:]))
    with pytest.raises(KeyboardInterrupt):
        revision.reopen(interrupted, prior.cov)
    assert torch.equal(state.dense_cov(), prior.dense_cov())


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
        (lambda head: revision.reopen(head.state, head.state.cov[:1]), "prior_cov is stored as"),
        (lambda head: revision.diffuse(head.state, [b.float() for b in head.state.cov]), "process_cov is stored as"),
    ],
)
def test_bad_input_changes_nothing(change: Remedy, message: str) -> None:
    head = adapted_head("joint")
    before = buffers(head)
    with pytest.raises(ValueError, match=message):
        change(head)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


def test_a_covariance_that_would_overflow_is_refused() -> None:
    head = adapted_head("layer")
    before = buffers(head)
    with pytest.raises(UpdateError, match=r"would not be finite; the posterior is unchanged.*winds the covariance up"):
        head.forget(1e-320)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


def test_constant_forgetting_winds_up_and_steps_towards_the_prior_do_not() -> None:
    """The trap of method.md 9: labels at one point say nothing about most directions."""
    forgetful, bounded = adapted_head("joint"), adapted_head("joint")
    prior = LAYERWISE["layer"].variances(bounded._prior_cov()[0], bounded.spec.shapes[0]).max()
    row, target = randn(1, 3, seed=12), randn(1, 2, seed=13)
    for _ in range(300):
        forgetful.update(row, target)
        forgetful.forget(0.98)
        bounded.update(row, target)
        bounded.reopen(0.02)
    hidden = slice(0, bounded.spec.shapes[0].size)
    assert float(forgetful.state.variances()[hidden].max()) > 100 * float(prior)
    assert float(bounded.state.variances()[hidden].max()) <= float(prior) * (1 + 1e-12)


# ---------------------------------------------------------------------- a learned noise


def learning_head(outputs: int, **config: Any) -> BayesianHead:
    torch.manual_seed(0)
    return BayesianHead.from_linear(nn.Linear(4, outputs), HeadConfig(noise="learned", **config))


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_noise_is_put_back_with_the_trust_in_it(outputs: int) -> None:
    head = learning_head(outputs, history=3)
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
    assert float(head.noise_labels) == before.labels
    assert torch.equal(head.noise_start_cov, start)  # where a reset begins
    assert torch.equal(head.mean, means)
    assert head.undoable == 0
    head.reopen()
    assert torch.equal(head.noise_cov, cov)


def test_a_known_noise_is_not_put_back() -> None:
    learned, known = learning_head(1), BayesianHead(4, 1)
    assert known.noise_estimate is None
    before = {name: value.clone() for name, value in known.state_dict().items()}
    with pytest.raises(ValueError, match="noise of this head is not learned"):
        known.reopen(noise=learned.noise_estimate)
    assert all(torch.equal(value, before[name]) for name, value in known.state_dict().items())
