"""The figure of ``kbt-rl change``, drawn from its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kbt_rl.experiments import plot_style
from kbt_rl.experiments.change import DelayRow, SuccessRow, success_after
from kbt_rl.experiments.change_setup import (
    CUSUM,
    EXPERT,
    FORGETTING,
    LEARNED,
    NONE,
    PRETRAINED,
    PROCESS,
    TOWARDS,
    TRAP,
    WINDOW,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    NONE: plot_style.FAINT,
    FORGETTING: plot_style.GREEN,
    PROCESS: plot_style.BLUE,
    TOWARDS: "#56B4E9",
    WINDOW: plot_style.PURPLE,
    CUSUM: plot_style.VERMILION,
    LEARNED: plot_style.ORANGE,
    TRAP: "#8c6d1f",
    PRETRAINED: "#c3c8cf",
    EXPERT: plot_style.INK,
}


def draw_change(shifts: Sequence[SuccessRow], delays: Sequence[DelayRow], drift: Sequence[SuccessRow]) -> Figure:
    """Success after a shift, delay of the alarms, and success under the drift."""
    figure, axes = plot_style.new_figure(4.6, ncols=3, width_ratios=(1.25, 1.0, 1.25))
    _draw_shifts(axes[0, 0], shifts)
    _draw_delays(axes[0, 1], delays)
    _draw_drift(axes[0, 2], drift)
    plot_style.legend_below(figure, axes[0, 0], columns=3)
    return figure


def _draw_shifts(axes: Axes, rows: Sequence[SuccessRow]) -> None:
    checkpoints = sorted({row.samples for row in rows})
    for name in dict.fromkeys(row.strategy for row in rows):
        points = [success_after(rows, name, samples) for samples in checkpoints]
        middle = [point.mean for point in points]
        errors = [[p.mean - p.lower for p in points], [p.upper - p.mean for p in points]]
        line = ":" if name in (EXPERT, PRETRAINED) else "-"
        axes.errorbar(
            checkpoints, middle, np.array(errors), label=name, color=_COLOURS[name], linestyle=line, marker="o",
            markersize=4, capsize=2,
        )  # fmt: skip
    axes.set(title="Ten successive plants", xlabel="labels since the shift", ylabel="success", ylim=(-0.03, 1.05))


def _draw_delays(axes: Axes, rows: Sequence[DelayRow]) -> None:
    names = list(dict.fromkeys(row.strategy for row in rows))
    labels, width = ["1", "2", "3", "4", "5", "6+", "none"], 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        found = [row.delay for row in rows if row.strategy == name and row.shift > 0]
        places = [6 if delay is None else min(delay, 6) - 1 for delay in found]
        shares = np.bincount(places, minlength=len(labels)) / max(len(places), 1)
        axes.bar(np.arange(len(labels)) + (index - (len(names) - 1) / 2) * width, shares, width, color=_COLOURS[name])
    axes.set_xticks(range(len(labels)), labels)
    axes.set(title="Labels until noticed", xlabel="labels since the shift", ylabel="share of the shifts")


def _draw_drift(axes: Axes, rows: Sequence[SuccessRow]) -> None:
    checkpoints = sorted({row.samples for row in rows})
    for name in dict.fromkeys(row.strategy for row in rows):
        middle = [success_after(rows, name, samples).mean for samples in checkpoints]
        line = ":" if name in (EXPERT, PRETRAINED) else "-"
        axes.plot(checkpoints, middle, color=_COLOURS[name], linestyle=line)
    axes.set(title="A slow drift", xlabel="labels", ylabel="success on the plant of the moment", ylim=(-0.03, 1.05))
