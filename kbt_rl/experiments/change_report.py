"""Files, tables and summary of the experiments with a changing world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.kbt import KBT
from kbt_rl.experiments.change import (
    DelayRow,
    FalseAlarmRow,
    SuccessRow,
    run_drift,
    run_shifts,
    run_stationary,
    success_after,
)
from kbt_rl.experiments.change_setup import (
    CUSUM,
    FORGETTING,
    LEARNED,
    NONE,
    PROCESS,
    TOWARDS,
    TRAP,
    WINDOW,
    ChangeConfig,
    draw_plants,
)
from kbt_rl.experiments.config import digest
from kbt_rl.experiments.figures_change import draw_change
from kbt_rl.experiments.learners import pretrain, pretrained_path
from kbt_rl.experiments.plot_style import save, style
from kbt_rl.experiments.report import text_table
from kbt_rl.experiments.runner import versions, write_json
from kbt_rl.experiments.tables import read_rows, write_rows

#: Compared on successive plants, and under the drift.
SHIFT_STRATEGIES = (NONE, FORGETTING, PROCESS, TOWARDS, WINDOW, CUSUM, LEARNED, TRAP)
DRIFT_STRATEGIES = (NONE, FORGETTING, PROCESS, CUSUM)


def run(configs: Sequence[ChangeConfig], stationary: tuple[int, Sequence[float]], out: Path, console: Console) -> None:
    """Run what is not there yet, one file each, then write tables, summary and figure.

    Args:
        configs: Pre-trained policies and streams.
        stationary: Samples without a change, and the variances of the label noise (N^2) to run them with.
        out: Folder of the results.
        console: Where progress is told.
    """
    kept, (samples, variances) = out / "change", stationary

    def model(seed: int) -> KBT:
        pretraining = PretrainConfig()
        return pretrain(seed, pretraining, pretrained_path(seed, pretraining, out / "models"))

    for config in configs:
        if not (path := kept / f"shifts-{_name(config)}.csv").exists():
            _keep(path, _run_shifts(config, model(config.pretrain_seed), kept), console)
    first = configs[0]
    for variance in variances:
        if not (path := kept / _alarms_file(first, samples, variance)).exists():
            rows = run_stationary(model(first.pretrain_seed), first.stream_seed, samples, variance)
            _keep(path, rows, console)
    for config in configs:
        if not (path := kept / f"drift-{_name(config)}.csv").exists():
            _keep(path, run_drift(config, model(config.pretrain_seed), DRIFT_STRATEGIES), console)
    _write(configs, stationary, out, console)


def _name(config: ChangeConfig) -> str:
    return f"p{config.pretrain_seed}-s{config.stream_seed}-{digest(config)}"


def _alarms_file(config: ChangeConfig, samples: int, variance: float) -> str:
    return f"alarms-p{config.pretrain_seed}-s{config.stream_seed}-{samples}-{variance}.csv"


def _run_shifts(config: ChangeConfig, pretrained: KBT, kept: Path) -> list[SuccessRow]:
    """Rows of the successive plants; the plants themselves and the delays are written beside."""
    draw = draw_plants(config)
    described = {
        "plants": [plant.dynamics for plant in draw.plants],
        "rejected_as_too_similar": draw.too_similar,
        "rejected_as_too_hard": draw.too_hard,
    }
    write_json({"config": asdict(config), **described, "versions": versions()}, kept / f"plants-{_name(config)}.json")
    rows, delays = run_shifts(config, pretrained, draw.plants, SHIFT_STRATEGIES)
    write_rows(kept / f"delays-{_name(config)}.csv", delays)
    return rows


def _keep(path: Path, rows: Sequence[Any], console: Console) -> None:
    write_rows(path, rows)
    console.print(f"written {path}")


def _write(
    configs: Sequence[ChangeConfig], stationary: tuple[int, Sequence[float]], out: Path, console: Console
) -> None:
    """Gather the files of these runs into tables, a summary and the figure."""
    kept, names = out / "change", [_name(config) for config in configs]
    shifts = [row for name in names for row in read_rows(kept / f"shifts-{name}.csv", SuccessRow)]
    delays = [row for name in names for row in read_rows(kept / f"delays-{name}.csv", DelayRow)]
    drift = [row for name in names for row in read_rows(kept / f"drift-{name}.csv", SuccessRow)]
    samples, variances = stationary
    files = [kept / _alarms_file(configs[0], samples, variance) for variance in variances]
    alarms = [row for path in files for row in read_rows(path, FalseAlarmRow)]
    for table, rows in (("shifts", shifts), ("delays", delays), ("drift", drift), ("false_alarms", alarms)):
        write_rows(out / f"change_{table}.csv", rows)
    summary = summarise(shifts, delays, drift, alarms)
    runs = [asdict(config) for config in configs]
    write_json({**summary, "configurations": runs, "versions": versions()}, out / "change_summary.json")
    with style():
        save(draw_change(shifts, delays, drift), out / "change.png")
    print_change(summary, console)
    console.print(f"written to {out}")


def summarise(
    shifts: Sequence[SuccessRow],
    delays: Sequence[DelayRow],
    drift: Sequence[SuccessRow],
    alarms: Sequence[FalseAlarmRow],
) -> dict[str, Any]:
    """Success after shifts, delays of detection, success under the drift, false alarms; plain values."""
    checkpoints = sorted({row.samples for row in shifts})
    names = list(dict.fromkeys(row.strategy for row in shifts))
    drifting = list(dict.fromkeys(row.strategy for row in drift))
    moved = [row._replace(samples=0) for row in drift if row.samples > 0]
    return {
        "success_after_shift": {
            name: {str(samples): success_after(shifts, name, samples)._asdict() for samples in checkpoints}
            for name in names
        },
        "detection": {name: _detection(delays, name) for name in dict.fromkeys(row.strategy for row in delays)},
        "success_under_drift": {name: success_after(moved, name, 0)._asdict() for name in drifting},
        "false_alarms": [row._asdict() for row in alarms],
    }


def _detection(delays: Sequence[DelayRow], strategy: str) -> dict[str, Any]:
    """Of all shifts of a strategy; alarms on the nominal plant before the first shift are false."""
    rows = [row for row in delays if row.strategy == strategy]
    after = [row for row in rows if row.shift > 0]
    seen = [row.delay for row in after if row.delay is not None]
    return {
        "shifts": len(after),
        "noticed_within_5": sum(delay <= 5 for delay in seen),
        "missed": len(after) - len(seen),
        "largest_delay": max(seen, default=None),
        "further_alarms": sum(row.repeats for row in after),
        "false_before_the_first_shift": sum((row.delay is not None) + row.repeats for row in rows if row.shift == 0),
    }


def print_change(summary: dict[str, Any], console: Console) -> None:
    """Print what ``summarise`` found: success, detection and false alarms."""
    after, drift = summary["success_after_shift"], summary["success_under_drift"]
    success = [
        [name, *(_interval(at) for at in found.values()), f"{drift[name]['mean']:.2f}" if name in drift else "-"]
        for name, found in after.items()
    ]
    header = ["strategy", *next(iter(after.values()), {}), "under the drift"]
    console.print(text_table("Success so many labels after a shift", header, success))
    detection = [[name, *map(str, found.values())] for name, found in summary["detection"].items()]
    header = ["strategy", "shifts", "noticed in 5", "missed", "largest delay", "further alarms", "false before"]
    console.print(text_table("Alarms", header, detection))
    false = [
        [row["test"], f"{row['noise_variance']:g} N²", row["noise"], str(row["lag"]), f"{row['misfit']:g}",
         f"{row['samples']:,}", str(row["alarms"])]
        for row in summary["false_alarms"]
    ]  # fmt: skip
    header = ["test or strategy", "labels with", "noise is", "lag", "misfit", "samples", "alarms"]
    console.print(text_table("False alarms while nothing changes", header, false))


def _interval(found: dict[str, Any]) -> str:
    return f"{found['mean']:.2f} [{found['lower']:.2f}, {found['upper']:.2f}]"
