"""Tables and figure of the study without an oracle, from the results that it left on the disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kbt_rl.experiments.aggregate import Z95, estimate
from kbt_rl.experiments.no_oracle import EXPERT_ACTS, IDENTIFIED_IID, IDENTIFIED_VISITED, CurveRow, LearnerRow, Study
from kbt_rl.experiments.plot_style import BLUE, GREEN, INK, VERMILION, legend_below, new_figure, save, style
from kbt_rl.experiments.tables import write_rows


def read_study(paths: Sequence[Path]) -> Study:
    """The rows of several results of :func:`perform`."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return Study(
        [LearnerRow(**row) for result in results for row in result["learners"]],
        [CurveRow(**row) for result in results for row in result["curve"]],
    )


def write_study(study: Study, out: Path) -> list[Path]:
    """Write the rows of all configurations and their summary as CSV."""
    tables: dict[str, list[Any]] = {
        "no_oracle.csv": study.learners,
        "no_oracle_gain.csv": study.curve,
        "no_oracle_summary.csv": summarise(study.learners),
    }
    for name, rows in tables.items():
        if rows:
            write_rows(out / name, rows)
    return [out / name for name, rows in tables.items() if rows]


class SummaryRow(NamedTuple):
    """A method at a checkpoint: means over its learners with 95 % intervals.

    The interval of ``no_fall`` is Wilson's, that of ``score`` a bootstrap over learners; ``lowest_policy`` is the mean
    score on the worst of the pre-trained policies.
    """

    method: str
    episodes: int
    learners: int
    no_fall: float
    no_fall_lower: float
    no_fall_upper: float
    score: float | None
    score_lower: float | None
    score_upper: float | None
    lowest_policy: float | None
    fallbacks: int


def summarise(rows: Sequence[LearnerRow]) -> list[SummaryRow]:
    """One row a method and checkpoint, in order of appearance."""
    groups: dict[tuple[str, int], list[LearnerRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.episodes), []).append(row)
    return [_summary(*key, group) for key, group in groups.items()]


def _summary(method: str, episodes: int, group: Sequence[LearnerRow]) -> SummaryRow:
    stayed = sum(row.no_fall for row in group)
    first = (method, episodes, len(group), stayed / len(group), *wilson_interval(stayed, len(group)))
    fallbacks = sum(row.fallbacks for row in group)
    scores = {seed: [row.score for row in group if row.pretrain_seed == seed and row.score is not None]
              for seed in sorted({row.pretrain_seed for row in group})}  # fmt: skip
    pooled = [score for of_policy in scores.values() for score in of_policy]
    if not pooled:
        return SummaryRow(*first, None, None, None, None, fallbacks)
    found = estimate(pooled)
    lowest = min(float(np.mean(of_policy)) for of_policy in scores.values())
    return SummaryRow(*first, found.mean, found.lower, found.upper, lowest, fallbacks)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, Probable inference, 1927); it does not collapse at 0 and 1."""
    share, weight = successes / trials, Z95**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = Z95 * np.sqrt(share * (1 - share) / trials + weight / trials / 4) / (1 + weight)
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def draw_study(study: Study, path: Path) -> Path:
    """Scores with labels off by method and number of episodes; error of the identified gain in the first episode."""
    with style():
        figure, axes = new_figure(4.6, ncols=2, width_ratios=(1.25, 1.0))
        scores, errors = axes[0]
        summary = [row for row in summarise(study.learners) if row.score is not None]
        methods = list(dict.fromkeys(row.method for row in summary))
        looks = {1: (BLUE, "o", -0.14), 5: (VERMILION, "s", 0.14)}
        for row in summary:
            color, marker, shift = looks.get(row.episodes, (INK, "^", 0.0))
            place, score = methods.index(row.method) + shift, row.score or 0.0
            spread = [[score - (row.score_lower or 0.0)], [(row.score_upper or 0.0) - score]]
            label = f"after {row.episodes} episode{'s' if row.episodes > 1 else ''}"
            scores.errorbar(score, place, xerr=spread, color=color, marker=marker, capsize=3, label=label)
        scores.set(title="The policy alone, labels off, fresh starts", xlabel="success", xlim=(-0.03, 1.03))
        scores.set_yticks(range(len(methods)), methods)
        scores.invert_yaxis()
        for method, color in zip(
            (IDENTIFIED_IID, IDENTIFIED_VISITED, EXPERT_ACTS), (VERMILION, BLUE, GREEN), strict=True
        ):
            times = sorted({row.time for row in study.curve if row.method == method})
            worst = [max(row.upper for row in study.curve if (row.method, row.time) == (method, t)) for t in times]
            middle = [
                np.mean([row.median for row in study.curve if (row.method, row.time) == (method, t)]) for t in times
            ]
            errors.plot(times, middle, color=color, label=method)
            errors.plot(times, worst, color=color, linestyle=":", linewidth=1.1)
        errors.set(title="Identified gain, first episode", xscale="log", yscale="log", xlabel="time, s")
        errors.set_ylabel("largest relative error; dotted: 95th percentile")
        errors.legend()
        legend_below(figure, scores, columns=2)
        return save(figure, path)
