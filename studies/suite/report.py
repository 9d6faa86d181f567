"""What the trials of the suite say: shares of the gap that a method closes, over streams and over tasks."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kbt_rl.files import write_text
from studies.plots import Panel, Picture
from studies.suite.methods import KBT, NONE, TEACHER
from studies.table import Row, Table, Text, interval

#: Of the summary over all tasks.
EVERYTHING = "all tasks"


def shares(table: Table) -> Table:
    """The share of the gap that each trial has closed, from the same starts; 0 is not learning, 1 the teacher."""
    gained = table.where(metric="return")
    ends = [{_place(row): row.value for row in gained.where(method=method.name)} for method in (NONE, TEACHER)]
    learned = [row for row in gained if row.method not in (NONE.name, TEACHER.name)]
    found = []
    for row in learned:
        low, high = (end[_place(row)] for end in ends)
        found.append(row._replace(metric="share", value=(row.value - low) / (high - low)))
    return Table(found)


def _place(row: Row) -> tuple[object, ...]:
    return (row.task, row.policy_seed, row.stream_seed, row.labels)


class Summary(NamedTuple):
    """``table.csv``: a line for each task, method and number of labels: the interquartile mean with its interval."""

    table: Table

    def write(self, out: Path) -> Path:
        """Write it; the file is replaced as a whole."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("task", "method", "labels", "share", "low", "high"))
        for (task, method, labels), rows in self.table.by("task", "method", "labels").items():
            writer.writerow((task, method, labels, *(round(value, 4) for value in rows.middle()[:3])))
        write_text(out / "table.csv", text.getvalue())
        return out / "table.csv"


def tables(share: Table) -> Iterator[Text]:
    """One table a task, then over all: a method a line, a number of labels a column."""
    for task, rows in share.by("task").items():
        yield _grid(f"{task}: share of the gap closed after n labels", rows)
    whole = [name for name, rows in share.by("method").items() if len(rows.by("task")) == len(share.by("task"))]
    if len(share.by("task")) > 1:
        yield _grid(f"{EVERYTHING}: share of the gap closed after n labels", share.where(method=whole), area=True)


def _grid(title: str, table: Table, *, area: bool = False) -> Text:
    counts = sorted(table.distinct("labels"))
    body = []
    for method, rows in table.by("method").items():
        cells = [interval(found) for found in rows.curve(middle=True).values()]
        body.append([method, *cells, *([interval(areas(rows).middle())] if area else [])])
    if area:
        body.sort(key=lambda line: -float(line[-1].split()[0]))
    return Text(title, ["method", *map(str, counts), *(["mean over these"] if area else [])], body)


def areas(table: Table) -> Table:
    """The mean over the numbers of labels of each trial."""
    return Table(
        rows.rows[0]._replace(labels=0, metric="area", value=rows.estimate().mean)
        for rows in table.by("task", "method", "policy_seed", "stream_seed").values()
    )


def never_worse(share: Table) -> Text:
    """The lowest interquartile mean of each method over tasks and numbers of labels, with its place."""
    body = []
    for method, rows in share.by("method").items():
        found = [(group.middle(), place) for place, group in rows.by("task", "labels").items()]
        low, (task, labels) = min(found, key=lambda one: one[0].mean)
        body.append([method, interval(low), f"{task}, {labels} labels"])
    return Text(
        "Lowest share of each method; below 0 it is worse than not learning", ["method", "share", "where"], body
    )


def coverage(table: Table) -> Text:
    """How many labels the 95 % intervals held where the learner went, by the labels learned before."""
    rows = table.where(metric="coverage", method=KBT.name)
    counts = sorted(rows.distinct("labels"))
    body = [
        [task, *(f"{group.estimate().mean:.3f}" for _, group in sorted(of.by("labels").items()))]
        for task, of in rows.by("task").items()
    ]
    return Text("Labels inside of the 95 % interval, up to n labels", ["task", *map(str, counts)], body)


def picture(share: Table, shown: tuple[str, ...]) -> Picture:
    """Share against labels, a panel a task."""
    counts = sorted(share.distinct("labels"))
    ticks = [labels for labels in counts if labels in (20, 100, 200, 1000)] or counts
    words = {"ylim": (-0.45, 1.12), "xscale": "log", "xticks": ticks, "xticklabels": list(map(str, ticks))}
    columns = min(4, len(share.by("task")))
    panels = []
    for place, (task, rows) in enumerate(share.by("task").items()):
        drawn = rows.where(method=[name for name in shown if name in rows.distinct("method")])
        named = {"xlabel": "labels"} | ({"ylabel": "share of the gap closed"} if place % columns == 0 else {})
        panels.append(Panel(task, drawn, words | named, middle=True, lines=(0.0, 1.0)))
    return Picture("policies", panels, 2.6 * -(-len(panels) // columns) + 0.6, columns=columns)
