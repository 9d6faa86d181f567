"""The NumPy form of the commonest update against the PyTorch definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kbt_rl.inference import scalar_step
from kbt_rl.inference.errors import NotPositiveDefiniteError
from kbt_rl.inference.head import BayesianHead, HeadConfig
from kbt_rl.inference.output import RULES


def random_head(seed: int, width: int | None = None, hidden_variance: float = 1e-2) -> BayesianHead:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(5, 1)
    config = HeadConfig(width=width, hidden_variance=hidden_variance, last_variance=0.5, rho=0.7, noise_variance=0.05)
    head = BayesianHead.from_linear(linear, config)
    for _ in range(3):  # correlates the layers
        head.update(torch.randn(4, 5, generator=generator), torch.randn(4, 1, generator=generator))
    return head


@pytest.mark.parametrize("rule", ["measure", "replace"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("width", "hidden_variance"), [(None, 1e-2), (13, 1e-5), (None, 0.0)])
def test_the_increment_equals_the_definition(
    seed: int, width: int | None, hidden_variance: float, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = random_head(seed, width, hidden_variance)
    head.rule = RULES[rule]
    features, target = torch.randn(1, 5, generator=torch.Generator().manual_seed(seed + 50)), torch.ones(1, 1)
    assert scalar_step.applies(head.state, 1)
    fast = head.increment(features, target)
    monkeypatch.setattr(scalar_step, "applies", lambda state, rows: False)
    plain = head.increment(features, target)
    scale = float(plain.mean_step.abs().max())
    torch.testing.assert_close(fast.mean_step, plain.mean_step, rtol=1e-10, atol=1e-12 * scale)
    assert torch.equal(fast.signs, plain.signs)
    torch.testing.assert_close(fast.cov_factor.abs(), plain.cov_factor.abs(), rtol=1e-10, atol=1e-13)
    for name in ("innovation", "nis", "epistemic_variance", "predictive_variance", "smallest_variance", "labels"):
        assert getattr(fast.info, name) == pytest.approx(getattr(plain.info, name), rel=1e-9, abs=1e-15), name


def test_a_stream_of_updates_ends_at_the_same_posterior(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, target = torch.randn(100, 1, 5, generator=generator), torch.randn(100, 1, 1, generator=generator)
    fast, plain = random_head(0), random_head(0)
    plain.load_state_dict(fast.state_dict())
    for rows, label in zip(features, target, strict=True):
        fast.update(rows, label)
    monkeypatch.setattr(scalar_step, "applies", lambda state, rows: False)
    for rows, label in zip(features, target, strict=True):
        plain.update(rows, label)
    torch.testing.assert_close(fast.mean, plain.mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(fast.state.dense_cov(), plain.state.dense_cov(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [{"structure": "layer"}, {"layers": 1}, {"layers": 3}, {"relu_order": 3}, {"feature_variance": 0.1}],
)
def test_other_heads_take_the_general_path(change: dict) -> None:
    head = BayesianHead.from_linear(nn.Linear(3, 1), HeadConfig(**change))
    assert not scalar_step.applies(head.state, 1)


def test_several_rows_or_outputs_take_the_general_path() -> None:
    assert not scalar_step.applies(BayesianHead.from_linear(nn.Linear(3, 2)).state, 1)
    assert not scalar_step.applies(BayesianHead.from_linear(nn.Linear(3, 1)).state, 2)


def test_no_variance_at_all_is_refused_and_changes_nothing() -> None:
    config = HeadConfig(hidden_variance=0.0, last_variance=0.0, noise_variance=0.0)
    head = BayesianHead.from_linear(nn.Linear(3, 1), config)
    before = head.mean.clone()
    with pytest.raises(NotPositiveDefiniteError):
        head.update(torch.ones(1, 3), torch.ones(1, 1))
    assert torch.equal(head.mean, before)
