"""Hold back an interrupt while a posterior is between two states.

A change in place takes several steps, and ``KeyboardInterrupt`` may come between any two of them.
"""

from __future__ import annotations

# What the module signal wraps: turning handlers into enums and back, it takes 15 us for what takes half a microsecond.
import _signal  # type: ignore[import-not-found, unused-ignore]
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold back SIGINT, which Python raises in the main thread only, until the block is done."""
    before = _signal.getsignal(signal.SIGINT)
    foreign = before is None  # a handler that C code installed cannot be put back
    if foreign or threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    try:  # from here on, as the handler of another signal may raise at once
        _signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
        yield
    finally:  # also after an error, which the interrupt then carries along
        try:
            _signal.signal(signal.SIGINT, before)
        finally:  # a signal that came before it, and whose handler raises, is raised instead of setting this one
            _signal.signal(signal.SIGINT, before)
        if pending and callable(before):
            before(*pending[0])
        elif pending and before == signal.SIG_DFL:
            signal.raise_signal(signal.SIGINT)
