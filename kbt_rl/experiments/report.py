"""What the experiment found as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from kbt_rl.experiments.aggregate import Estimate, curve, failures, methods_of
from kbt_rl.experiments.tables import AdaptRow, Tables, TimingRow
from kbt_rl.experiments.targets import Target, targets

#: Checkpoints that a table has room for.
SHOWN = (10, 20, 30, 50, 100, 200, 400)


def print_report(tables: Tables, console: Console) -> None:
    """Print success, regret, time per sample, uncertainty and the figures to reach."""
    for title, header, rows in _all_tables(tables):
        console.print(text_table(title, header, rows))


def text_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for the terminal; intervals go below their means, to save width."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(cell.replace(" [", "\n[") for cell in row))
    return table


TableText = tuple[str, Sequence[str], list[list[str]]]


def _all_tables(tables: Tables) -> list[TableText]:
    found: list[TableText] = []
    if tables.figure3:
        found.append(
            _curve_table("Success rate after n labels, mean [95 % interval over trials]", tables.figure3, False)
        )
        found.append(_curve_table("Regret after n labels, mean over trials", tables.figure3, True))
    if tables.figure4:
        found.append(_timing_table(tables.figure4))
    if tables.figure5_summary:
        header = ("rule", "label variance", "predicted", "error of the mean", "coverage of 95 % intervals")
        rows = [
            [row.rule, f"{row.noise_variance:g} N²", f"{row.final_variance:.2f} N²", f"{row.mean_error:.2f} N",
             f"{row.coverage:.3f}"]
            for row in tables.figure5_summary
        ]  # fmt: skip
        found.append(("Uncertainty after the last iteration", header, rows))
    found.append(_target_table(targets(tables)))
    return found


def _curve_table(title: str, rows: Sequence[AdaptRow], regret: bool) -> TableText:
    shown = [count for count in SHOWN if any(row.samples == count for row in rows)]
    body = []
    for method in methods_of(rows):
        points, failed = curve(rows, method, "regret" if regret else "success"), failures(rows, method)
        cells = []
        for count in shown:
            found = points.at(count)
            lost = f" ({failed[count]} NaN)" if failed.get(count) else ""
            cells.append("" if found is None else f"{found.mean:.3f}{lost}" if regret else _interval(found, lost))
        body.append([method, *cells])
    return title, ("method", *(str(count) for count in shown)), body


def _interval(found: Estimate, lost: str) -> str:
    return f"{found.mean:.2f}{lost} [{found.lower:.2f}, {found.upper:.2f}]"


def _timing_table(rows: Sequence[TimingRow]) -> TableText:
    header = ("method", "update alone", "encoder", "sample to posterior")
    body = [
        [row.method, *(f"{1e3 * value:.2f} ms" for value in (row.update_s, row.encoder_s, row.sample_to_posterior_s))]
        for row in rows
    ]
    return "Computation time per sample", header, body


def _target_table(found: Sequence[Target]) -> TableText:
    answer = {True: "yes", False: "NO", None: "not measured"}
    body = [
        [("aim: " if target.aim else "") + target.what, target.required, _measured(target), answer[target.reached]]
        for target in found
    ]
    return "Figures to reach", ("what", "required", "measured", "reached"), body


def _measured(target: Target) -> str:
    """Value, interval, and where it comes from."""
    if target.measured is None:
        return ""
    interval = "" if target.interval is None else " [{:.3g}, {:.3g}]".format(*target.interval)
    return f"{target.measured:.3g}{interval} {target.detail}".strip()
