"""The results of one run as JSON, a page of tables and two figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.optimize import nnls

from benchmarks.accuracy import Score
from benchmarks.blocks import BlockRow
from benchmarks.peers import STRUCTURES
from benchmarks.speed import INDEPENDENT, Row

matplotlib.use("Agg")

_UPDATE = (
    "*Update*: median of the samples' in microseconds, mean over the seeds; all methods learn in turns of ten samples."
)
# Fewer independent heads are bound by calls.
_MANY = 256
_ROOFLINE = (
    "What limits are made of: bytes that a call must read, and read and write back, at what this machine does at a "
    "working set of that size (*reads*, *rewrites*), and operations at what a core does in its registers. An update "
    "reads the covariance once, and reads and writes it once more, a block of up to 32 rows too; it multiplies and "
    "adds each entry once a row to propagate and once a label to condition, in float64. A network's pass reads each "
    "weight once."
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
    rows: Sequence[Row], scores: Sequence[Score], compared: Sequence[BlockRow], about: dict[str, Any]
) -> list[str]:
    lines = [
        "# Benchmarks", "",
        f"One process, one run: {about['machine']}, {about['cores']} cores, Python {about['python']}, PyTorch "
        f"{about['torch']}, NumPy {about['numpy']}, numba {about['numba']}, {about['date']}.",
        "Median and 99th percentile in microseconds; *limit* is what the memory and the core of this machine would "
        "need at best for the same working set, measured in the same run. Only ratios within one run mean anything.",
        "Of each call the lowest median of five rounds is shown, and the lowest limit (of samples seen there is one "
        "round): a machine that others use too changes its speed, and is never faster than alone.",
        "",
    ]  # fmt: skip
    for group in dict.fromkeys(row.group for row in rows):
        own = [row for row in rows if row.group == group]
        lines += [f"## {group.capitalize()}", ""]
        if group == "paper's head":
            lines += ["![Times of the paper's head](paper_head.png)", ""]
        if group == "width":
            lines += ["![Time and size against width](growth.png)", ""]
        lines += _throughput(own) if group == INDEPENDENT else _times(own)
        if group == "width":
            lines += _growth(own)
    lines += _rooflines(rows)
    for task in dict.fromkeys(each.task for each in scores):
        own = [each for each in scores if each.task == task]
        seeds = sorted({each.seed for each in own})
        lines += [f"## {task.capitalize()}", "", f"Seeds {seeds}; mean, and the range over the seeds. {_UPDATE}", ""]
        body = []
        for method in dict.fromkeys(each.method for each in own):
            found = [each for each in own if each.method == method]
            cells = [_range([getattr(each, name) for each in found]) for name in ("error", "coverage", "density")]
            update = _number(float(np.mean([each.update_us for each in found])))
            body.append((method, *cells, update, "; ".join(dict.fromkeys(each.prior for each in found)) or "-"))
        lines += _table(("method", "error", "coverage of 95 %", "log density", "update", "variances, rho"), body)
    lines += _blocks(compared)
    if about["missing"]:
        lines += ["## Not run", "", *(f"- {name}: {reason}" for name, reason in about["missing"].items()), ""]
    return lines


def _times(rows: Sequence[Row]) -> list[str]:
    """Every call beside what the machine would need at best."""
    heads = (
        "call", "weights", "covariance, kB", "threads", "median", "p99", "p99 / median", "limit", "median / limit",
    )  # fmt: skip
    body = [
        (
            row.name, row.weights or "-", _number(row.stored_bytes / 1e3) if row.weights else "-", row.threads,
            _number(row.median_us), _number(row.p99_us), _number(row.p99_us / row.median_us, 2),
            _number(row.limit_us), _number(row.median_us / row.limit_us, 2),
        )
        for row in rows
    ]  # fmt: skip
    return _table(heads, body)


def _rooflines(rows: Sequence[Row]) -> list[str]:
    """Bytes and operations of calls on one thread, of many heads' in one call too, against the machine."""
    body = []
    for row in rows:
        many = row.group == INDEPENDENT
        if row.roofline is None or row.threads > 1 or (many and ("loop" in row.name or row.rows < _MANY)):
            continue
        work, (read_s, rewrite_s, flops_s) = row.roofline
        amounts = work.read_bytes / 1e3, work.rewritten_bytes / 1e3, work.flops / 1e3
        body.append(
            (
                f"{row.name.replace(', one call', '')} heads in one call, {row.dtype}" if many else row.name,
                *map(_number, (*amounts, 1e-9 / read_s, 1e-9 / rewrite_s, flops_s / 1e9)),
                *map(_number, (row.roofline.moving_us, row.roofline.computing_us, row.median_us)),
                _number(row.median_us / row.limit_us, 2),
            )
        )
    heads = (
        "call", "read, kB", "rewritten, kB", "operations, thousands", "reads, GB/s", "rewrites, GB/s", "Gflop/s",
        "moving", "computing", "median", "median / limit",
    )  # fmt: skip
    return ["## Roofline", "", _ROOFLINE, "", *_table(heads, body)]


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


def _blocks(compared: Sequence[BlockRow]) -> list[str]:
    """A long batch in successive blocks beside one joint update of all its rows."""
    lines = ["## Long batches", "", "Rows learned in successive blocks against one joint update of all of them.", ""]
    body = []
    for task, rows, block in dict.fromkeys((each.task, each.rows, each.block) for each in compared):
        own = [each for each in compared if (each.task, each.block) == (task, block)]
        names = ("error", "mean_difference", "sd_ratio")
        body.append((task, rows, block, *(_range([getattr(each, name) for each in own]) for name in names)))
    heads = ("task", "rows", "block", "error", "difference of the means, joint sds", "sd over the joint update's")
    return [*lines, *_table(heads, body)]


def _throughput(rows: Sequence[Row]) -> list[str]:
    """Microseconds a head, and how many times the loop's throughput one call has."""

    def key(row: Row) -> tuple[str, int, int, str, int]:
        return row.structure, row.features, row.width, row.dtype, row.rows

    taken = {(*key(row), "loop" in row.name, row.threads): row.median_us / row.rows for row in rows}
    body = []
    for kind in dict.fromkeys(map(key, rows)):
        loop, one, two = (taken[(*kind, *way)] for way in ((True, 1), (False, 1), (False, 2)))
        structure, features, width, dtype, count = kind
        sizes = structure, f"{features}-{width}-1", dtype, count
        body.append((*sizes, *map(_number, (loop, one, two, loop / one, loop / two))))
    heads = (
        "structure",
        "head",
        "stored as",
        "heads",
        "loop, us a head",
        "one call",
        "two threads",
        "times the loop",
        "two threads",
    )
    return _table(heads, body)


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
    panels[0].set(
        xscale="log", yscale="log", xlabel="weights", ylabel="microseconds", title="One update; dotted: limit"
    )
    panels[1].set(xscale="log", yscale="log", xlabel="weights", ylabel="bytes", title="Covariance")
    panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _draw_paper_head(rows: Sequence[Row], path: Path) -> None:
    from matplotlib import pyplot

    own = [row for row in rows if row.group == "paper's head" and row.threads == 1]
    figure, panel = pyplot.subplots(figsize=(9, 0.42 * len(own) + 1.2), constrained_layout=True)
    places = np.arange(len(own))
    bars = panel.barh(places, [row.median_us for row in own], color="#0072b2")
    panel.bar_label(bars, [_number(row.median_us) for row in own], padding=3)
    panel.scatter([row.limit_us for row in own], places, marker="|", s=160, color="#d55e00", zorder=3, label="limit")
    panel.set_yticks(places, [row.name for row in own])
    panel.invert_yaxis()
    panel.set(xscale="log", xlabel="microseconds, median", title="The paper's head, 577 weights, one thread")
    panel.set_xlim(right=6.0 * max(row.median_us for row in own))  # room for the longest bar's number
    panel.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
