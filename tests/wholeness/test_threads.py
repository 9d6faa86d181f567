"""Threads that update, load, roll back and copy one posterior: they wait for each other, and all of it counts."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randn
from learners import changed, kbt, states, weights

from kbt_rl import KBT, HeadConfig, Sample
from kbt_rl.agents.export import load_safetensors, save_safetensors
from kbt_rl.agents.policies import DecisionTransformerPolicy
from wholeness.attacks import bits
from wholeness.subjects import FEATURES, HEADS, batch, head, rows


@pytest.fixture(autouse=True)
def _quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], object]) -> None:
    """Each in a thread of its own; the first error is this thread's."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120.0)
        assert not thread.is_alive(), "threads wait for each other"
    if errors:
        raise errors[0]


def each(work: Callable[[int], object], seeds: range) -> Callable[[], object]:
    return lambda: [work(seed) for seed in seeds]


@pytest.mark.parametrize(
    "settings", [{}, {"layers": 1, "structure": "joint"}, {"history": 5}], ids=["shared", "joint", "history"]
)
def test_updates_of_three_threads_all_count(settings: dict[str, Any]) -> None:
    """For one layer the order of labels does not matter, so that their posterior is known."""
    subject, alone = head(learned=0, **settings), head(learned=0, **settings)
    ranges = [range(0, 40), range(40, 80), range(80, 120)]
    together(*(each(lambda seed: subject.update(*rows(1, 2, seed)), part) for part in ranges))
    for seed in range(120):
        alone.update(*rows(1, 2, seed))
    assert int(subject.labels_seen) == 120
    torch.testing.assert_close(subject.mean, alone.mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(subject.covariance(), alone.covariance(), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("times", [30, pytest.param(1_000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("kind", ["head", "batch"])
def test_updates_loads_and_rollbacks_leave_what_one_of_them_has_left(kind: str, times: int) -> None:
    """An update and its rollback are one step each, so that what is left is an update away from what was loaded."""
    if kind == "head":
        subject, sample = head(learned=0, history=3, layers=2), rows(1, 2, 5)
    else:
        subject, sample = batch(0, history=3, noise="learned", layers=3), rows(HEADS, 1, 5)
    before, seen = copy.deepcopy(subject.state_dict()), []

    def learn(_: int) -> None:
        subject.update(*sample)

    def load(_: int) -> None:
        subject.load_state_dict(before)

    def take_back(_: int) -> None:
        try:
            subject.rollback(1)
        except ValueError as error:
            seen.append(str(error))

    def watch(_: int) -> None:
        state = copy.deepcopy(subject).state_dict()
        assert all(bool(torch.isfinite(value).all()) for value in state.values())

    together(*(each(work, range(times)) for work in (learn, learn, load, take_back, watch)))
    assert all("updates are kept" in message for message in seen)
    subject.load_state_dict(before)
    assert bits(subject) == {name: value.numpy().tobytes() for name, value in before.items()}
    subject.update(*sample)
    subject.rollback(1)
    for name, value in subject.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda subject: pickle.loads(pickle.dumps(subject))])
@pytest.mark.parametrize("kind", ["head", "batch"])
def test_copies_during_updates_are_of_one_moment(copied: Any, kind: str) -> None:
    subject = head(layers=2) if kind == "head" else batch(noise="learned", layers=3)
    count, outputs = (1, 2) if kind == "head" else (HEADS, 1)
    twin = copy.deepcopy(subject)
    known, copies = [bits(twin)], []
    for seed in range(60):
        twin.update(*rows(count, outputs, seed))
        known.append(bits(twin))
    done = threading.Event()

    def learn() -> None:
        for seed in range(60):
            subject.update(*rows(count, outputs, seed))
        done.set()

    def duplicate() -> None:
        while not done.is_set():
            copies.append(bits(copied(subject)))

    together(learn, duplicate)
    assert copies
    assert all(state in known for state in copies)


# Rows of an update, and what takes each way of computing it.
WAYS: dict[str, tuple[int, Callable[[], Any]]] = {
    **{f"one row, {name}": (1, lambda name=name: head(structure=name)) for name in ("shared", "neuron", "joint")},  # type: ignore[misc]
    "one row, learned noise": (1, lambda: head(noise="learned")),
    "one row, two layers": (1, lambda: head(1, layers=2)),
    "eight rows, three layers": (8, lambda: head(layers=3)),
    "forty rows": (40, lambda: head(layers=2, structure="layer")),
    "a batch": (HEADS, lambda: batch(layers=2, structure="neuron")),
    "a batch, joint": (HEADS, lambda: batch(layers=2)),
}


@pytest.mark.parametrize("way", WAYS)
def test_predictions_during_updates_are_those_of_whole_posteriors(way: str) -> None:
    """Bit for bit, by each way to ask for one, with all its parts together."""
    count, make = WAYS[way]
    subject, twin, updates = make(), make(), 200 if count == 1 else 40
    outputs = 1 if "batch" in way else subject.out_features
    probe, samples = randn(HEADS, FEATURES, seed=3), [rows(count, outputs, seed) for seed in range(updates)]

    def asked(which: Any) -> set[bytes]:
        parts = b"".join(part.contiguous().numpy().tobytes() for part in which.predict(probe))
        return {b"forward" + which(probe).numpy().tobytes(), b"predict" + parts}

    known, seen, done = asked(twin), [set[bytes]() for _ in range(2)], threading.Event()
    for sample in samples:
        twin.update(*sample)
        known |= asked(twin)

    def act(found: set[bytes]) -> None:
        while not done.is_set():
            found |= asked(subject)

    def learn() -> None:
        try:
            for index, sample in enumerate(samples):
                before = len(seen[0])
                subject.update(*sample)
                while index % 20 == 0 and len(seen[0]) == before:  # let the others see something of it
                    time.sleep(0.0)
        finally:
            done.set()

    together(learn, *(partial(act, found) for found in seen))
    assert not (seen[0] | seen[1]) - known, "a prediction is a mixture of two posteriors"
    assert len(seen[0]) > updates // 20
    assert bits(subject) == bits(twin)


def test_a_copy_has_a_lock_of_its_own() -> None:
    subject = head()
    for duplicate in (copy.deepcopy(subject), pickle.loads(pickle.dumps(subject)), copy.copy(subject)):
        with subject._lock:  # as an update holds it, which would be too quick
            together(lambda other=duplicate: other.update(*rows(1, 2, 0)))  # type: ignore[misc]


def test_files_that_are_saved_during_updates_are_of_one_moment(tmp_path: Path) -> None:
    sys.setswitchinterval(5e-4)  # a save takes a hundred times as long as an update
    model = kbt(policy_kwargs={"head": HeadConfig(layers=2)})
    twin, known = KBT.load(_saved(model, tmp_path)), []
    for seed in range(40):
        known.append(weights(twin))
        twin.update(_sample(seed))
    known.append(weights(twin))
    done = threading.Event()

    def learn() -> None:
        for seed in range(40):
            model.update(_sample(seed))
            done.wait(0.002)

    def save() -> None:
        for turn in range(4):
            model.save(tmp_path / f"{turn}.zip")
            model.policy.save(tmp_path / f"{turn}.pt")
            save_safetensors(model, tmp_path / f"{turn}.safetensors")
        done.set()

    together(learn, save)
    loads = {".zip": KBT.load, ".pt": DecisionTransformerPolicy.load, ".safetensors": load_safetensors}
    files = [path for path in tmp_path.iterdir() if path.stem.isdigit()]
    assert len(files) == 12
    for path in files:
        found = weights(loads[path.suffix](path))
        assert any(not changed(found, state) for state in known), f"{path.name} holds half an update"


def _saved(model: KBT, folder: Path) -> Path:
    model.save(folder / "start.zip")
    return folder / "start.zip"


def _sample(seed: int) -> Sample:
    return Sample(states(1, seed=seed), np.ones((1, 1)))
