"""The same posterior on a GPU, whose float64 rounds in another order: within 1e-9 of the CPU's after 200 updates."""

from __future__ import annotations

import pytest
import torch
from conftest import STRUCTURES, randn
from torch import nn

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 1), (4, 2)])
def test_a_stream_ends_at_the_same_posterior(structure: str, layers: int, rows: int, outputs: int) -> None:
    config = HeadConfig(structure=structure, layers=layers, noise_variance=0.1, hidden_variance=1e-3)
    torch.manual_seed(0)
    linear = nn.Linear(6, outputs)
    here, there = (BayesianHead.from_linear(linear, config).to(device) for device in ("cpu", "cuda"))
    for row, label in zip(randn(200, rows, 6, seed=1), randn(200, rows, outputs, seed=2), strict=True):
        expected, found = here.update(row, label), there.update(row.cuda(), label.cuda())
    assert found == pytest.approx(expected, rel=1e-7)
    probe = randn(5, 6, seed=3)
    for ours, theirs in zip(there.predict(probe.cuda()), here.predict(probe), strict=True):
        assert ours.device.type == "cuda"
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(there.covariance().cpu(), here.covariance(), rtol=1e-9, atol=1e-12)
