"""The figure of ``kbt-rl noise``, drawn from its tables alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kbt_rl.experiments.aggregate import estimate
from kbt_rl.experiments.noise import KNOWN, NO_LEARNING, ONLINE, ROBUST, UNTOLD, VARIATIONAL, CurveRow, NoiseRow
from kbt_rl.experiments.plot_style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    VERMILION,
    LineStyle,
    blank_figure,
    save,
    style,
)
from kbt_rl.experiments.tables import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEVEL_COLORS = (INK, GREEN, VERMILION, PURPLE)
_COLORS = {KNOWN.name: INK, ONLINE.name: VERMILION, ROBUST.name: BLUE, VARIATIONAL.name: ORANGE, UNTOLD.name: FAINT,
           "known, robust": GREEN}  # fmt: skip
_LINES = {ONLINE.name: LineStyle(VERMILION), VARIATIONAL.name: LineStyle(ORANGE, (0, (3, 1.5)))}


def draw_noise(out: Path) -> Path:
    """Draw ``noise.png`` from ``noise.csv`` and ``noise_curves.csv`` under ``out``."""
    rows, curves = read_rows(out / "noise.csv", NoiseRow), read_rows(out / "noise_curves.csv", CurveRow)
    with style():
        return save(noise_figure(rows, curves), out / "noise.png")


def noise_figure(rows: Sequence[NoiseRow], curves: Sequence[CurveRow]) -> Figure:
    """Learned variance against labels; error of the mean and coverage for each distribution of the noise."""
    figure = blank_figure(6.0)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.35))
    _draw_curves(figure.add_subplot(grid[:, 0]), curves)
    errors, coverage = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    _draw_points(errors, rows, "mean_error", 1.0)
    errors.set(title="Error of the mean, held out", ylabel="N, rms", yscale="log")
    _draw_points(coverage, rows, "coverage", 100.0)
    coverage.axhspan(93, 97, color=GREEN, alpha=0.15, linewidth=0)
    coverage.set(title="Coverage of 95 % intervals, held out", ylabel="% of labels", ylim=(None, 101))
    handles, labels = errors.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _draw_curves(panel: Axes, curves: Sequence[CurveRow]) -> None:
    levels = sorted({row.noise_variance for row in curves if row.kind == "gaussian"})
    for level, color in zip(levels, _LEVEL_COLORS, strict=False):
        panel.axhline(level, color=color, linewidth=0.7)
        for method, look in _LINES.items():
            values: defaultdict[int, list[float]] = defaultdict(list)
            for row in curves:
                if (row.method, row.kind, row.noise_variance) == (method, "gaussian", level):
                    values[row.iteration].append(row.learned_variance)
            if not values:
                continue
            places = sorted(values)
            middle = [estimate(values[place]) for place in places]
            panel.plot(places, [each.mean for each in middle], color=color, linestyle=look.line)
            if method == ONLINE.name:
                lower, upper = ([getattr(each, end) for each in middle] for end in ("lower", "upper"))
                panel.fill_between(places, lower, upper, color=color, alpha=0.15, linewidth=0)
        panel.plot([], [], color=color, linewidth=2.5, label=f"labels with {level:g} N²")
    for method, look in _LINES.items():
        panel.plot([], [], color=FAINT, linestyle=look.line, label=method)
    panel.set(title="Learned noise variance", xlabel="labels", ylabel="N²", ylim=(0, 1.8 * max([*levels, 1.0])))
    panel.set_xlim(left=0)
    panel.legend(loc="upper right")


def _draw_points(panel: Axes, rows: Sequence[NoiseRow], field: str, unit: float) -> None:
    settings = list(dict.fromkeys((row.kind, row.noise_variance) for row in rows))
    methods = [name for name in _COLORS if any(row.method == name for row in rows)]
    for place, method in zip(np.linspace(-0.3, 0.3, len(methods)), methods, strict=True):
        drawn = []
        for index, setting in enumerate(settings):
            values = [unit * getattr(r, field) for r in rows if (r.kind, r.noise_variance) == setting
                      and r.method == method]  # fmt: skip
            if values:
                found = estimate(values)
                drawn.append((index + place, found.mean, found.mean - found.lower, found.upper - found.mean))
        x, mean, below, above = zip(*drawn, strict=True)
        panel.errorbar(x, mean, (below, above), fmt="o", markersize=4, color=_COLORS[method], label=method)
    if field == "mean_error":
        before = [row.mean_error for row in rows if row.method == NO_LEARNING.name]
        if before:
            panel.axhline(float(np.mean(before)), color=FAINT, linestyle="--", linewidth=1.2, label="pre-trained")
    panel.set_xticks(range(len(settings)), [_setting(*setting) for setting in settings], fontsize=8.5)
    panel.set_xlim(-0.5, len(settings) - 0.5)


def _setting(kind: str, variance: float) -> str:
    name = {"gaussian": "Gaussian", "student_t": "Student t, 3", "outliers": "5 % wild"}[kind]
    return f"{name}\n{variance:g} N²"
