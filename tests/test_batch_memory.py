"""A batch that does not look into its heads still knows who has left, and tells whoever watches a posterior."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MACHINE_CODE, STRUCTURES, randn
from torch import Tensor
from torch.func import functional_call

from kbt_rl.inference import compiled
from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead

HEADS, FEATURES = 5, 4
pytestmark = MACHINE_CODE


def batch_of(structure: str = "neuron", **options: Any) -> HeadBatch:
    config = HeadConfig(structure=structure, hidden_variance=0.1, noise_variance=0.05, **options)
    batch = HeadBatch(BayesianHead(FEATURES, 1, config) for _ in range(HEADS))
    learn(batch, 90)
    return batch


def learn(batch: HeadBatch, seed: int) -> None:
    batch.update(randn(HEADS, FEATURES, seed=seed), randn(HEADS, 1, seed=seed + 1))


def assert_learns_as(batch: HeadBatch, heads: list[BayesianHead], seed: int) -> None:
    """The batch, and each of ``heads`` by itself, learn the same and are then the same."""
    learn(batch, seed)
    features, target = randn(HEADS, FEATURES, seed=seed), randn(HEADS, 1, seed=seed + 1)
    for head, row, label in zip(heads, features.split(1), target.split(1), strict=True):
        head.update(row, label)
    for mine, other in zip(batch, heads, strict=True):
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- who has left


REPLACE: dict[str, Callable[[dict[str, Any], Tensor], Any]] = {
    "item": lambda buffers, value: buffers.__setitem__("cov_0", value),
    "update": lambda buffers, value: buffers.update(cov_0=value),
    "or": lambda buffers, value: buffers.__ior__({"cov_0": value}),
    "pop": lambda buffers, value: (buffers.pop("cov_0"), buffers.setdefault("cov_0", value)),
    "delete": lambda buffers, value: (buffers.__delitem__("cov_0"), buffers.update({"cov_0": value})),
    "clear": lambda buffers, value: (old := dict(buffers), buffers.clear(), buffers.update({**old, "cov_0": value})),
    "popitem": lambda buffers, value: (buffers.update([buffers.popitem()]), buffers.update(cov_0=value)),
}


@pytest.mark.parametrize("how", REPLACE)
def test_a_buffer_that_is_replaced_is_missed(how: str) -> None:
    batch = batch_of()
    heads = list(copy.deepcopy(batch))
    for head in (batch[3], heads[3]):
        REPLACE[how](head._buffers, 0.5 * head.get_buffer("cov_0"))
    for seed in (1, 2):
        assert_learns_as(batch, heads, seed)


@pytest.mark.parametrize("name", ["mean", "cov_0", "cov_1", "noise_cov", "feature_scale", "target_scale"])
def test_a_swap_of_one_buffer_is_seen_while_it_lasts(name: str) -> None:
    """``functional_call`` puts tensors into the modules behind their backs, and takes them out again."""
    batch, features = batch_of(), randn(HEADS, FEATURES, seed=1)
    stack, other = batch._stack, copy.deepcopy(batch)
    swapped = {f"2.{name}": 1.5 * batch[2].get_buffer(name) + 0.1}
    other[2].load_state_dict({**other[2].state_dict(), name: swapped[f"2.{name}"]})
    own = functional_call(batch[2], {name: swapped[f"2.{name}"]}, (features[2:3],))
    torch.testing.assert_close(own, other(features)[2:3], rtol=1e-10, atol=1e-12)
    before = batch(features)
    assert batch._stack is stack  # all were back in their places
    found = functional_call(batch, swapped, (features,))
    torch.testing.assert_close(found, other(features), rtol=1e-10, atol=1e-12)
    assert torch.equal(batch(features), before)
    assert_learns_as(batch, list(copy.deepcopy(batch)), 3)


def test_a_head_in_two_batches_is_one_head() -> None:
    batch = batch_of()
    heads = list(copy.deepcopy(batch))
    second = HeadBatch(list(batch)[1:])
    for seed in (1, 11):
        assert_learns_as(batch, heads, seed)
        features, target = randn(HEADS - 1, FEATURES, seed=seed + 5), randn(HEADS - 1, 1, seed=seed + 6)
        second.update(features, target)
        HeadBatch(heads[1:]).update(features, target)


def test_other_heads_in_the_list_are_seen() -> None:
    batch, other = batch_of(), batch_of()
    learn(other, 7)
    batch[1] = other[1]
    assert batch[1] is other[1]
    for seed in (1, 2):
        assert_learns_as(batch, list(copy.deepcopy(batch)), seed)


def test_copies_are_on_their_own() -> None:
    batch = batch_of()
    for duplicate in (copy.deepcopy(batch[1]), pickle.loads(pickle.dumps(batch[1]))):
        assert type(duplicate._buffers) is dict
        duplicate.mean = torch.zeros_like(duplicate.mean)
    assert batch[1].mean.abs().sum() > 0
    shallow, heads = copy.copy(batch[1]), list(copy.deepcopy(batch))
    shallow.mean = heads[1].mean = 0.5 * shallow.mean.clone()  # with the same buffers, as for any module
    assert batch[1].mean is shallow.mean
    assert_learns_as(batch, heads, 1)


# ---------------------------------------------------------------------- who watches


LOOKS: dict[str, Callable[[BayesianHead], Tensor]] = {
    "attribute": lambda head: head.mean,
    "state": lambda head: head.state.mean,
    "named buffers": lambda head: dict(head.named_buffers())["mean"],
    "state dict": lambda head: head.state_dict(keep_vars=True)["mean"],
    "detached": lambda head: head.state_dict()["mean"],
    "get": lambda head: head._buffers.get("mean"),  # type: ignore[return-value]
    "values": lambda head: next(iter(head._buffers.values())),  # type: ignore[return-value]
    "copy": lambda head: head._buffers.copy()["mean"],  # type: ignore[return-value]
    "or": lambda head: (head._buffers | {})["mean"],  # type: ignore[return-value]
    "a view": lambda head: head.state.weights[0],
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("together", [False, True])
def test_a_tensor_that_somebody_holds_tells_that_it_has_changed(structure: str, look: str, together: bool) -> None:
    batch = batch_of(structure)
    held = {index: LOOKS[look](batch[index]) for index in (1, 3)}
    for seed in range(3):
        before = {index: tensor._version for index, tensor in held.items()}
        target = randn(HEADS, 1, seed=seed)
        target[3] = torch.nan
        batch.update(randn(HEADS, FEATURES, seed=seed + 1), target, together=together)
        assert held[1]._version > before[1]
        assert held[3]._version == before[3]


def test_a_gradient_through_a_posterior_that_has_changed_is_refused() -> None:
    batch, factor = batch_of(), torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = (factor * batch[2].mean).sum()
    learn(batch, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_a_head_has_cached_is_made_anew(structure: str) -> None:
    """Its view to act by, and the form of a dense covariance to predict by; also in the first call after it acted."""
    batch, row = batch_of(structure), randn(1, FEATURES, seed=1)
    for seed in range(3):
        for head in batch:
            mean, (predicted, variance, _) = head(row), head.predict(row)
            fresh = copy.deepcopy(head)
            torch.testing.assert_close(mean, fresh(row), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(predicted, fresh.predict(row).mean, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(variance, fresh.predict(row).epistemic, rtol=1e-12, atol=1e-14)
        learn(batch, seed)


def test_counters_that_nobody_watches_stay() -> None:
    """That they are left alone is what the calls of many heads save."""
    batch = batch_of()
    assert batch._stack is not None
    for seed in range(3):
        learn(batch, seed)
        batch.predict(randn(HEADS, FEATURES, seed=seed))
    assert batch._stack.handed_out == {}
    assert batch[1].mean is batch[1].mean
    assert batch._stack.handed_out.keys() == {1}


# ---------------------------------------------------------------------- independent weights


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
@pytest.mark.parametrize("rule", ["measure", "replace"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_bad_variance_is_not_learned_from(bad: float, rule: Any, layer: int) -> None:
    """Also where nothing comes through to that weight: a feature of 0."""
    batch = batch_of("diagonal", rule=rule)
    features, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    features[:, 0] = 0.0
    for head in batch:
        head._cov()[layer][(0, 0)] = bad
    before = [head.mean.clone() for head in batch]
    info = batch.update(features, target)
    assert info.refused.keys() == set(range(HEADS))
    assert all(torch.equal(head.mean, old) for head, old in zip(batch, before, strict=True))


@pytest.mark.parametrize("rule", ["measure", "replace"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("size", [1e-160, 1e-305, 1e-310, 1e-322])
def test_a_variance_next_to_nothing_leaves_finite_numbers(rule: Any, noise: float, size: float) -> None:
    batch, features = batch_of("diagonal", rule=rule), randn(HEADS, FEATURES, seed=1)
    for head in batch:
        head.set_noise(noise)
        hidden, last = head.state.weights
        hidden[:, :-1], hidden[:, -1], last[:] = 0.0, 1.0, 0.5  # every unit is on, so that no step is 0
        for block in head._cov():
            block.fill_(size)
    info = batch.update(features, batch(features))  # where nothing is to be learned, nothing else would tell
    for index, head in enumerate(batch):
        assert index in info.refused or all(bool(torch.isfinite(block).all()) for block in (head.mean, *head._cov()))


def test_units_that_are_all_but_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around where their moves become too small to be squared: as without machine code."""
    batch = batch_of("diagonal")
    for index, head in enumerate(batch):
        hidden, last = head.state.weights
        hidden[:, :-1] = 0.0  # so that the steps can be seen, however small
        hidden[:, -1] = -torch.linspace(1.0 + index, 13.0, len(hidden), dtype=torch.float64)
        last.fill_(0.5)
    heads, steps = list(copy.deepcopy(batch)), []
    learn(batch, 1)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "kernels", lambda: None)
        for index, head in enumerate(heads):
            plain = BayesianHead(FEATURES, 1, head.config)
            plain.load_state_dict(head.state_dict())
            plain.update(randn(HEADS, FEATURES, seed=1)[index : index + 1], randn(HEADS, 1, seed=2)[index : index + 1])
            for ours, theirs in zip(batch[index]._cov(), plain._cov(), strict=True):
                np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-10)
            ours, theirs = (each.state.weights[0][:, :-1].numpy() for each in (batch[index], plain))
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-130)
            steps.append(np.abs(theirs))
    assert np.concatenate(steps).min() < 1e-150 < 1e-50 < np.quantile(steps, 0.5)
