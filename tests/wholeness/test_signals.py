"""A signal whose handler raises, at any step of a change, leaves all of the change or nothing."""

from __future__ import annotations

import signal
import threading
from functools import partial
from typing import Any

import pytest

from kbt_rl.inference import transactions
from kbt_rl.inference.transactions import signals_deferred
from wholeness.attacks import SIGNALS, Stop, handled, steps_of, stopped
from wholeness.subjects import HEAD_CHANGES, MODEL_CHANGES, Change

CHANGES = {**{f"head: {name}": value for name, value in HEAD_CHANGES.items()}, **MODEL_CHANGES}
BY_SIGNAL = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


def check(change: Change, number: int, *, late: int, early: int) -> int:
    """Interrupt copies of a subject at all late steps, in which a change is committed, and at some before."""
    done = change.make()
    steps = steps_of(partial(change.change, done))
    old, new = change.state(change.make()), change.state(done)
    assert old != new
    first = max(steps - late, 0)
    chosen = [*range(1, first, max(first // early, 1)), *range(first + 1, steps + 1)]
    outcomes = set()
    for step in chosen:
        subject, handler = change.make(), signal.getsignal(number)
        stopped(partial(change.change, subject), step, number)
        after = change.state(subject)
        assert after in (old, new), f"half a change after a signal at step {step} of {steps}"
        outcomes.add(after == new)
        assert signal.getsignal(number) is handler
        assert_free(subject)
    assert outcomes == {False, True}
    return len(chosen)


def assert_free(subject: Any) -> None:
    """No lock is left behind; asked from another thread, as a lock can be taken again by its own."""
    held: list[object] = []

    def look() -> None:
        for part in getattr(subject, "policy", subject).modules():
            if hasattr(part, "_lock"):
                if part._lock.acquire(blocking=False):
                    part._lock.release()
                else:
                    held.append(part)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert not held


@pytest.mark.parametrize("name", CHANGES)
def test_a_signal_leaves_all_of_a_change_or_nothing(name: str) -> None:
    check(CHANGES[name], signal.SIGTERM, late=25, early=4)


@pytest.mark.nightly
@pytest.mark.parametrize("name", CHANGES)
@BY_SIGNAL
def test_a_signal_at_any_step_leaves_all_of_a_change_or_nothing(name: str, number: signal.Signals) -> None:
    check(CHANGES[name], number, late=400, early=400)


# ---------------------------------------------------------------------- the deferral itself


@BY_SIGNAL
def test_a_signal_waits_for_the_end_of_the_block(number: signal.Signals) -> None:
    done = []

    def work() -> None:
        with signals_deferred():
            signal.raise_signal(number)
            done.append(True)

    with handled(number), pytest.raises(Stop):
        work()
    assert done == [True]


def test_it_carries_along_the_error_of_the_block() -> None:
    def fail() -> None:
        with signals_deferred():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("the block failed")

    with handled(signal.SIGINT), pytest.raises(Stop) as caught:
        fail()
    assert isinstance(caught.value.__context__, ValueError)


def test_all_signals_are_delivered_in_their_order_also_if_handlers_raise() -> None:
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        raise Stop

    sent = [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]

    def work() -> None:
        with signals_deferred():
            for number in sent:
                signal.raise_signal(number)
            assert came == []

    with handled(signal.SIGINT, note), handled(signal.SIGTERM, note):
        with pytest.raises(Stop):
            work()
        assert came == sent
        assert signal.getsignal(signal.SIGINT) is note


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_has_no_handler_in_python_stays_so(action: Any) -> None:
    """Ignored and default actions are not Python's to defer."""
    with handled(signal.SIGTERM, action), signals_deferred():
        assert signal.getsignal(signal.SIGTERM) == action
        if action is signal.SIG_IGN:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_handlers_are_as_before_if_one_raises_while_they_are_replaced(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two signals are deferred, so that the first two calls replace their handlers and the others put them back."""

    class AnotherSignal:
        """Comes with a change of a handler, when Python looks for signals."""

        getsignal = staticmethod(signal.getsignal)
        calls = 0

        def signal(self, number: int, handler: Any) -> Any:
            before = signal.signal(number, handler)
            self.calls += 1
            if self.calls == call:
                raise TimeoutError
            return before

    begun = []

    def work() -> None:
        with signals_deferred():
            begun.append(True)

    with handled(signal.SIGINT), handled(signal.SIGTERM):
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch:
            patch.setattr(transactions, "_signal", AnotherSignal())
            patch.setattr(transactions, "DEFERRED", (int(signal.SIGINT), int(signal.SIGTERM)))
            with pytest.raises(TimeoutError):
                work()
        assert begun == [True] * (call > 2)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_other_threads_are_left_alone() -> None:
    handlers: list[Any] = []

    def work() -> None:
        with signals_deferred():
            handlers.append(signal.getsignal(signal.SIGINT))

    with handled(signal.SIGINT):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert handlers == [signal.getsignal(signal.SIGINT)]
