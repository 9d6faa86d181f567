"""Regression of a linear model: the posterior, the change between discrete and continuous time, the prior."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.linalg import logm
from scipy.signal import cont2discrete

from kbt_rl.agents.linear_model import LinearModelPosterior, continuous_model, discrete_rates, pendulum_prior
from kbt_rl.envs import DT, NOMINAL, SHIFTED, InvertedPendulumParams, linearize

PLANTS = pytest.mark.parametrize("plant", [NOMINAL, SHIFTED])


def random_problem(rows: int = 40, n: int = 4, p: int = 5, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((n, p, 2 * p))
    return {
        "prior_mean": rng.standard_normal((n, p)),
        "prior_cov": root @ root.transpose(0, 2, 1) / p,
        "noise_variance": rng.uniform(0.1, 2.0, n),
        "inputs": rng.standard_normal((rows, p)),
        "rates": rng.standard_normal((rows, n)),
    }


def posterior(problem: dict[str, Any], forgetting: float = 1.0) -> LinearModelPosterior:
    return LinearModelPosterior(
        problem["prior_mean"], problem["prior_cov"], problem["noise_variance"], forgetting=forgetting
    )


def least_squares(problem: dict[str, Any], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance by whitened, stacked least squares: the prior as ``p`` more observations."""
    means, covs = [], []
    for w, cov, r, y in zip(
        problem["prior_mean"], problem["prior_cov"], problem["noise_variance"], problem["rates"].T, strict=True
    ):
        whitener = np.linalg.inv(np.linalg.cholesky(cov))
        scale = np.sqrt(weights / r)
        design = np.vstack([whitener, scale[:, None] * problem["inputs"]])
        means.append(np.linalg.lstsq(design, np.concatenate([whitener @ w, scale * y]), rcond=None)[0])
        triangle = np.linalg.inv(np.linalg.qr(design)[1])
        covs.append(triangle @ triangle.T)
    return np.array(means), np.array(covs)


@pytest.mark.parametrize("order_seed", [None, 1, 2])
@pytest.mark.parametrize("chunk", [1, 7])
def test_posterior_is_that_of_all_transitions_in_any_order(order_seed: int | None, chunk: int) -> None:
    problem = random_problem()
    count = len(problem["inputs"])
    order = np.arange(count) if order_seed is None else np.random.default_rng(order_seed).permutation(count)
    belief = posterior(problem)
    for start in range(0, count, chunk):
        rows = order[start : start + chunk]
        belief.observe(problem["inputs"][rows], problem["rates"][rows])
    mean, cov = least_squares(problem, np.ones(count))
    np.testing.assert_allclose(belief.mean, mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(belief.cov, cov, rtol=0, atol=1e-10)
    np.testing.assert_allclose(belief.precision @ belief.cov, np.broadcast_to(np.eye(5), (4, 5, 5)), atol=1e-9)
    assert belief.transitions == count


def test_forgetting_weighs_transitions_by_their_age_and_never_the_prior() -> None:
    problem = random_problem()
    belief = posterior(problem, forgetting=0.9)
    for z, y in zip(problem["inputs"], problem["rates"], strict=True):
        belief.observe(z[None], y[None])
    mean, cov = least_squares(problem, 0.9 ** np.arange(len(problem["inputs"]))[::-1])
    np.testing.assert_allclose(belief.mean, mean, rtol=0, atol=1e-10)
    np.testing.assert_allclose(belief.cov, cov, rtol=0, atol=1e-10)
    for _ in range(400):
        belief.observe(np.zeros((1, 5)), np.zeros((1, 4)))  # nothing to learn from: back to the prior, no further
    np.testing.assert_allclose(belief.cov, problem["prior_cov"], rtol=1e-9)


def test_no_transitions_and_all_forgotten_are_the_prior() -> None:
    problem = random_problem()
    belief = posterior(problem)
    belief.observe(np.empty((0, 5)), np.empty((0, 4)))
    assert belief.transitions == 0
    belief.observe(problem["inputs"], problem["rates"])
    assert np.abs(belief.mean - problem["prior_mean"]).max() > 0.1
    belief.forget_all()
    np.testing.assert_allclose(belief.mean, problem["prior_mean"], rtol=0, atol=1e-10)
    assert belief.transitions == 0


# --- discrete and continuous time -------------------------------------------------------------------------------------


@PLANTS
def test_discrete_model_is_the_zero_order_hold(plant: InvertedPendulumParams) -> None:
    A, B = linearize(plant)
    held, pushed, *_ = cont2discrete((A, B, np.eye(4), np.zeros((4, 1))), DT)
    rates = discrete_rates(A, B, DT)
    np.testing.assert_allclose(np.eye(4) + DT * rates[:, :4], held, rtol=0, atol=1e-14)
    np.testing.assert_allclose(DT * rates[:, 4:], pushed, rtol=0, atol=1e-14)


@PLANTS
def test_continuous_model_inverts_the_discrete_one(plant: InvertedPendulumParams) -> None:
    A, B = linearize(plant)
    found_A, found_B = continuous_model(discrete_rates(A, B, DT), DT)
    np.testing.assert_allclose(found_A, A, rtol=0, atol=1e-11)
    np.testing.assert_allclose(found_B, B, rtol=0, atol=1e-11)


def test_continuous_model_is_the_matrix_logarithm() -> None:
    rates = np.random.default_rng(0).standard_normal((4, 5)) * 4.0
    step = np.eye(5) + DT * np.vstack([rates, np.zeros(5)])
    expected = logm(step).real / DT
    A, B = continuous_model(rates, DT)
    np.testing.assert_allclose(np.hstack([A, B]), expected[:4], rtol=0, atol=1e-11)


@pytest.mark.parametrize("eigenvalue", [-0.5, -1.0, 1e6])
def test_model_without_a_continuous_form_is_an_error(eigenvalue: float) -> None:
    rates = np.zeros((4, 5))
    rates[1, 1] = (eigenvalue - 1.0) / DT
    with pytest.raises(ValueError, match=r"too fast for a step of 0\.02 s|no logarithm"):
        continuous_model(rates, DT)


# --- prior ------------------------------------------------------------------------------------------------------------


def test_prior_is_centred_on_the_nominal_plant_and_spread_over_others() -> None:
    prior = pendulum_prior(NOMINAL, spread=4.0, model_error=0.2)
    mean = discrete_rates(*linearize(NOMINAL), DT)
    np.testing.assert_array_equal(prior.prior_mean, mean)
    np.testing.assert_array_equal(prior.mean.shape, (4, 5))
    factors = [0.25, 0.5, 1.0, 2.0, 4.0]
    second = np.zeros((5, 5))
    for cart in factors:
        for pole in factors:
            for length in factors:
                other = replace(NOMINAL, cart_mass=cart, pole_mass=0.1 * pole, pole_half_length=0.5 * length)
                deviation = discrete_rates(*linearize(other), DT)[3] - mean[3]
                second += np.outer(deviation, deviation) / 125
    np.testing.assert_allclose(prior.prior_cov[3], second + 0.05**2 * np.eye(5), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(prior.noise_variance, 0.2**2 * np.array([DT / 2, 1, DT / 2, 1]) ** 2)
    # No pendulum's acceleration depends on where its cart is; a plant's angle and force coefficients change together.
    np.testing.assert_allclose(prior.prior_cov[3][[0, 1], [0, 1]], 0.05**2, rtol=1e-9)
    assert prior.prior_cov[3][2, 4] / np.sqrt(prior.prior_cov[3][2, 2] * prior.prior_cov[3][4, 4]) < -0.3


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["spread", "model_error", "dt"])
def test_bad_numbers_of_the_prior(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} .*got {value}"):
        pendulum_prior(NOMINAL, **{name: value})


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior_mean": np.full((4, 5), np.nan)}, "prior_mean must be finite"),
        ({"prior_mean": np.zeros(5)}, "prior_mean must be finite with 2 axes"),
        ({"prior_mean": np.zeros((5, 4))}, "do not fit"),
        ({"prior_cov": np.zeros((4, 4, 4))}, "do not fit"),
        ({"prior_cov": np.zeros((4, 5, 5))}, "positive definite"),
        ({"prior_cov": np.eye(5) + np.triu(np.ones((4, 5, 5)), 1)}, "symmetric"),
        ({"noise_variance": np.ones(3)}, "do not fit"),
        ({"noise_variance": np.array([1.0, 1.0, -1.0, 1.0])}, "noise_variance must be positive"),
        ({"forgetting": 0.0}, "forgetting must be in"),
        ({"forgetting": 1.1}, "forgetting must be in"),
        ({"forgetting": float("nan")}, "forgetting must be in"),
    ],
)
def test_bad_posterior(change: dict[str, Any], message: str) -> None:
    problem = random_problem()
    arguments = {name: problem[name] for name in ("prior_mean", "prior_cov", "noise_variance")} | change
    with pytest.raises(ValueError, match=message):
        LinearModelPosterior(**arguments)


@pytest.mark.parametrize(
    ("inputs", "rates"),
    [
        (np.zeros((2, 4)), np.zeros((2, 4))),
        (np.zeros((2, 5)), np.zeros((3, 4))),
        (np.zeros(5), np.zeros(4)),
        (np.full((1, 5), np.inf), np.zeros((1, 4))),
        (np.zeros((1, 5)), np.full((1, 4), np.nan)),
    ],
)
def test_bad_transitions_change_nothing(inputs: np.ndarray, rates: np.ndarray) -> None:
    problem = random_problem()
    belief = posterior(problem, forgetting=0.5)
    belief.observe(problem["inputs"], problem["rates"])
    before = belief.mean
    with pytest.raises(ValueError, match=r"do not fit|must be finite"):
        belief.observe(inputs, rates)
    np.testing.assert_array_equal(belief.mean, before)
    assert belief.transitions == 40
