"""What this machine can do at best: bytes a second at a working set of a given size, and operations a second.

The limit of an update follows: it has to read the covariance once to propagate, and to read and write it once to
condition, whatever the arithmetic.
"""

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
        for i in range(64):
            held[i] = 0.999 * held[i] + 0.001
    return held.sum()


class Limits(NamedTuple):
    """Seconds a byte to read, seconds a byte to read and write back, and operations a second."""

    read_s: float
    rewrite_s: float
    flops: float

    def of_cores(self, count: int) -> Limits:
        """What so many cores would do if each had a memory of its own."""
        return Limits(self.read_s / count, self.rewrite_s / count, self.flops * count)


def limits(working_set: int, seconds: float = 0.05) -> Limits:
    """Measure at a working set of so many bytes.

    Args:
        working_set: Bytes that are gone through again and again; small ones stay in a cache.
        seconds: For each measurement.
    """
    values = np.ones(max(working_set // 8, 64))
    read = _seconds(lambda: _read(values), seconds) / values.nbytes
    rewrite = _seconds(lambda: _rewrite(values, 0.999), seconds) / values.nbytes
    rounds = 2_000
    return Limits(read, rewrite, 2 * 64 * rounds / _seconds(lambda: _multiply_add(rounds), seconds))


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


class Work(NamedTuple):
    """What one update on one row must move and compute.

    Attributes:
        stored_bytes: Size of the covariance: read once by the forward pass, read and written once by the commit.
        flops: Multiplications and additions.
    """

    stored_bytes: int
    flops: int

    def of_heads(self, count: int) -> Work:
        """That of so many heads."""
        return Work(count * self.stored_bytes, count * self.flops)


class Roofline(NamedTuple):
    """What must be done, and what the machine did at a working set of that size in the same run."""

    work: Work
    machine: Limits

    @property
    def moving_us(self) -> float:
        """Microseconds to read the covariance, and to read it again and write it."""
        return 1e6 * self.work.stored_bytes * (self.machine.read_s + self.machine.rewrite_s)

    @property
    def computing_us(self) -> float:
        """Microseconds to multiply and add."""
        return 1e6 * self.work.flops / self.machine.flops

    @property
    def limit_us(self) -> float:
        """The longer of the two."""
        return max(self.moving_us, self.computing_us)


def update_work(structure: str, shapes: tuple[tuple[int, int], ...], itemsize: int = 8) -> Work:
    """Least work of an update on one row with one output.

    Each stored entry is multiplied and added once to propagate and once to condition. A symmetric matrix of ``m`` rows
    has ``m (m + 1) / 2`` entries to store, each of which stands for two in the product.

    Args:
        structure: ``joint``, ``layer``, ``neuron`` or ``diagonal``.
        shapes: Neurons and inputs (bias included) of each layer.
        itemsize: Bytes of a number.
    """

    def triangle(m: int) -> int:
        return m * (m + 1) // 2

    sizes = [n * k for n, k in shapes]
    entries = {
        "joint": triangle(sum(sizes)),
        "layer": sum(triangle(size) for size in sizes),
        "neuron": sum(n * triangle(k) for n, k in shapes),
        "diagonal": sum(sizes),
    }[structure]
    products = entries if structure == "diagonal" else 2 * entries
    return Work(itemsize * entries, 2 * products + 2 * entries)
