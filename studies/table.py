"""The one result table: a row is one number that one trial measured. Words and figures are made from it alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text as RichText

from kbt_rl.files import write_text
from studies.statistics import Estimate, estimate, interquartile, wilson


class Row(NamedTuple):
    """One number of one trial.

    Attributes:
        study: Its name.
        task: Plant, and what else was varied around the method, such as the noise of the labels.
        method: What learned or acted.
        policy_seed: Seed of the pre-trained policy.
        stream_seed: Seed of the labels and the starts.
        labels: Labels used when it was measured.
        metric: What was measured, with its unit if it has one.
        value: The number.
    """

    study: str
    task: str
    method: str
    policy_seed: int
    stream_seed: int
    labels: int
    metric: str
    value: float


_KINDS = tuple(get_type_hints(Row).values())


class Table:
    """Rows of one or more studies, in the order of their trials."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def where(self, **wanted: Any) -> Table:
        """The rows whose columns have these values; a collection of values means any of them."""
        rows = self.rows
        for name, value in wanted.items():
            place = Row._fields.index(name)
            if isinstance(value, str | int | float):
                rows = [row for row in rows if row[place] == value]
            else:
                rows = [row for row in rows if row[place] in value]
        return Table(rows)

    def by(self, *columns: str) -> dict[Any, Table]:
        """Tables of equal values in these columns, in order of appearance; the key is the value, or a tuple of them."""
        places = [Row._fields.index(name) for name in columns]
        groups: dict[Any, list[Row]] = {}
        for row in self.rows:
            key = row[places[0]] if len(places) == 1 else tuple([row[place] for place in places])
            groups.setdefault(key, []).append(row)
        return {key: Table(rows) for key, rows in groups.items()}

    def by_stream(self) -> Table:
        """The same by stream, then as before: the order in which a plan pairs the seeds, and intervals resample."""
        return Table(sorted(self.rows, key=lambda row: row.stream_seed))

    def distinct(self, column: str) -> list[Any]:
        """The values of a column, in order of appearance."""
        place = Row._fields.index(column)
        return list(dict.fromkeys(row[place] for row in self.rows))

    def values(self) -> list[float]:
        """The numbers."""
        return [row.value for row in self.rows]

    def estimate(self) -> Estimate:
        """Mean over the rows with its interval."""
        return estimate(self.values())

    def middle(self) -> Estimate:
        """Interquartile mean over the rows with its interval; each task is resampled by itself."""
        return interquartile([group.values() for group in self.by("task").values()])

    def curve(self, *, middle: bool = False) -> dict[int, Estimate]:
        """Estimates by number of labels, ascending: means, or interquartile means."""
        groups = sorted(self.by("labels").items())
        return {labels: group.middle() if middle else group.estimate() for labels, group in groups}

    def mean(self, metric: str, digits: int = 2, scale: float = 1.0, *, plain: bool = False) -> str:
        """Mean of a metric as words, with its interval unless it is ``plain``; empty where it was not measured."""
        rows = self.where(metric=metric)
        if not rows.rows:
            return ""
        found = rows.estimate()
        return f"{scale * found.mean:.{digits}f}" if plain else interval(found, digits, scale)

    def share(self, metric: str, trials: int) -> str:
        """Mean of a metric that is a share of so many trials, with Wilson's interval; empty where there is none."""
        rows = self.where(metric=metric)
        if not rows.rows:
            return ""
        mean = rows.estimate().mean
        lower, upper = wilson(mean, trials)
        return f"{mean:.2f} [{lower:.2f}, {upper:.2f}]"

    def minus(self, other: Table) -> Table:
        """Differences to the rows of another table with the same task, seeds, labels and metric; others are left out.

        Methods that had the same labels and starts are compared so, trial by trial.
        """
        theirs = {_pair(row): row.value for row in other}
        return Table(row._replace(value=row.value - theirs[_pair(row)]) for row in self if _pair(row) in theirs)

    def write(self, path: Path) -> None:
        """Write as CSV with exact floats; the file is replaced as a whole."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(self.rows)
        write_text(path, text.getvalue())


def as_row(values: Iterable[Any]) -> Row:
    """A row from its values, as text or as numbers.

    Raises:
        ValueError: There are too few or too many, or one is of the wrong kind.
    """
    given = list(values)
    if len(given) != len(_KINDS):
        raise ValueError(f"a row has {len(_KINDS)} values; got {len(given)}")
    row: Row = Row._make(kind(value) for kind, value in zip(_KINDS, given, strict=True))
    return row


def _pair(row: Row) -> tuple[Any, ...]:
    return (row.task, row.policy_seed, row.stream_seed, row.labels, row.metric)


# ---------------------------------------------------------------------- words


class Text(NamedTuple):
    """A table of words."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, title: str, table: Table, by: Mapping[str, str], cells: Mapping[str, Callable[[Table], str]]) -> Text:
        """A line for each group of equal values in the columns ``by``, which maps them to their headings.

        Args:
            title: Above the table.
            table: What is told.
            by: Heading of each column.
            cells: Of each further column, by its heading: what it says of a group.
        """
        body = []
        for key, rows in table.by(*by).items():
            names = key if isinstance(key, tuple) else (key,)
            body.append([*map(str, names), *(cell(rows) for cell in cells.values())])
        return cls(title, [*by.values(), *cells], body)

    def rich(self) -> RichTable:
        """For the terminal; intervals go below their means, and no number is cut where it is 80 columns wide."""
        table = RichTable(title=RichText(self.title), title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
        for index, name in enumerate(self.header):
            words = " ".join(row[index] for row in self.rows).split()
            widest = max(map(len, words), default=0) if index else 0
            table.add_column(name, justify="right" if index else "left", min_width=widest, overflow="fold")
        for row in self.rows:
            table.add_row(*(RichText(cell.replace(" [", "\n[")) for cell in row))
        return table

    def markdown(self) -> str:
        """For documents."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def interval(found: Estimate, digits: int = 2, scale: float = 1.0) -> str:
    """A mean with its 95 % interval; the mean alone where all trials agree."""
    mean, lower, upper = (f"{scale * value:.{digits}f}" for value in found[:3])
    return mean if lower == mean == upper else f"{mean} [{lower}, {upper}]"
