"""A few threads that stay and help callers of machine code, which holds no lock of Python's while it runs.

Starting a thread takes as long as a hundred small updates, waking one as long as ten.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from queue import SimpleQueue

from kbt_rl.inference.interrupts import interrupts_deferred


class _Task:
    """Parts of one call, each for whoever comes first: the caller, or a thread that has found the time.

    Nobody waits for a helper that has not come yet, so that a call is done even if none ever does.
    """

    def __init__(self, call: Callable[[slice], None], parts: Iterable[slice]) -> None:
        self._call, self._parts = call, deque(parts)
        self._came: list[None] = []
        self._left: list[None] = []
        self._bell: SimpleQueue[None] = SimpleQueue()
        self.errors: list[BaseException] = []

    def work(self) -> None:
        """Take parts until none is left."""
        while True:
            try:
                part = self._parts.popleft()
            except IndexError:
                return
            self._call(part)

    def help(self) -> None:
        """The same in another thread than the caller's."""
        self._came.append(None)
        try:
            self.work()
        except BaseException as error:  # it is the caller's
            self.errors.append(error)
            self._parts.clear()
        finally:
            self._left.append(None)
            self._bell.put(None)

    def end(self) -> None:
        """Wait for all who are at a part, and leave none to those who come later; may be called again."""
        self._parts.clear()
        while len(self._left) < len(self._came):
            self._bell.get()


class _Helpers:
    """Threads that are started when they are first needed, and not in the way when the interpreter ends."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        self._count, self._lock = 0, threading.Lock()

    def ask(self, task: _Task, helpers: int) -> None:
        """Offer a task to so many threads."""
        if self._count < helpers:
            with self._lock:
                while self._count < helpers:
                    threading.Thread(target=self._serve, name="kbt_rl helper", daemon=True).start()
                    self._count += 1
        for _ in range(helpers):
            self._tasks.put(task)

    def _serve(self) -> None:
        while True:
            task = self._tasks.get()
            task.help()
            del task  # and with it the caller's memory


_helpers = _Helpers()


def _start_anew() -> None:
    """In a forked process, where the threads are gone."""
    global _helpers
    _helpers = _Helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def share(call: Callable[[slice], None], parts: list[slice], threads: int) -> None:
    """Call with each of ``parts``, in up to ``threads`` threads, this one among them; returns when all is done.

    After an error or an interrupt some parts may not have been begun, but none is under way any more: an interrupt that
    arrives meanwhile is delivered afterwards.
    """
    task = _Task(call, parts)
    with interrupts_deferred():
        try:
            try:
                _helpers.ask(task, min(threads, len(parts)) - 1)
                task.work()
            finally:
                task.end()
        finally:  # where the handler of another signal has raised, whose interrupts are not deferred, in `end` itself
            task.end()
    if task.errors:
        raise task.errors[0]
