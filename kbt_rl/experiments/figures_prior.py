"""The figure of ``kbt-rl prior``, drawn from its table alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kbt_rl.experiments.aggregate import estimate
from kbt_rl.experiments.plot_style import BLUE, FAINT, INK, PURPLE, VERMILION, new_figure, save, style
from kbt_rl.experiments.prior_choice import CHOSEN, DEFAULT, NO_LEARNING, PAPER, WORST, PriorRow
from kbt_rl.experiments.tables import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {CHOSEN: VERMILION, DEFAULT: INK, PAPER: PURPLE, WORST: BLUE, NO_LEARNING: FAINT}


def draw_prior(out: Path) -> Path:
    """Draw ``prior.png`` from ``prior.csv`` under ``out``."""
    with style():
        return save(prior_figure(read_rows(out / "prior.csv", PriorRow)), out / "prior.png")


def prior_figure(rows: Sequence[PriorRow]) -> Figure:
    """Success and regret of each prior at each checkpoint, over the plants that the choice has not seen."""
    figure, panels = new_figure(3.8, nrows=1, ncols=2)
    _draw(panels[0, 0], rows, "success")
    _draw(panels[0, 1], rows, "regret")
    panels[0, 0].set(title="Success on other plants", ylabel="share of starts", ylim=(-0.03, 1.03))
    panels[0, 1].set(title="Regret on other plants", ylabel="cost over the expert's, minus 1", yscale="log")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _draw(panel: Axes, rows: Sequence[PriorRow], field: str) -> None:
    checkpoints = sorted({row.labels for row in rows})
    methods = [name for name in _COLORS if any(row.method == name for row in rows)]
    for shift, method in zip(np.linspace(-0.3, 0.3, len(methods)), methods, strict=True):
        found = [
            estimate([getattr(row, field) for row in rows if (row.method, row.labels) == (method, count)])
            for count in checkpoints
        ]
        middle = [each.mean for each in found]
        spread = [[each.mean - each.lower for each in found], [each.upper - each.mean for each in found]]
        places = np.arange(len(checkpoints)) + shift
        panel.errorbar(places, middle, spread, fmt="o", markersize=5, color=_COLORS[method], label=method)
    panel.set_xticks(range(len(checkpoints)), [str(count) for count in checkpoints])
    panel.set(xlabel="labels", xlim=(-0.5, len(checkpoints) - 0.5))
