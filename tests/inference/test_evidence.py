"""The sum of one-step-ahead log densities against the marginal likelihood of exact linear regression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import STRUCTURES, linear, marginal_likelihood, randn, random_cov
from torch import nn
from wholeness.attacks import bits

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.evidence import sequential_log_density
from kbt_rl.inference.head import BayesianHead

FEATURES = 3


def linear_head(outputs: int, last_variance: float, **config: Any) -> BayesianHead:
    layer = linear(FEATURES, outputs, seed=0)
    independent = config.pop("independent", False)
    settings = HeadConfig(layers=1, last_variance=last_variance, **config)
    head = BayesianHead.from_linear(
        layer,
        settings,
        feature_mean=randn(FEATURES, seed=2),
        feature_scale=randn(FEATURES, seed=3).exp(),
        target_scale=randn(outputs, seed=4).exp(),
    )
    noise = 0.2 * random_cov(outputs, seed=5)
    head.set_noise(noise.diagonal().diag() if independent else noise)
    return head


# ---------------------------------------------------------------------- the evidence of one layer is exact


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("structure", ["joint", "layer"])
@pytest.mark.parametrize("order", [None, 0, 1])
@pytest.mark.parametrize("block", [1, 7, 40])
def test_with_one_layer_it_is_the_marginal_likelihood(
    outputs: int, structure: str, order: int | None, block: int
) -> None:
    head = linear_head(outputs, 0.7, structure=structure)
    features, targets = randn(40, FEATURES, seed=6), 2.0 * randn(40, outputs, seed=7)
    expected = marginal_likelihood(head, features, targets)
    if order is not None:
        taken = torch.randperm(40, generator=torch.Generator().manual_seed(order))
        features, targets = features[taken], targets[taken]
    found = sequential_log_density(head, zip(features.split(block), targets.split(block), strict=True))
    assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("structure", [*STRUCTURES, "shared"])
def test_the_head_itself_stays_as_it_is(structure: Any) -> None:
    config = HeadConfig(layers=1 if structure == "shared" else 2, structure=structure, noise="learned", history=2)
    head = BayesianHead.from_linear(nn.Linear(FEATURES, 1), config)
    before = bits(head)
    batches = list(zip(randn(5, FEATURES, seed=0).split(1), randn(5, 1, seed=1).split(1), strict=True))
    assert sequential_log_density(head, batches) == sequential_log_density(head, batches) != 0.0
    assert bits(head) == before
    assert sequential_log_density(head, []) == 0.0


@pytest.mark.parametrize("structure", ["joint", "shared"])
def test_labels_in_part_count_with_their_own_scales(structure: str) -> None:
    """The marginal likelihood of those entries that have a label."""
    head = linear_head(2, 0.7, structure=structure, independent=structure == "shared")
    features, targets = randn(12, FEATURES, seed=6), 2.0 * randn(12, 2, seed=7)
    targets[torch.arange(12) % 3 == 0, 0] = torch.nan
    targets[7, 1], targets[5] = torch.nan, torch.nan
    expected = marginal_likelihood(head, features, targets)
    found = sequential_log_density(head, zip(features.split(4), targets.split(4), strict=True))
    assert found == pytest.approx(expected, abs=1e-8)


def test_classes_are_scored_by_their_log_probability() -> None:
    head = BayesianHead.from_linear(nn.Linear(FEATURES, 3), HeadConfig(rule="laplace"))
    features, classes, expected = randn(6, FEATURES, seed=8), torch.tensor([0, 2, 2, -100, 1, 0]), 0.0
    found = sequential_log_density(head, zip(features.split(1), classes.split(1), strict=True))
    for row, label in zip(features.split(1), classes.split(1), strict=True):
        if int(label) >= 0:
            expected += float(torch.log_softmax(head(row), dim=-1)[0, int(label)])
        head.update(row, label)
    assert found == pytest.approx(expected, rel=1e-10)
