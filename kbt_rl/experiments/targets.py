"""The figures that the experiment has to reach, measured on its tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kbt_rl.experiments.aggregate import (
    ComparisonRow,
    CurveEstimate,
    Estimate,
    compare,
    curve,
    largest_drop,
    methods_of,
    trial_curves,
    warm_starts,
)
from kbt_rl.experiments.tables import EXPERT, KBT, PRETRAINED, AdaptRow, Tables, TimingRow

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Target:
    """One figure to reach.

    Attributes:
        what: What is measured.
        required: The condition, in words.
        measured: The value, None where it was not measured.
        interval: Its 95 % interval, where there is one.
        reached: Whether the condition holds, None where it was not measured.
        aim: Whether it is an aim beyond what is required.
        detail: Where the value comes from, such as the worst checkpoint.
    """

    what: str
    required: str
    measured: float | None = None
    interval: tuple[float, float] | None = None
    reached: bool | None = None
    aim: bool = False
    detail: str = ""


def targets(tables: Tables) -> list[Target]:
    """Every figure to reach, also those that these tables cannot tell."""
    return [
        *_success_targets(tables.figure3),
        *_comparison_targets(tables.figure3),
        *_regret_targets(tables.figure3),
        *_cost_targets(tables.figure4),
        *_uncertainty_targets(tables),
        _initialisation_target(tables),
    ]


def _success_targets(rows: Sequence[AdaptRow]) -> list[Target]:
    kbt = curve(rows, KBT)
    return [
        _at_most("success of the pre-trained policy, shifted plant", 0.0, _first(curve(rows, PRETRAINED)), slack=0.005),
        _at_least("success of the expert, shifted plant", 1.0, _first(curve(rows, EXPERT)), slack=0.005),
        _at_least("success of KBT after 10 samples", 0.90, kbt.at(10), aim=True),
        _at_least("success of KBT after 30 samples", 0.95, kbt.at(30)),
        _at_least("success of KBT, lowest from 20 samples", 0.99, *_worst(kbt, 20, min), aim=True),
        _at_least("success of KBT, lowest from 50 samples", 0.99, *_worst(kbt, 50, min)),
        _drop_target(rows, kbt),
    ]


def _drop_target(rows: Sequence[AdaptRow], kbt: CurveEstimate) -> Target:
    what, required = "drop of KBT below its running maximum after 50 samples", "<= 0.02"
    if not any(samples > 50 for samples in kbt.samples):
        return Target(what, required)
    drop = largest_drop((n, e.mean) for n, e in zip(kbt.samples, kbt.estimates, strict=True))
    worst = max(largest_drop(points) for points in trial_curves(rows, KBT).values())
    detail = f"of the mean curve; {worst:.3g} in the worst single trial"
    return Target(what, required, drop, reached=drop <= 0.02 + _ROUNDING, detail=detail)


def _comparison_targets(rows: Sequence[AdaptRow]) -> list[Target]:
    what = "success of KBT minus warm start, same starts and streams, worst"
    required = ">= -max(0.01, 2 standard errors), any memory and number of samples"
    compared = compare_warm_starts(rows)
    if not compared:
        return [Target(what, required), Target(what, ">= 0", aim=True)]
    worst = min(compared, key=lambda row: row.success_difference + _tolerance(row))
    reached = worst.success_difference + _tolerance(worst) >= -_ROUNDING
    lowest = min(compared, key=lambda row: row.success_difference)
    found = lowest.success_difference
    return [
        Target(what, required, *_difference(worst), reached, detail=_place(worst)),
        Target(what, ">= 0", *_difference(lowest), found >= -_ROUNDING, aim=True, detail=_place(lowest)),
    ]


def compare_warm_starts(rows: Sequence[AdaptRow]) -> list[ComparisonRow]:
    """KBT against each warm start, by memory, at every checkpoint."""
    return [row for method in warm_starts(methods_of(rows)) for row in compare(rows, method)]


def _tolerance(row: ComparisonRow) -> float:
    return max(0.01, 2 * row.success_standard_error)


def _difference(row: ComparisonRow) -> tuple[float, tuple[float, float]]:
    value, margin = row.success_difference, 1.96 * row.success_standard_error
    return value, (value - margin, value + margin)


def _place(row: ComparisonRow) -> str:
    return f"{row.method} after {row.samples} samples"


def _regret_targets(rows: Sequence[AdaptRow]) -> list[Target]:
    kbt = curve(rows, KBT, "regret")
    found = [
        _at_most("regret of KBT after 20 samples", 0.08, kbt.at(20)),
        _at_most("regret of KBT after 50 samples", 0.03, kbt.at(50)),
        _at_most("regret of KBT, highest from 100 samples", 0.02, *_worst(kbt, 100, max)),
    ]
    compared = [row for row in compare_warm_starts(rows) if row.samples > 0]
    early = [row for row in compared if row.samples <= 50]
    return [*found, _regret_comparison(early, "up to 50 samples"), _regret_comparison(compared, "everywhere", aim=True)]


def _regret_comparison(compared: Sequence[ComparisonRow], where: str, aim: bool = False) -> Target:
    what, required = f"regret of KBT minus every warm start's, {where}, worst", "< 0"
    if not compared:
        return Target(what, required, aim=aim)
    worst = max(compared, key=lambda row: row.regret_difference)
    value, margin = worst.regret_difference, 1.96 * worst.regret_standard_error
    return Target(what, required, value, (value - margin, value + margin), value < 0, aim, _place(worst))


def _cost_targets(rows: Sequence[TimingRow]) -> list[Target]:
    times = {row.method: row for row in rows}
    kbt, large, small = (times.get(name) for name in (KBT, "warm start 100", "warm start 10"))

    def ratio(what: str, limit: int, field: str, other: TimingRow | None) -> Target:
        if kbt is None or other is None:
            return Target(what, f"<= 1/{limit}")
        value = getattr(kbt, field) / getattr(other, field)
        return Target(what, f"<= 1/{limit}", value, reached=value <= 1 / limit, detail=f"1/{1 / value:.3g}")

    found = [
        ratio("time of an update, KBT over warm start 100", 5, "update_s", large),
        ratio("time of an update, KBT over warm start 10", 50, "update_s", small),
        ratio("time from sample to posterior, KBT over warm start 100", 3, "sample_to_posterior_s", large),
        ratio("time from sample to posterior, KBT over warm start 10", 40, "sample_to_posterior_s", small),
    ]
    what = "time of an update of KBT over a forward pass of PyTorch's encoder"
    if kbt is None:
        return [*found, Target(what, "< 1")]
    value = kbt.update_s / kbt.pytorch_encoder_s
    detail = f"{kbt.update_s / kbt.encoder_s:.3g} of this library's shorter pass"
    return [*found, Target(what, "< 1", value, reached=value < 1, detail=detail)]


def _uncertainty_targets(tables: Tables) -> list[Target]:
    rows = tables.figure5_summary
    found = []
    for rule in ("measure", "replace"):
        what, required = f"predicted variance, relative error at 10, 20, 50 N^2, {rule}", "<= 0.05"
        noisy = [row for row in rows if row.rule == rule and row.noise_variance > 0]
        if not noisy:
            found.append(Target(what, required))
            continue
        errors = {row.noise_variance: abs(row.final_variance / row.noise_variance - 1) for row in noisy}
        worst = max(errors.values())
        values = ", ".join(f"{row.noise_variance:g}: {row.final_variance:.3g}" for row in noisy)
        found.append(Target(what, required, worst, reached=worst <= 0.05, detail=values))
    at_50 = next((row for row in rows if row.rule == "measure" and row.noise_variance == 50.0), None)
    error, coverage = (None, None) if at_50 is None else (at_50.mean_error, at_50.coverage)
    below, within = (None, None) if at_50 is None else (at_50.mean_error < 0.7, 0.93 <= at_50.coverage <= 0.97)
    return [
        *found,
        Target("error of the mean at 50 N^2, measure, N", "< 0.7", error, reached=below),
        Target("coverage of 95 % intervals at 50 N^2, measure", "0.93 to 0.97", coverage, reached=within),
    ]


def _initialisation_target(tables: Tables) -> Target:
    what, required = "head against the pre-trained layer before any update, largest difference", "<= 1e-10"
    if not tables.initialisation:
        return Target(what, required)
    worst = max(tables.initialisation, key=lambda row: row.largest_difference)
    detail = f"L = {worst.layers}, prior variance {worst.prior_variance:g}"
    return Target(what, required, worst.largest_difference, reached=worst.largest_difference <= 1e-10, detail=detail)


def _first(points: CurveEstimate) -> Estimate | None:
    return points.estimates[0] if points.estimates else None


def _worst(points: CurveEstimate, start: int, pick: Callable[..., Any]) -> tuple[Estimate | None, str]:
    """The lowest or highest estimate from ``start`` samples on, and where it is."""
    tail = [(e, n) for n, e in zip(points.samples, points.estimates, strict=True) if n >= start]
    if not tail:
        return None, ""
    found, samples = pick(tail, key=lambda pair: pair[0].mean)
    return found, f"after {samples} samples"


def _at_least(
    what: str, limit: float, found: Estimate | None, detail: str = "", *, aim: bool = False, slack: float = _ROUNDING
) -> Target:
    if found is None:
        return Target(what, f">= {limit:.2f}", aim=aim)
    interval = (found.lower, found.upper)
    return Target(what, f">= {limit:.2f}", found.mean, interval, found.mean >= limit - slack, aim, detail)


def _at_most(what: str, limit: float, found: Estimate | None, detail: str = "", *, slack: float = _ROUNDING) -> Target:
    if found is None:
        return Target(what, f"<= {limit:.2f}")
    interval = (found.lower, found.upper)
    return Target(what, f"<= {limit:.2f}", found.mean, interval, found.mean <= limit + slack, detail=detail)
