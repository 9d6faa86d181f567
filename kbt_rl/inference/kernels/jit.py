"""How the machine code is compiled, and what happens where it cannot be."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from functools import lru_cache
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


@lru_cache(maxsize=1)
def _say_uncached() -> None:
    warnings.warn(
        "numba finds no folder to keep compiled code in, so each process compiles anew (some 10 s); set "
        "NUMBA_CACHE_DIR to a folder that can be written to",
        stacklevel=4,
    )


def _as(**options: Any) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        # numba names its cache of a function after it and notices changes in the function's own file only, not in those
        # of what it calls.
        function.__qualname__ += f"_{_FINGERPRINT}"
        try:
            compiled: Function = njit(cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache folder can be written to
            _say_uncached()
            compiled = njit(error_model="numpy", **options)(function)
        return compiled

    return decorate


# Sums may be reordered, so that they use vector instructions; NaN and infinity keep their meaning. A loop that adds up
# stores nothing: one that does both is compiled twice, with vector instructions and without, and where its arrays lie
# decides at run time in which of the two orders it adds.
_SUMS = {"reassoc", "contract"}

compiled = _as(fastmath=_SUMS, nogil=True)
# Here the order is what keeps the digits.
in_order = _as(fastmath={"contract"})
# Copied into each caller, whose loop can then be vectorised.
inlined = _as(fastmath=_SUMS, inline="always")
