"""Learned noise against conjugate updates, batch regression, sampling and itself in another form."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import linear, randn, random_cov
from scipy import integrate, stats
from torch import Tensor
from wholeness.attacks import bits

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.noise.learned import NoiseModel
from kbt_rl.inference.types import Array, NoiseEstimate

FEATURES = 3
STATISTICS = ("innovation", "variational")


def model(outputs: int = 1, **config: Any) -> NoiseModel:
    made = NoiseModel.of(HeadConfig(**{"noise": "learned", "noise_memory": math.inf, **config}), outputs)
    assert made is not None
    return made


def head(outputs: int = 1, **config: Any) -> BayesianHead:
    layer = linear(FEATURES, outputs, seed=0)
    return BayesianHead.from_linear(layer, HeadConfig(**{"layers": 2, "hidden_variance": 1e-3, **config}))


def stream(count: int, outputs: int = 1, sd: float = 0.5, seed: int = 10) -> tuple[Tensor, Tensor]:
    """Labels of another linear map with noise."""
    features, weight = randn(count, FEATURES, seed=seed), randn(FEATURES, outputs, seed=seed + 1)
    return features, features @ weight + sd * randn(count, outputs, seed=seed + 2)


def information(directions: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """``-dC`` of a measurement ``W' u`` with noise 1."""
    inner = directions.T @ cov @ directions + np.eye(directions.shape[1])
    found: np.ndarray = directions @ np.linalg.inv(inner) @ directions.T
    return found


# Learning the noise


@pytest.mark.parametrize("statistic", STATISTICS)
def test_without_epistemic_variance_the_estimate_is_the_conjugate_one(statistic: str) -> None:
    """Inverse-gamma: information n0 + N, scale n0 R0 + sum e^2; the estimate is the one over the other."""
    start, trust = 0.5, 4.0
    errors = randn(50, seed=0).numpy()
    noise, labels = start, trust
    for error in errors:
        *_, noise, labels = model(noise_statistic=statistic).judge_scalar(float(error), 0.0, noise, labels)
    assert labels == pytest.approx(trust + 50)
    assert noise == pytest.approx((trust * start + float(errors @ errors)) / (trust + 50), rel=1e-12)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("rows", [1, 5])
def test_without_epistemic_variance_the_covariance_is_inverse_wishart(statistic: str, rows: int) -> None:
    start, trust, outputs = random_cov(2, seed=1).numpy(), 6.0, 2
    errors = randn(40, outputs, seed=2).numpy()
    estimate = NoiseEstimate(start, trust)
    for block in errors.reshape(-1, rows, outputs):
        nothing = np.zeros((rows * outputs, rows * outputs))
        estimate = model(outputs, noise_statistic=statistic).judge(block, nothing, estimate).estimate
    assert estimate.labels == pytest.approx(trust + 40)
    np.testing.assert_allclose(estimate.cov, (trust * start + errors.T @ errors) / (trust + 40), rtol=1e-11)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_statistic_is_the_post_update_residual_and_variance(statistic: str) -> None:
    """By the Kalman update of the output itself, with the gain written out."""
    outputs, rows, trust = 2, 3, 5.0
    error, cov, noise = (
        randn(rows, outputs, seed=3).numpy(),
        random_cov(rows * outputs, seed=4).numpy(),
        random_cov(outputs, seed=5).numpy(),
    )

    def moment(assumed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        big = np.kron(np.eye(rows), assumed)
        gain = cov @ np.linalg.inv(cov + big)
        residual = (error.ravel() - gain @ error.ravel()).reshape(rows, outputs)
        after = cov - gain @ cov
        blocks = sum(after[i : i + outputs, i : i + outputs] for i in range(0, rows * outputs, outputs))
        return residual.T @ residual + blocks, np.eye(rows * outputs) - gain

    if statistic == "variational":
        expected = noise
        for _ in range(2):
            expected = (trust * noise + moment(expected)[0]) / (trust + rows)
        labels = trust + rows
    else:
        total, share = moment(noise)
        labels = trust + np.trace(share @ share) / outputs
        expected = noise + (total - rows * noise) / labels
    found = model(outputs, noise_statistic=statistic).judge(error, cov, NoiseEstimate(noise, trust)).estimate
    assert found.labels == pytest.approx(labels, rel=1e-12)
    np.testing.assert_allclose(found.cov, expected, rtol=1e-10)


def test_information_is_the_share_of_the_fisher_information() -> None:
    """Fisher information on the noise of N(0, S + R) over that of N(0, R), by the variance of the score."""
    variance, noise = 0.7, 0.4
    *_, labels = model().judge_scalar(0.3, variance, noise, 2.0)

    def fisher(epistemic: float) -> float:
        def score(error: float, assumed: float) -> float:
            step = 1e-5
            upper, lower = (stats.norm.logpdf(error, scale=math.sqrt(epistemic + assumed + h)) for h in (step, -step))
            return float(upper - lower) / (2 * step)

        spread = math.sqrt(epistemic + noise)
        density = stats.norm(scale=spread).pdf
        value, _ = integrate.quad(lambda e: density(e) * score(e, noise) ** 2, -10 * spread, 10 * spread)
        return float(value)

    assert labels - 2.0 == pytest.approx(fisher(variance) / fisher(0.0), rel=1e-5)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("robust_dof", [None, 4.0])
def test_a_right_noise_does_not_drift(statistic: str, robust_dof: float | None) -> None:
    """The step is zero on average when errors have the covariance S + R, for clipped errors as well."""
    outputs, draws = 2, 3_000
    cov, noise = random_cov(outputs, seed=6).numpy(), 0.5 * random_cov(outputs, seed=7).numpy()
    errors = np.random.default_rng(0).multivariate_normal(np.zeros(outputs), cov + noise, draws)
    judge = model(outputs, noise_statistic=statistic, robust_dof=robust_dof).judge
    # Much trust, so that the step of each draw is taken from the same noise.
    trust = 1e7
    steps = np.stack([judge(e[None], cov, NoiseEstimate(noise, trust)).estimate.cov - noise for e in errors])
    standard_error = steps.std(axis=0) / math.sqrt(len(steps))
    assert (np.abs(steps.mean(axis=0)) < 6 * standard_error).all()
    assert (standard_error > 0).all()


@pytest.mark.parametrize("config", [{}, {"noise_statistic": "variational"}, {"robust_dof": 4.0}])
@pytest.mark.parametrize("memory", [math.inf, 20.0])
def test_one_row_and_output_in_floats_is_the_matrix_form(config: dict[str, Any], memory: float) -> None:
    subject = model(noise_memory=memory, **config)
    noise, labels = 0.3, 2.0
    for error, variance in zip([0.5, -3.0, 0.1, 40.0], [0.0, 2.0, 1e-4, 0.5], strict=True):
        estimate = NoiseEstimate(np.array([[noise]]), labels)
        matrix = subject.judge(np.array([[error]]), np.array([[variance]]), estimate)
        move, precision, weight, noise, labels = subject.judge_scalar(error, variance, noise, labels)
        assert matrix.mean_step[0] == pytest.approx(move, rel=1e-10)
        assert matrix.directions[0, 0] ** 2 == pytest.approx(precision, rel=1e-10)
        assert matrix.weight == pytest.approx(weight, rel=1e-9)
        assert matrix.estimate.cov[0, 0] == pytest.approx(noise, rel=1e-12)
        assert matrix.estimate.labels == pytest.approx(labels, rel=1e-12)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_gaussian_labels_are_conditioned_by_bayes_rule(rows: int, outputs: int, statistic: str) -> None:
    """``dm = (S + R)^-1 e`` and ``dC = -(S + R)^-1``, with the estimate before or after the labels."""
    cov, noise = random_cov(rows * outputs, seed=15).numpy(), random_cov(outputs, seed=16).numpy()
    error = randn(rows, outputs, seed=17).numpy()
    judged = model(outputs, noise_statistic=statistic).judge(error, cov, NoiseEstimate(noise, 3.0))
    used = noise if statistic == "innovation" else judged.estimate.cov
    inverse = np.linalg.inv(cov + np.kron(np.eye(rows), used))
    np.testing.assert_allclose(judged.mean_step, inverse @ error.ravel(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(information(judged.directions, cov), inverse, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_estimate_stays_positive_whatever_comes(rows: int, scale: float, statistic: str) -> None:
    """Also with the least trust, where a single update could take more than there is."""
    outputs = 2
    subject = model(outputs, noise_labels=1e-3, noise_floor=1e-12, noise_statistic=statistic)
    estimate = NoiseEstimate(np.eye(outputs), 1e-3)
    for step in range(5):
        cov = scale * random_cov(rows * outputs, seed=step).numpy()
        before = estimate.cov
        estimate = subject.judge(np.zeros((rows, outputs)), cov, estimate).estimate
        assert np.linalg.eigvalsh(estimate.cov)[0] > 0.0
        if statistic == "innovation":
            assert np.linalg.eigvalsh(estimate.cov - 0.5 * before)[0] > -1e-12
    assert np.trace(estimate.cov) < outputs


def test_the_floor_holds_in_every_direction() -> None:
    floor = 0.2
    estimate = NoiseEstimate(np.diag([0.25, 3.0]), 1.0)
    for _ in range(30):
        estimate = (
            model(2, noise_start=1.0, noise_floor=floor)
            .judge(np.array([[0.0, 1.0]]), np.zeros((2, 2)), estimate)
            .estimate
        )
    np.testing.assert_allclose(np.linalg.eigvalsh(estimate.cov)[0], floor, rtol=1e-12)
    scalar = model(noise_start=1.0, noise_floor=floor).judge_scalar(0.0, 0.0, 0.25, 1.0)
    assert scalar[3] == floor


@pytest.mark.parametrize("statistic", STATISTICS)
def test_outputs_that_know_nothing_of_each_other_are_learned_as_if_alone(statistic: str) -> None:
    """With block-diagonal covariances and the same S / R everywhere, the information is that of one output."""
    ratio, noise = 0.6, np.array([0.3, 2.0])
    errors = randn(20, 2, seed=8).numpy()
    both = NoiseEstimate(np.diag(noise), 50.0)
    alone = [(float(value), 50.0) for value in noise]
    subject, single = (model(size, noise_statistic=statistic) for size in (2, 1))
    for error in errors:
        for j in range(2):
            alone[j] = single.judge_scalar(float(error[j]), ratio * alone[j][0], *alone[j])[3:]
        both = subject.judge(error[None], ratio * np.diag(np.diag(both.cov)), both).estimate
        # Keep the blocks apart: the product of two errors is no covariance in this model.
        both = NoiseEstimate(np.diag(np.diag(both.cov)), both.labels)
    assert both.labels == pytest.approx(alone[0][1]) == pytest.approx(alone[1][1])
    # The second iteration of the variational learner sees the product of the errors that the first one put in.
    tolerance = 1e-10 if statistic == "innovation" else 2e-2
    np.testing.assert_allclose(np.diag(both.cov), [noise for noise, _ in alone], rtol=tolerance)


# The head


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(("outputs", "rows"), [(1, 1), (2, 8)])
def test_the_noise_of_a_stream_is_found(statistic: str, outputs: int, rows: int) -> None:
    """Within 6 standard errors of the variance of 2,000 Gaussian labels."""
    truth = 0.5 * random_cov(outputs, seed=13)
    root = torch.linalg.cholesky(truth)
    features, clean = stream(2_000, outputs, sd=0.0)
    target = clean + randn(2_000, outputs, seed=14) @ root.mT
    learner = head(
        outputs, layers=1, structure="joint", noise="learned", noise_memory=math.inf, noise_statistic=statistic
    )
    for i in range(0, 2_000, rows):
        learner.update(features[i : i + rows], target[i : i + rows])
    spread = torch.sqrt((truth.square() + torch.outer(truth.diagonal(), truth.diagonal())) / 2_000)
    assert bool(((learner.noise_cov - truth).abs() < 6 * spread).all())
    assert torch.equal(learner.predict(features[:1]).aleatoric[0], learner.noise_cov)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_fixed_head_is_what_it_was(rows: int) -> None:
    """No buffers and no digits more; a learned noise that cannot move gives the same posterior to rounding."""
    features, target = stream(9)
    plain = head(noise_variance=0.2)
    stiff = head(noise="learned", noise_start=0.2, noise_labels=1e30, noise_memory=math.inf)
    assert not any("noise_" in name for name in bits(plain) if name != "noise_cov")
    for i in range(0, 9, rows):
        for learner in (plain, stiff):
            learner.update(features[i : i + rows], target[i : i + rows])
    torch.testing.assert_close(stiff.mean, plain.mean, rtol=1e-11, atol=1e-12)
    assert float(stiff.noise_cov[0, 0]) == pytest.approx(0.2, rel=1e-14)
    assert plain.kind.noise_model is None


def test_the_record_is_one_step_ahead() -> None:
    """NIS and predictive variance refer to the noise before the label, also where the label is weighed down."""
    learner = head(noise="learned", robust_dof=4.0)
    learner.update(*stream(20))
    features, target = stream(1, seed=20)
    mean, epistemic, aleatoric = (value.squeeze() for value in learner.predict(features))
    info = learner.update(features, target + 50.0)
    predictive = float(epistemic + aleatoric)
    assert info.predictive_variance == pytest.approx(predictive)
    assert info.nis == pytest.approx(float((target + 50.0 - mean) ** 2) / predictive)


@pytest.mark.parametrize("outputs", [1, 2])
def test_reset_and_set_noise_start_learning_again(outputs: int) -> None:
    learner = head(outputs, noise="learned", noise_start=0.3, noise_labels=2.0)
    fresh = bits(learner)
    layer_weight, layer_bias = randn(outputs, FEATURES, seed=0), randn(outputs, seed=1)
    learner.update(*stream(10, outputs))
    assert float(learner.noise_labels) > 2.0
    learner.reset(layer_weight, layer_bias)
    assert bits(learner) == fresh
    learner.update(*stream(10, outputs))
    learner.set_noise(0.7)
    expected = 0.7 * torch.eye(outputs, dtype=torch.float64)
    assert torch.equal(learner.noise_cov, expected)
    assert float(learner.noise_labels) == 2.0
    learner.update(*stream(10, outputs))
    learner.reset(layer_weight, layer_bias)
    assert torch.equal(learner.noise_cov, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_features_whose_variance_is_not_finite_in_units_of_the_noise_are_refused(rows: int) -> None:
    learner = head(2, noise="learned", noise_floor=1e-295, noise_start=1e-290)
    features, target = stream(rows, 2)
    features[-1, 0] = 9e24
    before = bits(learner)
    with pytest.raises(UpdateError, match="not finite"):
        learner.update(features, target)
    assert bits(learner) == before


@pytest.mark.parametrize("outputs", [1, 2])
def test_noise_of_zero_is_refused_where_it_is_a_unit(outputs: int) -> None:
    learner = head(outputs, noise_variance=0.1, robust_dof=4.0)
    before = bits(learner)
    with pytest.raises(ValueError, match="must be positive in every direction"):
        learner.set_noise(0.0)
    assert bits(learner) == before
    learner.noise_cov.zero_()  # as a hand-made state might have it
    with pytest.raises(NotPositiveDefiniteError, match="label noise"):
        learner.update(*stream(1, outputs))


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_noise_too_small_for_float64_is_refused_and_changes_nothing(outputs: int, size: float) -> None:
    learner = head(outputs, noise_variance=1e-14, last_variance=100.0, robust_dof=4.0)
    refused = []
    for seed in range(6):
        before = bits(learner)
        try:
            learner.update(size * randn(1, FEATURES, seed=seed), torch.ones(1, outputs))
        except UpdateError as error:
            refused.append(str(error))
            assert bits(learner) == before
    assert refused
    assert all("noise" in message for message in refused)


# Noise that is learned exactly


class Regression(NamedTuple):
    """Matrix-normal inverse-Wishart regression: ``W | V ~ MN(mean, V, cov)``, ``V ~ IW(scale, dof)``."""

    mean: Array
    cov: Array
    scale: Array
    dof: float

    def after(self, features: Tensor, target: Tensor) -> Regression:
        """All rows at once, by the normal equations and the residual sum of squares."""
        X, Y = np.pad(features.numpy(), ((0, 0), (0, 1)), constant_values=1.0), target.numpy()
        before, precision = np.linalg.inv(self.cov), np.linalg.inv(self.cov) + X.T @ X
        mean = np.linalg.solve(precision, X.T @ Y + before @ self.mean)
        scale = self.scale + Y.T @ Y + self.mean.T @ before @ self.mean - mean.T @ precision @ mean
        return Regression(mean, np.linalg.inv(precision), scale, self.dof + len(X))

    def predictive(self, row: Tensor) -> Any:
        """Student's t distribution of the label for one row of features."""
        x, free = np.append(row.numpy(), 1.0), self.dof - len(self.scale) + 1.0
        spread = (1.0 + x @ self.cov @ x) / free
        return stats.multivariate_t(loc=x @ self.mean, shape=self.scale * spread, df=free)


def regression_of(learner: BayesianHead) -> Regression:
    """The prior of a fresh head; the noise it starts from is the scale over the predictive degrees of freedom."""
    config, (outputs, inputs) = learner.config, learner.spec.shapes[0]
    mean = learner.mean.clone().view(outputs, inputs).numpy().T
    cov = config.last_variance / float(learner.noise_start_cov.diagonal().mean()) * np.eye(inputs)
    start = learner.noise_start_cov.numpy() * config.noise_labels
    return Regression(mean, cov, start, config.noise_labels + outputs - 1.0)


def conjugate(outputs: int, **config: Any) -> BayesianHead:
    settings = {"noise_memory": math.inf, "noise_floor": 1e-12, "last_variance": 1.0, **config}
    learner = head(outputs, layers=1, noise="learned", **settings)
    assert learner.spec.structure == "shared"
    return learner


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("blocks", [[1] * 60, [17, 1, 42]], ids=["one by one", "uneven blocks"])
@pytest.mark.parametrize("noise", [None, "correlated"])
def test_shared_learns_the_noise_as_conjugate_regression_does(outputs: int, blocks: list[int], noise: Any) -> None:
    learner = conjugate(outputs, noise_labels=3.0, last_variance=2.0)
    if noise is not None:
        learner.set_noise(0.3 * random_cov(outputs, seed=20))
    features, target = stream(60, outputs)
    expected = regression_of(learner).after(features, target)
    for rows, labels in zip(features.split(blocks), target.split(blocks), strict=True):
        learner.update(rows, labels)
    free = expected.dof - outputs + 1.0
    np.testing.assert_allclose(learner.mean.view(outputs, -1).numpy().T, expected.mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(learner.noise_cov.numpy(), expected.scale / free, rtol=1e-10, atol=1e-12)
    assert learner.noise_labels.tolist() == pytest.approx([free] * outputs)
    weights = np.kron(expected.scale / free, expected.cov)
    np.testing.assert_allclose(learner.covariance().numpy(), weights, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(learner.variances().numpy(), weights.diagonal(), rtol=1e-9)
    probe = randn(1, FEATURES, seed=21)
    mean, epistemic, aleatoric = learner.predict(probe)
    found = expected.predictive(probe[0])
    np.testing.assert_allclose(mean[0].numpy(), found.loc, rtol=1e-10)
    np.testing.assert_allclose((epistemic + aleatoric)[0].numpy(), found.shape, rtol=1e-10)
    assert learner.predictive_dof == pytest.approx(found.df)


@pytest.mark.parametrize("outputs", [1, 3])
def test_its_record_is_that_of_students_t(outputs: int) -> None:
    learner, (features, target) = conjugate(outputs, noise_labels=2.5), stream(12, outputs)
    expected = regression_of(learner)
    for row, label in zip(features.split(1), target.split(1), strict=True):
        predictive = expected.predictive(row[0])
        error = label[0].numpy() - predictive.loc
        info = learner.update(row, label)
        assert info.log_density == pytest.approx(float(predictive.logpdf(label[0].numpy())), rel=1e-9)
        assert info.nis == pytest.approx(float(error @ np.linalg.solve(predictive.shape, error)), rel=1e-9)
        assert info.dof == pytest.approx(predictive.df)
        assert info.predictive_variance == pytest.approx(float(np.diag(predictive.shape).mean()), rel=1e-9)
        expected = expected.after(row, label)


@pytest.mark.parametrize("blocks", [1, 40])
def test_partial_labels_leave_each_outputs_marginal_exact(blocks: int) -> None:
    """Each output is the head of that output alone, taught with the labels that it had."""
    outputs = 3
    learner, (features, target) = conjugate(outputs), stream(40, outputs)
    alone = []
    for j in range(outputs):
        single = conjugate(1)
        single.reset(learner.prior_mean.view(outputs, -1)[j : j + 1, :-1], learner.prior_mean.view(outputs, -1)[j, -1:])
        alone.append(single)
    missing = torch.rand(40, outputs, generator=torch.Generator().manual_seed(3)) < 0.4
    missing[:5] = False  # labels of all outputs first
    target[missing] = torch.nan
    for rows, labels in zip(features.split(blocks), target.split(blocks), strict=True):
        learner.update(rows, labels)
    for j, single in enumerate(alone):
        single.update(features[~missing[:, j]], target[~missing[:, j], j : j + 1])
        torch.testing.assert_close(learner.mean.view(outputs, -1)[j], single.mean, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(learner.noise_cov[j, j], single.noise_cov[0, 0], rtol=1e-10, atol=0.0)
        torch.testing.assert_close(learner.noise_labels[j], single.noise_labels[0], rtol=1e-12, atol=0.0)
        probe = randn(4, FEATURES, seed=22)
        ours, theirs = learner.epistemic_variance(probe)[:, j], single.epistemic_variance(probe)[:, 0]
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0.0)
    assert learner.predictive_dof == float(learner.noise_labels.min())


def test_the_density_of_a_partial_label_is_the_marginal_one() -> None:
    learner, (features, target) = conjugate(3), stream(10, 3)
    learner.update(features, target)
    row, label = features[:1] + 0.1, target[:1].clone()
    predictive, _ = regression_of(conjugate(3)).after(features, target).predictive(row[0]), label
    label[0, 1] = torch.nan
    given = [0, 2]
    marginal = stats.multivariate_t(
        loc=predictive.loc[given], shape=predictive.shape[np.ix_(given, given)], df=predictive.df
    )
    assert learner.increment(row, label).info.log_density == pytest.approx(float(marginal.logpdf(label[0, given])))


def test_outputs_told_apart_are_independent_afterwards_and_after_reopening() -> None:
    """Each keeps its own degrees of freedom, whatever is done to the weights."""
    learner, (features, target) = conjugate(2), stream(20, 2)
    learner.update(features[:8], target[:8])
    partial = target[8:14].clone()
    partial[:, 1] = torch.nan
    learner.update(features[8:14], partial)
    assert float(learner.noise_cov[0, 1]) == 0.0
    assert learner.noise_labels.tolist() == [15.0, 9.0]
    for fraction in (0.5, 1.0):
        learner.reopen(fraction)
        expected = []
        mean, epistemic, aleatoric = (part[0] for part in learner.predict(features[14:15]))
        for j in range(2):
            spread = float((epistemic + aleatoric)[j, j]) ** 0.5
            free = float(learner.noise_labels[j])
            expected.append(stats.t.logpdf(float(target[14, j]), free, float(mean[j]), spread))
        before = learner.noise_labels.clone()
        assert learner.update(features[14:15], target[14:15]).log_density == pytest.approx(sum(expected)), fraction
        assert torch.equal(learner.noise_labels, before + 1.0)


@pytest.mark.parametrize("memory", [5.0, 1.0])
def test_a_finite_memory_follows_a_noise_that_changes(memory: float) -> None:
    learner = head(1, layers=1, noise="learned", noise_memory=memory, last_variance=1e-12)
    for scale in (1.0, 10.0):
        for seed in range(60):
            learner.update(randn(1, FEATURES, seed=seed), learner(randn(1, FEATURES, seed=seed)) + scale)
        assert float(learner.noise_cov[0, 0]) == pytest.approx(scale**2, rel=1e-4)
        assert float(learner.noise_labels[0]) == memory


def test_a_noise_that_was_set_leaves_the_weights_as_sure_as_they_were() -> None:
    learner = conjugate(2)
    learner.update(*stream(10, 2))
    before = learner.variances()
    learner.set_noise(7.0)
    torch.testing.assert_close(learner.variances().sum(), before.sum(), rtol=1e-12, atol=0.0)
    assert torch.equal(learner.noise_cov, 7.0 * torch.eye(2, dtype=torch.float64))
    learner.reset(randn(2, FEATURES, seed=0), randn(2, seed=1))
    prior = torch.full((2 * (FEATURES + 1),), learner.config.last_variance, dtype=torch.float64)
    torch.testing.assert_close(learner.variances(), prior, rtol=1e-12, atol=0.0)
