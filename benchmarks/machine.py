"""What this machine can do at best: bytes a second at a working set of a given size, and operations a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[np.float64]


@njit(fastmath=True)
def _read(values: Array) -> float:
    total = 0.0
    for i in range(values.size):  # by index: numba walks through an array one number at a time
        total += values[i]
    return total


@njit(fastmath=True)
def _rewrite(values: Array, scale: float) -> None:
    for i in range(values.size):
        values[i] = scale * values[i] + 1e-9


@njit(fastmath=True)
def _multiply_add(rounds: int) -> float:
    held = np.ones(64)
    for _ in range(rounds):
        for i in range(64):  # a constant: what is held stays in registers
            held[i] = 0.999 * held[i] + 0.001
    return held.sum()


@njit(fastmath=True)
def _multiply_add_singles(rounds: int) -> float:
    held = np.ones(128, np.float32)
    for _ in range(rounds):
        for i in range(128):
            held[i] = np.float32(0.999) * held[i] + np.float32(0.001)
    return held.sum()


# How many numbers go through the registers in a round, by the precision that is computed in.
_ARITHMETIC = {"float64": (_multiply_add, 64), "float32": (_multiply_add_singles, 128)}


class Limits(NamedTuple):
    """Seconds a byte to read, seconds a byte to read and write back, and operations a second."""

    read_s: float
    rewrite_s: float
    flops: float


def limits(working_set: int, computed_in: str = "float64", seconds: float = 0.02) -> Limits:
    """Measure at a working set of so many bytes.

    Args:
        working_set: Bytes that are gone through again and again; small ones stay in a cache.
        computed_in: ``float64`` or ``float32``.
        seconds: For each measurement.
    """
    values = np.ones(max(working_set // 8, 64))
    read = _seconds(lambda: _read(values), seconds) / values.nbytes
    rewrite = _seconds(lambda: _rewrite(values, 0.999), seconds) / values.nbytes
    (multiply_add, width), rounds = _ARITHMETIC[computed_in], 2_000
    return Limits(read, rewrite, 2 * width * rounds / _seconds(lambda: multiply_add(rounds), seconds))


def _seconds(call: Callable[[], object], seconds: float) -> float:
    """Of a call: the first quartile, as a stall is not the machine's limit and the fastest call a shared one's luck."""
    call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return float(np.quantile(taken, 0.25))
