"""Many heads in one call: the same as so many separate heads, whatever way the call takes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MACHINE_CODE, STRUCTURES, randn
from torch import Tensor, nn

from kbt_rl.inference import batch as batches
from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.types import UpdateInfo

HEADS, FEATURES = 5, 4


@pytest.fixture(params=[pytest.param("machine code", marks=MACHINE_CODE), "loop"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "loop":
        monkeypatch.setattr(batches.engines, "batch_engine_for", lambda kind: None)


def separate(config: HeadConfig, outputs: int = 1, heads: int = HEADS) -> list[BayesianHead]:
    """Heads with means, units and noise of their own."""
    found = []
    for seed in range(heads):
        linear = nn.Linear(FEATURES, outputs)
        with torch.no_grad():
            linear.weight.copy_(randn(outputs, FEATURES, seed=seed))
            linear.bias.zero_()
        units = {"feature_mean": randn(FEATURES, seed=10 + seed), "feature_scale": torch.full((FEATURES,), 1.0 + seed)}
        scale = None if config.link == "softmax" else torch.full((outputs,), 2.0 + seed)
        found.append(BayesianHead.from_linear(linear, config, **units, target_scale=scale))
        if config.link == "identity":
            found[-1].set_noise(0.1 + 0.05 * seed)
    return found


def batch_of(config: HeadConfig, outputs: int = 1) -> tuple[HeadBatch, list[BayesianHead]]:
    heads = separate(config, outputs)
    return HeadBatch(heads), heads


def labels_of(config: HeadConfig, outputs: int, seed: int, heads: int = HEADS) -> Tensor:
    drawn = randn(heads, outputs, seed=seed)
    return torch.softmax(drawn, dim=-1) if config.link == "softmax" else drawn


def bits(batch: HeadBatch) -> list[bytes]:
    """Of each head."""
    buffers = [value.numpy() for value in batch.state_dict().values()]
    return [b"".join(buffer[index].tobytes() for buffer in buffers) for index in range(len(batch))]


def assert_same(batch: HeadBatch, heads: list[BayesianHead], tolerance: float = 1e-10) -> None:
    assert len(batch) == len(heads)
    for mine, other in zip(batch, heads, strict=True):
        for (name, ours), theirs in zip(mine.named_buffers(), other.buffers(), strict=True):
            largest = tolerance * float(theirs.double().abs().max())
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=largest, msg=name)


@MACHINE_CODE
@pytest.mark.parametrize("structure", STRUCTURES)
def test_there_is_machine_code_for_two_layers_and_one_output(structure: Any) -> None:
    """So that the comparisons below compare two ways; which one was taken is not told in public."""
    batch, _ = batch_of(HeadConfig(structure=structure, layers=2))
    assert type(batch._engine) is batches.engines.BatchEngine


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rule", ["measure", "replace"])
@pytest.mark.parametrize("together", [False, True])
def test_they_learn_as_separate_heads(structure: Any, layers: int, rule: Any, together: bool) -> None:
    config = HeadConfig(structure=structure, layers=layers, rule=rule, hidden_variance=0.1)
    batch, heads = batch_of(config)
    for step in range(12):
        features, target = randn(HEADS, FEATURES, seed=100 + step), labels_of(config, 1, seed=200 + step)
        target[torch.arange(HEADS) % 3 == step % 4] = torch.nan
        info = batch.update(features, target, together=together)
        assert not info.refused
        for index, head in enumerate(heads):
            if target[index].isnan().any():
                assert info.labels[index] == 0
                assert np.isnan(info.nis[index])
                continue
            alone = head.update(features[index : index + 1], target[index : index + 1])
            assert info.of(index) == pytest.approx(alone, rel=1e-9, abs=1e-12, nan_ok=True)
    assert_same(batch, heads)


KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    **{f"two layers, {name}": (3, {"layers": 2, "structure": name, "hidden_variance": 0.1}) for name in STRUCTURES},
    "three layers": (1, {"layers": 3, "structure": "layer"}),
    "shared": (2, {}),
    "shared, learned noise": (2, {"noise": "learned"}),
    "learned noise": (1, {"layers": 2, "noise": "learned"}),
    "robust": (1, {"layers": 2, "robust_dof": 4.0, "structure": "diagonal"}),
    "history": (1, {"layers": 2, "history": 3, "structure": "neuron"}),
    "classes": (3, {"rule": "fisher", "last_variance": 1.0}),
    "classes, two layers": (3, {"rule": "laplace", "layers": 2, "last_variance": 1.0}),
    "uncertain features": (1, {"layers": 2, "feature_variance": 0.1}),
    "forgetting": (1, {"layers": 2, "forgetting": "process_noise", "forgetting_rate": 0.01}),
    "linearised": (1, {"layers": 2, "propagation": "linearised", "hidden_variance": 0.1}),
}


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_predicts_as_separate_heads(kind: str) -> None:
    outputs, settings = KINDS[kind]
    config = HeadConfig(**settings)
    batch, heads = batch_of(config, outputs)
    for step in range(4):
        features, target = randn(HEADS, FEATURES, seed=step), labels_of(config, outputs, seed=20 + step)
        info = batch.update(features, target, together=step % 2 == 0)
        alone = [head.update(r, t) for head, r, t in zip(heads, features.split(1), target.split(1), strict=True)]
        merged = info.merged()
        assert merged.labels == sum(each.labels for each in alone) == HEADS * outputs
        assert merged.nis == pytest.approx(sum(each.nis for each in alone))
        assert merged.epistemic_variance == pytest.approx(np.mean([each.epistemic_variance for each in alone]))
    assert_same(batch, heads)
    features = randn(HEADS, FEATURES, seed=50)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
    means = torch.cat([head(row) for head, row in zip(heads, features.split(1), strict=True)])
    torch.testing.assert_close(batch(features), means, **close)
    torch.testing.assert_close(batch(features.float()), batch(features.float().double()), **close)
    predictions = [head.predict(row) for head, row in zip(heads, features.split(1), strict=True)]
    found = batch.predict(features)
    for part, theirs in zip(found, zip(*predictions, strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(theirs), **close)
    own = torch.cat([each.epistemic_variance for each in predictions])
    torch.testing.assert_close(found.epistemic_variance, own, **close)
    features = randn(3 * HEADS, FEATURES, seed=51)
    blocks = [head.predict_logits(block) for head, block in zip(heads, features.split(3), strict=True)]
    for part, theirs in zip(batch.predict_logits(features, each=3), zip(*blocks, strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(theirs), **close)
    variances = torch.cat([head.epistemic_variance(b) for head, b in zip(heads, features.split(3), strict=True)])
    torch.testing.assert_close(batch.epistemic_variance(features, each=3), variances, **close)


# ---------------------------------------------------------------------- the batch owns the memory


@pytest.mark.usefixtures("_way")
def test_a_head_of_the_batch_is_a_copy_that_can_be_put_back() -> None:
    """What is done with a head by itself reaches the batch when it is put back, and not before."""
    batch, heads = batch_of(HeadConfig(layers=2, structure="neuron", hidden_variance=0.1))
    acts = (
        lambda head: head.update(randn(1, FEATURES, seed=1), randn(1, 1, seed=2)),
        lambda head: head.update(randn(40, FEATURES, seed=1), randn(40, 1, seed=2)),
        lambda head: head.reopen(0.5),
        lambda head: head.set_noise(0.3),
        lambda head: head.load_state_dict(heads[0].state_dict()),
    )
    for seed, act in enumerate(acts):
        features, target = randn(HEADS, FEATURES, seed=seed), randn(HEADS, 1, seed=30 + seed)
        batch.update(features, target)
        for head, row, label in zip(heads, features.split(1), target.split(1), strict=True):
            head.update(row, label)
        taken, before = batch[2], bits(batch)
        act(taken)
        act(heads[2])
        assert bits(batch) == before
        batch[2] = taken
        assert_same(batch, heads)
        taken.forget(0.5)
        assert_same(batch, heads)
        torch.testing.assert_close(batch(features)[2], heads[2](features[2:3])[0], rtol=1e-10, atol=1e-12)
    assert torch.equal(batch[-1].mean, batch[HEADS - 1].mean)
    for index in (HEADS, -HEADS - 1):
        with pytest.raises(IndexError, match=f"head {index} was asked for; there are {HEADS}"):
            batch[index]
    with pytest.raises(ValueError, match="a head of this batch is a BayesianHead"):
        batch[0] = BayesianHead(FEATURES, 2)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda batch: pickle.loads(pickle.dumps(batch))])
def test_a_copy_moves_on_its_own(duplicate: Any) -> None:
    batch, heads = batch_of(HeadConfig(layers=2, structure="layer"))
    batch.update(randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2))
    other, before = duplicate(batch), bits(batch)
    assert bits(other) == before
    other.update(randn(HEADS, FEATURES, seed=3), randn(HEADS, 1, seed=4))
    heads[0].update(randn(1, FEATURES, seed=3), randn(1, 1, seed=4))
    assert bits(batch) == before
    assert all(ours != theirs for ours, theirs in zip(before, bits(other), strict=True))


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("assign", [False, True])
def test_saved_buffers_come_back_bit_by_bit(assign: bool) -> None:
    config = HeadConfig(layers=2, structure="diagonal")
    batch, other = HeadBatch(separate(config)), HeadBatch(separate(config))
    batch.update(randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2))
    assert batch.state_dict().keys() == batch[0].state_dict().keys()
    other(randn(HEADS, FEATURES, seed=1))
    other.load_state_dict(copy.deepcopy(batch.state_dict()), assign=assign)
    assert bits(other) == bits(batch)
    for each in (batch, other):
        each.update(randn(HEADS, FEATURES, seed=3), randn(HEADS, 1, seed=4))
    assert bits(other) == bits(batch)
    broken = {**batch.state_dict(), "cov_0": -batch.get_buffer("cov_0")}
    before = bits(batch)
    with pytest.raises(RuntimeError, match=r"holds the variance -.*; expected finite, >= 0"):
        batch.load_state_dict(broken)
    model = nn.Sequential(batch)
    cast = {name: value.float() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"is torch\.float32 in the file"):
        model.load_state_dict(cast)
    with pytest.raises(RuntimeError, match="has shape"):
        batch.load_state_dict(HeadBatch(separate(config, heads=3)).state_dict())
    assert bits(batch) == before


def test_no_cast_reaches_the_posteriors() -> None:
    batch, _ = batch_of(HeadConfig(layers=2))
    before = bits(batch)
    assert bits(nn.Sequential(batch).half()[0]) == before
    batch.update(randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2))


# ---------------------------------------------------------------------- taking back


@pytest.mark.parametrize("structure", ["neuron", "joint"])
def test_updates_of_single_heads_are_taken_back(structure: Any) -> None:
    batch, heads = batch_of(HeadConfig(layers=2, structure=structure, history=4, hidden_variance=0.1))
    taken_back = [1, 1, 2, 0, 0]
    for step in range(4):
        features, target = randn(HEADS, FEATURES, seed=step), randn(HEADS, 1, seed=20 + step)
        target[step] = torch.nan
        batch.update(features, target)
        for index, head in enumerate(heads):
            learned = [other for other in range(4) if other != index]
            if step in learned[: len(learned) - taken_back[index]]:
                head.update(features[index : index + 1], target[index : index + 1])
    assert [batch.rollback(count, index) for index, count in enumerate(taken_back) if count] == [1, 1, 2]
    assert_same(batch, heads, 1e-9)
    with pytest.raises(ValueError, match="while 2 updates are kept"):
        batch.rollback(3, 0)
    batch[0] = heads[0]
    with pytest.raises(ValueError, match="while 0 updates are kept"):
        batch.rollback(1, 0)
    with pytest.raises(ValueError, match="keep no updates"):
        HeadBatch(separate(HeadConfig())).rollback(1, 0)


# ---------------------------------------------------------------------- what is refused


def certain(batch: HeadBatch, index: int) -> None:
    """Make a head certain of everything, and without noise: a label can only contradict it."""
    head = batch[index]
    head.set_noise(0.0)
    for block in head.state.cov:
        block.zero_()
    batch[index] = head


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
def test_who_refuses_stays_and_tells_why(structure: Any, layers: int) -> None:
    config = HeadConfig(structure=structure, layers=layers)
    batch, heads = batch_of(config)
    certain(batch, 1)
    features, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    features[2, 0], features[3, 1], target[4] = torch.nan, 1e300, torch.inf
    before = bits(batch)
    info = batch.update(features, target)
    assert [now == old for now, old in zip(bits(batch), before, strict=True)] == [False, True, True, True, True]
    heads[0].update(features[:1], target[:1])
    assert_same(HeadBatch([batch[0]]), heads[:1])
    assert info.labels.tolist() == [1, 0, 0, 0, 0]
    assert info.refused.keys() == {1, 2, 3, 4}
    assert isinstance(info.refused[1], UpdateError)
    assert isinstance(info.refused[3], UpdateError)
    assert "NaN or infinity" in str(info.refused[2])
    assert "NaN or infinity" in str(info.refused[4])
    assert info.merged().labels == 1


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
def test_huge_features_are_refused_however_small_the_variances(structure: Any, layers: int) -> None:
    _, heads = batch_of(HeadConfig(structure=structure, layers=layers))
    for head in heads:
        for block in head.state.cov:
            block.mul_(1e-20)
    batch = HeadBatch(heads)
    features, target = 1e27 * randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    before = bits(batch)
    assert batch.update(features, target).refused.keys() == set(range(HEADS))
    for index, head in enumerate(heads):
        with pytest.raises(UpdateError, match="huge"):
            head.update(features[index : index + 1], target[index : index + 1])
    assert bits(batch) == bits(HeadBatch(heads)) == before


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_step_that_would_leave_an_infinite_variance_is_refused(structure: Any) -> None:
    """The rule ``replace`` divides by the square of a variance, here 1e-320, while the mean hardly moves."""
    heads = [BayesianHead(FEATURES, 1, HeadConfig(layers=2, structure=structure, rule="replace")) for _ in range(HEADS)]
    for head in heads:
        head.set_noise(0.1)
        for block in head.state.cov:
            block.mul_(1e-160 if structure == "diagonal" else 1e-80)
    batch, features = HeadBatch(heads), randn(HEADS, FEATURES, seed=1)
    target, before = batch(features), bits(batch)
    info = batch.update(features, target)
    assert info.refused.keys() == set(range(HEADS))
    assert bits(batch) == before


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("history", [0, 2])
def test_together_one_refusal_stops_all(history: int) -> None:
    batch, _ = batch_of(HeadConfig(layers=2, structure="neuron", history=history))
    certain(batch, 1)
    features, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    before = bits(batch)
    with pytest.raises(UpdateError):
        batch.update(features, target, together=True)
    assert bits(batch) == before
    target[1] = torch.nan
    assert batch.update(features, target, together=True).merged().labels == HEADS - 1


@pytest.mark.usefixtures("_way")
def test_other_shapes_and_kinds_are_refused() -> None:
    batch, heads = batch_of(HeadConfig(layers=2))
    rows, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    for ask in (
        lambda: batch.update(rows[1:], target[1:]),
        lambda: batch.update(rows, target[1:]),
        lambda: batch.update(rows[:, 1:], target),
        lambda: batch(rows[1:]),
        lambda: batch.predict(rows[:, 1:]),
        lambda: batch.predict_logits(rows, each=2),
    ):
        with pytest.raises(ValueError, match=r"expected \((5|10), "):
            ask()
    with pytest.raises(TypeError, match="real numbers"):
        batch.update(rows, target.to(torch.complex128))
    with pytest.raises(ValueError, match="at least one head"):
        HeadBatch([])
    with pytest.raises(ValueError, match="of one kind; got 2"):
        HeadBatch([*heads, BayesianHead(FEATURES, 1)])


def test_outputs_that_labels_tell_apart_do_not_fit_into_shared_heads_of_a_batch() -> None:
    batch, heads = batch_of(HeadConfig(), 2)
    rows, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 2, seed=2)
    target[3, 0] = torch.nan
    before = bits(batch)
    info = batch.update(rows, target)
    assert list(info.refused) == [3]
    assert "use structure='neuron'" in str(info.refused[3])
    assert bits(batch)[3] == before[3]
    heads[3].update(rows[3:4], target[3:4])
    with pytest.raises(ValueError, match="have had different labels; use structure='neuron'"):
        HeadBatch(heads)
    apart, others = batch_of(HeadConfig(structure="neuron"), 2)
    assert not apart.update(rows, target).refused
    for index, head in enumerate(others):
        head.update(rows[index : index + 1], target[index : index + 1])
    assert_same(apart, others)


@pytest.mark.usefixtures("_way")
def test_nothing_to_learn() -> None:
    batch, _ = batch_of(HeadConfig(layers=2))
    before = bits(batch)
    for together in (False, True):
        info = batch.update(randn(HEADS, FEATURES, seed=1), torch.full((HEADS, 1), torch.nan), together=together)
        assert info.merged().labels == 0
        assert {name for name in UpdateInfo._fields if np.isfinite(getattr(info, name)).any()} == {"labels", "repairs"}
    assert bits(batch) == before


@pytest.mark.usefixtures("_way")
def test_rows_that_cannot_be_written_are_read() -> None:
    batch, heads = batch_of(HeadConfig(layers=2, structure="neuron"))
    features, target = randn(HEADS, FEATURES, seed=1).numpy(), np.asfortranarray(randn(HEADS, 1, seed=2).numpy())
    features.flags.writeable = False
    batch.update(features, target)
    for index, head in enumerate(heads):
        head.update(features[index : index + 1], target[index : index + 1])
    assert_same(batch, heads)
