"""Conditioning on the target against the literal matrix formulas, with explicit inverses."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import scipy.optimize
import scipy.special
import torch
from conftest import randn, random_cov, smallest_eigenvalue
from torch import Tensor

from kbt_rl.inference.errors import NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.likelihoods.base import Conditioning
from kbt_rl.inference.likelihoods.registry import LIKELIHOODS
from kbt_rl.inference.types import Gaussian

inv = torch.linalg.inv
LINKS = {
    "measure": "identity",
    "replace": "identity",
    "fisher": "softmax",
    "laplace": "softmax",
    "taylor": "softmax",
    "replace_softmax": "softmax",
}


class Problem(NamedTuple):
    predicted: Gaussian
    target: Tensor
    noise: Tensor

    @property
    def rows(self) -> int:
        return len(self.target)

    @property
    def all_noise(self) -> Tensor:
        return torch.block_diag(*[self.noise] * self.rows)

    @property
    def probabilities(self) -> Tensor:
        return torch.softmax(self.predicted.mean.view_as(self.target), dim=-1)

    @property
    def jacobian(self) -> Tensor:
        return torch.block_diag(*(torch.diag(p) - torch.outer(p, p) for p in self.probabilities))


def problem(rows: int, outputs: int, link: str, seed: int = 0, noise_scale: float = 0.5) -> Problem:
    size = rows * outputs
    predicted = Gaussian(randn(size, seed=seed), random_cov(size, seed=seed + 1))
    target = randn(rows, outputs, seed=seed + 2)
    target = torch.softmax(target, dim=-1) if link == "softmax" else target
    return Problem(predicted, target, noise_scale * random_cov(outputs, seed=seed + 3))


def literal(rule: str, given: Problem) -> tuple[Tensor, Tensor]:
    """``dm = S^-1 (m+ - m)`` and ``dC = S^-1 (S+ - S) S^-1`` of each rule as it is defined."""
    mean, cov = given.predicted
    target, noise, jacobian = given.target.flatten(), given.all_noise, given.jacobian
    if rule == "measure":
        gain = cov @ inv(cov + noise)
        after = Gaussian(mean + gain @ (target - mean), cov - gain @ cov)
    elif rule == "replace":
        after = Gaussian(target, noise)
    elif rule == "fisher":
        after_cov = inv(inv(cov) + jacobian)
        after = Gaussian(mean + after_cov @ (target - given.probabilities.flatten()), after_cov)
    elif rule == "laplace":
        mode = posterior_mode(given)
        p = torch.softmax(mode.view_as(given.target), dim=-1)
        information = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p))
        after = Gaussian(mode, inv(inv(cov) + information))
    else:
        error = target - given.probabilities.flatten()
        through = jacobian @ cov @ jacobian.mT
        through = through + (noise if rule == "taylor" else 1e-6 * torch.eye(len(cov), dtype=torch.float64))
        gain = cov @ jacobian.mT @ inv(through)
        smaller = -through if rule == "taylor" else noise - through
        after = Gaussian(mean + gain @ error, cov + gain @ smaller @ gain.mT)
    return inv(cov) @ (after.mean - mean), inv(cov) @ (after.cov - cov) @ inv(cov)


def posterior_mode(given: Problem) -> Tensor:
    """Most probable logits under ``N(m, S)`` and the softmax likelihood, by SciPy from the gradient alone."""
    mean, precision, target = given.predicted.mean.numpy(), inv(given.predicted.cov).numpy(), given.target.numpy()

    def gradient(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        slope: npt.NDArray[np.float64] = precision @ (logits - mean)
        return slope + (scipy.special.softmax(logits.reshape(target.shape), axis=1) - target).ravel()

    found = scipy.optimize.root(gradient, mean, method="lm", options={"xtol": 1e-15, "ftol": 1e-15})
    assert np.abs(gradient(found.x)).max() < 1e-10
    return torch.from_numpy(found.x)


def condition(rule: str, given: Problem) -> Conditioning:
    return LIKELIHOODS[rule].condition(given.predicted, given.target, given.all_noise)


def cov_step(step: Conditioning, given: Problem) -> Tensor:
    """``dC``, of a measurement by the gain form."""
    if step.change is not None:
        factor, signs = step.change
        return factor * signs @ factor.mT
    directions = step.directions
    return -directions @ inv(directions.mT @ given.predicted.cov @ directions + step.noise_cov) @ directions.mT


def assert_relative(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def test_every_rule_states_its_link() -> None:
    assert {name: rule.link for name, rule in LIKELIHOODS.items()} == LINKS


# A single class is certain: there is nothing to learn.
RULES_AND_OUTPUTS = [(rule, o) for rule, link in LINKS.items() for o in (1, 2, 3) if link == "identity" or o > 1]


@pytest.mark.parametrize(("rule", "outputs"), RULES_AND_OUTPUTS)
@pytest.mark.parametrize("rows", [1, 4])
def test_rule_equals_its_literal_formula(rule: str, rows: int, outputs: int) -> None:
    given = problem(rows, outputs, LINKS[rule])
    step = condition(rule, given)
    mean_step, change = literal(rule, given)
    # P = J S J' + 1e-6 I has a condition number near 1e5, and its inverse enters twice.
    tolerance = 1e-7 if rule == "replace_softmax" else 1e-10
    assert_relative(step.mean_step, mean_step, tolerance)
    assert_relative(cov_step(step, given), change, tolerance)
    guess = given.probabilities if LINKS[rule] == "softmax" else given.predicted.mean.view_as(given.target)
    torch.testing.assert_close(step.innovation, (given.target - guess).flatten(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 3])
def test_laplace_finds_the_mode_where_the_prediction_is_sure_and_wrong(rows: int) -> None:
    """The first Newton step (``fisher``) is too long there; the mode is where the target gets likely."""
    mean = torch.tensor([40.0, 0.0, -40.0], dtype=torch.float64).repeat(rows)
    cov = 100.0 * (torch.eye(3 * rows, dtype=torch.float64) + 0.1)
    target = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).repeat(rows, 1)
    predicted = Gaussian(mean, cov)
    step = LIKELIHOODS["laplace"].condition(predicted, target, torch.zeros(3, 3))
    mode = mean + cov @ step.mean_step
    literal_mode = posterior_mode(Problem(predicted, target, torch.zeros(3, 3)))
    torch.testing.assert_close(mode, literal_mode, rtol=1e-6, atol=1e-6)
    residual = target - torch.softmax(mode.view_as(target), dim=-1)
    torch.testing.assert_close(step.mean_step, residual.flatten(), rtol=0.0, atol=1e-8)
    first = LIKELIHOODS["fisher"].condition(predicted, target, torch.zeros(3, 3))
    assert float((cov @ first.mean_step).abs().max()) > 1.5 * float((mode - mean).abs().max())


def test_impossible_class_has_a_huge_nis() -> None:
    mean = torch.tensor([800.0, 0.0], dtype=torch.float64)
    target = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    predicted = Gaussian(mean, torch.eye(2, dtype=torch.float64))
    for rule in ("fisher", "laplace"):
        nis = float(LIKELIHOODS[rule].condition(predicted, target, torch.zeros(2, 2)).nis)
        assert nis == pytest.approx(1 / torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("rule", LINKS)
def test_rule_leaves_prediction_target_and_noise_alone(rule: str) -> None:
    given = problem(2, 3, LINKS[rule])
    kept = given.predicted.mean.clone(), given.predicted.cov.clone(), given.target.clone(), given.noise.clone()
    condition(rule, given)
    for now, before in zip((*given.predicted, given.target, given.noise), kept, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("rule", ["measure", "fisher", "taylor"])
def test_bayesian_rules_only_take_uncertainty_away(rule: str) -> None:
    given = problem(3, 3, LINKS[rule], seed=20)
    step = condition(rule, given)
    cov = given.predicted.cov
    after = cov + cov @ cov_step(step, given) @ cov
    assert step.change is None
    assert smallest_eigenvalue(after) > 0.0
    assert smallest_eigenvalue(cov - after) > -1e-14


@pytest.mark.parametrize("rule", ["measure", "fisher", "taylor"])
def test_a_certain_prediction_takes_no_covariance_step(rule: str) -> None:
    given = problem(2, 3, LINKS[rule], seed=30)
    certain = given._replace(predicted=Gaussian(given.predicted.mean, torch.zeros_like(given.predicted.cov)))
    step = condition(rule, certain)
    assert bool(torch.isfinite(step.mean_step).all())
    information = {
        "measure": -inv(given.all_noise),
        "fisher": -given.jacobian,
        "taylor": -given.jacobian @ inv(given.all_noise) @ given.jacobian,
    }[rule]
    assert_relative(cov_step(step, certain), information, 1e-12)


@pytest.mark.parametrize("rule", ["fisher", "taylor"])
@pytest.mark.parametrize("logit", [30.0, 800.0])
def test_a_confident_softmax_gives_finite_steps(rule: str, logit: float) -> None:
    cov = random_cov(3, seed=50)
    predicted = Gaussian(torch.tensor([logit, 0.0, -logit], dtype=torch.float64), cov)
    target = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    step = LIKELIHOODS[rule].condition(predicted, target, 0.1 * torch.eye(3, dtype=torch.float64))
    for value in step[:-1]:
        assert bool(torch.isfinite(torch.as_tensor(value)).all())
    if rule == "fisher":  # F is nearly 0, so the plain gradient y - p remains; Taylor's stalls with J
        assert_relative(step.mean_step, torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64), 1e-8)
    else:
        assert float(step.mean_step.abs().max()) < 1e-10


def test_fisher_ignores_the_noise() -> None:
    given = problem(2, 3, "softmax", seed=60)
    other = given._replace(noise=given.noise * 100.0)
    for mine, theirs in zip(condition("fisher", given)[:-1], condition("fisher", other)[:-1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("rule", ["fisher", "taylor", "replace_softmax"])
def test_softmax_rules_do_not_see_a_common_shift_of_the_logits(rule: str) -> None:
    given = problem(2, 3, "softmax", seed=70)
    shifted = given._replace(predicted=Gaussian(given.predicted.mean + 5.0, given.predicted.cov))
    torch.testing.assert_close(
        condition(rule, shifted).mean_step, condition(rule, given).mean_step, rtol=1e-8, atol=1e-10
    )
    ones = torch.kron(torch.eye(2, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64))
    assert float((ones @ cov_step(condition(rule, given), given)).abs().max()) < 1e-7


# Normalised innovation squared


@pytest.mark.parametrize("rule", ["measure", "replace"])
def test_nis_of_the_identity_link_uses_prediction_plus_noise(rule: str) -> None:
    given = problem(3, 2, "identity", seed=80)
    error = given.target.flatten() - given.predicted.mean
    expected = error @ inv(given.predicted.cov + given.all_noise) @ error
    assert float(condition(rule, given).nis) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("rule", ["fisher", "taylor", "replace_softmax"])
def test_nis_of_the_softmax_link_uses_the_pseudo_inverse_of_its_singular_covariance(rule: str) -> None:
    given = problem(2, 3, "softmax", seed=90)
    error = (given.target - given.probabilities).flatten()
    cov = given.jacobian + given.jacobian @ given.predicted.cov @ given.jacobian
    expected = error @ torch.linalg.pinv(cov, hermitian=True, rtol=1e-12) @ error
    assert float(condition(rule, given).nis) == pytest.approx(float(expected), rel=1e-8)


def test_flattened_probabilities_are_judged_by_the_labels() -> None:
    """The log ratio of ``sqrt(p) / sum sqrt(p)`` to ``p``, which change detection sums; the identity link has none."""
    given = problem(2, 3, "softmax", seed=95)
    flattened = given.probabilities.sqrt() / given.probabilities.sqrt().sum(-1, keepdim=True)
    expected = float((given.target * (flattened / given.probabilities).log()).sum())
    for rule, link in LINKS.items():
        ratio = condition(rule, problem(2, 3, link, seed=95)).log_ratio
        assert np.isnan(ratio) if link == "identity" else ratio == pytest.approx(expected, rel=1e-12)


# Errors


def singular(given: Problem) -> Problem:
    """Two rows that are copies of each other, without noise."""
    block = given.predicted.cov[:2, :2]
    cov = torch.cat([torch.cat([block, block], dim=1)] * 2)
    return given._replace(predicted=Gaussian(given.predicted.mean, cov), noise=torch.zeros_like(given.noise))


@pytest.mark.parametrize(
    ("rule", "name"), [("measure", "predicted covariance plus noise"), ("replace", "which the rule 'replace' inverts")]
)
def test_repeated_rows_without_noise_are_refused_with_advice(rule: str, name: str) -> None:
    with pytest.raises(NotPositiveDefiniteError, match=f"{name}.*raise the noise variance.*unchanged") as caught:
        condition(rule, singular(problem(2, 2, "identity")))
    assert isinstance(caught.value, UpdateError)
    assert caught.value.smallest == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("seed", range(0, 100, 10))
def test_taylor_without_noise_is_refused_or_takes_the_pseudo_inverse_of_its_singular_covariance(seed: int) -> None:
    """Whether a matrix that is singular by construction factorises is up to rounding; what comes out is not."""
    given = problem(1, 3, "softmax", seed=seed)._replace(noise=torch.zeros(3, 3, dtype=torch.float64))
    jacobian = given.jacobian
    gain = jacobian @ torch.linalg.pinv(jacobian @ given.predicted.cov @ jacobian, hermitian=True, rtol=1e-12)
    try:
        step = condition("taylor", given)
    except NotPositiveDefiniteError as error:
        assert "which the rule 'taylor' inverts" in error.name  # noqa: PT017
        return
    assert_relative(step.mean_step, gain @ (given.target - given.probabilities).flatten(), 1e-8)
    assert_relative(cov_step(step, given), -gain @ jacobian, 1e-8)


@pytest.mark.parametrize("rule", ["measure", "replace"])
@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan")])
def test_scalar_covariance_that_is_not_positive_is_refused(rule: str, variance: float) -> None:
    predicted = Gaussian(torch.zeros(1, dtype=torch.float64), torch.full((1, 1), variance, dtype=torch.float64))
    zero = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match=r"has the eigenvalue|holds NaN"):
        LIKELIHOODS[rule].condition(predicted, zero, zero)


@pytest.mark.parametrize("rule", LINKS)
def test_covariance_with_nan_is_told_from_an_indefinite_one(rule: str) -> None:
    given = problem(1, 3, LINKS[rule])
    given.predicted.cov[1, 1] = float("nan")
    with pytest.raises(NotPositiveDefiniteError, match="holds NaN or infinity; check features and target"):
        condition(rule, given)


def test_indefinite_covariance_is_reported_with_its_eigenvalue() -> None:
    given = problem(1, 2, "identity")
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="has the eigenvalue -1") as caught:
        condition("measure", given._replace(predicted=Gaussian(given.predicted.mean, indefinite), noise=0 * indefinite))
    assert caught.value.smallest == pytest.approx(-1.0)
    assert "predicted covariance plus noise" in caught.value.name


# Independent outputs


def independent(outputs: int, link: str, scale: float, seed: int) -> tuple[Tensor, ...]:
    """Mean, variances, target and noise of the outputs of one row."""
    mean, target = 2.0 * randn(outputs, seed=seed), randn(outputs, seed=seed + 1)
    target = torch.softmax(3.0 * target, dim=-1) if link == "softmax" else target
    return mean, scale * randn(outputs, seed=seed + 2).exp(), target, 0.3 * randn(outputs, seed=seed + 3).exp()


@pytest.mark.parametrize("rule", ["measure", "fisher", "laplace"])
@pytest.mark.parametrize("outputs", [2, 3, 30])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_independent_outputs_are_conditioned_as_by_the_joint_form(rule: str, outputs: int, scale: float) -> None:
    mean, variance, target, noise = independent(outputs, LINKS[rule], scale, seed=100)
    alone = LIKELIHOODS[rule].each(mean, variance, target, noise, 0.0)
    given = Problem(Gaussian(mean, variance.diag()), target.unsqueeze(0), noise.diag())
    joint = condition(rule, given)
    assert alone is not None
    torch.testing.assert_close(alone.mean_step, joint.mean_step, rtol=1e-8, atol=1e-10)
    left = variance - variance.square() / (variance + alone.noise)
    expected = (given.predicted.cov + given.predicted.cov @ cov_step(joint, given) @ given.predicted.cov).diagonal()
    torch.testing.assert_close(left, expected, rtol=1e-8, atol=1e-12 * scale)
    for name in ("innovation", "nis", "log_density"):
        torch.testing.assert_close(getattr(alone, name), getattr(joint, name), rtol=1e-9, atol=1e-12)
    assert alone.log_ratio == pytest.approx(joint.log_ratio, rel=1e-9, nan_ok=True)


def test_rules_that_do_not_part_the_outputs_say_so() -> None:
    for name, rule in LIKELIHOODS.items():
        assert rule.has_each == (name in ("measure", "fisher", "laplace"))
        assert (rule.each(*independent(3, rule.link, 1.0, seed=110), 0.0) is None) != rule.has_each


@pytest.mark.parametrize("rule", ["fisher", "laplace"])
def test_classes_without_probability_keep_their_covariance(rule: str) -> None:
    mean = torch.tensor([3.0, -2.0, -9.0, -9.5, 0.0], dtype=torch.float64)
    target = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    variance = torch.ones(5, dtype=torch.float64)
    full, active = (LIKELIHOODS[rule].each(mean, variance, target, variance, least) for least in (0.0, 0.01))
    assert full is not None
    assert active is not None
    assert torch.isfinite(active.noise).tolist() == [True, False, False, True, True]
    kept = torch.isfinite(active.noise)
    assert torch.equal(active.noise[kept], full.noise[kept])
    assert torch.equal(active.mean_step, full.mean_step)


@pytest.mark.parametrize("rule", ["fisher", "laplace"])
@pytest.mark.parametrize("logit", [40.0, 800.0])
def test_a_class_that_is_certain_takes_the_information_of_the_others(rule: str, logit: float) -> None:
    """``p (1 - p)`` of a class with all but none of the rest is the rest, not what is left of 1 by rounding."""
    mean = torch.tensor([logit, 0.0, -1.0], dtype=torch.float64)
    target = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    variance = 1e-3 * torch.ones(3, dtype=torch.float64)
    found = LIKELIHOODS[rule].each(mean, variance, target, variance, 0.0)
    assert found is not None
    rest = torch.exp(mean[1:] - logit).sum()
    expected = 1.0 / rest if logit < 700.0 else torch.tensor(torch.inf, dtype=torch.float64)
    torch.testing.assert_close(found.noise[0], expected, rtol=2e-3, atol=0.0)


# Many classes


SCRIPT = """
    import resource, sys, torch
    from kbt_rl.inference.config import HeadConfig
    from kbt_rl.inference.head import BayesianHead
    structure, classes, features, rows = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    small = BayesianHead(2, 3, HeadConfig(rule="laplace", structure=structure))
    for count in (1, 2):  # what the first updates of a process load
        small.update(torch.ones(count, 2), torch.zeros(count, dtype=torch.int64))
    head = BayesianHead(features, classes, HeadConfig(rule="laplace", structure=structure, active_probability=0.01))
    data = torch.randn(rows, features), torch.randint(classes, (rows,))
    before = peak()
    head.update(*data)
    print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the largest memory of a process is told in another unit elsewhere")
@pytest.mark.parametrize(
    ("structure", "classes", "features", "rows", "megabytes"),
    [("neuron", 1_000, 64, 32, 200.0), ("rotated", 1_000, 256, 32, 200.0), ("rotated", 1_000, 256, 1, 4.0)],
)
def test_an_update_of_many_classes_takes_little_memory(
    structure: str, classes: int, features: int, rows: int, megabytes: float
) -> None:
    """Beyond the posterior itself; an array of all pairs of classes and rows would be 8 GB."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), structure, *map(str, (classes, features, rows))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert float(found.stdout) < megabytes
