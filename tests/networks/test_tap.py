"""Hooks that are heard during the library's own calls, and change nothing else."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import randn
from torch import Tensor, nn

from kbt_rl.networks.tap import Tap, untapped


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def layers(net: nn.Sequential) -> list[nn.Linear]:
    return [part for part in net if isinstance(part, nn.Linear)]


def test_features_are_the_inputs_of_the_tapped_layers(net: nn.Sequential) -> None:
    first, second, last = layers(net)
    rows = randn(6, 3, seed=0).float()
    heard = Tap(last, (second, first)).hear(lambda: net(rows))
    expected = torch.cat([net[:4](rows), net[:2](rows), rows], dim=1)
    assert torch.equal(heard.features, expected)
    assert torch.equal(heard.result, net(rows))
    assert not heard.features.requires_grad


def test_the_answer_takes_the_place_of_the_last_layer_in_this_call_only(net: nn.Sequential) -> None:
    rows = randn(6, 3, seed=0).float()
    before = net(rows)
    tap = Tap(layers(net)[-1])

    def answer(features: Tensor, output: Tensor) -> Tensor:
        assert torch.equal(output, before)
        return features.sum(1, keepdim=True) + torch.zeros_like(output)

    heard = tap.hear(lambda: net(rows), answer)
    assert torch.equal(heard.result, net[:4](rows).sum(1, keepdim=True).expand(6, 2))
    assert torch.equal(net(rows), before)


def test_two_taps_on_one_network_do_not_hear_each_other(net: nn.Sequential) -> None:
    rows, last = randn(2, 3, seed=0).float(), layers(net)[-1]
    one, other = Tap(last), Tap(last)
    one.hear(lambda: net(rows), lambda features, output: output + 1.0)
    heard = other.hear(lambda: net(rows))
    assert torch.equal(heard.result, net(rows))


def test_removed_hooks_leave_nothing(net: nn.Sequential) -> None:
    tap = Tap(layers(net)[-1], layers(net)[:1])
    tap.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


def test_copies_of_a_tapped_network_are_not_tapped(net: nn.Sequential) -> None:
    rows = randn(2, 3, seed=0).float()
    tap = Tap(layers(net)[-1])
    copied, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    for other in (copied, pickled):
        assert torch.equal(other(rows), net(rows))
    with pytest.raises(ValueError, match="without its tapped layer"):
        tap.hear(lambda: pickled(rows))
    untapped(copied)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in copied.modules())


def test_threads_hear_their_own_calls(net: nn.Sequential) -> None:
    tap = Tap(layers(net)[-1])
    rows = [randn(2, 3, seed=seed).float() for seed in range(64)]
    with ThreadPoolExecutor(8) as pool:
        heard = list(pool.map(lambda one: tap.hear(lambda: net(one)).features, rows))
    for one, features in zip(rows, heard, strict=True):
        assert torch.equal(features, net[:4](one))


def test_a_call_that_fails_is_over(net: nn.Sequential) -> None:
    tap = Tap(layers(net)[-1])
    with pytest.raises(RuntimeError):
        tap.hear(lambda: net(torch.zeros(1, 7)))
    assert tap.hear(lambda: net(torch.zeros(1, 3))).features.shape == (1, 4)
    with pytest.raises(RuntimeError, match="calls itself"):
        tap.hear(lambda: tap.hear(lambda: net(torch.zeros(1, 3))))
