"""The noise models against conjugate updates, quadrature, sampling and each other."""

from __future__ import annotations

import copy
import io
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

from kbt_rl.inference import compiled
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.noise import NoiseEstimate, NoiseModel
from kbt_rl.inference.robust import StudentNoise

FEATURES = 3
STATISTICS = ("innovation", "variational")


def model(outputs: int = 1, **config: Any) -> NoiseModel:
    made = NoiseModel.of(HeadConfig(**{"noise": "learned", "noise_memory": math.inf, **config}), outputs)
    assert made is not None
    return made


def head(outputs: int = 1, **config: Any) -> BayesianHead:
    layer = nn.Linear(FEATURES, outputs, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(outputs, FEATURES, seed=0))
        layer.bias.copy_(randn(outputs, seed=1))
    return BayesianHead.from_linear(layer, HeadConfig(**{"hidden_variance": 1e-3, **config}))


def stream(count: int, outputs: int = 1, sd: float = 0.5, seed: int = 10) -> tuple[Tensor, Tensor]:
    """Labels of another linear map with noise."""
    features, weight = randn(count, FEATURES, seed=seed), randn(FEATURES, outputs, seed=seed + 1)
    return features, features @ weight + sd * randn(count, outputs, seed=seed + 2)


def buffers(learner: BayesianHead) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


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
        move, info, weight, noise, labels = subject.judge_scalar(error, variance, noise, labels)
        assert matrix.mean_step[0] == pytest.approx(move, rel=1e-10)
        assert matrix.cov_factor[0, 0] ** 2 == pytest.approx(info, rel=1e-10)
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
    np.testing.assert_allclose(judged.cov_factor @ judged.cov_factor.T, inverse, rtol=1e-10, atol=1e-12)


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


# Wild labels


def posterior_by_quadrature(error: float, variance: float, noise: float, dof: float) -> tuple[float, float]:
    """Mean and variance of the output's shift under Student's t noise, by integrating over the output itself."""
    sd, scale = math.sqrt(variance), math.sqrt(noise)
    grid = np.union1d(np.linspace(-12 * sd, 12 * sd, 40_001), error + scale * np.linspace(-60.0, 60.0, 40_001))
    weights = stats.norm.pdf(grid, scale=sd) * stats.t.pdf((error - grid) / scale, dof)
    weights /= np.trapezoid(weights, grid)
    mean = float(np.trapezoid(grid * weights, grid))
    return mean, float(np.trapezoid((grid - mean) ** 2 * weights, grid))


@pytest.mark.parametrize("dof", [1.5, 4.0, 12.0])
@pytest.mark.parametrize("variance", [1e-2, 1.0, 50.0])
@pytest.mark.parametrize("error", [0.0, 0.3, -2.0, 6.0, 30.0])
def test_the_posterior_is_that_of_students_t(dof: float, variance: float, error: float) -> None:
    """Exactly, but for a variance that would grow, which stays."""
    noise = 0.7
    subject = model(noise="fixed", noise_variance=noise, robust_dof=dof)
    move, info, weight, _, _ = subject.judge_scalar(error, variance, noise, math.inf)
    mean, left = posterior_by_quadrature(error, variance, noise, dof)
    assert variance * move == pytest.approx(mean, rel=2e-5, abs=1e-9)
    assert variance - variance**2 * info == pytest.approx(min(left, variance), rel=2e-5)
    assert weight >= 0.0
    assert info == pytest.approx(1.0 / (variance + noise / weight) if weight else 0.0)


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
    subject = model(outputs, noise="fixed", robust_dof=dof)
    judged = subject.judge(error[None], cov, NoiseEstimate(noise, math.inf))
    np.testing.assert_allclose(judged.mean_step, moves, rtol=1e-7)
    np.testing.assert_allclose(judged.cov_factor @ judged.cov_factor.T, info, rtol=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
def test_clipped_errors_of_gaussian_labels_have_their_own_variance(outputs: int) -> None:
    """By sampling, and the largest contribution of any label is bounded."""
    student = StudentNoise(4.0, outputs)
    squares = np.random.default_rng(1).chisquare(outputs, 200_000)
    clipped = np.array([student.clip(q) * q for q in squares[:50_000]])
    assert abs(clipped.mean() - outputs) < 6 * clipped.std() / math.sqrt(len(clipped))
    assert student.clip(1e12) * 1e12 < 3.0 * (4.0 + outputs)


def test_a_wild_label_hardly_moves_a_learned_head_and_a_plain_one_far() -> None:
    features, target = stream(200)
    plain, robust = head(noise_variance=0.25), head(noise_variance=0.25, robust_dof=4.0)
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
    config = {"noise_variance": 0.25, "robust_dof": 4.0, "last_variance": 0.1}
    with_wild, without = head(outputs, **config), head(outputs, **config)
    features, target = stream(6, outputs)
    for learner in (with_wild, without):
        learner.update(*stream(30, outputs))
    wild = target.clone()
    wild[2] += 1e5
    rest = [0, 1, 3, 4, 5]
    with_wild.update(features, wild)
    without.update(features[rest], target[rest])
    torch.testing.assert_close(with_wild.mean, without.mean, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(with_wild.mean, head(outputs, **config).mean, atol=1e-2)


# The head


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("structure", ["joint", "layer", "neuron", "diagonal"])
@pytest.mark.parametrize("config", [{"noise": "learned"}, {"noise": "learned", "robust_dof": 4.0}])
def test_machine_code_and_the_general_path_agree(
    outputs: int, structure: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    features, target = stream(30, outputs)
    fast, general = (head(outputs, structure=structure, **config) for _ in range(2))
    infos = []
    for learner in (fast, general):
        if learner is general:
            monkeypatch.setattr(compiled, "kernels", lambda: None)
            learner._bound = None
        infos.append([learner.update(features[i : i + 1], target[i : i + 1]) for i in range(30)])
    for name, value in buffers(fast).items():
        torch.testing.assert_close(value, buffers(general)[name], rtol=1e-8, atol=1e-10, msg=name)
    torch.testing.assert_close(torch.tensor(infos[0][-1]), torch.tensor(infos[1][-1]), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("rows", [1, 8])
def test_the_noise_of_a_stream_is_found(statistic: str, outputs: int, rows: int) -> None:
    """Within 6 standard errors of the variance of 2,000 Gaussian labels."""
    truth = 0.5 * random_cov(outputs, seed=13)
    root = torch.linalg.cholesky(truth)
    features, clean = stream(2_000, outputs, sd=0.0)
    target = clean + randn(2_000, outputs, seed=14) @ root.mT
    learner = head(outputs, layers=1, noise="learned", noise_memory=math.inf, noise_statistic=statistic)
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
    assert not any("noise_" in name for name in buffers(plain) if name != "noise_cov")
    for i in range(0, 9, rows):
        for learner in (plain, stiff):
            learner.update(features[i : i + rows], target[i : i + rows])
    torch.testing.assert_close(stiff.mean, plain.mean, rtol=1e-11, atol=1e-12)
    assert float(stiff.noise_cov[0, 0]) == pytest.approx(0.2, rel=1e-14)
    assert plain.noise_model is None


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


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("config", [{}, {"robust_dof": 3.0}, {"noise_statistic": "variational"}])
@pytest.mark.parametrize("through", ["state_dict", "deepcopy", "to"])
def test_learning_goes_on_bit_for_bit_after_saving(rows: int, config: dict[str, Any], through: str) -> None:
    learner = head(2, noise="learned", **config)
    learner.update(*stream(40, 2))
    if through == "deepcopy":
        back = copy.deepcopy(learner)
    elif through == "to":
        back = copy.deepcopy(learner).float().to("cpu", torch.float16)
    else:
        file = io.BytesIO()
        torch.save(learner.state_dict(), file)
        file.seek(0)
        back = BayesianHead(FEATURES, 2, learner.config)
        back.load_state_dict(torch.load(file, weights_only=True))
    before = buffers(learner)
    assert_same(buffers(back), before)
    for each in (learner, back):
        each.update(*stream(rows, 2, seed=30))
    assert_same(buffers(back), buffers(learner))
    assert not torch.equal(before["noise_cov"], learner.noise_cov)


@pytest.mark.parametrize("outputs", [1, 2])
def test_reset_and_set_noise_start_learning_again(outputs: int) -> None:
    learner = head(outputs, noise="learned", noise_start=0.3, noise_labels=2.0)
    fresh = buffers(learner)
    layer_weight, layer_bias = randn(outputs, FEATURES, seed=0), randn(outputs, seed=1)
    learner.update(*stream(10, outputs))
    assert float(learner.noise_labels) > 2.0
    learner.reset(layer_weight, layer_bias)
    assert_same(buffers(learner), fresh)
    learner.update(*stream(10, outputs))
    learner.set_noise(0.7)
    expected = 0.7 * torch.eye(outputs, dtype=torch.float64)
    assert torch.equal(learner.noise_cov, expected)
    assert float(learner.noise_labels) == 2.0
    learner.update(*stream(10, outputs))
    learner.reset(layer_weight, layer_bias)
    assert torch.equal(learner.noise_cov, expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_an_increment_carries_the_noise_and_changes_nothing_before_it_is_applied(rows: int) -> None:
    ours, theirs = (head(2, noise="learned") for _ in range(2))
    before, data = buffers(ours), stream(rows, 2)
    step = ours.increment(*data)
    assert_same(buffers(ours), before)
    ours.apply_increment(step)
    theirs.update(*data)
    assert_same(buffers(ours), buffers(theirs))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_a_bad_label_changes_nothing(rows: int, bad: float) -> None:
    """1e200 is finite, but its square is not."""
    learner = head(2, noise="learned")
    features, target = stream(rows, 2)
    target[-1, 0] = bad
    before = buffers(learner)
    with pytest.raises((ValueError, UpdateError), match=r"NaN or infinity|huge values"):
        learner.update(features, target)
    assert_same(buffers(learner), before)


@pytest.mark.parametrize("rows", [1, 3])
def test_features_whose_variance_is_not_finite_in_units_of_the_noise_are_refused(rows: int) -> None:
    learner = head(2, noise="learned", noise_floor=1e-295, noise_start=1e-290)
    features, target = stream(rows, 2)
    features[-1, 0] = 9e24
    before = buffers(learner)
    with pytest.raises(UpdateError, match="not finite"):
        learner.update(features, target)
    assert_same(buffers(learner), before)


@pytest.mark.parametrize("outputs", [1, 2])
def test_noise_of_zero_is_refused_where_it_is_a_unit(outputs: int) -> None:
    learner = head(outputs, noise_variance=0.1, robust_dof=4.0)
    before = buffers(learner)
    with pytest.raises(ValueError, match="must be positive in every direction"):
        learner.set_noise(0.0)
    assert_same(buffers(learner), before)
    learner.noise_cov.zero_()  # as a hand-made state might have it
    with pytest.raises(NotPositiveDefiniteError, match="label noise"):
        learner.update(*stream(1, outputs))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"noise": "guessed"}, "noise is 'guessed'; choose one of fixed, learned"),
        ({"noise_statistic": "mean"}, "noise_statistic is 'mean'"),
        ({"noise": "learned", "rule": "replace"}, "needs the rule 'measure'"),
        ({"robust_dof": 4.0, "rule": "fisher"}, "needs the rule 'measure'"),
        ({"robust_dof": 0.0}, "robust_dof is 0.0"),
        ({"robust_dof": 4.0, "noise_variance": 0.0}, "noise_variance is 0"),
        ({"noise_start": 0.0}, "noise_start is 0.0"),
        ({"noise_labels": float("nan")}, "noise_labels is nan"),
        ({"noise_floor": 1.0}, "noise_floor is 1.0, above noise_start"),
        ({"noise_memory": 0.5}, "noise_memory is 0.5"),
        ({"noise_labels": 600.0}, "noise_memory is 500.0"),
    ],
)
def test_a_bad_configuration_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig(**config)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_noise_too_small_for_float64_is_refused_and_changes_nothing(outputs: int, size: float) -> None:
    config = HeadConfig(noise_variance=1e-14, last_variance=100.0, robust_dof=4.0)
    torch.manual_seed(0)
    head = BayesianHead.from_linear(torch.nn.Linear(4, outputs), config)
    before, refused = (head.mean.clone(), head.state.dense_cov()), []
    for seed in range(6):
        try:
            assert head.update(size * randn(1, 4, seed=seed), torch.ones(1, outputs)).label_weight >= 0.0
        except UpdateError as error:
            refused.append(str(error))
            assert torch.equal(head.mean, before[0])
            assert torch.equal(head.state.dense_cov(), before[1])
        before = head.mean.clone(), head.state.dense_cov()
    assert refused
    assert all("noise" in message for message in refused)
