"""What is done to a posterior from outside: sent to another process, loaded, given what is not its own."""

from __future__ import annotations

import copy
import multiprocessing
from typing import Any

import pytest
import torch
from conftest import randn
from torch import nn

from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead


def _sent(value: Any) -> None:
    """To another process, for which PyTorch moves tensors in place."""
    here, there = multiprocessing.Pipe()
    here.send(value)
    there.recv()


@pytest.mark.parametrize("sent", ["state_dict", "view", "share_memory"])
def test_a_head_whose_memory_was_moved_goes_on(sent: str) -> None:
    head = BayesianHead.from_linear(nn.Linear(4, 1))
    head.update(randn(1, 4, seed=0), randn(1, 1, seed=1))
    head(randn(2, 4, seed=2))
    twin = copy.deepcopy(head)
    if sent == "share_memory":
        head.share_memory()
    else:
        _sent(getattr(head, sent)())
    torch.testing.assert_close(head(randn(2, 4, seed=2)), twin(randn(2, 4, seed=2)), rtol=0.0, atol=0.0)
    for seed in range(20):
        for each in (head, twin):
            each.update(randn(1, 4, seed=seed), randn(1, 1, seed=100 + seed))
    assert int(head.labels_seen) == 21
    assert all(map(torch.equal, head.buffers(), twin.buffers()))


@pytest.mark.parametrize("structure", ["neuron", "joint"])
def test_a_batch_whose_memory_was_moved_goes_on(structure: str) -> None:
    config = HeadConfig(structure=structure)
    batch = HeadBatch(BayesianHead.from_linear(nn.Linear(4, 1), config) for _ in range(3))
    batch.update(randn(3, 4, seed=0), randn(3, 1, seed=1))
    twin = copy.deepcopy(batch)
    _sent(batch.state_dict())
    for seed in range(5):
        for each in (batch, twin):
            each.update(randn(3, 4, seed=seed), randn(3, 1, seed=100 + seed))
    assert [int(head.labels_seen) for head in batch] == [6, 6, 6]
    assert all(map(torch.equal, batch.buffers(), twin.buffers()))


def test_an_increment_of_another_state_or_head_is_refused() -> None:
    head = BayesianHead.from_linear(nn.Linear(4, 1))
    step = head.increment(randn(1, 4, seed=0), randn(1, 1, seed=1))
    head.apply_increment(step)
    before = copy.deepcopy(head)
    with pytest.raises(UpdateError, match="another state"):
        head.apply_increment(step)
    larger = BayesianHead.from_linear(nn.Linear(8, 1))
    with pytest.raises(ValueError, match="another head"):
        head.apply_increment(larger.increment(randn(1, 8, seed=0), randn(1, 1, seed=1)))
    assert all(map(torch.equal, head.buffers(), before.buffers()))
    assert bool((head.state.variances() >= 0.0).all())


def test_a_noise_with_a_gradient_is_taken_as_a_number() -> None:
    head = BayesianHead.from_linear(nn.Linear(4, 1))
    head.set_noise(torch.tensor(0.1, requires_grad=True).exp())
    head.update(randn(1, 4, seed=0), randn(1, 1, seed=1))
    assert not head.noise_cov.requires_grad


def test_what_is_not_finite_in_the_heads_units_is_refused() -> None:
    head = BayesianHead.from_linear(nn.Linear(4, 1), target_scale=torch.tensor([1e-10]))
    before = copy.deepcopy(head)
    with pytest.raises(ValueError, match="not finite"):
        head.set_noise(1e300)
    with pytest.raises(ValueError, match="complex"):
        head.set_noise(torch.tensor(1.0 + 1.0j))
    with pytest.raises(ValueError, match="not finite"):
        head.reset(torch.ones(1, 4), torch.ones(1), target_scale=torch.tensor([1e-310], dtype=torch.float64))
    assert all(map(torch.equal, head.buffers(), before.buffers()))


@pytest.mark.parametrize("wrong", ["shape", "missing", "unexpected", "dtype"])
@pytest.mark.parametrize("batched", [False, True])
def test_a_refused_load_changes_nothing(wrong: str, batched: bool) -> None:
    heads = [BayesianHead.from_linear(nn.Linear(4, 1)) for _ in range(2)]
    own, other = (HeadBatch(heads), HeadBatch(copy.deepcopy(heads))) if batched else heads
    for each in (other,) if not batched else other:
        each.update(randn(1, 4, seed=0), randn(1, 1, seed=1))
    saved = {name: value.clone() for name, value in other.state_dict().items()}
    name = "1.cov_2" if batched else "cov_2"
    if wrong == "missing":
        del saved[name]
    else:
        added = {"shape": torch.zeros(3, 3, dtype=torch.float64), "dtype": saved[name].float()}
        saved["x" if wrong == "unexpected" else name] = added.get(wrong, torch.zeros(1))
    before = copy.deepcopy(own)
    with pytest.raises(RuntimeError, match=r"unchanged|lost digits"):
        own.load_state_dict(saved)
    assert all(map(torch.equal, own.buffers(), before.buffers()))


@pytest.mark.parametrize(
    "options", [{"noise": "learned"}, {"robust_dof": 4.0}, {"dtype": "float32"}, {"rule": "replace"}]
)
def test_a_batch_takes_no_head_of_another_kind_later(options: dict[str, Any]) -> None:
    batch = HeadBatch(BayesianHead.from_linear(nn.Linear(4, 1)) for _ in range(2))
    features, target = randn(2, 4, seed=0), randn(2, 1, seed=1)
    batch.update(features, target)
    batch[1] = BayesianHead.from_linear(nn.Linear(4, 1), HeadConfig(**options))
    with pytest.raises(ValueError, match="one kind"):
        batch.update(features, target)
    assert [int(head.labels_seen) for head in batch] == [1, 0]


def test_no_head_is_in_a_batch_twice() -> None:
    head = BayesianHead.from_linear(nn.Linear(4, 1))
    with pytest.raises(ValueError, match="twice"):
        HeadBatch([head, head])


@pytest.mark.parametrize("how", ["made", "copied", "loaded", "assigned", "in a batch"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_a_head_of_inference_mode_learns_outside_of_it(how: str, outputs: int) -> None:
    torch.manual_seed(0)
    layer, config = nn.Linear(3, outputs), HeadConfig(width=8, history=2)
    expected = BayesianHead.from_linear(layer, config)
    head = copy.deepcopy(expected)
    with torch.inference_mode():
        if how == "made":
            head = BayesianHead.from_linear(layer, config)
        elif how == "copied":
            head = copy.deepcopy(expected)
        elif how == "in a batch":
            head = HeadBatch([copy.deepcopy(expected)])[0]
        else:
            head.load_state_dict(copy.deepcopy(expected.state_dict()), assign=how == "assigned")
        head.predict(torch.ones(2, 3))
    for row in (torch.ones(1, 3), torch.zeros(1, 3)):
        head.update(row, torch.ones(1, outputs))
        expected.update(row, torch.ones(1, outputs))
    for name, value in head.named_buffers():
        assert torch.equal(value, expected.get_buffer(name)), name
    torch.testing.assert_close(head(torch.ones(2, 3)), expected(torch.ones(2, 3)), rtol=0.0, atol=0.0)
    assert head.rollback(2) == 2
