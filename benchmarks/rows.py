"""What is timed, and the record of it: calls in turns, in rounds, beside what the machine would need at best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.clock import Timing, in_turns
from benchmarks.machine import limits
from benchmarks.memory import peak_growth
from benchmarks.work import Roofline, Work, update_work
from kbt_rl.inference.head import BayesianHead

# A machine that others use too changes its speed between the first call and the last, and is never faster than alone:
# of so many rounds the lowest median of each call is taken, and its lowest limit.
ROUNDS = 4
_STREAM = 64


class Case(NamedTuple):
    """A call to be timed.

    Attributes:
        name: What is called.
        call: Without arguments.
        head: What it updates, None for a rival or another call.
        rows: Rows of one update, or independent heads with a row each.
        work: What the call must do at least; None where no formula is given.
        samples: Labelled samples of one call, to which its time is shared out.
    """

    name: str
    call: Callable[[], Any]
    head: BayesianHead | None = None
    rows: int = 1
    work: Work | None = None
    samples: int = 1


class Row(NamedTuple):
    """One timed call.

    Attributes:
        group: What is varied, or the heading of a comparison, of which the first call is the measure.
        name: What was called.
        structure: Of the head's covariance, or empty.
        features: Inputs of the head.
        width: Hidden units.
        rows: Rows in one update, or independent heads with a row each.
        weights: Number of weights of the head.
        stored_bytes: Size of the covariance as this library stores it.
        median_us: Microseconds of a call, median.
        p99_us: 99th percentile.
        allocated_bytes: By which the memory of the process grew at most during a call; NaN where it was not measured.
        roofline: What the machine's memory and cores would need at best, None where no formula is given.
    """

    group: str
    name: str
    structure: str
    features: int
    width: int
    rows: int
    weights: int
    stored_bytes: int
    median_us: float
    p99_us: float
    allocated_bytes: float
    roofline: Roofline | None

    @property
    def limit_us(self) -> float:
        """What the machine would need at best; NaN where no formula is given."""
        return math.nan if self.roofline is None else self.roofline.limit_us


def update_case(name: str, head: BayesianHead, rows: int = 1) -> Case:
    """Updates of a head on a stream of 64 samples, again and again; feature entries of order one."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((_STREAM, rows, head.in_features))
    labels = rng.standard_normal((_STREAM, rows, head.out_features))
    turn = turns()

    def call() -> None:
        i = next(turn)
        head.update(features[i], labels[i])

    return Case(name, call, head, rows, update_work(head.spec.structure, shapes_of(head), rows))


def turns(count: int = _STREAM) -> Iterator[int]:
    """0 to ``count - 1``, again and again."""
    while True:
        yield from range(count)


def shapes_of(head: BayesianHead) -> tuple[tuple[int, int], ...]:
    """Neurons and inputs of each layer."""
    return tuple((shape.n, shape.k) for shape in head.spec.shapes)


def stored_bytes(head: BayesianHead) -> int:
    """Size of the covariance as it is stored."""
    return sum(block.nbytes for block in head.state.cov)


def timed(
    group: str,
    cases: Sequence[Case],
    seconds: float,
    *,
    rounds: int = ROUNDS,
    burst: int = 10,
    warm_up: int = 3,
    alone: bool = False,
) -> list[Row]:
    """Time all cases in rounds; see ``Row`` and ``clock.in_turns``.

    Args:
        group: Heading of all.
        cases: What to call.
        seconds: For each, all rounds together.
        rounds: How often everything is timed.
        burst: Calls of one in a row.
        warm_up: Calls of each, and in each round, that are not counted.
        alone: Whether a case has its time in a round at once: a wide one would empty the caches of the others.
    """
    taken: dict[str, list[Timing]] = {case.name: [] for case in cases}
    limited: dict[str, list[Roofline]] = {case.name: [] for case in cases}
    for _ in range(rounds):
        for together in [[case] for case in cases] if alone else [cases]:
            calls = {case.name: case.call for case in together}
            for name, timing in in_turns(calls, seconds / rounds, burst, warm_up).items():
                taken[name].append(timing)
            for case in together:  # right after it, on the machine as fast as it is at the moment
                if case.work is not None:
                    machine = limits(case.work.working_set, case.work.computed_in)
                    limited[case.name].append(Roofline(case.work, machine))
    return [_row(group, case, taken[case.name], limited[case.name]) for case in cases]


def _row(group: str, case: Case, timings: Sequence[Timing], rooflines: Sequence[Roofline]) -> Row:
    best = min(timings, key=lambda timing: timing.median_us)
    limit = min(rooflines, key=lambda roofline: roofline.limit_us, default=None)
    times = best.median_us / case.samples, best.p99_us / case.samples
    allocated = peak_growth(case.call, tries=2 if best.median_us < 1e6 else 1)
    if case.head is None:
        return Row(group, case.name, "", 0, 0, case.rows, 0, 0, *times, allocated, limit)
    head = case.head
    hidden = head.spec.shapes[0].n if len(head.spec.shapes) > 1 else 0
    sizes = head.in_features, hidden, case.rows, len(head.mean), stored_bytes(head)
    return Row(group, case.name, head.spec.structure, *sizes, *times, allocated, limit)
