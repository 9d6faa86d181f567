"""Algorithm 1: which rows a pair of sequences becomes, and that equal rows count as less noise."""

from __future__ import annotations

import pytest
import torch
from conftest import randn
from torch import Tensor, nn

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.preprocessing import prefix_rows


def running_mean(sequence: Tensor) -> Tensor:
    """A causal encoder."""
    return sequence.cumsum(0) / torch.arange(1, len(sequence) + 1).unsqueeze(-1)


def pair(length: int) -> tuple[Tensor, Tensor]:
    return randn(length, 3, seed=length), randn(length, 2, seed=length + 1)


def test_last_uses_each_position_once() -> None:
    sequence, targets = pair(5)
    features, labels = prefix_rows(running_mean, sequence, targets)
    torch.testing.assert_close(features, running_mean(sequence))
    assert torch.equal(labels, targets)


def test_all_repeats_the_rows_of_every_prefix() -> None:
    sequence, targets = pair(3)
    features, labels = prefix_rows(running_mean, sequence, targets, rows="all")
    order = [0, 0, 1, 0, 1, 2]
    torch.testing.assert_close(features, running_mean(sequence)[order])
    assert torch.equal(labels, targets[order])


@pytest.mark.parametrize("layers", [1, 2])
def test_repeated_rows_act_like_less_noise(layers: int) -> None:
    linear = nn.Linear(3, 1)
    row, target = randn(1, 3, seed=1), torch.ones(1, 1)
    repeated = BayesianHead.from_linear(linear, HeadConfig(layers=layers, noise_variance=0.4))
    repeated.update(row.repeat(4, 1), target.repeat(4, 1))
    once = BayesianHead.from_linear(linear, HeadConfig(layers=layers, noise_variance=0.1))
    once.update(row, target)
    torch.testing.assert_close(repeated.mean, once.mean, rtol=1e-9, atol=1e-12)


def test_an_encoder_that_looks_ahead_is_encoded_prefix_by_prefix() -> None:
    sequence, targets = pair(4)

    def mean_of_all(prefix: Tensor) -> Tensor:
        return prefix.mean(0, keepdim=True).expand(len(prefix), -1)

    features, _ = prefix_rows(mean_of_all, sequence, targets)
    torch.testing.assert_close(features, running_mean(sequence))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(2, 2)}, "4 inputs and 2 targets"),
        ({"rows": "first"}, "choose 'all' or 'last'"),
        ({"encode": lambda prefix: prefix[:1]}, "returned 1 rows for a prefix of 2"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    sequence, targets = pair(4)
    arguments = {"encode": running_mean, "sequence": sequence, "targets": targets, "rows": "last"} | change
    with pytest.raises(ValueError, match=message):
        prefix_rows(**arguments)
