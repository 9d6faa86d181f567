"""Where memory runs out, at any allocation of a change, nothing has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from wholeness.attacks import OutOfMemory, OutOfMemoryError
from wholeness.subjects import HEAD_CHANGES, MODEL_CHANGES, Change

CHANGES = {**{f"head: {name}": value for name, value in HEAD_CHANGES.items()}, **MODEL_CHANGES}


def check(change: Change, early: int, late: int) -> int:
    """Let allocations of a copy's change fail, ``early`` ones and the last ones; returns how many."""
    change.change(change.make())  # what the tests keep for later is made
    done = change.make()
    with OutOfMemory(10**9) as counting:
        change.change(done)
    old, new, total = change.state(change.make()), change.state(done), 10**9 - counting.left
    assert old != new
    first = max(total - late, 0)
    chosen = [*range(1, first, max(first // early, 1)), *range(first + 1, total + 1)]
    for count in chosen:
        subject = change.make()
        with OutOfMemory(count) as allocator, suppress(OutOfMemoryError):
            change.change(subject)
        assert allocator.left <= 0
        after = change.state(subject)
        # The record of an update may be made after the last write, and then comes too late to stop it.
        assert after == old or (after == new and count > total - 12), f"half a change at allocation {count} of {total}"
    return len(chosen)


@pytest.mark.parametrize("name", CHANGES)
def test_no_memory_leaves_nothing_changed(name: str) -> None:
    assert check(CHANGES[name], early=8, late=12) > 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", CHANGES)
def test_no_memory_at_more_allocations_leaves_nothing_changed(name: str) -> None:
    check(CHANGES[name], early=500, late=100)


def test_the_allocator_of_these_tests_sees_what_allocates() -> None:
    values = torch.ones(4)
    with OutOfMemory(1) as allocator:
        values.add_(1.0)
        values.view(2, 2)
        assert allocator.left == 1
        with pytest.raises(OutOfMemoryError):
            values + 1.0


LONG = [pytest.param(way, marks=pytest.mark.nightly) for way in ("update", "save", "all")]


LONG = [pytest.param(way, marks=pytest.mark.nightly) for way in ("update", "save", "all")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
@pytest.mark.parametrize("way", ["one row", "rows", "blocks", "load", *LONG])
def test_a_real_limit_of_memory_leaves_nothing_changed(way: str, tmp_path: Path) -> None:
    """In a process of its own, whose address space is limited more and more until the change succeeds."""
    script = Path(__file__).with_name("limited_memory.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[2]), *sys.path])}
    command = [sys.executable, str(script), way, str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    record = json.loads(result.stdout)
    assert record["failed"] >= 3
    assert record["succeeded"] >= 1
    assert record["broken"] == 0
