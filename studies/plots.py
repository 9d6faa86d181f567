"""All figures: a study says what its panels show; here is how they are drawn, for colour-blind readers too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from string import ascii_lowercase
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from kbt_rl.files import replacing
from studies import methods
from studies.table import Table

if TYPE_CHECKING:  # matplotlib is imported where it draws: no worker needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 10.0, 130  # inches; 1300 pixels
INK, FAINT = "#2b2f36", "#8a9099"
#: Okabe and Ito's colours, which stay apart under all common colour blindness, the ones of most contrast first.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7a6a00", "#4b4f9e")
VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY = COLOURS[:6]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.2)), (0, (6, 2, 1.5, 2)))
_STYLE = {
    "font.size": 10.5, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": FAINT, "axes.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e9ed", "grid.linewidth": 0.8,
    "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 1.6, "lines.markersize": 5,
    "figure.facecolor": "white", "savefig.facecolor": "white", "pdf.fonttype": 42,
}  # fmt: skip


class Look(NamedTuple):
    """Of one method in every figure."""

    color: Any
    line: Any = "-"
    marker: str = ""
    width: float = 1.6
    order: float = 2.0

    @property
    def options(self) -> dict[str, Any]:
        """For ``Axes.plot`` and ``Axes.errorbar``."""
        return {
            "color": self.color, "linestyle": self.line, "marker": self.marker, "linewidth": self.width,
            "zorder": self.order,
        }  # fmt: skip


# The first six lead the legend, the others end it.
_FIXED = {
    methods.DEFAULT.name: Look(VERMILION, width=3.2, order=5),
    "kbt_rl": Look(VERMILION, marker="o", width=2.6, order=5),  # of the suite, which draws with this module
    methods.TWO_LAYERS.name: Look(BLUE, _DASHES[1], width=2.4, order=6),
    methods.ONE_LAYER.name: Look(GREEN, _DASHES[2], width=2.0, order=7),
    methods.EVERY_LAYER.name: Look(ORANGE, _DASHES[3], width=2.0, order=6.5),
    methods.PRINTED.name: Look(PURPLE, _DASHES[3], "X", order=3.5),
    methods.PRETRAINED.name: Look(FAINT, _DASHES[3], "|"),
    methods.FLOOR.name: Look(INK, _DASHES[2], width=1.4),
    methods.EXPERT.name: Look(INK, _DASHES[1], "_", width=1.2),
}


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name, in the order of the legend: warm starts from dark to light by memory, with markers."""
    from matplotlib import colormaps

    warm = [name for name in names if name.startswith("warm start")]
    shades = {
        name: Look(colormaps["viridis"](place), "-", marker, 1.4)
        for name, place, marker in zip(warm, np.linspace(0.12, 0.86, len(warm)), itertools.cycle(MARKERS), strict=False)
    }
    rest = [name for name in names if name not in _FIXED and name not in shades]
    taken = {_FIXED[name].color for name in names if name in _FIXED}
    free = [colour for colour in COLOURS if colour not in taken]
    others = {
        name: Look(*look) for name, look in zip(rest, zip(*map(itertools.cycle, (free, _DASHES, MARKERS)),
                                                          strict=False), strict=False)
    }  # fmt: skip
    found, fixed = {**others, **_FIXED, **shades}, list(_FIXED)
    return {name: found[name] for name in [*fixed[:6], *rest, *warm, *fixed[6:]] if name in names}


class Panel(NamedTuple):
    """One panel of a figure.

    Attributes:
        title: Of the panel.
        table: What it shows.
        axes: What ``Axes.set`` takes: names, limits and scales of the axes.
        kind: ``curves`` of the mean against the number of labels, with its 95 % interval as a band; ``points``, the
            means side by side with bars; or ``rows``, the same with the places one below the other.
        by: The column that tells curves or points apart.
        along: The column whose values are the places of points.
        scale: What values are multiplied with.
        least: Smaller ones are drawn here.
        middle: Whether curves are of the interquartile mean.
        few_labels: Whether the scale of labels is linear up to 10 and logarithmic above.
        band: Where a value should lie.
        lines: Values to mark.
    """

    title: str
    table: Table
    axes: Mapping[str, Any]
    kind: Literal["curves", "points", "rows"] = "curves"
    by: str = "method"
    along: str = "task"
    scale: float = 1.0
    least: float = -np.inf
    middle: bool = False
    few_labels: bool = False
    band: tuple[float, float] | None = None
    lines: Sequence[float] = ()

    def draw(self, axes: Axes, looks: Mapping[str, Look]) -> None:
        """Draw it."""
        own = {name: look for name, look in looks.items() if name in self.table.distinct(self.by)}
        places = self.table.distinct(self.along)
        most = min(0.36, 0.08 * (len(own) - 1))  # so that each stays by its own place
        shifts = np.linspace(-most, most, len(own))
        for (name, look), shift in zip(own.items(), shifts, strict=True):
            rows = self.table.where(**{self.by: name})
            found = rows.curve(middle=self.middle) if self.kind == "curves" else {
                places.index(place) + shift: group.estimate() for place, group in rows.by(self.along).items()
            }  # fmt: skip
            estimates = (np.array([estimate[i] for estimate in found.values()]) for i in range(3))
            mean, lower, upper = (np.maximum(self.scale * values, self.least) for values in estimates)
            if self.kind == "curves":
                axes.fill_between(list(found), lower, upper, color=look.color, alpha=0.15, linewidth=0,
                                  zorder=look.order - 1)  # fmt: skip
                low, high = self.axes.get("ylim", (None, None))
                leaves = (low is not None and mean.min() < low) or (high is not None and mean.max() > high)
                # Marks on an axis are drawn whole, but what leaves the panel is cut.
                axes.plot(list(found), mean, label=name, solid_capstyle="round", clip_on=leaves, **look.options)
                continue
            sides: dict[str, Any] = {"y": list(found), "x": mean, "xerr": (mean - lower, upper - mean)}
            if self.kind == "points":
                sides = {"x": list(found), "y": mean, "yerr": (mean - lower, upper - mean)}
            apart = {"linestyle": "none", "marker": look.marker or "o", "capsize": 2, "elinewidth": 1.2}
            axes.errorbar(label=name, **{**look.options, **sides, **apart})
        if self.kind == "rows":
            axes.set_yticks(range(len(places)), list(map(str, places)))
            axes.invert_yaxis()
        elif self.kind == "points":
            axes.set_xticks(range(len(places)), [str(place).replace(", ", "\n") for place in places])
        elif self.few_labels:
            last = max(self.table.distinct("labels"))
            axes.set_xscale("symlog", linthresh=10, linscale=0.6)
            ticks = [tick for tick in (0, 5, 10, 20, 50, 100, 200, 400) if tick <= last]
            axes.set_xticks(ticks, list(map(str, ticks)))
            axes.minorticks_off()
            axes.set(xlim=(0, last), xlabel="labels (linear up to 10, then logarithmic)")
        if self.band is not None:
            (axes.axvspan if self.kind == "rows" else axes.axhspan)(*self.band, color=FAINT, alpha=0.2, linewidth=0)
        for value in self.lines:
            (axes.axvline if self.kind == "rows" else axes.axhline)(value, color=INK, linewidth=0.8, linestyle=":")
        axes.set(title=self.title, **self.axes)


class Picture(NamedTuple):
    """A figure: panels in rows, with one legend below all.

    Attributes:
        name: Of its files.
        panels: Row by row.
        height: Inches.
        columns: Panels in a row; all if left out.
        legend: Columns of the legend.
    """

    name: str
    panels: Sequence[Panel]
    height: float = 4.8
    columns: int | None = None
    legend: int = 3

    def draw(self) -> Figure:
        """The figure, without pyplot and its global state."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH, self.height), dpi=DPI, layout="constrained")
        columns = self.columns or len(self.panels)
        grid = figure.subplots(-(-len(self.panels) // columns), columns, squeeze=False).flat
        for left in grid[len(self.panels) :]:
            left.remove()
        names = list(dict.fromkeys(name for panel in self.panels for name in panel.table.distinct(panel.by)))
        entries: dict[str, Any] = {}
        for letter, axes, panel in zip(ascii_lowercase, grid, self.panels, strict=False):
            panel.draw(axes, looks(names))
            if columns > 3:
                axes.set_title(fill(panel.title, 18, break_long_words=False), fontsize=9.5)
            if len(self.panels) > 1:
                axes.text(-0.015, 1.02, letter, transform=axes.transAxes, ha="right", weight="bold", size=11.5)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
        order = [name for name in looks(names) if name in entries]
        figure.legend([entries[name] for name in order], order, loc="outside lower center", ncols=self.legend)
        trials = max(len(panel.table.by("policy_seed", "stream_seed")) for panel in self.panels)
        mean = "interquartile mean" if any(panel.middle for panel in self.panels) else "mean"
        text = f"{mean} of {trials} trials, 95 % interval" if trials > 1 else "one trial"
        figure.suptitle(text, x=0.995, ha="right", fontsize=9.5, color=FAINT)
        return figure

    def write(self, out: Path) -> Path:
        """Draw it and write it as PNG, and as PDF for papers; the files are replaced as a whole."""
        with style():
            figure = self.draw()
            for ending in ("pdf", "png"):
                path = out / f"{self.name}.{ending}"
                with replacing(path) as file:
                    figure.savefig(file, format=ending)
        return path


@contextmanager
def style() -> Iterator[None]:
    """Draw and save in the style of all figures; afterwards matplotlib's settings are as before."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield
