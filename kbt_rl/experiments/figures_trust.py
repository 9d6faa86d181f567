"""The calibration plot of ``kbt-rl trust``, drawn from its table alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kbt_rl.experiments.aggregate import Estimate, estimate
from kbt_rl.experiments.plot_style import BLUE, FAINT, GREEN, INK, ORANGE, VERMILION, new_figure, save, style
from kbt_rl.experiments.tables import read_rows
from kbt_rl.experiments.trust import LEVELS, NO_LEARNING, NOISES, STREAMS, STRUCTURES, TrustRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = dict(zip(STRUCTURES, (VERMILION, BLUE, GREEN, ORANGE), strict=True))
_TITLES = {"iid": "i.i.d. states", "closed loop": "Closed loop: fresh episodes of the policy"}
# Percentage points that the target for 95 % intervals allows, and how many the lower panels show.
_ALLOWED, _SHOWN = 2.0, 8.0
_PERCENT = [100.0 * level for level in LEVELS]


def draw_trust(out: Path) -> Path:
    """Draw ``calibration.png`` from ``trust.csv`` under ``out``."""
    with style():
        return save(calibration_figure(read_rows(out / "trust.csv", TrustRow)), out / "calibration.png")


def calibration_figure(rows: Sequence[TrustRow]) -> Figure:
    """Measured coverage against the nominal level, and below how far the two are apart, for each kind of stream.

    The upper panels show the heads that learn the noise; a triangle at the edge of a lower panel is beyond it.
    """
    figure, panels = new_figure(6.6, nrows=2, ncols=2, sharex=False, height_ratios=(1.25, 1.0))
    for column, stream in enumerate(STREAMS):
        mine = [row for row in rows if row.stream == stream]
        _draw_reliability(panels[0, column], mine)
        _draw_differences(panels[1, column], mine)
        panels[0, column].set(title=_TITLES[stream], xlabel="nominal level, %")
        panels[1, column].set(xlabel="nominal level, %")
    panels[0, 0].set_ylabel("labels inside, %")
    panels[1, 0].set_ylabel("inside minus nominal, points")
    handles, labels = panels[1, 0].get_legend_handles_labels()
    first_handles, first_labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles + first_handles, labels + first_labels, loc="outside lower center", ncols=5)
    return figure


def _coverage(rows: Sequence[TrustRow], structure: str, noise: str) -> list[Estimate] | None:
    """At each level in per cent, over trials and noise variances; None where there is no such trial."""
    members = [row for row in rows if (row.structure, row.noise) == (structure, noise)]
    if not members:
        return None
    return [estimate([100.0 * getattr(row, f"coverage_{level:.0f}") for row in members]) for level in _PERCENT]


def _draw_reliability(panel: Axes, rows: Sequence[TrustRow]) -> None:
    panel.plot((0, 100), (0, 100), color=INK, linewidth=0.8, zorder=1)
    looks = [(NO_LEARNING, "known", FAINT)] + [(name, "learned", _COLORS[name]) for name in STRUCTURES]
    for structure, noise, color in looks:
        found = _coverage(rows, structure, noise)
        if found is None:
            continue
        label = "pre-trained" if structure == NO_LEARNING else None
        line = "--" if structure == NO_LEARNING else "-"
        panel.plot(_PERCENT, [each.mean for each in found], line, marker="o", markersize=3.5, color=color, label=label)
    panel.set(xlim=(45, 101), ylim=(-3, 103))


def _draw_differences(panel: Axes, rows: Sequence[TrustRow]) -> None:
    # Levels side by side at equal distances, so that 95 and 99 can be told apart.
    panel.axhspan(-_ALLOWED, _ALLOWED, color=GREEN, alpha=0.13, linewidth=0)
    panel.axhline(0.0, color=INK, linewidth=0.8)
    kinds = [(structure, noise) for structure in STRUCTURES for noise in NOISES]
    for shift, (structure, noise) in zip(np.linspace(-0.36, 0.36, len(kinds)), kinds, strict=True):
        found = _coverage(rows, structure, noise)
        if found is None:
            continue
        color, learned = _COLORS[structure], noise == "learned"
        middle = np.array([each.mean for each in found]) - _PERCENT
        places, shown = np.arange(len(LEVELS)) + shift, np.abs(middle) <= _SHOWN
        spread = np.array([[each.mean - each.lower, each.upper - each.mean] for each in found]).T
        face = color if learned else "white"
        look: dict[str, Any] = {"markersize": 4, "linewidth": 1.2, "color": color, "markerfacecolor": face}
        drawn = np.where(shown, middle, np.nan)
        panel.errorbar(places, drawn, spread, fmt="o", label=f"{structure}, {noise} noise", **look)
        if not shown.all():
            beyond = np.clip(middle[~shown], -_SHOWN, _SHOWN)
            panel.plot(places[~shown], beyond, "v", clip_on=False, **{**look, "linewidth": 0})
    panel.set_ylim(-_SHOWN, _SHOWN)
    panel.set_xticks(range(len(LEVELS)), [f"{level:.0f}" for level in _PERCENT])
