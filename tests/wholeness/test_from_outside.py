"""What is done to a posterior from outside: sent to another process, loaded, given what is not its own."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import randn
from torch import nn

from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from wholeness.attacks import bits
from wholeness.subjects import HEADS, batch, head, module, rows


def _sent(value: Any) -> None:
    """To another process, for which PyTorch moves tensors in place."""
    here, there = multiprocessing.Pipe()
    here.send(value)
    there.recv()


@pytest.mark.parametrize("sent", ["state_dict", "share_memory"])
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
    for mine, other in zip(head.buffers(), twin.buffers(), strict=True):  # other addresses, other rounding
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-15)


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


def test_an_increment_of_another_head_is_refused() -> None:
    head, larger = BayesianHead.from_linear(nn.Linear(4, 1)), BayesianHead.from_linear(nn.Linear(8, 1))
    before = bits(head)
    with pytest.raises(ValueError, match="another head"):
        head.apply_increment(larger.increment(randn(1, 8, seed=0), randn(1, 1, seed=1)))
    assert bits(head) == before


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


WRONG: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "missing": lambda saved, name: saved.pop(name),
    "shape": lambda saved, name: saved.update({name: torch.zeros(3, 2, dtype=torch.float64)}),
    "dtype": lambda saved, name: saved.update({name: saved[name].float()}),
    "unexpected": lambda saved, name: saved.update({f"{name}_x": torch.zeros(1)}),
    "no tensor": lambda saved, name: saved.update({name: "text"}),
    "not finite": lambda saved, name: saved[name].view(-1)[:1].fill_(torch.nan),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["mean", "cov_0", "noise_cov"])
@pytest.mark.parametrize(
    "make", [head, batch, lambda: nn.Sequential(head()), module], ids=["head", "batch", "nested", "module"]
)
def test_a_refused_load_changes_nothing(wrong: str, name: str, make: Any) -> None:
    own, other = make(), make()
    part = other[0] if isinstance(other, nn.Sequential) else other
    part.reopen() if hasattr(part, "reopen") else part.update(*rows(HEADS, 1, 7))
    saved = {key: value.clone() for key, value in other.state_dict().items()}
    WRONG[wrong](saved, f"0.{name}" if isinstance(other, nn.Sequential) else name)
    before = bits(own)
    with pytest.raises(RuntimeError):
        own.load_state_dict(saved)
    assert bits(own) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cov_0", torch.ones(1, 4, 4), "finite and lower triangular"),
        ("noise_cov", [[-1.0]], "has the eigenvalue -1: it is no covariance"),
        ("target_scale", [0.0], "is not positive everywhere"),
        ("feature_scale", [1.0, -1.0, 1.0], "is not positive everywhere"),
        ("labels_seen", -1, "counts labels: it is -1"),
        ("noise_labels", [0.0], "is not positive everywhere"),
        ("cov_1", [3], r"groups \[.*3.*\]; there are 1"),
        ("cov_1", [-1], r"groups \[.*-1.*\]; there are 1"),
    ],
)
@pytest.mark.parametrize("make", [head, batch])
def test_a_state_that_is_no_posterior_is_refused(make: Any, name: str, value: Any, message: str) -> None:
    own = make(1, noise="learned") if make is head else make(noise="learned")
    before, saved = bits(own), copy.deepcopy(own.state_dict())
    (saved[name] if make is head else saved[name][1]).copy_(torch.as_tensor(value))
    with pytest.raises(RuntimeError, match=message):
        own.load_state_dict(saved)
    assert bits(own) == before


def test_a_noise_that_is_not_symmetric_is_refused() -> None:
    own = head(2, noise="learned")
    saved = copy.deepcopy(own.state_dict())
    saved["noise_cov"][0, 1] += 0.01
    with pytest.raises(RuntimeError, match="not symmetric"):
        own.load_state_dict(saved)


@pytest.mark.parametrize("options", [{"noise": "learned"}, {"robust_dof": 4.0}, {"rule": "replace"}, {"layers": 2}])
def test_a_batch_takes_no_head_of_another_kind(options: dict[str, Any]) -> None:
    subject = batch()
    before = bits(subject)
    with pytest.raises(ValueError, match="a head of this batch is a BayesianHead"):
        subject[1] = head(1, **options)
    assert bits(subject) == before


def test_a_batch_takes_no_head_whose_outputs_have_had_different_labels() -> None:
    apart = head(2, missing=True)
    subject = HeadBatch([head(2)] * HEADS)
    before = bits(subject)
    with pytest.raises(ValueError, match="outputs have had different labels"):
        subject[1] = apart
    assert bits(subject) == before
    with pytest.raises(ValueError, match="outputs have had different labels"):
        HeadBatch([head(2), apart])


@pytest.mark.parametrize("kind", ["head", "batch"])
@pytest.mark.parametrize("change", ["by hand", "loaded", "loaded with the policy", "replaced", "noise"])
def test_a_foreign_change_is_not_rolled_back_over(kind: str, change: str) -> None:
    """What was learned before it cannot be taken back from what it has left."""
    subject = head(1, history=5) if kind == "head" else batch(history=5)
    count = 1 if kind == "head" else HEADS
    subject.update(*rows(count, 1, 8))
    state = {name: value.clone() for name, value in subject.state_dict().items()}
    if change == "by hand":
        subject.get_buffer("mean").mul_(1.0)
    elif change == "loaded":
        subject.load_state_dict(state)
    elif change == "loaded with the policy":
        nn.Sequential(subject).load_state_dict({f"0.{name}": value for name, value in state.items()})
    elif change == "replaced":
        subject._buffers["mean"] = subject._buffers["mean"].clone()
    elif kind == "head":
        subject.set_noise(0.2)
    else:
        subject[1] = subject[1]
        assert subject.rollback(1, 0) == 1  # the others have not changed
    with pytest.raises(ValueError, match="while 0 updates are kept"):
        subject.rollback(1) if kind == "head" or change != "noise" else subject.rollback(1, 1)
    subject.update(*rows(count, 1, 9))
    assert subject.rollback(1) == count


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
