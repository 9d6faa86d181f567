"""Times of calls that take turns.

A shared machine changes its speed by a factor of two within minutes. What is timed one after another is then compared
with each other's weather; what takes turns sees the same. Only ratios within one run mean anything.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Timing(NamedTuple):
    """Microseconds of one call.

    Attributes:
        median_us: Median.
        p99_us: 99th percentile.
        calls: How often it was called.
    """

    median_us: float
    p99_us: float
    calls: int


def in_turns(
    calls: Mapping[str, Callable[[], Any]], seconds: float = 2.0, burst: int = 10, warm_up: int = 3
) -> dict[str, Timing]:
    """Time calls in turns of ``burst`` each, until each has had ``seconds`` or 20,000 calls.

    Args:
        calls: What to time, by name.
        seconds: For each. One that takes so long is called twice, of which the second counts.
        burst: Calls in a row; the caches are then as in a loop of this call, but for its first.
        warm_up: Calls of each that are not counted.
    """
    budget = 1e9 * seconds
    bursts = {name: _warmed(call, budget, burst, warm_up) for name, call in calls.items()}
    taken: dict[str, list[int]] = {name: [] for name in calls}
    left = dict.fromkeys(calls, budget)
    collecting = gc.isenabled()
    gc.disable()
    try:
        while any(rest > 0 for rest in left.values()):
            for name, call in calls.items():
                if left[name] <= 0:
                    continue
                times = [_nanoseconds(call) for _ in range(bursts[name])]
                taken[name] += times
                left[name] -= sum(times)
                if len(taken[name]) >= 20_000:
                    left[name] = 0.0
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(each) for name, each in taken.items()}


def _warmed(call: Callable[[], Any], budget: float, burst: int, warm_up: int) -> int:
    """Warm a call up; returns how many calls of it, at most ``burst``, are within the budget."""
    spent = last = 0
    for _ in range(warm_up):
        last = _nanoseconds(call)
        spent += last
        if spent > budget:
            break
    return max(1, min(burst, int(budget / max(last, 1))))


def _nanoseconds(call: Callable[[], Any]) -> int:
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start


def _summary(nanoseconds: list[int]) -> Timing:
    values = np.asarray(nanoseconds) / 1e3
    return Timing(float(np.median(values)), float(np.quantile(values, 0.99)), len(values))
