"""How the machine code is compiled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def fingerprint(folder: Path) -> str:
    """Of all sources in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:8]


_FINGERPRINT = fingerprint(Path(__file__).parent)


def _as(**options: Any) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        # numba's cache of a compiled function is named after it, and notices changes in its own file only, not in those
        # of what it calls.
        function.__qualname__ += f"_{_FINGERPRINT}"
        compiled: Function = njit(cache=True, error_model="numpy", **options)(function)
        return compiled

    return decorate


# Sums may be reordered, so that they use vector instructions; NaN and infinity keep their meaning. A loop that adds up
# stores nothing: one that does both is compiled twice, with vector instructions and without, and where its arrays lie
# decides at run time in which of the two orders it adds (``tests/test_bits.py``).
_SUMS = {"reassoc", "contract"}

compiled = _as(fastmath=_SUMS)
compiled_nogil = _as(fastmath=_SUMS, nogil=True)
# Here the order is what keeps the digits.
in_order = _as(fastmath={"contract"})
# Copied into each caller, whose loop can then be vectorised.
inlined = _as(fastmath=_SUMS, inline="always")
