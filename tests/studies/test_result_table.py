"""The result table: what is written is read back, and what is asked of it is counted right."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from studies.table import Row, Table, Text, as_row, interval


def row(method: str = "a", stream: int = 0, labels: int = 0, value: float = 0.0, metric: str = "success") -> Row:
    return Row("study", "task, with a comma", method, 1000, stream, labels, metric, value)


ROWS = Table([
    row("b", 0, 10, 0.1 + 0.2), row("a", 0, 10, 1.0), row("a", 1, 10, 0.5), row("a", 0, 5, 0.25),
    row("a", 0, 5, float("inf"), "delay"),
])  # fmt: skip


def test_a_table_is_written_as_csv_to_the_last_bit(tmp_path: Path) -> None:
    ROWS.write(tmp_path / "new" / "results.csv")
    with (tmp_path / "new" / "results.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == list(Row._fields)
    assert [as_row(line) for line in lines] == ROWS.rows


def test_rows_are_chosen_by_value_or_by_any_of_several() -> None:
    assert len(ROWS.where(method="a", metric="success")) == 3
    assert ROWS.where(labels=(5, 7)).distinct("metric") == ["success", "delay"]
    assert len(ROWS.where(method="c")) == 0


def test_groups_keep_the_order_of_the_rows() -> None:
    assert list(ROWS.by("method")) == ["b", "a"]
    assert list(ROWS.by("method", "labels")) == [("b", 10), ("a", 10), ("a", 5)]


def test_a_curve_is_ascending_and_averages_over_trials() -> None:
    curve = ROWS.where(method="a", metric="success").curve()
    assert list(curve) == [5, 10]
    assert curve[10].mean == 0.75
    assert curve[10].trials == 2


def test_differences_are_paired_by_labels_and_seeds() -> None:
    ours, theirs = Table([row("a", s, n, 1.0) for s in (0, 1) for n in (5, 10)]), Table([row("b", 1, 10, 0.25)])
    (difference,) = ours.minus(theirs)
    assert (difference.method, difference.stream_seed, difference.labels, difference.value) == ("a", 1, 10, 0.75)


@pytest.mark.parametrize("values", [[], ["study"] * 8, [*ROWS.rows[0], "more"]])
def test_a_row_of_other_values_is_refused(values: list[str]) -> None:
    with pytest.raises(ValueError, match=r"a row has 8 values|invalid literal"):
        as_row(values)


def test_a_table_of_words_is_printed_whole_and_written_as_markdown() -> None:
    text = Text("Title [of it]", ["method", "10"], [["KBT [markup]", "0.50 [0.25, 0.75]"]])
    said = io.StringIO()
    Console(width=60, file=said).print(text.rich())
    printed = said.getvalue()
    assert "Title [of it]" in printed
    assert "KBT" in printed and "[markup]" in printed and "[0.25, 0.75]" in printed  # noqa: PT018
    assert text.markdown().splitlines()[-1] == "| KBT [markup] | 0.50 [0.25, 0.75] |"


def test_words_of_a_metric_are_empty_where_it_was_not_measured() -> None:
    rows = ROWS.where(method="a", labels=10)
    assert rows.mean("success") == "0.75 [0.50, 1.00]"
    assert rows.mean("success", 1, 100.0, plain=True) == "75.0"
    assert rows.share("success", 200) == "0.75 [0.69, 0.80]"
    assert rows.mean("delay") == rows.share("delay", 200) == ""


def test_a_table_of_words_has_a_line_for_each_group() -> None:
    text = Text.of("Title", ROWS, {"method": "who", "labels": "n"}, {"rows": lambda rows: str(len(rows))})
    assert text.header == ["who", "n", "rows"]
    assert text.rows == [["b", "10", "1"], ["a", "10", "2"], ["a", "5", "2"]]


def test_an_interval_is_left_out_where_all_trials_agree() -> None:
    curve = ROWS.where(method="a", metric="success").curve()
    assert interval(curve[5]) == "0.25"
    assert interval(curve[10], 1, 100.0) == "75.0 [50.0, 100.0]"
