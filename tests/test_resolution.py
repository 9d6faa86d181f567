"""A posterior stored in float32: what it can resolve, and the repair where a label would go below it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MACHINE_CODE, STRUCTURES, randn
from scipy.linalg import eigh
from torch import Tensor, nn

from kbt_rl.inference import compiled, resolution, state, update
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.state import HeadState

CORRELATED = ("joint", "layer", "neuron")
FEATURES = 4


def pair(outputs: int = 1, **options: Any) -> tuple[BayesianHead, BayesianHead]:
    """The same head in float64 and in float32."""
    torch.manual_seed(0)
    layer = nn.Linear(FEATURES, outputs, dtype=torch.float64)
    options = {"noise_variance": 1e-3, "hidden_variance": 1e-4, **options}
    wide, narrow = (HeadConfig(**options, dtype=dtype) for dtype in ("float64", "float32"))
    return BayesianHead.from_linear(layer, wide), BayesianHead.from_linear(layer, narrow)


def stream(count: int, rows: int = 1, outputs: int = 1, decades: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    """Rows whose directions vary by ``10 ** decades``, and labels of a function with a kink."""
    turn = torch.linalg.qr(randn(FEATURES, FEATURES, seed=1))[0]
    mix = turn * torch.logspace(0.0, -decades, FEATURES, dtype=torch.float64) @ turn.mT
    features = randn(count, rows, FEATURES, seed=2) @ (mix / mix.norm(dim=0))
    law = randn(FEATURES, outputs, seed=3)
    targets = features @ law + 0.5 * features[..., :1].abs() + 0.03 * randn(count, rows, outputs, seed=4)
    return list(zip(features, targets, strict=True))


def smallest_eigenvalue(state: HeadState) -> float:
    """Of the correlations of the weights."""
    cov = state.dense_cov().double()
    scale = cov.diagonal().rsqrt()
    return float(torch.linalg.eigvalsh(scale.unsqueeze(-1) * cov * scale)[0])


def learn(head: BayesianHead, samples: list[tuple[Tensor, Tensor]]) -> None:
    for features, target in samples:
        head.update(features, target)


def snapshot(head: BayesianHead) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


def assert_bits(head: BayesianHead, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("outputs", "rows"), [(1, 1), (3, 1), (1, 5), (2, 40)])
def test_it_follows_the_float64_posterior(structure: str, layers: int, outputs: int, rows: int) -> None:
    wide, narrow = pair(outputs, structure=structure, layers=layers, noise_variance=0.1)
    for features, target in stream(50, rows, outputs):
        theirs, ours = wide.update(features, target), narrow.update(features, target)
        assert ours.repairs == theirs.repairs == 0
        assert ours.nis == pytest.approx(theirs.nis, rel=1e-3, abs=1e-4)
    assert narrow.mean.dtype == narrow.cov_0.dtype == torch.float32
    assert narrow.noise_cov.dtype == narrow.feature_mean.dtype == torch.float64
    features = stream(1, 5)[0][0]
    for other, mine in zip(wide.predict(features), narrow.predict(features), strict=True):
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(narrow(features), wide(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(narrow.view().weights[0], wide.view().weights[0], rtol=1e-3, atol=1e-5)


@MACHINE_CODE
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("outputs", "rows"), [(1, 1), (3, 1), (1, 5), (2, 5)])
def test_the_machine_code_computes_in_float64(structure: str, layers: int, outputs: int, rows: int) -> None:
    """From a posterior in float32 follows what follows from the same numbers in float64."""
    wide, narrow = pair(outputs, structure=structure, layers=layers)
    learn(narrow, stream(5, rows, outputs))
    wide.load_state_dict({name: value.to(wide.state_dict()[name]) for name, value in narrow.state_dict().items()})
    features, target = stream(1, rows, outputs)[0]
    for other, mine in zip(wide.predict(features), narrow.predict(features), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)
    ours, theirs = narrow.increment(features, target), wide.increment(features, target)
    torch.testing.assert_close(ours.mean_step, theirs.mean_step, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(ours.cov_factor, theirs.cov_factor, rtol=1e-9, atol=1e-13)
    mine, other = narrow.update(features, target), wide.update(features, target)
    for name in ("nis", "epistemic_variance", "log_density", "innovation"):
        assert getattr(ours.info, name) == pytest.approx(getattr(theirs.info, name), rel=1e-11), name
        assert getattr(mine, name) == pytest.approx(getattr(other, name), rel=1e-11), name


@pytest.mark.parametrize("machine_code", [pytest.param(True, marks=MACHINE_CODE), False])
def test_units_whose_variance_is_rounded_below_nothing(machine_code: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are certain to a prediction, and a label that wants to know more repairs them."""
    if not machine_code:
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    _, narrow = pair(structure="neuron", noise_variance=1e-8)
    row, target = randn(1, FEATURES, seed=1), randn(1, 1, seed=2)
    inputs = torch.cat([row[0], torch.ones(1)])
    along = torch.outer(inputs, inputs) / inputs.square().sum()
    narrow.cov_0.copy_(1e-4 * (torch.eye(FEATURES + 1) - (1.0 + 1e-6) * along))
    spreads = torch.einsum("p,jpq,q->j", inputs, narrow.cov_0.double(), inputs)
    assert bool((spreads < 0.0).all())
    assert bool((narrow.state.variances() > 0.0).all())
    for part in narrow.predict(row):
        assert bool(torch.isfinite(part).all())
    torch.testing.assert_close(narrow.predict(row).mean, narrow(row), rtol=1e-6, atol=1e-7)
    narrow.cov_1.mul_(1e-12)  # so that the label is about the hidden units
    assert narrow.update(row, target).repairs == 1
    assert bool((narrow.state.variances() > 0.0).all())


@pytest.mark.parametrize("structure", CORRELATED)
@pytest.mark.parametrize("layers", [1, 2])
def test_repairs_keep_it_positive_where_labels_go_below_the_rounding(structure: str, layers: int) -> None:
    _, narrow = pair(structure=structure, layers=layers, noise_variance=1e-8, hidden_variance=1e-5)
    repairs, variances = 0, narrow.state.variances()
    for features, target in stream(4000, decades=6.0):
        repairs += narrow.update(features, target).repairs
        assert bool((narrow.state.variances() <= variances).all())
        variances = narrow.state.variances()
    assert repairs > 0
    assert smallest_eigenvalue(narrow.state) > 0.0


def test_without_repairs_it_does_not_stay_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_LEAST_QUOTIENT", 0.0)
    _, narrow = pair(layers=1, noise_variance=1e-6)
    samples = stream(1500, decades=5.0)
    with pytest.raises(UpdateError):
        learn(narrow, samples)


@pytest.mark.parametrize("structure", CORRELATED)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_jacobian_gives_the_covariance_with_the_output(structure: str, layers: int, outputs: int) -> None:
    wide, _ = pair(outputs, structure=structure, layers=layers)
    for features, target in stream(5, 2, outputs):
        wide.update(features, target)
    for features in (stream(1, 3)[0][0], stream(1, 1)[0][0]):
        jacobian = resolution.general_jacobian(wide.state, features)
        torch.testing.assert_close(wide.state.dense_cov() @ jacobian, update.propagate(wide.state, features)[1])
        torch.testing.assert_close(resolution.jacobian(wide.state, features), jacobian, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("structure", CORRELATED)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("outputs", "rows"), [(1, 1), (1, 4), (3, 1), (2, 3)])
def test_what_is_forgotten_follows_from_the_least_certain_combination(
    structure: str, layers: int, outputs: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, narrow = pair(outputs, structure=structure, layers=layers, noise_variance=1e-5)
    samples = stream(60, rows, outputs, decades=3.0)
    learn(narrow, samples)
    features = samples[0][0]
    cov, gradients = narrow.state.dense_cov().double(), resolution.general_jacobian(narrow.state, features)
    together, apart = gradients.mT @ cov @ gradients, gradients.mT @ (cov.diagonal().unsqueeze(-1) * gradients)
    quotient = float(eigh(together.numpy(), apart.numpy(), eigvals_only=True)[0])
    assert 0.0 < quotient < 0.4
    covariances = update.propagate(narrow.state, features)[1], narrow.state.variances().double()
    monkeypatch.setattr(state, "_LEAST_QUOTIENT", quotient * (1.0 - 1e-6))
    assert resolution.shrinkage(narrow.state, features, *covariances) == 0.0
    monkeypatch.setattr(state, "_LEAST_QUOTIENT", limit := quotient * (1.0 + 1e-6))
    forgotten = resolution.shrinkage(narrow.state, features, *covariances)
    assert forgotten == pytest.approx((2.0 * limit - quotient) / (1.0 - quotient), rel=1e-4)
    repaired = (1.0 - forgotten) * together + forgotten * apart
    assert eigh(repaired.numpy(), apart.numpy(), eigvals_only=True)[0] == pytest.approx(2.0 * limit, rel=1e-4)


def test_a_row_that_comes_twice_is_no_reason_to_forget() -> None:
    _, narrow = pair()
    learn(narrow, stream(5))
    features = stream(1)[0][0].repeat(3, 1)
    assert narrow.update(features, torch.zeros(3, 1)).repairs == 0


@MACHINE_CODE
@pytest.mark.parametrize("structure", CORRELATED)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.usefixtures("_short_block_rows")
def test_the_machine_code_asks_for_the_same_repairs(
    structure: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_LEAST_QUOTIENT", 1e-3)  # so that repairs are needed soon
    _, fast = pair(structure=structure, layers=layers, noise_variance=1e-6)
    plain, repairs = copy.deepcopy(fast), 0
    for features, target in stream(300, decades=5.0):
        cross_cov, variances = update.propagate(fast.state, features)[1], fast.state.variances().double()
        forgotten = resolution.shrinkage(fast.state, features, cross_cov, variances)
        info = fast.update(features, target)
        assert info.repairs == (forgotten > 0.0)
        repairs += info.repairs
    assert repairs > 0
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    without = BayesianHead(plain.in_features, plain.out_features, plain.config)
    without.load_state_dict(plain.state_dict())
    for features, target in stream(300, decades=5.0):
        without.update(features, target)
    assert smallest_eigenvalue(without.state) > 0.0
    probe = stream(1, 5)[0][0]
    torch.testing.assert_close(without(probe), fast(probe), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("structure", CORRELATED)
def test_scaling_correlations_leaves_variances_and_can_be_taken_back(structure: str) -> None:
    _, narrow = pair(structure=structure)
    for features, target in stream(5):
        narrow.update(features, target)
    before = narrow.state.clone()
    expected = before.dense_cov() * 0.75
    expected.diagonal().copy_(before.variances())
    resolution.scale_correlations_(narrow.state, 0.75, before.variances())
    assert torch.equal(narrow.state.dense_cov(), expected)
    resolution.scale_correlations_(narrow.state, 1.0 / 0.75, before.variances())
    torch.testing.assert_close(narrow.state.dense_cov(), before.dense_cov(), rtol=1e-6, atol=0.0)


def test_a_repair_and_its_update_are_one_change(monkeypatch: pytest.MonkeyPatch) -> None:
    _, narrow = pair(layers=1, noise_variance=1e-6, history=1)
    for features, target in stream(1500, decades=5.0):
        before, undone = snapshot(narrow), copy.deepcopy(narrow)
        if narrow.increment(features, target).correlation != 1.0:
            break
        narrow.update(features, target)
    with pytest.raises(UpdateError):
        narrow.update(features, torch.full_like(target, 1e300))
    assert_bits(narrow, before)
    step = narrow.increment(features, target)
    assert_bits(narrow, before)
    assert step.info.repairs == narrow.update(features, target).repairs == 1
    assert narrow.rollback() == 1
    torch.testing.assert_close(narrow.state.dense_cov(), undone.state.dense_cov(), rtol=1e-3, atol=1e-6)
    undone.apply_increment(step)
    assert undone.labels_seen == narrow.labels_seen + 1


@pytest.mark.parametrize("cast", [nn.Module.float, nn.Module.half, nn.Module.double, lambda module: module.cpu()])
def test_no_cast_reaches_it(cast: Any) -> None:
    for head in pair():
        before = snapshot(head)
        cast(nn.ModuleList([head]))
        assert all(value.dtype == before[name].dtype for name, value in head.state_dict().items())
        assert_bits(head, before)


def test_it_loads_from_its_own_dtype_only() -> None:
    wide, narrow = pair()
    for mine, other in ((wide, narrow), (narrow, wide)):
        before = snapshot(mine)
        with pytest.raises(RuntimeError, match=r"HeadConfig\.dtype"):
            mine.load_state_dict(other.state_dict())
        assert_bits(mine, before)
    fresh = BayesianHead(FEATURES, 1, narrow.config)
    fresh.load_state_dict(narrow.state_dict())
    assert_bits(fresh, snapshot(narrow))


def test_loosening_works_on_it() -> None:
    wide, narrow = pair()
    for head in (wide, narrow):
        for features, target in stream(20):
            head.update(features, target)
        head.reopen(0.5)
        head.forget(0.9)
        head.add_process_noise(0.1)
    assert narrow.cov_0.dtype == torch.float32
    torch.testing.assert_close(narrow.state.variances().double(), wide.state.variances(), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("options", [{"layers": 3}, {"feature_variance": 0.1}, {"dtype": "float16"}])
def test_what_it_is_not_made_for_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"dtype is 'float(32|16)'"):
        HeadConfig(**{"dtype": "float32", **options})


def test_half_the_memory() -> None:
    wide, narrow = (sum(block.nbytes for block in (head.mean, *head.state.cov)) for head in pair())
    assert wide == 2 * narrow


def test_array_features_are_read_in_float64() -> None:
    _, narrow = pair()
    other = copy.deepcopy(narrow)
    for features, target in stream(5):
        narrow.update(features, target)
        other.update(np.asarray(features), np.asarray(target))
    assert_bits(other, snapshot(narrow))
