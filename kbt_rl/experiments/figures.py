"""The figures, drawn from the CSV tables alone, so that they can be redrawn without a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kbt_rl.experiments.aggregate import curve, failures, methods_of
from kbt_rl.experiments.figures_more import draw_correlated, draw_initialisation, draw_softmax
from kbt_rl.experiments.plot_style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    PURPLE,
    VERMILION,
    LineStyle,
    blank_figure,
    draw_curve,
    legend_below,
    method_styles,
    new_figure,
    save,
    split_scale,
    style,
)
from kbt_rl.experiments.tables import EXPERT, FLOOR, AdaptRow, Tables, UncertaintyRow, read_tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RULES = {"measure": LineStyle(VERMILION), "replace": LineStyle(BLUE, (0, (3, 1.5)))}
_LEVEL_COLORS = (INK, GREEN, VERMILION, PURPLE)


def draw_figures(out: Path) -> list[Path]:
    """Draw every figure whose table is under ``out`` as PNG beside it, and return their paths.

    Raises:
        FileNotFoundError: The folder holds no table.
    """
    tables = read_tables(out)
    drawings: dict[str, tuple[Sequence[Any], Callable[[Tables], Figure]]] = {
        "figure3": (tables.figure3, draw_figure3),
        "figure4": (tables.figure4, draw_figure4),
        "figure5": (tables.figure5_summary, draw_figure5),
        "initialisation": (tables.initialisation, draw_initialisation),
        "softmax": (tables.softmax, draw_softmax),
        "correlated": (tables.correlated, draw_correlated),
    }
    with style():
        return [save(draw(tables), out / f"{name}.png") for name, (rows, draw) in drawings.items() if rows]


# ---------------------------------------------------------------------- Figure 3


def draw_figure3(tables: Tables) -> Figure:
    """Success rate and regret against the number of samples."""
    rows = tables.figure3
    styles = method_styles(methods_of(rows))
    last = max(row.samples for row in rows)
    trials = max(len(values) for values in _trials_by_method(rows).values())
    least = _least_regret(rows)
    figure, axes = new_figure(5.6, ncols=2)
    success, regret = axes[0]
    for method, look in styles.items():
        if method != FLOOR:
            draw_curve(success, curve(rows, method), look, method)
        if method != EXPERT:  # whose regret is zero
            draw_curve(regret, curve(rows, method, "regret"), look, method, floor=least)
        _mark_failures(success, rows, method, look)
    for panel in (success, regret):
        split_scale(panel, last)
        panel.set_xlabel("labelled samples" + (", two linear scales meeting at 50" if last > 50 else ""))
    success.set(title="Success rate on the shifted plant", ylabel="share of starts that succeed", ylim=(-0.03, 1.03))
    regret.set(title="Regret against the expert", ylabel="cost / cost of the expert $-$ 1", yscale="log")
    regret.set_ylim(least, 200)
    shown = f"mean of {trials} trials, 95 % interval" if trials > 1 else "one trial"
    figure.suptitle(shown, x=0.995, ha="right", fontsize=9.5, color=FAINT)
    if FLOOR in styles:  # which has no success rate, but a place in the legend
        success.plot([], [], label="best linear head on the features", **styles[FLOOR].options)
    legend_below(figure, success, columns=4)
    return figure


def _least_regret(rows: Sequence[AdaptRow]) -> float:
    """Lower end of the regret axis: the power of ten below all mean regrets, within reason."""
    means = [e.mean for method in methods_of(rows) for e in curve(rows, method, "regret").estimates if e.mean > 0]
    return float(10.0 ** np.clip(np.floor(np.log10(min(means, default=1.0))), -4, 0))


def _trials_by_method(rows: Sequence[AdaptRow]) -> dict[str, set[tuple[int, int]]]:
    trials: dict[str, set[tuple[int, int]]] = {}
    for row in rows:
        trials.setdefault(row.method, set()).add((row.pretrain_seed, row.stream_seed))
    return trials


def _mark_failures(axes: Axes, rows: Sequence[AdaptRow], method: str, look: LineStyle) -> None:
    """A cross at each checkpoint by which further trials have failed."""
    counts = failures(rows, method)
    mean = {n: e.mean for n, e in zip(*curve(rows, method), strict=True)}
    before = [0, *counts.values()]
    lost = [n for n, previous in zip(counts, before, strict=False) if counts[n] > previous]
    if lost:
        options = {"color": look.color, "marker": "x", "markersize": 7, "markeredgewidth": 1.8, "linestyle": "none"}
        values = [mean[n] for n in lost]
        label = f"{method}: trials lost to NaN ({max(counts.values())} of {len(_trials_by_method(rows)[method])})"
        axes.plot(lost, values, zorder=6, label=label, clip_on=False, **options)


# ---------------------------------------------------------------------- Figure 4


def draw_figure4(tables: Tables) -> Figure:
    """Computation time per sample, the update alone and from sample to posterior."""
    times = {row.method: row for row in tables.figure4}
    styles = method_styles(list(times))
    rows = [times[method] for method in styles]
    places = np.arange(len(rows), dtype=float)
    figure, axes = new_figure(0.55 * len(rows) + 1.5)
    panel = axes[0, 0]
    encoder = 1e3 * float(np.median([row.pytorch_encoder_s for row in rows]))
    label = f"one pass of PyTorch's encoder, {encoder:.2g} ms"
    panel.axvline(encoder, color=INK, linestyle=":", linewidth=1.4, label=label)
    for shift, field, alpha, label in (
        (-0.2, "update_s", 1.0, "update alone"),
        (0.2, "sample_to_posterior_s", 0.4, "from sample to posterior, with the encoder"),
    ):
        values = [1e3 * getattr(row, field) for row in rows]
        colors = [look.color for look in styles.values()]
        bars = panel.barh(places + shift, values, height=0.38, color=colors, alpha=alpha, zorder=2)
        words = [f"{value:.3g} ms" for value in values]
        patch = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        panel.bar_label(bars, words, padding=4, fontsize=9, color=INK, bbox=patch)
        panel.barh([0], [0], color=INK, alpha=alpha, label=label)
    panel.set(title="Computation time per labelled sample", xlabel="milliseconds, log scale", xscale="log")
    panel.set_yticks(places, list(styles))
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    least = 1e3 * min(row.update_s for row in rows)
    most = 1e3 * max(row.sample_to_posterior_s for row in rows)
    panel.set_xlim(10 ** np.floor(np.log10(least) - 0.2), 3 * most)
    legend_below(figure, panel, columns=3)
    return figure


# ---------------------------------------------------------------------- Figure 5


def draw_figure5(tables: Tables) -> Figure:
    """Predicted variance against iterations; error of the mean and coverage at the end."""
    figure = blank_figure(5.2)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
    panel = figure.add_subplot(grid[:, 0])
    _draw_variances(panel, tables)
    _draw_mean_errors(figure.add_subplot(grid[0, 1]), tables.figure5_summary)
    _draw_coverage(figure.add_subplot(grid[1, 1]), tables.figure5_summary)
    legend_below(figure, panel, columns=4)
    return figure


def _noise_levels(rows: Sequence[UncertaintyRow]) -> dict[float, float]:
    """Variance of the labels, and the variance that the method was told, which is not zero for clean labels."""
    return {row.noise_variance: row.noise_floor for row in sorted(rows, key=lambda row: row.noise_variance)}


def _draw_variances(panel: Axes, tables: Tables) -> None:
    levels = _noise_levels(tables.figure5_summary)
    for (variance, floor), color in zip(levels.items(), _LEVEL_COLORS, strict=False):
        panel.axhline(floor, color=color, linewidth=0.7, zorder=1)
        for rule, look in _RULES.items():
            points = sorted(
                (r.iteration, r.predicted_variance)
                for r in tables.figure5
                if r.rule == rule and r.noise_variance == variance
            )
            if points:
                iterations, values = zip(*points, strict=True)
                panel.plot(iterations, values, color=color, linestyle=look.line, linewidth=1.7)
        name = f"labels with {variance:g} N²" if variance else f"clean labels (floor {floor:.2g} N²)"
        panel.plot([], [], color=color, linewidth=2.5, label=name)
    for rule, look in _RULES.items():
        panel.plot([], [], color=FAINT, linestyle=look.line, label=f"rule {rule}")
    panel.plot([], [], color=FAINT, linewidth=0.7, label="true variance")
    panel.set(
        title="Predicted variance of the label", xlabel="iterations", ylabel="N², mean of the last 500 iterations"
    )
    panel.set_ylim(0, 1.25 * max(max(levels), 1.0))
    panel.set_xlim(left=0)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _draw_mean_errors(panel: Axes, rows: Sequence[UncertaintyRow]) -> None:
    levels = list(_noise_levels(rows))
    for shift, (rule, look) in zip((-0.2, 0.2), _RULES.items(), strict=True):
        values = {levels.index(row.noise_variance): row.mean_error for row in rows if row.rule == rule}
        places = np.array(list(values), dtype=float) + shift
        hatch = None if rule == "measure" else "////"
        bars = panel.bar(places, list(values.values()), width=0.38, color=look.color, hatch=hatch, edgecolor="white")
        panel.bar_label(bars, fmt="%.2f", fontsize=8.5)
        _rule_name(panel, rule, look, 0.98 - 0.14 * (rule == "replace"))
    panel.set(title="Error of the mean after learning", ylabel="N, rms")
    panel.set_ylim(0, 1.2 * max(row.mean_error for row in rows))
    panel.set_xticks(range(len(levels)), [f"{level:g} N²" for level in levels])
    panel.grid(visible=False, axis="x")


def _rule_name(panel: Axes, rule: str, look: LineStyle, height: float) -> None:
    panel.text(0.02, height, f"■ {rule}", color=look.color, transform=panel.transAxes, va="top", fontsize=9.5)


def _draw_coverage(panel: Axes, rows: Sequence[UncertaintyRow]) -> None:
    levels = list(_noise_levels(rows))
    panel.axhspan(93, 97, color=GREEN, alpha=0.15, linewidth=0)
    panel.axhline(95, color=GREEN, linewidth=0.9)
    for shift, (rule, look) in zip((-0.08, 0.08), _RULES.items(), strict=True):
        points = [(levels.index(row.noise_variance) + shift, 100 * row.coverage) for row in rows if row.rule == rule]
        if points:
            marker = "o" if rule == "measure" else "D"
            panel.plot(*zip(*points, strict=True), marker, color=look.color, markersize=7)
    panel.set(title="Coverage of 95 % intervals", xlabel="variance of the label noise", ylabel="% of held-out labels")
    panel.set_ylim(min(90.0, 100 * min(row.coverage for row in rows) - 3), 100)
    panel.set_xlim(-0.5, len(levels) - 0.5)
    panel.set_xticks(range(len(levels)), [f"{level:g} N²" for level in levels])
