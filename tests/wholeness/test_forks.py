"""A fork while another thread learns: the child gets a whole posterior and free locks, and the parent goes on."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import randn
from torch import nn

from kbt_rl import HeadConfig
from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.loading import load_whole
from wholeness.attacks import Stop, bits, handled
from wholeness.subjects import FEATURES, HEADS, average, batch, head, rows

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

LABELS = 40
# The lock of a posterior, which has no public name, is held here to bring a fork to a certain moment.


@pytest.fixture(autouse=True)
def _quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        yield
    sys.setswitchinterval(before)


def forked(work: Callable[[], bool], seconds: float = 60.0) -> bool | None:
    """Whether ``work`` was true in a child process; None if it hung."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def fork_while_learning(subject: Any, samples: list[Any], forks: int) -> None:
    """Fork while a thread learns the samples again and again, copies the subject and loads it."""
    twin, start = copy.deepcopy(subject), copy.deepcopy(subject.state_dict())
    known = [bits(twin)]
    for sample in samples:
        twin.update(*sample)
        known.append(bits(twin))
    stop = threading.Event()

    def learn() -> None:
        while not stop.is_set():
            subject.load_state_dict(start)
            for sample in samples:
                if not stop.is_set():
                    subject.update(*sample)
                    copy.deepcopy(subject)

    def child() -> bool:
        whole = bits(subject) in known
        subject.update(*samples[0])
        BayesianHead(FEATURES, 1).update(*rows(1, 1, 0))
        return whole and bits(copy.deepcopy(subject)) == bits(subject)

    thread = threading.Thread(target=learn)
    thread.start()
    try:
        outcomes = [forked(child) for _ in range(forks)]
    finally:
        stop.set()
        thread.join()
    assert outcomes.count(None) == 0, "children hang"
    assert outcomes.count(False) == 0, "children have half an update"


SUBJECTS: dict[str, Callable[[], Any]] = {
    "shared": head,
    "two layers, joint": lambda: head(layers=2, structure="joint"),
    "learned noise": lambda: head(noise="learned"),
    "a batch": lambda: batch(noise="learned", layers=3),
    "several noises": lambda: average(history=0),
    "several noises, with history": average,
}


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("forks", [8, pytest.param(200, marks=pytest.mark.nightly)])
def test_a_child_has_a_whole_posterior_and_free_locks(name: str, forks: int) -> None:
    subject = SUBJECTS[name]()
    count, outputs = (HEADS, 1) if isinstance(subject, HeadBatch) else (1, 2)
    fork_while_learning(subject, [rows(count, outputs, seed) for seed in range(LABELS)], forks)


def test_writers_of_several_posteriors_and_a_fork_do_not_wait_for_each_other() -> None:
    """Two threads load the same two heads in modules that list them in another order."""
    first, second = head(), head()
    modules = [nn.ModuleList([first, second]), nn.ModuleList([second, first])]
    states, stop = [copy.deepcopy(module.state_dict()) for module in modules], threading.Event()

    def load(index: int) -> None:
        while not stop.is_set():
            load_whole(modules[index], states[index])

    threads = [threading.Thread(target=load, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        outcomes = [forked(lambda: bool(first.update(*rows(1, 2, 0)))) for _ in range(10)]
    finally:
        stop.set()
        for thread in threads:
            thread.join(60.0)
    assert outcomes == [True] * 10
    assert not any(thread.is_alive() for thread in threads)


def test_a_signal_that_comes_while_a_fork_waits_is_delivered_and_no_lock_is_left() -> None:
    """To the parent alone, and once."""
    subject, came, released = head(), [], threading.Event()

    def note(*_: object) -> None:
        came.append(os.getpid())
        raise Stop

    def hold() -> None:
        with subject._lock:
            held.set()
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        released.set()

    held = threading.Event()
    with handled(signal.SIGTERM, note):
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(10.0)
        outcome, deadline = None, time.monotonic() + 10.0
        with pytest.raises(Stop):  # noqa: PT012  # the signal comes some time after the fork
            outcome = forked(lambda: not came and bool(subject.update(*rows(1, 2, 0))))
            while time.monotonic() < deadline:
                time.sleep(0.001)
        thread.join()
    assert released.is_set()
    assert outcome in (True, None)  # the signal may come before the child is waited for
    assert came == [os.getpid()]
    other = threading.Thread(target=subject.update, args=rows(1, 2, 0))
    other.start()
    other.join(60.0)
    assert not other.is_alive()
    assert forked(lambda: bool(subject.update(*rows(1, 2, 0))))


def test_a_fork_in_an_update_has_its_locks() -> None:
    """A signal handler may fork; the thread that forks has the lock, and so has the child."""
    subject = BayesianHead(FEATURES, 1, HeadConfig(layers=1))
    with subject._lock:
        assert forked(lambda: bool(subject.update(randn(1, FEATURES, seed=1), torch.zeros(1, 1))))
    assert forked(lambda: bool(subject.update(randn(1, FEATURES, seed=1), torch.zeros(1, 1))))
