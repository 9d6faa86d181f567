"""A layer learned under several label noises: each exact, weighted by the evidence, against SciPy and least squares."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MACHINE_CODE, linear, randn
from scipy import stats
from torch import Tensor, nn
from wholeness.attacks import bits

from kbt_rl.inference.engines import registry as engines
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.model_average import RATIOS, SHARES, ModelAverage

FEATURES, OUTPUTS, ROWS = 4, 2, 30
PRIOR = 0.25


@pytest.fixture(params=["torch", pytest.param("numba", marks=MACHINE_CODE)], autouse=True)
def _code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        for name in ("engine_for", "average_engine_for"):
            monkeypatch.setattr(engines, name, lambda kind: None)


def average(outputs: int = OUTPUTS, spread: float = 1e-6, **settings: Any) -> ModelAverage:
    """Steps from label to label are large beside ``spread``, so that all evidence counts in full."""
    head = ModelAverage(FEATURES, outputs, PRIOR, **{"first": 1.0, **settings})
    layer = linear(FEATURES, outputs, seed=1)
    head.reset(layer.weight, layer.bias, spread=spread)
    return head


def stream(outputs: int = OUTPUTS, seed: int = 3) -> tuple[Tensor, Tensor]:
    features = randn(ROWS, FEATURES, seed=seed)
    return features, features @ randn(FEATURES, outputs, seed=seed + 1) + 0.3 * randn(ROWS, outputs, seed=seed + 2)


def prior_mean(features: Tensor, outputs: int) -> Tensor:
    layer = linear(FEATURES, outputs, seed=1)
    found: Tensor = features @ layer.weight.detach().double().mT + layer.bias.detach().double()
    return found


def test_before_any_label_it_is_the_layer() -> None:
    features = randn(5, FEATURES, seed=9)
    head = average()
    torch.testing.assert_close(head.mean_outputs(features), prior_mean(features, OUTPUTS), rtol=0.0, atol=1e-14)
    np.testing.assert_allclose(head.evidence.shares, np.array(SHARES) / sum(SHARES))


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_density_of_a_stream_is_the_marginal_likelihood_of_the_conjugate_model(ratio: float) -> None:
    head = average(outputs=1, ratios=[ratio], shares=[1.0])
    features, target = stream(outputs=1)
    found = sum(head.update(features[row : row + 1], target[row : row + 1]).log_density for row in range(ROWS))
    design = torch.cat([features, torch.ones(ROWS, 1, dtype=torch.float64)], dim=1).numpy()
    # Weights N(m, s P), noise s ratio, s inverse-gamma with 2 degrees of freedom: the labels are jointly Student's t.
    shape = ratio * np.eye(ROWS) + PRIOR * design @ design.T
    exact = stats.multivariate_t.logpdf(target[:, 0].numpy(), prior_mean(features, 1)[:, 0].numpy(), shape, df=2)
    assert found == pytest.approx(exact, rel=1e-9)


def test_weights_are_the_posterior_probabilities_of_the_models() -> None:
    head = average(outputs=1)
    features, target = stream(outputs=1)
    for row in range(ROWS):
        head.update(features[row : row + 1], target[row : row + 1])
    design = torch.cat([features, torch.ones(ROWS, 1, dtype=torch.float64)], dim=1).numpy()
    residual = (target - prior_mean(features, 1))[:, 0].numpy()
    logs = [
        np.log(share)
        + stats.multivariate_t.logpdf(residual, shape=ratio * np.eye(ROWS) + PRIOR * design @ design.T, df=2)
        for ratio, share in zip(RATIOS, SHARES, strict=True)
    ]
    exact = np.exp(logs - np.logaddexp.reduce(logs))
    np.testing.assert_allclose(head.evidence.shares, exact, rtol=1e-8)


def test_the_mean_is_that_of_ridge_regressions_weighted_by_the_evidence() -> None:
    head = average()
    features, target = stream()
    head.update(features, target)
    design = torch.cat([features, torch.ones(ROWS, 1, dtype=torch.float64)], dim=1)
    at = randn(3, FEATURES, seed=20)
    rows = torch.cat([at, torch.ones(3, 1, dtype=torch.float64)], dim=1)
    each = []
    for ratio in RATIOS:
        gram = design.mT @ design + ratio / PRIOR * torch.eye(FEATURES + 1, dtype=torch.float64)
        fit = torch.linalg.solve(gram, design.mT @ (target - prior_mean(features, OUTPUTS)))
        each.append(prior_mean(at, OUTPUTS) + rows @ fit)
    shares = torch.from_numpy(head.evidence.shares)
    expected = (shares[:, None, None] * torch.stack(each)).sum(0)
    torch.testing.assert_close(head.mean_outputs(at), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(head.predict(at).mean, expected, rtol=1e-9, atol=1e-9)


def test_the_mean_follows_every_change() -> None:
    """It is kept from call to call."""
    head, at = average(history=3), randn(3, FEATURES, seed=20)
    features, target = stream()
    saved = copy.deepcopy(head).state_dict()
    changes: list[Callable[[], object]] = [
        lambda: head.update(features, target),
        lambda: head.rollback(),
        lambda: head.update(features[:3], target[:3]),
        lambda: head.reopen(0.5),
        lambda: head.add_process_noise(0.1),
        lambda: head.forget(0.9),
        lambda: head.update(features[3:6], target[3:6]),
        lambda: head.load_state_dict(saved),
        lambda: nn.Sequential(head).load_state_dict(prefixed(saved)),
        lambda: head.reset(torch.ones(OUTPUTS, FEATURES), torch.zeros(OUTPUTS)),
    ]
    for change in changes:
        head.mean_outputs(at)
        change()
        torch.testing.assert_close(head.mean_outputs(at), head.predict(at).mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(head.mean_outputs(at[0]), head.predict(at).mean[0], rtol=1e-12, atol=1e-12)


def test_the_predicted_variance_is_that_of_the_mixture() -> None:
    head = average(outputs=1)
    features, target = stream(outputs=1)
    head.update(features, target)
    at = randn(1, FEATURES, seed=20)
    evidence, each = head.evidence, head.head.predict(at)
    generator = np.random.default_rng(0)
    scales = evidence.scale[:, 0] * each.epistemic_variance[0].numpy()
    chosen = generator.choice(3, size=400_000, p=evidence.shares)
    drawn = each.mean[0].numpy()[chosen] + np.sqrt(scales[chosen]) * generator.standard_normal(len(chosen))
    found = float(head.predict(at).epistemic_variance)
    error = np.std((drawn - drawn.mean()) ** 2) / np.sqrt(len(drawn))
    assert abs(drawn.var() - found) < 6.0 * error
    assert float(head.epistemic_variance(at)) == found


def test_units_of_features_and_targets_do_not_matter() -> None:
    features, target = stream()
    plain, scaled = average(), ModelAverage(FEATURES, OUTPUTS, PRIOR, first=1.0)
    layer = linear(FEATURES, OUTPUTS, seed=1)
    centre, unit, size = randn(FEATURES, seed=5), torch.tensor([1e-3, 2.0, 1.0, 50.0]), torch.tensor([10.0, 0.1])
    weight = layer.weight.detach().double() * size[:, None] / unit
    bias = layer.bias.detach().double() * size - weight @ centre
    scaled.reset(weight, bias, feature_mean=centre, feature_scale=unit, target_scale=size, spread=1e-6)
    for row in range(ROWS):
        one = plain.update(features[row : row + 1], target[row : row + 1])
        other = scaled.update(features[row : row + 1] * unit + centre, target[row : row + 1] * size)
        assert one.log_density == pytest.approx(other.log_density, rel=1e-6, abs=1e-6)
    at = randn(2, FEATURES, seed=7)
    torch.testing.assert_close(
        scaled.mean_outputs(at * unit + centre), plain.mean_outputs(at) * size, rtol=1e-6, atol=1e-6
    )


def test_evidence_of_repeated_labels_counts_by_how_far_the_features_moved() -> None:
    features, target = stream(outputs=1)
    head = average(outputs=1, spread=4.0, first=0.03)
    head.update(features[:1], target[:1])
    assert float(head.dof) == pytest.approx(2.03)
    head.update(features[:1], target[:1])
    assert float(head.dof) == pytest.approx(2.03)  # the same state again tells nothing of the noise
    near = features[:1] + 0.1
    head.update(near, target[:1])
    assert float(head.dof) == pytest.approx(2.03 + 4 * 0.1**2 / 4.0)
    head.update(near + 10.0, target[:1])
    assert float(head.dof) == pytest.approx(3.03 + 4 * 0.1**2 / 4.0)  # at most a whole label


def test_missing_entries_are_left_out() -> None:
    features, target = stream()
    target[::2, 0] = torch.nan
    head, alone = average(), average()
    for row in range(ROWS):
        head.update(features[row : row + 1], target[row : row + 1])
    assert head.dof.tolist() == [2.0 + ROWS / 2, 2.0 + ROWS]
    other = target.clone()
    other[:, 1] = torch.nan
    for row in range(ROWS):
        alone.update(features[row : row + 1], other[row : row + 1])
    at = randn(3, FEATURES, seed=20)
    means = head.head.mean_outputs(at).view(3, 3, OUTPUTS), alone.head.mean_outputs(at).view(3, 3, OUTPUTS)
    torch.testing.assert_close(means[0][..., 0], means[1][..., 0], rtol=1e-10, atol=1e-10)


def test_rows_without_a_label_are_left_out_whatever_their_features() -> None:
    features, target = stream()
    head, alone = average(), average()
    wild = torch.full((1, FEATURES), torch.nan, dtype=torch.float64)
    nothing = torch.full((1, OUTPUTS), torch.nan, dtype=torch.float64)
    info = head.update(torch.cat([wild, features, wild]), torch.cat([nothing, target, nothing]))
    assert info == alone.update(features, target)
    assert bits(head) == bits(alone)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("log_shares", torch.nan, "is not finite"),
        ("misfit", -1.0, "not positive"),
        ("dof", 0.0, "not positive"),
        ("last", torch.inf, "is not finite"),
        ("head.mean", torch.nan, "holds NaN or infinity"),
    ],
)
def test_broken_evidence_is_not_loaded(name: str, value: float, message: str) -> None:
    head = average()
    head.update(*stream())
    before, saved = bits(head), head.state_dict()
    saved = {key: tensor.clone() for key, tensor in saved.items()}
    saved[name].fill_(value)
    for load in (head.load_state_dict, lambda state: nn.Sequential(head).load_state_dict(prefixed(state))):
        with pytest.raises(RuntimeError, match=message):
            load(saved)
        assert bits(head) == before
    for key in saved:
        shorter = {**head.state_dict(), key: saved[key].float() if saved[key].is_floating_point() else saved[key].int()}
        with pytest.raises(RuntimeError, match=r"in the file and torch\.\w+ in the head"):
            head.load_state_dict(shorter)


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"0.{name}": value for name, value in state.items()}


def test_an_update_without_labels_changes_nothing() -> None:
    head = average()
    before = bits(head)
    info = head.update(randn(2, FEATURES, seed=0), torch.full((2, OUTPUTS), torch.nan, dtype=torch.float64))
    assert info.labels == 0
    assert bits(head) == before


@pytest.mark.parametrize(
    ("features", "target", "error"),
    [
        (torch.full((1, FEATURES), torch.nan), torch.zeros(1, OUTPUTS), ValueError),
        (torch.zeros(1, FEATURES), torch.full((1, OUTPUTS), torch.inf), ValueError),
        (torch.full((1, FEATURES), 1e200, dtype=torch.float64), torch.zeros(1, OUTPUTS), UpdateError),
        (torch.zeros(1, FEATURES + 1), torch.zeros(1, OUTPUTS), ValueError),
        (torch.zeros(1, FEATURES), torch.zeros(1, OUTPUTS + 1), ValueError),
        (torch.zeros(2, FEATURES), torch.zeros(1, OUTPUTS), ValueError),
    ],
)
def test_what_is_refused_changes_nothing(features: Tensor, target: Tensor, error: type[Exception]) -> None:
    head = average()
    head.update(*stream())
    before = bits(head)
    with pytest.raises(error):
        head.update(features, target)
    assert bits(head) == before


def test_rollback_takes_back_the_evidence_with_the_weights() -> None:
    features, target = stream()
    head = average(history=5)
    head.update(features[:10], target[:10])
    evidence, at = head.evidence, randn(3, FEATURES, seed=20)
    before, kept = head.mean_outputs(at), [part.copy() for part in evidence]
    for row in (10, 11, 12):
        head.update(features[row : row + 1], target[row : row + 1])
    assert head.undoable == 4
    assert head.rollback(3) == 3
    torch.testing.assert_close(head.mean_outputs(at), before, rtol=1e-9, atol=1e-9)
    for now, then in zip(head.evidence, kept, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_saved_head_predicts_the_same_bits() -> None:
    head = average()
    head.update(*stream())
    other = ModelAverage(FEATURES, OUTPUTS, **head.settings())
    other.load_state_dict(head.state_dict())
    at = randn(3, FEATURES, seed=20)
    assert torch.equal(other.mean_outputs(at), head.mean_outputs(at))
    assert torch.equal(other.predict(at).epistemic, head.predict(at).epistemic)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_a_copy_moves_on_its_own(how: Callable[[ModelAverage], ModelAverage]) -> None:
    head = average(history=2)
    features, target = stream()
    head.update(features, target)
    other, before, at = how(head), bits(head), randn(3, FEATURES, seed=20)
    assert torch.equal(other.mean_outputs(at), head.mean_outputs(at))
    other.update(features, -target)
    assert bits(head) == before
    assert (head.undoable, other.undoable) == (1, 1)
    other.rollback()
    torch.testing.assert_close(other.mean_outputs(at), head.mean_outputs(at), rtol=1e-9, atol=1e-9)


def test_reopening_brings_the_doubt_back() -> None:
    head = average()
    features, target = stream()
    at = randn(3, FEATURES, seed=20)
    start = head.epistemic_variance(at)
    head.update(features, target)
    mean = head.head.mean_outputs(at)
    assert bool((head.epistemic_variance(at) < start).all())
    head.reopen()
    torch.testing.assert_close(head.head.mean_outputs(at), mean)
    np.testing.assert_allclose(head.evidence.shares, np.array(SHARES) / sum(SHARES))
    own = head.head.epistemic_variance(at)
    fresh = average().head.epistemic_variance(at)
    torch.testing.assert_close(own, fresh)


def test_outputs_of_a_model_share_a_covariance_whatever_their_scales() -> None:
    head, layer = ModelAverage(FEATURES, 9), linear(FEATURES, 9)
    head.reset(layer.weight, layer.bias, target_scale=randn(9, seed=2).exp())
    features, target = stream(9)
    for row in range(3):
        head.update(features[row : row + 1], target[row : row + 1])
    assert len(head.head.cov_0) == len(RATIOS)


@pytest.mark.parametrize(
    "settings",
    [{"ratios": [1.0], "shares": [0.5, 0.5]}, {"ratios": [], "shares": []}, {"ratios": [0.0], "shares": [1.0]}],
)
def test_ratios_and_shares_that_make_no_mixture_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        ModelAverage(FEATURES, OUTPUTS, **settings)
