"""The results of one run as JSON, a page of tables and two figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.optimize import nnls

from benchmarks.accuracy import Score
from benchmarks.blocks import BlockRow
from benchmarks.peers import STRUCTURES
from benchmarks.rows import Row
from benchmarks.speed import INDEPENDENT, PAPER

matplotlib.use("Agg")

_UPDATE = (
    "*Update*: median of the samples' in microseconds, mean over the seeds; all methods learn in turns of ten samples."
)
_HOW = (
    "Median and 99th percentile of a call in microseconds on one thread, of several rounds the lowest median, since a "
    "machine that others use too is never faster than alone. *Over the first*: median over that of the table's first "
    "row. *Allocated*: by how many kB the memory of the process grows at most during a call. *Limit*: what the memory "
    "and the core of this machine need at best, measured in the same run: an update reads the stored covariance twice "
    "and writes it once, and multiplies and adds each entry once a row to propagate and once a label to condition, in "
    "float64; a network's pass reads each weight once. Only ratios within one run mean anything."
)


def write(
    out: Path, rows: Sequence[Row], scores: Sequence[Score], compared: Sequence[BlockRow], about: dict[str, Any]
) -> Path:
    """``bench.json``, ``benchmarks.md`` and the figures; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    parts = {"speed": rows, "accuracy": scores, "blocks": compared}
    record = {"about": about, **{name: [_plain(each) for each in part] for name, part in parts.items()}}
    (out / "bench.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    _draw_growth(rows, out / "growth.png")
    _draw_paper_head(rows, out / "paper_head.png")
    page = out / "benchmarks.md"
    page.write_text("\n".join(_page(rows, scores, compared, about)) + "\n", encoding="utf-8")
    return page


def _plain(record: Any) -> dict[str, Any]:
    """A named tuple as JSON takes it, the ones within it too, with the limit that follows from a roofline."""
    nested = {name: _plain(value) if hasattr(value, "_asdict") else value for name, value in record._asdict().items()}
    return {**nested, "limit_us": record.limit_us} if isinstance(record, Row) else nested


def _table(heads: Sequence[str], body: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return [*lines, *("| " + " | ".join(map(str, cells)) + " |" for cells in body), ""]


def _number(value: float, digits: int = 3) -> str:
    """So many significant digits, thousands in groups; a dash for NaN."""
    if math.isnan(value):
        return "-"
    rounded = f"{value:.{digits}g}"
    return f"{float(rounded):,.0f}" if abs(value) >= 1_000.0 else f"{float(rounded):g}"


def _page(
    rows: Sequence[Row], scores: Sequence[Score], compared: Sequence[BlockRow], about: Mapping[str, Any]
) -> list[str]:
    lines = [
        "# Benchmarks", "",
        f"One process, one run: {about['machine']}, {about['cores']} cores, Python {about['python']}, PyTorch "
        f"{about['torch']}, NumPy {about['numpy']}, numba {about['numba']}, {about['date']}.", "", _HOW, "",
    ]  # fmt: skip
    for group in dict.fromkeys(row.group for row in rows):
        own = [row for row in rows if row.group == group]
        lines += [f"## {group[0].upper()}{group[1:]}", ""]
        if group == PAPER:
            lines += ["![Times of the paper's head](paper_head.png)", ""]
        if group == "width":
            lines += ["![Time and size against width](growth.png)", ""]
        lines += _throughput(own) if group == INDEPENDENT else _times(own)
        if group == "width":
            lines += _growth(own)
    for task in dict.fromkeys(each.task for each in scores):
        lines += _accuracy(task, [each for each in scores if each.task == task])
    lines += _blocks(compared)
    if about["missing"]:
        lines += ["## Not run", "", *(f"- {name}: {reason}" for name, reason in about["missing"].items()), ""]
    return lines


def _times(rows: Sequence[Row]) -> list[str]:
    """Every call beside the first, and beside what the machine would need at best."""
    heads = (
        "call", "weights", "covariance, kB", "median", "p99", "over the first", "allocated, kB", "limit",
        "median / limit",
    )  # fmt: skip
    body = [
        (
            row.name, row.weights or "-", _number(row.stored_bytes / 1e3) if row.weights else "-",
            _number(row.median_us), _number(row.p99_us), _number(row.median_us / rows[0].median_us),
            _number(row.allocated_bytes / 1e3), _number(row.limit_us), _number(row.median_us / row.limit_us, 2),
        )
        for row in rows
    ]  # fmt: skip
    return _table(heads, body)


def _growth(rows: Sequence[Row]) -> list[str]:
    """How well time follows the structure's formula: a constant plus a multiple of the limit, fitted in ratios."""
    body = []
    for structure in dict.fromkeys(row.structure for row in rows):
        own = [row for row in rows if row.structure == structure]
        times, limits = (np.array([getattr(row, name) for row in own]) for name in ("median_us", "limit_us"))
        design = np.stack([1.0 / times, limits / times], axis=1)
        (constant, factor), _ = nnls(design, np.ones(len(own)))
        worst = f"{100.0 * float(np.abs(design @ (constant, factor) - 1.0).max()):.0f} %"
        body.append((structure, f"{own[0].weights} to {own[-1].weights}", _number(constant), _number(factor), worst))
    text = "Median fitted by a constant plus a multiple of the limit; the largest relative deviation from that."
    return [text, "", *_table(("structure", "weights", "constant, us", "multiple", "largest deviation"), body)]


def _throughput(rows: Sequence[Row]) -> list[str]:
    """Microseconds a head, and how many times the loop's throughput one call has."""
    taken: dict[tuple[str, str, int], dict[bool, float]] = {}
    for row in rows:
        kind = row.structure, f"{row.features}-{row.width}-1", row.rows
        taken.setdefault(kind, {})["loop" in row.name] = row.median_us / row.rows
    body = [(*kind, *map(_number, (way[True], way[False], way[True] / way[False]))) for kind, way in taken.items()]
    return _table(("structure", "head", "heads", "loop, us a head", "one call", "times the loop"), body)


def _accuracy(task: str, scores: Sequence[Score]) -> list[str]:
    seeds = sorted({each.seed for each in scores})
    body = []
    for method in dict.fromkeys(each.method for each in scores):
        found = [each for each in scores if each.method == method]
        cells = [_range([getattr(each, name) for each in found]) for name in ("error", "coverage", "density")]
        update = _number(float(np.mean([each.update_us for each in found])))
        body.append((method, *cells, update, "; ".join(dict.fromkeys(each.prior for each in found)) or "-"))
    heads = ("method", "error", "coverage of 95 %", "log density", "update", "variances, rho")
    text = f"Seeds {seeds}; mean, and the range over the seeds. {_UPDATE}"
    return [f"## {task.capitalize()}", "", text, "", *_table(heads, body)]


def _blocks(compared: Sequence[BlockRow]) -> list[str]:
    """Rows in successive blocks beside one joint update of all of them."""
    lines = ["## Several rows", "", "Rows learned in successive blocks against one joint update of all of them.", ""]
    body = []
    for task, rows, block in dict.fromkeys((each.task, each.rows, each.block) for each in compared):
        own = [each for each in compared if (each.task, each.block) == (task, block)]
        names = ("error", "mean_difference", "sd_ratio")
        body.append((task, rows, block, *(_range([getattr(each, name) for each in own]) for name in names)))
    heads = ("task", "rows", "block", "error", "difference of the means, joint sds", "sd over the joint update's")
    return [*lines, *_table(heads, body)]


def _range(values: Sequence[float]) -> str:
    if any(math.isnan(value) for value in values):
        return "-"
    return f"{np.mean(values):.4f} ({min(values):.3f} to {max(values):.3f})"


def _draw_growth(rows: Sequence[Row], path: Path) -> None:
    from matplotlib import pyplot

    own = [row for row in rows if row.group == "width"]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for structure, marker in zip(STRUCTURES, "osD^", strict=True):
        line = sorted((row for row in own if row.structure == structure), key=lambda row: row.weights)
        if not line:
            continue
        weights = [row.weights for row in line]
        (drawn,) = panels[0].plot(weights, [row.median_us for row in line], marker=marker, label=structure)
        panels[0].plot(weights, [row.limit_us for row in line], linestyle=":", color=drawn.get_color())
        panels[1].plot(weights, [row.stored_bytes for row in line], marker=marker, color=drawn.get_color())
    labels = (("microseconds", "One update; dotted: limit"), ("bytes", "Covariance"))
    for panel, (y, title) in zip(panels, labels, strict=True):
        panel.set(xscale="log", yscale="log", xlabel="weights", ylabel=y, title=title)
    if own:  # of an early page there may be none yet
        panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _draw_paper_head(rows: Sequence[Row], path: Path) -> None:
    from matplotlib import pyplot

    own = [row for row in rows if row.group == PAPER]
    figure, panel = pyplot.subplots(figsize=(9, 0.42 * len(own) + 1.2), constrained_layout=True)
    places = np.arange(len(own))
    bars = panel.barh(places, [row.median_us for row in own], color="#0072b2")
    panel.bar_label(bars, [_number(row.median_us) for row in own], padding=3)
    panel.scatter([row.limit_us for row in own], places, marker="|", s=160, color="#d55e00", zorder=3, label="limit")
    panel.set_yticks(places, [row.name for row in own])
    panel.invert_yaxis()
    panel.set(xscale="log", xlabel="microseconds, median", title="The paper's head, 577 weights, one thread")
    panel.set_xlim(right=6.0 * max((row.median_us for row in own), default=1.0))  # room for the longest bar's number
    panel.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
