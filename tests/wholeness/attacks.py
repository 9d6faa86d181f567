"""Ways to break a change off half way: a signal at any step of it, and memory that runs out at any allocation."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

PARTS = (f"kbt_rl{os.sep}", f"{os.sep}contextlib.py", f"{os.sep}threading.py")
SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Stop(BaseException):
    """What the handler of a signal raises, as Ctrl-C does and a container that is stopped."""


@contextmanager
def handled(number: int, handler: Callable[[int, FrameType | None], object] | None = None) -> Iterator[None]:
    """A handler of its own for a signal, raising ``Stop`` by default: a parent may have had it ignored."""

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(number, stop if handler is None else handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class _Steps:
    """Counts the steps of a change at which Python looks for signals, and raises one there.

    It looks when a function of Python begins, and when one of C has returned.
    """

    def __init__(self, step: int, number: int) -> None:
        self.left, self.number = step, number

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_return") and any(part in frame.f_code.co_filename for part in PARTS):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                signal.raise_signal(self.number)


def traced(work: Callable[[], object], steps: _Steps) -> None:
    before = sys.getprofile()
    sys.setprofile(steps)
    try:
        work()
    finally:
        sys.setprofile(before)


def steps_of(work: Callable[[], object]) -> int:
    """Steps of the library's own code in ``work``."""
    steps = _Steps(10**9, signal.SIGINT)
    traced(work, steps)
    return 10**9 - steps.left


def stopped(work: Callable[[], object], step: int, number: int) -> bool:
    """Whether a signal at a step has stopped ``work``; later it is delivered afterwards."""
    with handled(number):
        try:
            traced(work, _Steps(step, number))
        except Stop:
            return True
    return False


class OutOfMemoryError(RuntimeError):
    """PyTorch's own is a RuntimeError too."""


class OutOfMemory(TorchDispatchMode):
    """Lets the ``count``-th operation that would allocate fail as PyTorch's allocator does."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(result.alias_info is None for result in func._schema.returns):
            self.left -= 1
            if self.left == 0:
                raise OutOfMemoryError("DefaultCPUAllocator: can't allocate memory")
        return func(*args, **(kwargs or {}))


def bits(module: nn.Module) -> dict[str, bytes]:
    """All tensors, so that NaN equals NaN and 0 differs from -0."""
    return {name: value.contiguous().numpy().tobytes() for name, value in module.state_dict().items()}
