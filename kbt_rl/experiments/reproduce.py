"""From result files to everything a person looks at: tables, summary, figures, TensorBoard runs, the printed report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kbt_rl.experiments.config import Trial, tuned
from kbt_rl.experiments.figures import draw_figures
from kbt_rl.experiments.report import print_report
from kbt_rl.experiments.runner import read_results
from kbt_rl.experiments.summary import write_summary
from kbt_rl.experiments.tables import collect, write_tables
from kbt_rl.experiments.tensorboard import export_runs


def draw(trials: Sequence[Trial], out: Path, console: Console) -> None:
    """Write and print what the finished trials show; numbers are on disk before anything is drawn."""
    results = read_results(trials, out)
    tables = collect(results)
    write_tables(tables, out)
    write_summary(results, tables, out, tuned())
    figures = draw_figures(out)
    export_runs(tables, out)
    print_report(tables, console)
    console.print(f"figures: {', '.join(path.name for path in figures)} in {out}")
    console.print(f"curves: tensorboard --logdir {out / 'tensorboard'}")
