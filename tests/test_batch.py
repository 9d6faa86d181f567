"""Many heads in one call: the same as so many separate heads, whatever way the call takes."""

from __future__ import annotations

import copy
import pickle
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MACHINE_CODE, STRUCTURES, randn
from torch import Tensor, nn

from kbt_rl.inference import compiled, state
from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.record import UpdateInfo
from kbt_rl.inference.stack import HeadStack

HEADS, FEATURES = 5, 4


@pytest.fixture(params=[pytest.param("machine code", marks=MACHINE_CODE), "loop"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "loop":
        monkeypatch.setattr(compiled, "kernels", lambda: None)


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


def batch_of(config: HeadConfig, outputs: int = 1, **settings: Any) -> tuple[HeadBatch, list[BayesianHead]]:
    heads = separate(config, outputs)
    return HeadBatch(copy.deepcopy(heads), **settings), heads


def labels_of(config: HeadConfig, outputs: int, seed: int, heads: int = HEADS) -> Tensor:
    drawn = randn(heads, outputs, seed=seed)
    return torch.softmax(drawn, dim=-1) if config.link == "softmax" else drawn


def bits(head: BayesianHead) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in head.state_dict().items()}


def assert_same(batch: HeadBatch, heads: list[BayesianHead], tolerance: float = 1e-10) -> None:
    for mine, other in zip(batch, heads, strict=True):
        for ours, theirs in zip((mine.mean, *mine._cov()), (other.mean, *other._cov()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
        torch.testing.assert_close(mine.noise_cov, other.noise_cov, rtol=1e-10, atol=0.0)
        if mine.learns_noise:
            torch.testing.assert_close(mine.noise_labels, other.noise_labels, rtol=1e-10, atol=0.0)
        assert int(mine.labels_seen) == int(other.labels_seen)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rule", ["measure", "replace"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("together", [False, True])
def test_they_learn_as_separate_heads(structure: str, layers: int, rule: Any, threads: int, together: bool) -> None:
    config = HeadConfig(structure=structure, layers=layers, rule=rule, hidden_variance=0.1)
    batch, heads = batch_of(config, threads=threads)
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
            for name in UpdateInfo._fields:
                ours, theirs = getattr(info.of(index), name), getattr(alone, name)
                assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12), name
    assert_same(batch, heads)


@MACHINE_CODE
@pytest.mark.parametrize("structure", ["joint", "layer", "neuron"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("together", [False, True])
def test_heads_in_float32_are_repaired_as_separate_heads(
    structure: str, layers: int, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_LEAST_QUOTIENT", 1e-3)  # so that repairs are needed soon, by one head or another
    config = HeadConfig(structure=structure, layers=layers, hidden_variance=1e-4, dtype="float32")
    batch, heads = batch_of(config, threads=2)
    for head in (*batch, *heads):
        head.set_noise(1e-6)
    turn, sizes = torch.linalg.qr(randn(FEATURES, FEATURES, seed=1))[0], torch.logspace(0.0, -5.0, FEATURES).double()
    mix = turn * sizes @ turn.mT
    units, repairs = [(head.feature_mean, head.feature_scale) for head in heads], []
    for step in range(60):
        rows = randn(HEADS, FEATURES, seed=step) @ (mix / mix.norm(dim=0))
        features = torch.stack([mean + scale * row for (mean, scale), row in zip(units, rows, strict=True)])
        target = labels_of(config, 1, seed=100 + step)
        info = batch.update(features, target, together=together)
        alone = [head.update(features[i : i + 1], target[i : i + 1]).repairs for i, head in enumerate(heads)]
        assert info.repairs.tolist() == alone
        repairs.append(sum(alone))
    assert any(0 < some < HEADS for some in repairs)
    assert_same(batch, heads, tolerance=1e-6)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("hidden", "last"), [(30.0, 50.0), (1e-12, 3.0), (1e6, 1e-6)])
def test_the_record_tells_the_smallest_variance(structure: str, hidden: float, last: float) -> None:
    """Of whatever size, and whichever layer it is in."""
    batch, heads = batch_of(HeadConfig(structure=structure, hidden_variance=hidden, last_variance=last))
    features, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    info = batch.update(features, target)
    for index, head in enumerate(heads):
        head.update(features[index : index + 1], target[index : index + 1])
    smallest = [float(head.state.variances().min()) for head in heads]
    np.testing.assert_allclose(info.smallest_variance, smallest, rtol=1e-9)


KINDS = pytest.mark.parametrize(
    ("config", "outputs"),
    [
        *((HeadConfig(structure=structure, hidden_variance=0.1), 3) for structure in STRUCTURES),
        (HeadConfig(layers=3, structure="layer"), 1),
        (HeadConfig(noise="learned"), 1),
        (HeadConfig(robust_dof=4.0, structure="diagonal"), 1),
        (HeadConfig(history=3, structure="neuron"), 1),
        (HeadConfig(rule="fisher", last_variance=1.0), 3),
        (HeadConfig(layers=1), 2),
        (HeadConfig(feature_variance=0.1), 1),
        *((HeadConfig(structure=structure, hidden_variance=0.1, dtype="float32"), 1) for structure in STRUCTURES),
        (HeadConfig(layers=1, dtype="float32"), 2),
    ],
    ids=lambda value: (
        f"{value.structure} {value.rule} {value.layers} {value.dtype}" if isinstance(value, HeadConfig) else str(value)
    ),
)


@pytest.mark.usefixtures("_way")
@KINDS
def test_every_kind_learns_and_predicts_as_separate_heads(config: HeadConfig, outputs: int) -> None:
    batch, heads = batch_of(config, outputs, threads=2)
    for step in range(4):
        features, target = randn(HEADS, FEATURES, seed=step), labels_of(config, outputs, seed=20 + step)
        batch.update(features, target, together=step % 2 == 0)
        for head, row, label in zip(heads, features.split(1), target.split(1), strict=True):
            head.update(row, label)
    assert_same(batch, heads)
    features = randn(HEADS, FEATURES, seed=50)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
    means = torch.cat([head(row) for head, row in zip(heads, features.split(1), strict=True)])
    torch.testing.assert_close(batch(features), means, **close)
    torch.testing.assert_close(batch(features.float()), batch(features.float().double()), **close)
    alone = [head.predict(row) for head, row in zip(heads, features.split(1), strict=True)]
    for part, theirs in zip(batch.predict(features), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(theirs), **close)
    features = randn(3 * HEADS, FEATURES, seed=51)
    blocks = [head.predict_logits(block) for head, block in zip(heads, features.split(3), strict=True)]
    for part, theirs in zip(batch.predict_logits(features, each=3), zip(*blocks, strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(theirs), **close)


# ---------------------------------------------------------------------- heads on the batch's memory


@pytest.mark.usefixtures("_way")
def test_a_head_of_the_batch_is_a_head() -> None:
    """What is done with a head by itself, between calls of the batch, is done to the batch."""
    config = HeadConfig(structure="neuron", hidden_variance=0.1)
    batch, heads = batch_of(config)
    acts = (
        lambda head: head.update(randn(1, FEATURES, seed=1), randn(1, 1, seed=2)),
        lambda head: head.update(randn(40, FEATURES, seed=1), randn(40, 1, seed=2)),
        lambda head: head.reopen(0.5),
        lambda head: head.forget(0.9),
        lambda head: head.set_noise(0.3),
        lambda head: head.load_state_dict(heads[0].state_dict()),
        lambda head: head.load_state_dict({k: v.clone() for k, v in heads[0].state_dict().items()}, assign=True),
        lambda head: setattr(head, "noise_cov", torch.full((1, 1), 0.7, dtype=torch.float64)),
        lambda head: head.double(),
    )
    for seed, act in enumerate(acts):
        features, target = randn(HEADS, FEATURES, seed=seed), randn(HEADS, 1, seed=30 + seed)
        batch.update(features, target)
        for head, row, label in zip(heads, features.split(1), target.split(1), strict=True):
            head.update(row, label)
        act(batch[2])
        act(heads[2])
        assert_same(batch, heads)
        for rows in (features, features[[2, 2, 2, 2, 2]]):
            torch.testing.assert_close(batch(rows)[2], batch[2](rows[2:3])[0], rtol=1e-10, atol=1e-12)


def test_a_cached_view_notices_the_batch() -> None:
    batch, _ = batch_of(HeadConfig(structure="joint", hidden_variance=0.1))
    row = randn(1, FEATURES, seed=1)
    for seed in range(3):
        before = [head(row) for head in batch]
        batch.update(randn(HEADS, FEATURES, seed=seed), torch.where(torch.arange(HEADS) == 1, torch.nan, 1.0)[:, None])
        for index, head in enumerate(batch):
            assert torch.equal(head(row), before[index]) == (index == 1)
            torch.testing.assert_close(head(row), head.predict(row).mean, rtol=1e-10, atol=1e-12)


@MACHINE_CODE
def test_a_change_of_one_head_moves_its_own_version_only() -> None:
    batch, _ = batch_of(HeadConfig())
    batch.update(randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2))
    before = [head.mean._version for head in batch]
    batch[3].update(randn(1, FEATURES, seed=1), randn(1, 1, seed=2))
    after = [head.mean._version for head in batch]
    assert [index for index in range(HEADS) if before[index] != after[index]] == [3]
    batch[0].mean.add_(0.0)
    assert [head.mean._version for head in batch][1:] == after[1:]


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda batch: pickle.loads(pickle.dumps(batch))])
def test_a_copy_moves_on_its_own(duplicate: Any) -> None:
    batch, _ = batch_of(HeadConfig(structure="layer"))
    batch.update(randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2))
    other, alone, before = duplicate(batch), duplicate(batch[1]), [bits(head) for head in batch]
    assert [bits(head) for head in other] == before
    assert len(pickle.dumps(batch[1])) < 2 * len(pickle.dumps(BayesianHead(FEATURES, 1, HeadConfig(structure="layer"))))
    other.update(randn(HEADS, FEATURES, seed=3), randn(HEADS, 1, seed=4))
    alone.update(randn(1, FEATURES, seed=3), randn(1, 1, seed=4))
    assert [bits(head) for head in batch] == before
    assert all(ours != theirs for ours, theirs in zip(before, map(bits, other), strict=True))


def test_the_names_are_those_of_a_list_of_modules() -> None:
    config = HeadConfig(structure="diagonal")
    batch, heads = batch_of(config)
    batch.update(randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2))
    assert batch.state_dict().keys() == nn.ModuleList(heads).state_dict().keys()
    other = HeadBatch(separate(config))
    other(randn(HEADS, FEATURES, seed=1))
    other.load_state_dict(batch.state_dict())
    assert_same(other, list(batch), 0.0)
    torch.testing.assert_close(other(randn(HEADS, FEATURES, seed=1)), batch(randn(HEADS, FEATURES, seed=1)))


def test_acting_first_in_inference_mode_does_not_freeze_the_posteriors() -> None:
    batch, _ = batch_of(HeadConfig())
    features, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    with torch.inference_mode():
        batch(features)
    batch.update(features, target)
    batch[0].reopen()
    batch[0].update(features[:1], target[:1])
    assert int(batch[0].labels_seen) == 2


# ---------------------------------------------------------------------- what is refused


def certain(batch: HeadBatch, index: int) -> None:
    """Make a head certain of everything, and without noise: a label can only contradict it."""
    batch[index].set_noise(0.0)
    for block in batch[index]._cov():
        block.zero_()


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
def test_who_refuses_stays_and_tells_why(structure: str, layers: int) -> None:
    config = HeadConfig(structure=structure, layers=layers)
    batch, heads = batch_of(config, threads=2)
    certain(batch, 1)
    features, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    features[2, 0], features[3, 1], target[4] = torch.nan, 1e300, torch.inf
    before = [bits(head) for head in batch]
    info = batch.update(features, target)
    assert [bits(head) == old for head, old in zip(batch, before, strict=True)] == [False, True, True, True, True]
    heads[0].update(features[:1], target[:1])
    assert_same(HeadBatch([batch[0]]), heads[:1])
    assert info.labels.tolist() == [1, 0, 0, 0, 0]
    assert info.refused.keys() == {1, 2, 3, 4}
    assert isinstance(info.refused[1], UpdateError)
    assert isinstance(info.refused[3], UpdateError)
    assert "NaN or infinity" in str(info.refused[2])
    assert "NaN or infinity" in str(info.refused[4])
    assert info.merged().labels == 1


@MACHINE_CODE
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_step_that_would_leave_an_infinite_variance_is_refused(structure: str) -> None:
    """The rule ``replace`` divides by the square of a variance, here 1e-320, while the mean hardly moves."""
    batch = HeadBatch(BayesianHead(FEATURES, 1, HeadConfig(structure=structure, rule="replace")) for _ in range(HEADS))
    for head in batch:
        head.set_noise(0.1)
        for block in head._cov():
            block.mul_(1e-160)
    features = randn(HEADS, FEATURES, seed=1)
    target, before = batch(features), [bits(head) for head in batch]
    info = batch.update(features, target)
    assert info.refused.keys() == set(range(HEADS))
    assert [bits(head) for head in batch] == before


@pytest.mark.usefixtures("_way")
def test_together_one_refusal_stops_all() -> None:
    batch, _ = batch_of(HeadConfig(structure="neuron"))
    certain(batch, 1)
    features, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    before = [bits(head) for head in batch]
    with pytest.raises(UpdateError):
        batch.update(features, target, together=True)
    assert [bits(head) for head in batch] == before
    target[1] = torch.nan
    assert batch.update(features, target, together=True).merged().labels == HEADS - 1


@pytest.mark.usefixtures("_way")
def test_other_shapes_and_kinds_are_refused() -> None:
    batch, heads = batch_of(HeadConfig())
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
        HeadBatch([*heads, BayesianHead(FEATURES, 1, HeadConfig(layers=1))])
    for threads in (0, 1.5, True):
        with pytest.raises(ValueError, match="a whole number, at least 1"):
            HeadBatch(heads, threads=threads)  # type: ignore[arg-type]


def test_nothing_to_learn() -> None:
    batch, _ = batch_of(HeadConfig())
    before = [bits(head) for head in batch]
    for together in (False, True):
        info = batch.update(randn(HEADS, FEATURES, seed=1), torch.full((HEADS, 1), torch.nan), together=together)
        assert info.merged().labels == 0
    assert [bits(head) for head in batch] == before


# ---------------------------------------------------------------------- interrupts and threads


@MACHINE_CODE
@pytest.mark.parametrize("together", [False, True])
def test_an_interrupt_leaves_each_head_before_or_after(together: bool) -> None:
    config = HeadConfig(structure="neuron", noise_variance=0.05)
    batch = HeadBatch(BayesianHead(FEATURES, 1, config) for _ in range(50))
    features, target = randn(50, FEATURES, seed=1), randn(50, 1, seed=2)
    twins = copy.deepcopy(batch)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before, caught = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for attempt in range(400):
            seen = int(batch[0].labels_seen)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001 + 0.00001 * (attempt % 60))
                batch.update(features, target, together=together)
                signal.setitimer(signal.ITIMER_REAL, 0.0)
            except KeyboardInterrupt:
                caught += 1
            if int(batch[0].labels_seen) > seen:
                twins.update(features, target, together=together)
            assert [bits(head) for head in batch] == [bits(head) for head in twins]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert caught >= 10


@MACHINE_CODE
def test_threads_that_come_first_together_make_one_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would take the heads away from the call that has just been given the first."""
    under_way: list[threading.Event] = []

    class SlowStack(HeadStack):
        def __init__(self, *arguments: Any) -> None:
            under_way.append(threading.Event())
            begun.set()
            time.sleep(0.2)
            super().__init__(*arguments)

    begun = threading.Event()
    monkeypatch.setattr("kbt_rl.inference.batch.HeadStack", SlowStack)
    batch, heads = batch_of(HeadConfig(structure="neuron"))
    features, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    learner = threading.Thread(target=lambda: batch.update(features, target))
    learner.start()
    begun.wait()
    batch.predict_logits(features)
    learner.join()
    assert len(under_way) == 1
    for index, head in enumerate(heads):
        head.update(features[index : index + 1], target[index : index + 1])
    assert_same(batch, heads)


@MACHINE_CODE
def test_batches_that_share_heads_do_not_wait_for_each_other() -> None:
    heads = separate(HeadConfig(structure="neuron"))
    features, target = randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)

    def learn(batch: HeadBatch) -> None:
        for _ in range(100):
            batch.update(features, target)

    batches = [HeadBatch(heads), HeadBatch(heads)]
    threads = [threading.Thread(target=learn, args=(batch,), daemon=True) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not any(thread.is_alive() for thread in threads)
    assert {int(head.labels_seen) for head in heads} == {200}


@MACHINE_CODE
def test_read_only_rows_need_no_machine_code_of_their_own() -> None:
    from kbt_rl.inference.kernels import learn_neurons

    batch, heads = batch_of(HeadConfig(structure="neuron"))
    features, target = randn(HEADS, FEATURES, seed=1).numpy(), randn(HEADS, 1, seed=2).numpy()
    batch.update(features, target)
    known = set(learn_neurons.signatures)
    for array in (features, target):
        array.flags.writeable = False
    batch.update(features, target)
    assert set(learn_neurons.signatures) == known
    for _ in range(2):
        for index, head in enumerate(heads):
            head.update(features[index : index + 1], target[index : index + 1])
    assert_same(batch, heads)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
def test_huge_features_are_refused_however_small_the_variances(structure: str, layers: int) -> None:
    config = HeadConfig(structure=structure, layers=layers)
    batch, heads = batch_of(config)
    for head in (*batch, *heads):
        for block in head._cov():
            block.mul_(1e-20)
    features, target = 1e27 * randn(HEADS, FEATURES, seed=1), randn(HEADS, 1, seed=2)
    before = [bits(head) for head in batch]
    assert batch.update(features, target).refused.keys() == set(range(HEADS))
    for index, head in enumerate(heads):
        with pytest.raises(UpdateError, match="huge"):
            head.update(features[index : index + 1], target[index : index + 1])
    assert [bits(head) for head in batch] == [bits(head) for head in heads] == before


@MACHINE_CODE
@pytest.mark.parametrize("structure", ["neuron", "joint"])
def test_whoever_predicts_sees_no_half_update(structure: str) -> None:
    """Two posteriors in turn, learned and reset by two threads of the batch; a third one reads."""
    config = HeadConfig(structure=structure, hidden_variance=0.1, noise_variance=0.05)
    batch = HeadBatch((BayesianHead(FEATURES, 1, config) for _ in range(20)), threads=2)
    start, rows = copy.deepcopy(batch.state_dict()), randn(20, FEATURES, seed=3)
    features, target = randn(20, FEATURES, seed=1), randn(20, 1, seed=2)
    allowed = [batch.predict_logits(rows)]
    batch.update(features, target)
    allowed.append(batch.predict_logits(rows))
    done, wrong = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            found = batch.predict_logits(rows)
            for mean, cov, *known in zip(*found, *allowed[0], *allowed[1], strict=True):
                if not any(torch.equal(mean, known[i]) and torch.equal(cov, known[i + 1]) for i in (0, 2)):
                    wrong.append((mean, cov))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(150):
            batch.load_state_dict(start)
            batch.update(features, target)
    finally:
        done.set()
        reader.join()
    assert not wrong
