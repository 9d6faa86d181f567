"""One covariance for all outputs of a layer, and a copy for each group of outputs that labels tell apart: exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MACHINE_CODE, linear, randn
from torch import Tensor
from wholeness.attacks import bits

from kbt_rl.inference import head as heads
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.types import UpdateInfo

FEATURES, OUTPUTS, UPDATES = 5, 6, 500
NOISE, VARIANCE = 0.3, 2.0


@pytest.fixture(params=["torch", pytest.param("numba", marks=MACHINE_CODE)], autouse=True)
def _code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(heads.engines, "engine_for", lambda kind: None)


def make_head(structure: str, **config: Any) -> BayesianHead:
    layer = linear(FEATURES, OUTPUTS, seed=1)
    settings = {"layers": 1, "noise_variance": NOISE, "last_variance": VARIANCE, **config}
    return BayesianHead.from_linear(layer, HeadConfig(structure=structure, **settings))  # type: ignore[arg-type]


def stream(kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features, labels and perhaps a variance of each label."""
    features, target = randn(UPDATES, FEATURES, seed=3), randn(UPDATES, OUTPUTS, seed=4)
    drawn = torch.rand(UPDATES, OUTPUTS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    if kind == "partial":
        target[drawn < 0.4] = torch.nan
    noise = {"noise of a label": 0.1 + drawn, "noise of a row": 0.1 + drawn[:, 0]}.get(kind)
    return features, target, noise


def regression(features: Tensor, target: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean ``(o, k)`` and covariance ``(o, k, k)`` of each output, from the normal equations of its own labels."""
    design = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    prior = torch.cat([randn(OUTPUTS, FEATURES, seed=1), randn(OUTPUTS, seed=2)[:, None]], dim=1)
    variances = torch.full_like(target, NOISE) if noise is None else noise.view(UPDATES, -1).expand_as(target)
    means, covs = [], []
    for output in range(OUTPUTS):
        seen = ~torch.isnan(target[:, output])
        weighted = design[seen] / variances[seen, output : output + 1]
        cov = torch.linalg.inv(weighted.mT @ design[seen] + torch.eye(FEATURES + 1, dtype=torch.float64) / VARIANCE)
        means.append(cov @ (weighted.mT @ target[seen, output] + prior[output] / VARIANCE))
        covs.append(cov)
    return torch.stack(means), torch.stack(covs)


def teach(head: BayesianHead, features: Tensor, target: Tensor, noise: Tensor | None) -> list[UpdateInfo]:
    rows = range(len(features))
    if noise is None:
        return [head.update(features[i : i + 1], target[i : i + 1]) for i in rows]
    return [head.update(features[i : i + 1], target[i : i + 1], noise[i : i + 1]) for i in rows]


@pytest.mark.parametrize("kind", ["plain", "partial", "noise of a label", "noise of a row"])
def test_it_equals_neuron_joint_and_batch_regression(kind: str) -> None:
    features, target, noise = stream(kind)
    mean, cov = regression(features, target, noise)
    probe = randn(7, FEATURES, seed=6)
    inputs = torch.cat([probe, torch.ones(7, 1, dtype=torch.float64)], dim=1)
    spread = torch.einsum("np,opq,nq->no", inputs, cov, inputs)
    records: list[list[UpdateInfo]] = []
    for structure in ("shared", "neuron", "joint"):
        head = make_head(structure)
        records.append(teach(head, features, target, noise))
        torch.testing.assert_close(head.mean.view(OUTPUTS, -1), mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(head.epistemic_variance(probe), spread, rtol=1e-10, atol=0.0)
        torch.testing.assert_close(head(probe), inputs @ mean.mT, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(head.covariance(), torch.block_diag(*cov), rtol=1e-9, atol=1e-12)
        assert int(head.labels_seen) == int((~torch.isnan(target)).any(dim=1).sum())
        if structure == "shared":
            groups = {"plain": 1, "noise of a row": 1}.get(kind, OUTPUTS)
            assert len(head.state.cov[0]) == groups
    for step in range(UPDATES):
        first = records[0][step]
        assert first.labels == int((~torch.isnan(target[step])).sum())
        for other in records[1:]:
            assert first == pytest.approx(other[step], rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("kind", ["plain", "partial", "noise of a label"])
def test_rows_in_one_call_are_rows_one_by_one(kind: str) -> None:
    features, target, noise = (part if part is None else part[:40] for part in stream(kind))
    together, one_by_one = make_head("shared"), make_head("shared")
    info = together.update(features, target) if noise is None else together.update(features, target, noise)
    parts = teach(one_by_one, features, target, noise)
    torch.testing.assert_close(together.mean, one_by_one.mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(together.covariance(), one_by_one.covariance(), rtol=1e-12, atol=1e-14)
    assert info.nis == pytest.approx(sum(part.nis for part in parts))
    assert info.log_density == pytest.approx(sum(part.log_density for part in parts))


@pytest.mark.parametrize("noise", [1e-3, 1e-12])
def test_a_label_that_counts_for_nothing_is_no_label(noise: float) -> None:
    """As its noise grows, a label becomes a missing one."""
    missing, noisy = make_head("shared"), make_head("shared")
    features, target, _ = stream("plain")
    variances = torch.full((3, OUTPUTS), noise, dtype=torch.float64)
    variances[1, 2] = 1e12
    noisy.update(features[:3], target[:3], variances)
    target[1, 2] = torch.nan
    variances[1, 2] = noise
    missing.update(features[:3], target[:3], variances)
    torch.testing.assert_close(noisy.mean, missing.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(noisy.covariance(), missing.covariance(), rtol=1e-6, atol=1e-7)


def test_units_of_targets_are_those_of_the_noise_of_a_label() -> None:
    scale = randn(OUTPUTS, seed=7).exp()
    features, target, noise = stream("noise of a label")
    assert noise is not None
    plain, scaled = make_head("shared"), make_head("shared")
    scaled.reset(randn(OUTPUTS, FEATURES, seed=1) * scale[:, None], randn(OUTPUTS, seed=2) * scale, target_scale=scale)
    plain.update(features[:9], target[:9], noise[:9])
    scaled.update(features[:9], target[:9] * scale, noise[:9] * scale.square())
    torch.testing.assert_close(scaled(features), plain(features) * scale, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (torch.ones(2), r"noise has shape \(2,\); expected \(3,\) or \(3, 6\)"),
        (torch.ones(3, 2), r"noise has shape \(3, 2\)"),
        (-torch.ones(3), "negative or not finite"),
        (torch.full((3,), torch.inf), "negative or not finite"),
        (torch.full((3,), torch.nan), "negative or not finite"),
    ],
)
def test_a_bad_noise_of_labels_changes_nothing(noise: Tensor, message: str) -> None:
    head = make_head("shared")
    before = bits(head)
    with pytest.raises(ValueError, match=message):
        head.update(randn(3, FEATURES, seed=1), randn(3, OUTPUTS, seed=2), noise)
    assert bits(head) == before


def test_correlated_noise_of_outputs_is_not_for_it() -> None:
    head = make_head("shared")
    with pytest.raises(ValueError, match="'shared' takes independent noise of each output; use structure='joint'"):
        head.set_noise(torch.eye(OUTPUTS) + 0.1)
