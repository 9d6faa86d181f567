"""Threads that share out the heads of one call: the same bits as one, and never at work when the call is over."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import MACHINE_CODE, STRUCTURES, randn

from kbt_rl.inference import pool
from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead

HEADS, FEATURES = 30, 4


def batch_of(structure: str = "neuron", threads: int = 2) -> HeadBatch:
    config = HeadConfig(structure=structure, hidden_variance=0.1, noise_variance=0.05)
    return HeadBatch((BayesianHead(FEATURES, 1, config) for _ in range(HEADS)), threads=threads)


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(HEADS, FEATURES, seed=seed), randn(HEADS, 1, seed=seed + 1)


def bits(batch: HeadBatch) -> list[dict[str, bytes]]:
    return [{name: value.numpy().tobytes() for name, value in head.state_dict().items()} for head in batch]


def helpers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "kbt_rl helper"}


@contextmanager
def raising(number: int) -> Iterator[None]:
    """A signal whose handler raises KeyboardInterrupt."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)


@MACHINE_CODE
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("threads", [2, 3, HEADS + 5])
@pytest.mark.parametrize("together", [False, True])
def test_the_bits_are_those_of_one_thread(structure: str, threads: int, together: bool) -> None:
    one, several = batch_of(structure, 1), batch_of(structure, threads)
    for seed in range(5):
        features, target = rows(seed)
        target[seed] = torch.nan
        for batch in (one, several):
            assert batch.update(features, target, together=together).merged().labels == HEADS - 1
    assert bits(one) == bits(several)
    assert all(torch.equal(*pair) for pair in zip(one.predict(features), several.predict(features), strict=True))


@MACHINE_CODE
def test_threads_stay() -> None:
    batch = batch_of()
    batch.update(*rows(1))
    before = helpers()
    assert before
    for seed in range(5):
        batch.update(*rows(seed))
    assert helpers() == before


@MACHINE_CODE
def test_callers_share_the_threads() -> None:
    batches, alone = [batch_of() for _ in range(3)], batch_of(threads=1)

    def learn(batch: HeadBatch) -> None:
        for seed in range(100):
            batch.update(*rows(seed))

    callers = [threading.Thread(target=learn, args=(batch,)) for batch in batches]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    learn(alone)
    assert all(bits(batch) == bits(alone) for batch in batches)


# ---------------------------------------------------------------------- interrupts


@MACHINE_CODE
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGINT], ids=["SIGALRM", "SIGINT"])
@pytest.mark.parametrize("attempts", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_an_interrupt_leaves_each_head_before_or_after(together: bool, number: signal.Signals, attempts: int) -> None:
    batch, (features, target), caught = batch_of(), rows(1), 0
    batch.update(features, target)
    twins = copy.deepcopy(batch)
    twins.threads = 1
    old = bits(batch)
    main = threading.main_thread().ident
    assert main is not None
    with raising(number):
        for attempt in range(attempts):
            before = old
            twins.update(features, target, together=together)
            after = bits(twins)
            alarm = threading.Timer(0.0001 + 0.00001 * (attempt % 60), signal.pthread_kill, (main, number))
            try:
                alarm.start()
                batch.update(features, target, together=together)
                alarm.join()
            except KeyboardInterrupt:
                caught += 1
            now = bits(batch)
            time.sleep(0.0002)
            assert bits(batch) == now, "a thread was still at work"
            changed = [head != previous for head, previous in zip(now, before, strict=True)]
            assert [i for i, (head, *pair) in enumerate(zip(now, before, after, strict=True)) if head not in pair] == []
            if number == signal.SIGINT:  # deferred while the heads change
                assert all(changed) or not any(changed)
            batch.load_state_dict(twins.state_dict())
            old = after
    assert caught >= 10


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGINT], ids=["SIGALRM", "SIGINT"])
@pytest.mark.parametrize("times", [1, 3])
def test_the_caller_waits_for_those_at_work(number: signal.Signals, times: int) -> None:
    """An interrupt in the caller's own part, while a helper is at another one that takes long."""
    begun, ended, both = [], [], threading.Barrier(2, timeout=10)

    def call(part: slice) -> None:
        begun.append(part.start)
        if part.start < 2:
            both.wait()
        if threading.current_thread() is threading.main_thread():
            for _ in range(times if number == signal.SIGINT else 1):
                signal.raise_signal(number)
        else:
            time.sleep(0.1)
        ended.append(part.start)

    with raising(number), pytest.raises(KeyboardInterrupt):
        pool.share(call, [slice(i, i + 1) for i in range(4)], 2)
    if number == signal.SIGINT:  # deferred: all is done
        assert sorted(ended) == [0, 1, 2, 3]
    else:
        assert len(begun) == 2
        assert len(ended) == 1
    time.sleep(0.05)
    assert len(begun) == len(set(begun)) == (4 if number == signal.SIGINT else 2)


def test_a_second_signal_does_not_end_the_wait() -> None:
    """One that is not deferred, in the caller's part, and another one while it waits."""
    ended, both = [], threading.Barrier(2, timeout=10)

    def call(part: slice) -> None:
        both.wait()
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            signal.raise_signal(signal.SIGALRM)
        time.sleep(0.2)
        ended.append(part)

    with raising(signal.SIGALRM), pytest.raises(KeyboardInterrupt):
        pool.share(call, [slice(0, 1), slice(1, 2)], 2)
    assert len(ended) == 1


def test_an_error_in_a_thread_is_the_callers() -> None:
    both = threading.Barrier(2, timeout=10)

    def call(_: slice) -> None:
        both.wait()
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        pool.share(call, [slice(0, 1), slice(1, 2)], 2)


def test_the_caller_takes_what_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(pool._helpers, "ask", lambda *_: None)
    pool.share(lambda part: done.append(part.start), [slice(i, i + 1) for i in range(5)], 3)
    assert done == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------- processes


@MACHINE_CODE
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    batch, alone = batch_of(), batch_of(threads=1)
    for each in (batch, alone):
        each.update(*rows(1))
    alone.update(*rows(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            batch.update(*rows(2))
            code = 0 if bits(batch) == bits(alone) and len(helpers()) == 1 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@MACHINE_CODE
def test_threads_do_not_hold_the_interpreter_up() -> None:
    code = (
        "import torch; from kbt_rl import BayesianHead, HeadBatch\n"
        "batch = HeadBatch((BayesianHead(2, 1) for _ in range(4)), threads=2)\n"
        "batch.update(torch.ones(4, 2), torch.ones(4, 1)); print('learned')"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "learned\n"
