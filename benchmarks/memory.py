"""How much memory a call needs beyond what is there before it."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROCESS = Path("/proc/self")


def peak_growth(call: Callable[[], Any], tries: int = 2) -> float:
    """Bytes by which the resident memory of this process grows at most during a call, more than during none.

    Of both the smallest of some tries counts, as other threads and pages that are read back make one larger. The first
    call is not measured: it may give memory back.

    Free memory is given back to the system before, so that whatever the call allocates is seen, by Python, NumPy,
    PyTorch, BLAS or machine code. It is exact to a few pages of 4 kB where no other thread of the process is at work,
    and NaN where the system is not Linux.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return math.nan
    gc.collect()
    try:
        _growth(call, trim)
        own, nothing = (min(_growth(each, trim) for _ in range(tries)) for each in (call, _nothing))
    except OSError:
        return math.nan
    return max(own - nothing, 0.0)


def _nothing() -> None:
    pass


def _growth(call: Callable[[], Any], trim: Callable[[int], int]) -> float:
    trim(0)
    (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # the peak starts again at what is resident now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))
