"""The printed smoother, layer by layer with inverses: equal to the collapsed one, and unstable as Eq. (47) has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conftest import randn, random_state, smallest_eigenvalue
from torch import Tensor

from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.likelihoods.registry import LIKELIHOODS
from kbt_rl.inference.network import apply, increment, weights_of
from kbt_rl.inference.paper import Cross, rts_update
from kbt_rl.inference.prior import layer_shapes, prior_layers, prior_means
from kbt_rl.inference.types import Gaussian, HeadState

NOISE = torch.tensor([[0.2, 0.05], [0.05, 0.1]], dtype=torch.float64)


def measured(target: Tensor) -> Callable[[Gaussian], Gaussian]:
    """Bayes' rule in gain form."""

    def condition(predicted: Gaussian) -> Gaussian:
        gain = predicted.cov @ torch.linalg.inv(predicted.cov + torch.block_diag(*[NOISE] * len(target)))
        after = predicted.mean + gain @ (target.flatten() - predicted.mean)
        return Gaussian(after, predicted.cov - gain @ predicted.cov)

    return condition


def replaced(target: Tensor) -> Callable[[Gaussian], Gaussian]:
    """Algorithm 2, lines 23 and 24."""
    return lambda predicted: Gaussian(target.flatten(), torch.block_diag(*[NOISE] * len(target)))


def layer_covs(state: HeadState) -> list[Tensor]:
    """Full covariance of each layer's weights."""
    return [root.mT @ root for root in state.cov]


CONDITIONS = {"measure": measured, "replace": replaced}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_same_step(state: HeadState, features: Tensor, rule: str) -> None:
    """The collapsed update and the smoother with full cross-covariance move mean and covariance alike."""
    target = randn(len(features), 2, seed=1)
    weights, cov = rts_update(
        weights_of(state),
        layer_covs(state),
        features,
        CONDITIONS[rule](target),
        feature_variance=state.spec.feature_variance,
        relu_order=state.spec.relu_order,
    )
    after = apply(state, increment(state, features, target, LIKELIHOODS[rule], NOISE))
    reference_mean = torch.cat([weight.flatten() for weight in weights])
    assert relative_error(after.mean - state.mean, reference_mean - state.mean) < 1e-8
    for mine, theirs, before in zip(layer_covs(after), cov, layer_covs(state), strict=True):
        moved = theirs - before
        # A stiff prior moves by little more than the rounding of the entries that the difference is taken of.
        rounding = 4.0 * torch.finfo(torch.float64).eps * float(before.abs().max())
        assert float((mine - theirs).abs().max()) < 1e-8 * float(moved.abs().max()) + rounding


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("feature_variance", "relu_order"), [(0.0, 2), (0.1, 2), (0.0, 3)])
@pytest.mark.parametrize("rule", CONDITIONS)
def test_collapsed_step_equals_the_smoother_layer_by_layer(
    layers: int, rows: int, feature_variance: float, relu_order: int, rule: str
) -> None:
    state = random_state(layers, variance=0.3, feature_variance=feature_variance, relu_order=relu_order, seed=layers)
    assert_same_step(state, randn(rows, 3, seed=2), rule)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_repeated_rows_need_the_pseudo_inverse_and_then_agree(layers: int) -> None:
    features = randn(3, 3, seed=3)
    features[1] = features[0]
    assert_same_step(random_state(layers, variance=0.3), features, "measure")


@pytest.mark.parametrize("layers", [2, 3])
def test_more_rows_than_inputs_agree(layers: int) -> None:
    assert_same_step(random_state(layers, variance=0.3), randn(6, 3, seed=4), "measure")


@pytest.mark.parametrize("hidden_variance", [1e-2, 1e-8])
def test_step_from_the_prior_agrees(hidden_variance: float) -> None:
    shapes = layer_shapes(3, 2, 3, 8)
    base = random_state(3, width=8)
    means = prior_means(randn(2, 3, seed=5), randn(2, seed=6), shapes)
    prior = prior_layers(shapes, hidden_variance=hidden_variance, last_variance=1.0, rho=0.9)
    cov = STRUCTURES["layer"].from_prior(prior)
    state = HeadState(base.spec, torch.cat([mean.flatten() for mean in means]), cov)
    assert_same_step(state, randn(1, 3, seed=7), "measure")


def test_reference_leaves_its_input_alone() -> None:
    state = random_state(2)
    kept = state.clone()
    rts_update(weights_of(state), layer_covs(state), randn(1, 3, seed=8), replaced(randn(1, 2, seed=9)))
    assert torch.equal(state.mean, kept.mean)
    assert all(torch.equal(mine, old) for mine, old in zip(state.cov, kept.cov, strict=True))


# The diagonal cross-covariance


def test_diagonal_cross_covariance_is_exact_for_the_last_layer_only() -> None:
    state = random_state(2, variance=0.3)
    features, condition = randn(1, 3, seed=10), measured(randn(1, 2, seed=11))
    full = rts_update(weights_of(state), layer_covs(state), features, condition, cross="full")
    diagonal = rts_update(weights_of(state), layer_covs(state), features, condition, cross="diagonal")
    for of_full, of_diagonal, before in zip(full, diagonal, (weights_of(state), layer_covs(state)), strict=True):
        assert torch.equal(of_full[1], of_diagonal[1])
        assert relative_error(of_diagonal[0] - before[0], of_full[0] - before[0]) > 0.05


class Outcome(NamedTuple):
    """Sample of the first indefinite covariance and of the first that is not finite; None if it never came."""

    indefinite: int | None
    not_finite: int | None


def run_linear_teacher(variance: float, cross: Cross, samples: int = 300) -> Outcome:
    """Algorithm 2 with the paper's prior of one variance, on noise-free labels of a random linear map."""
    features, teacher = randn(samples, 4, seed=12), randn(1, 4, seed=13)
    shapes = layer_shapes(4, 1, 2, None)
    weights = prior_means(randn(1, 4, seed=14), torch.zeros(1, dtype=torch.float64), shapes)
    prior = prior_layers(shapes, hidden_variance=variance, last_variance=variance, rho=0.0)
    cov = [root.mT @ root for root in STRUCTURES["layer"].from_prior(prior)]
    data_cov = torch.full((1, 1), 1e-3, dtype=torch.float64)
    indefinite: int | None = None
    for count in range(1, samples + 1):
        row = features[count - 1 : count]
        label = Gaussian((row @ teacher.mT).flatten(), data_cov)
        try:
            weights, cov = rts_update(weights, cov, row, lambda _, label=label: label, cross=cross)
        except torch.linalg.LinAlgError:
            return Outcome(indefinite, count)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (*weights, *cov)):
            return Outcome(indefinite, count)
        if indefinite is None and min(smallest_eigenvalue(block) for block in cov) < -1e-6 * variance:
            indefinite = count
    return Outcome(indefinite, None)


@pytest.mark.parametrize("variance", [1e-2, 1e-3, 1e-4])
def test_diagonal_cross_covariance_breaks_down_and_the_full_one_does_not(variance: float) -> None:
    """Keeping only the diagonal of Eq. (47) claims more knowledge than a weight's variance allows."""
    assert run_linear_teacher(variance, "full") == Outcome(None, None)
    diagonal = run_linear_teacher(variance, "diagonal")
    assert diagonal.indefinite is not None
    assert diagonal.not_finite is not None
    assert diagonal.indefinite <= diagonal.not_finite <= 200
