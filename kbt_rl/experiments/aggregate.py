"""Means over trials with bootstrap intervals, and paired comparisons of methods on the same trials."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from kbt_rl.experiments.tables import KBT, WARM_START, AdaptRow, CorrelatedRow

Value = Literal["success", "regret"]
CurveRow = AdaptRow | CorrelatedRow
RESAMPLES = 2_000
#: Half the width of a central 95 % interval of a Gaussian, in standard deviations.
Z95 = 1.959964
_SEED = 20_240
_PERCENTILES = (2.5, 97.5)


class Estimate(NamedTuple):
    """A mean over trials, its 95 % interval, and the extremes of single trials."""

    mean: float
    lower: float
    upper: float
    minimum: float
    maximum: float
    trials: int


class CurveEstimate(NamedTuple):
    """Estimates against the number of samples."""

    samples: list[int]
    estimates: list[Estimate]

    def at(self, samples: int) -> Estimate | None:
        """The estimate at a checkpoint, or None if it was not one."""
        return self.estimates[self.samples.index(samples)] if samples in self.samples else None


class SummaryRow(NamedTuple):
    """A method at a checkpoint, over all trials."""

    method: str
    samples: int
    trials: int
    failed: int
    success: float
    success_lower: float
    success_upper: float
    success_minimum: float
    regret: float
    regret_lower: float
    regret_upper: float
    regret_maximum: float


class ComparisonRow(NamedTuple):
    """KBT minus another method, paired by pre-trained policy and stream, hence by labels and starts."""

    method: str
    samples: int
    success_difference: float
    success_standard_error: float
    regret_difference: float
    regret_standard_error: float
    trials: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and its 95 % interval by a percentile bootstrap over trials, always with the same resamples."""
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(_SEED).integers(len(array), size=(RESAMPLES, len(array)))
    lower, upper = np.percentile(array[drawn].mean(axis=1), _PERCENTILES)
    return Estimate(float(array.mean()), float(lower), float(upper), float(array.min()), float(array.max()), len(array))


def methods_of(rows: Iterable[CurveRow]) -> list[str]:
    """Names of the methods in order of appearance."""
    return list(dict.fromkeys(row.method for row in rows))


def warm_starts(methods: Iterable[str]) -> list[str]:
    """The warm starts among the methods, by memory."""
    return sorted((name for name in methods if name.startswith(WARM_START)), key=memory_of)


def memory_of(warm_start: str) -> int:
    """Memory of a warm start, which its name ends in."""
    return int(warm_start.split()[-1])


def curve(rows: Iterable[CurveRow], method: str, value: Value = "success", stream: str | None = None) -> CurveEstimate:
    """Estimates of a method at each of its checkpoints.

    Args:
        rows: Of Figure 3 or of the correlated experiment.
        method: Its name.
        value: ``success`` or ``regret``.
        stream: Only rows of this stream, for rows that have one.
    """
    values: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row.method == method and (stream is None or getattr(row, "stream", None) == stream):
            values[row.samples].append(getattr(row, value))
    samples = sorted(values)
    return CurveEstimate(samples, [estimate(values[count]) for count in samples])


def failures(rows: Iterable[AdaptRow], method: str) -> dict[int, int]:
    """How many trials of a method have failed by each checkpoint."""
    counts: defaultdict[int, int] = defaultdict(int)
    for row in rows:
        if row.method == method:
            counts[row.samples] += row.failed
    return dict(sorted(counts.items()))


def summary_rows(rows: Sequence[AdaptRow]) -> list[SummaryRow]:
    """Every method at every checkpoint."""
    summary = []
    for method in methods_of(rows):
        success, regret, failed = curve(rows, method), curve(rows, method, "regret"), failures(rows, method)
        for count, s, r in zip(success.samples, success.estimates, regret.estimates, strict=True):
            of_success = (s.mean, s.lower, s.upper, s.minimum)
            of_regret = (r.mean, r.lower, r.upper, r.maximum)
            summary.append(SummaryRow(method, count, s.trials, failed[count], *of_success, *of_regret))
    return summary


def compare(rows: Sequence[AdaptRow], method: str) -> list[ComparisonRow]:
    """KBT against a method at every checkpoint that both have; trials without a partner are left out."""
    ours = {(row.pretrain_seed, row.stream_seed, row.samples): row for row in rows if row.method == KBT}
    pairs: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        partner = ours.get((row.pretrain_seed, row.stream_seed, row.samples))
        if row.method == method and partner is not None:
            pairs[row.samples].append((partner.success - row.success, partner.regret - row.regret))
    return [_comparison(method, samples, np.array(pairs[samples])) for samples in sorted(pairs)]


def _comparison(method: str, samples: int, differences: np.ndarray) -> ComparisonRow:
    count = len(differences)
    error = differences.std(axis=0, ddof=1) / count**0.5 if count > 1 else np.zeros(2)
    mean = differences.mean(axis=0)
    return ComparisonRow(method, samples, float(mean[0]), float(error[0]), float(mean[1]), float(error[1]), count)


def trial_curves(rows: Iterable[AdaptRow], method: str) -> dict[tuple[int, int], list[tuple[int, float]]]:
    """Success of each trial ``(pretrain_seed, stream_seed)`` of a method: ``(samples, success)`` in order."""
    curves: defaultdict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row.method == method:
            curves[row.pretrain_seed, row.stream_seed].append((row.samples, row.success))
    return {trial: sorted(points) for trial, points in curves.items()}


def largest_drop(points: Iterable[tuple[int, float]], after: int = 50) -> float:
    """Largest fall below the running maximum at any checkpoint after ``after`` samples."""
    best, drop = -np.inf, 0.0
    for samples, value in points:
        best = max(best, value)
        if samples > after:
            drop = max(drop, best - value)
    return drop


def success_by_encoder(
    rows: Iterable[AdaptRow], method: str = KBT, between: tuple[int, int] = (10, 50)
) -> dict[int, float]:
    """Mean success of a method over trials and the checkpoints in a range, by pre-training seed."""
    values: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row.method == method and between[0] <= row.samples <= between[1]:
            values[row.pretrain_seed].append(row.success)
    return {seed: float(np.mean(values[seed])) for seed in sorted(values)}
