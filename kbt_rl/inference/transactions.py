"""A change as a whole or not at all: signals are held back and writers wait for each other, also over a fork.

A change in place takes several steps. Between any two of them a signal handler may raise (Ctrl-C, a SIGTERM handler
that exits), another thread may write, or the process may fork. So whoever changes a posterior first computes and
allocates all that is new, and then copies it with the writer's lock held and signals deferred.
"""

from __future__ import annotations

# What the module signal wraps: turning handlers into enums and back, it takes 15 us for what takes half a microsecond.
import _signal  # type: ignore[import-not-found, unused-ignore]
import _thread
import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

_NAMES = (
    "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGXCPU",
    "SIGTSTP", "SIGCHLD", "SIGBREAK",
)  # fmt: skip
#: Signals whose handlers people write in Python.
DEFERRED = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))

T = TypeVar("T")
Handler = Callable[[int, FrameType | None], object]


class signals_deferred:  # noqa: N801  # used as a context manager
    """Hold back the handlers of signals, which Python runs in the main thread only, until the block is done.

    They are then called in the order in which the signals came, also after an error in the block.
    """

    __slots__ = ("_handlers", "_pending")

    def __enter__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._pending: list[tuple[int, FrameType | None]] = []
        if _thread.get_ident() != threading.main_thread().ident:
            return
        getsignal, pending, handlers = _signal.getsignal, self._pending, self._handlers
        for number in DEFERRED:
            if callable(handler := getsignal(number)):
                handlers[number] = handler

        def defer(number: int, frame: FrameType | None) -> None:
            pending.append((number, frame))

        try:  # a handler that is not replaced yet may raise at once
            for number in handlers:
                _signal.signal(number, defer)
        except BaseException:
            self._end()
            raise

    def __exit__(self, *_: object) -> None:
        if self._handlers:
            self._end()

    def _end(self) -> None:
        try:
            _restore(self._handlers)
        finally:
            if self._pending:
                _deliver(self._handlers, self._pending)


def _restore(handlers: Mapping[int, Handler]) -> None:
    """Put all handlers back, also if one of them raises as soon as it is back."""
    left = dict(handlers)
    try:
        for number, handler in handlers.items():
            _signal.signal(number, handler)
            del left[number]
    finally:
        if left:
            _restore(left)


def _deliver(handlers: Mapping[int, Handler], pending: list[tuple[int, FrameType | None]]) -> None:
    """Call the handlers of all signals that came, also if one of them raises."""
    while pending:
        number, frame = pending.pop(0)
        try:
            handlers[number](number, frame)
        finally:
            if pending:
                _deliver(handlers, pending)


def replace_buffers(buffers: MutableMapping[str, Any], new: Mapping[str, Tensor]) -> None:
    """Take over new values of tensors: in place where that is possible, so that whoever shares the memory sees them.

    Signals and other writers are to be held back meanwhile; nothing else can fail here.
    """
    for name, value in new.items():
        buffer = buffers[name]
        # What was made under torch.inference_mode() cannot be changed in place outside of it.
        if buffer.shape == value.shape and not (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            buffer.copy_(value)
        else:
            buffers[name] = value.to(buffer.device)


# ---------------------------------------------------------------------- writers


class Writer(Protocol):
    """Who has a lock that its writers hold."""

    _lock: Any


# By the order in which they were made, which is the order in which several of their locks are taken.
_writers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_numbers = itertools.count()
_registry = threading.RLock()  # held for a moment only, and nothing else is waited for meanwhile


def register_writer(writer: Writer) -> None:
    """Have a fork wait until nobody writes, so that the child gets whole posteriors and free locks."""
    with _registry:
        _writers[writer] = next(_numbers)


def with_writers_held(module: nn.Module, work: Callable[[], T]) -> T:
    """What ``work`` returns, while nobody else writes to a posterior of ``module`` or reads one.

    A lock's own ``with`` cannot be interrupted, as a context manager that is written in Python can.
    """
    return _with_held(_in_order(part for part in module.modules() if part in _writers), work)


def _with_held(writers: list[Any], work: Callable[[], T]) -> T:
    if not writers:
        return work()
    with writers[0]._lock:
        return _with_held(writers[1:], work)


def _in_order(writers: Iterable[Any]) -> list[Any]:
    return sorted(writers, key=lambda writer: _writers.get(writer, -1))


# ---------------------------------------------------------------------- forks


_SOON = 0.01  # seconds, in which the callbacks of a fork are done


def _repeat(signals: list[int]) -> None:
    time.sleep(_SOON)
    for number in signals:
        _thread.interrupt_main(signal.Signals(number))


class _Fork:
    """All locks, taken before a fork and given back after it on both sides."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.RLock()
        self._held: list[Any] = []
        self._deferral: signals_deferred | None = None

    def before(self) -> None:
        """Wait until nobody writes."""
        deferral = signals_deferred()
        deferral.__enter__()  # Python ignores errors in here, and a handler that raises would leave locks out
        self._one_at_a_time.acquire()
        known: set[Any] = set()
        while True:
            _registry.acquire()
            new = [writer for writer in _in_order(_writers) if writer not in known]
            if not new:
                break  # with the registry held, so that the child can add to it
            _registry.release()
            for writer in new:
                writer._lock.acquire()
                self._held.append(writer._lock)
            known.update(new)
        self._deferral = deferral

    def after_in_parent(self) -> None:
        """Go on; signals that came meanwhile are repeated from outside, where their errors count."""
        came = self._released()
        if came:
            _thread.start_new_thread(_repeat, (came,))

    def after_in_child(self) -> None:
        """Go on; signals that came meanwhile were the parent's."""
        self._released()

    def _released(self) -> list[int]:
        """Give all locks back; returns the signals that came."""
        deferral, self._deferral = self._deferral, None
        if deferral is None:  # a signal has stopped ``before`` at its first step
            return []
        _registry.release()
        while self._held:
            self._held.pop().release()
        self._one_at_a_time.release()
        came = [number for number, _ in deferral._pending]
        deferral._pending.clear()
        deferral.__exit__()
        return came


if hasattr(os, "register_at_fork"):
    _fork = _Fork()
    os.register_at_fork(before=_fork.before, after_in_parent=_fork.after_in_parent, after_in_child=_fork.after_in_child)
