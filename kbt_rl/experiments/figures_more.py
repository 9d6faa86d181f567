"""The three smaller figures: the head before any update, the moments of the softmax, labels at visited states."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kbt_rl.experiments.aggregate import curve, methods_of
from kbt_rl.experiments.plot_style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    VERMILION,
    draw_curve,
    legend_below,
    method_styles,
    new_figure,
)
from kbt_rl.experiments.tables import Tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_initialisation(tables: Tables) -> Figure:
    """Head against the pre-trained layer before any update."""
    figure, axes = new_figure(4.2)
    panel = axes[0, 0]
    looks = zip((GREEN, VERMILION, BLUE), ("o", "s", "^"), (11, 7, 5), strict=True)
    for layers, (color, marker, size) in zip((1, 2, 3), looks, strict=True):
        points = [
            (row.prior_variance, max(row.largest_difference, 1e-17))
            for row in tables.initialisation
            if row.layers == layers
        ]
        if points:
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=size, label=f"L = {layers}")
    panel.axhline(1e-10, color=INK, linestyle="--", linewidth=1.2, label="to be reached")
    panel.axhline(np.finfo(np.float64).eps, color=FAINT, linewidth=0.9, label="rounding of float64")
    panel.set(title="Largest difference between the Bayesian head and the pre-trained layer before any update")
    panel.set(xscale="log", yscale="log", ylim=(1e-17, 1e-8))
    panel.set(xlabel="prior variance of all weights", ylabel="difference / rms of the labels")
    legend_below(figure, panel, columns=5)
    return figure


def draw_softmax(tables: Tables) -> Figure:
    """Error of the first-order softmax moments against sampling."""
    variances = [row.logit_variance for row in tables.softmax]
    figure, axes = new_figure(3.9, ncols=2)
    panels = (("mean_rmse", "Mean of the probabilities", "rms error"),
              ("cov_relative_error", "Covariance of the probabilities", "relative error, Frobenius norm"))  # fmt: skip
    for panel, (field, title, label) in zip(axes[0], panels, strict=True):
        values = [getattr(row, field) for row in tables.softmax]
        panel.plot(variances, values, color=VERMILION, marker="o", markersize=5)
        panel.set(title=title, xlabel="variance of the logits", ylabel=label, xscale="log", yscale="log")
    axes[0, 1].axhline(1.0, color=FAINT, linewidth=0.9)
    axes[0, 1].text(variances[0], 1.1, "as large as the covariance itself", color=FAINT, fontsize=9, va="bottom")
    figure.suptitle("First-order moments of the softmax against sampling", x=0.01, ha="left", color=FAINT, fontsize=10)
    return figure


def draw_correlated(tables: Tables) -> Figure:
    """Success with labels at visited states against i.i.d. ones, a panel for each method."""
    rows = tables.correlated
    styles = method_styles(methods_of(rows))
    last = max(row.samples for row in rows)
    figure, axes = new_figure(3.9, ncols=len(styles), sharey=True)
    for panel, (method, look) in zip(axes[0], styles.items(), strict=True):
        for stream, line, width in (("iid", "-", 2.4), ("visited", (0, (3, 1.5)), 1.8)):
            points = curve(rows, method, stream=stream)
            if points.samples:
                draw_curve(panel, points, look._replace(line=line, width=width), stream)
        falls = [row.falls for row in rows if row.method == method and row.falls is not None and row.samples == last]
        fallen = f"\n{np.mean(falls):.1f} falls a run while learning" if falls else ""
        panel.set(title=method, xlabel=f"labels{fallen}", xlim=(0, last), ylim=(-0.03, 1.03))
    axes[0, 0].set_ylabel("share of starts that succeed")
    figure.suptitle("Success rate by where labels are asked", x=0.01, ha="left", color=FAINT, fontsize=10)
    _legend_of_streams(figure, axes[0, 0])
    return figure


def _legend_of_streams(figure: Figure, panel: Axes) -> None:
    panel.plot([], [], color=INK, linewidth=2.4, label="i.i.d. states of the label box")
    panel.plot([], [], color=INK, linestyle=(0, (3, 1.5)), linewidth=1.8, label="states that the learner visits itself")
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles[-2:], labels[-2:], loc="outside lower center", ncols=2)
