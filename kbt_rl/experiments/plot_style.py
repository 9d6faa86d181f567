"""How all figures look: colours, lines, scales and legends. matplotlib is imported where it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kbt_rl.experiments.aggregate import CurveEstimate, memory_of, warm_starts
from kbt_rl.experiments.config import MEMORIES
from kbt_rl.experiments.tables import EXPERT, FLOOR, KBT, LINEAR, PRETRAINED, PRINTED
from kbt_rl.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
WIDTH = 10.0  # inches: 1300 pixels
INK, FAINT = "#2b2f36", "#8a9099"
#: Okabe and Ito's colours, which stay apart under all common colour blindness.
VERMILION, BLUE, GREEN, PURPLE, ORANGE = "#D55E00", "#0072B2", "#009E73", "#AA4499", "#E69F00"
_RC = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save in the style of all figures; afterwards matplotlib's settings are as before."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def blank_figure(height: float) -> Figure:
    """A figure of the common width, without pyplot and its global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def new_figure(height: float, **gridspec: Any) -> tuple[Figure, Any]:
    """A figure of the common width and its axes, an array of ``nrows`` x ``ncols``."""
    figure = blank_figure(height)
    return figure, figure.subplots(squeeze=False, **gridspec)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure in the format that the ending of ``path`` names; the file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:])
    return path


class LineStyle(NamedTuple):
    """Of one method in every figure."""

    color: Any
    line: Any = "-"
    width: float = 1.6
    order: float = 2.0

    @property
    def options(self) -> dict[str, Any]:
        """For ``Axes.plot``."""
        return {"color": self.color, "linestyle": self.line, "linewidth": self.width, "zorder": self.order}


_STYLES = {
    KBT: LineStyle(VERMILION, width=3.0, order=5),
    LINEAR: LineStyle(GREEN, width=1.8, order=4),
    PRINTED: LineStyle(PURPLE, (0, (4, 2)), order=3.5),
    FLOOR: LineStyle(INK, (0, (1, 1.2)), 1.4),
    PRETRAINED: LineStyle(FAINT, (0, (5, 2, 1, 2)), 1.6),
    EXPERT: LineStyle(INK, (0, (6, 3)), 1.2),
}


def method_styles(methods: Sequence[str]) -> dict[str, LineStyle]:
    """A style for each method, in the order of the legend."""
    warm = warm_starts(methods)
    others = [name for name in methods if name not in _STYLES and name not in warm]
    order = [KBT, LINEAR, PRINTED, *others, *warm, PRETRAINED, FLOOR, EXPERT]
    styles = {**{name: LineStyle(ORANGE) for name in others}, **{name: _shade(name) for name in warm}, **_STYLES}
    return {name: styles[name] for name in order if name in methods}


def _shade(warm_start: str) -> LineStyle:
    """One graded colour for all warm starts, the darker the more memory, the same in every figure."""
    from matplotlib import colormaps

    few, many = np.log(MEMORIES[0]), np.log(MEMORIES[-1])
    place = (np.log(memory_of(warm_start)) - few) / (many - few)
    return LineStyle(tuple(colormaps["Blues"](0.36 + 0.64 * float(np.clip(place, 0.0, 1.0)))))


def draw_curve(axes: Axes, points: CurveEstimate, look: LineStyle, label: str, floor: float | None = None) -> None:
    """Mean as a line and 95 % interval as a band; values below ``floor`` are drawn there."""
    least = -np.inf if floor is None else floor
    mean, lower, upper = (
        np.maximum([getattr(e, name) for e in points.estimates], least) for name in ("mean", "lower", "upper")
    )
    axes.fill_between(points.samples, lower, upper, color=look.color, alpha=0.16, linewidth=0, zorder=look.order - 1)
    axes.plot(points.samples, mean, label=label, solid_capstyle="round", **look.options)


def split_scale(axes: Axes, last: float, split: float = 50.0) -> None:
    """Samples on two linear scales: up to ``split`` on the left half of the axis, the rest on the right half."""
    if last <= split:
        axes.set_xlim(0, last)
        return
    ratio = split / (last - split)

    def forward(samples: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.where(samples <= split, samples, split + (samples - split) * ratio)

    def inverse(place: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.where(place <= split, place, split + (place - split) / ratio)

    axes.set_xscale("function", functions=(forward, inverse))
    step = 50 if last <= 200 else 100
    axes.set_xticks([*range(0, int(split) + 1, 10), *range(step * int(split // step + 1), int(last) + 1, step)])
    axes.set_xlim(0, last)
    axes.axvline(split, color=FAINT, linewidth=0.8, zorder=0.5)


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """One legend for the whole figure, outside the data; of entries with the same name the first."""
    handles, labels = axes.get_legend_handles_labels()
    first = dict(reversed(list(zip(labels, handles, strict=True))))
    ordered = {label: first[label] for label in dict.fromkeys(labels)}
    figure.legend(ordered.values(), ordered.keys(), loc="outside lower center", ncols=columns)
