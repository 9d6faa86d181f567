"""Files, summary and figure of the experiments with a changing world."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.kbt import KBT
from kbt_rl.experiments.aggregate import Estimate, estimate
from kbt_rl.experiments.change import DelayRow, FalseAlarmRow, SuccessRow, run_drift, run_shifts, run_stationary
from kbt_rl.experiments.change_setup import (
    CUSUM,
    EXPERT,
    FORGETTING,
    LEARNED,
    NONE,
    PRETRAINED,
    PROCESS,
    TOWARDS,
    TRAP,
    WINDOW,
    ChangeConfig,
    draw_plants,
)
from kbt_rl.experiments.config import digest
from kbt_rl.experiments.learners import pretrain
from kbt_rl.experiments.plot_style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    VERMILION,
    legend_below,
    new_figure,
    save,
    style,
)
from kbt_rl.experiments.runner import versions, write_json
from kbt_rl.experiments.tables import read_rows, write_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Compared on successive plants, and under the drift.
SHIFT_STRATEGIES = (NONE, FORGETTING, PROCESS, TOWARDS, WINDOW, CUSUM, LEARNED, TRAP)
DRIFT_STRATEGIES = (NONE, FORGETTING, PROCESS, CUSUM)
_COLOURS = {
    NONE: FAINT,
    FORGETTING: GREEN,
    PROCESS: BLUE,
    TOWARDS: "#56B4E9",
    WINDOW: PURPLE,
    CUSUM: VERMILION,
    LEARNED: ORANGE,
    TRAP: "#8c6d1f",
    PRETRAINED: "#c3c8cf",
    EXPERT: INK,
}


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
        return pretrain(seed, pretraining, out / "models" / f"pretrained-{seed}-{digest(pretraining)}.zip")

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
    console.print(summary)
    with style():
        save(draw(shifts, delays, drift), out / "change.png")
    console.print(f"written {out / 'change.png'}")


def success_after(rows: Sequence[SuccessRow], strategy: str, samples: int) -> Estimate:
    """Success so many labels after a shift: mean over the shifts of a trial, interval over trials."""
    trials: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.strategy == strategy and row.samples == samples:
            trials[row.pretrain_seed, row.stream_seed].append(row.success)
    return estimate([float(np.mean(values)) for values in trials.values()])


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


# ---------------------------------------------------------------------- figure


def draw(shifts: Sequence[SuccessRow], delays: Sequence[DelayRow], drift: Sequence[SuccessRow]) -> Figure:
    """Success after a shift, delay of the alarms, and success under the drift."""
    figure, axes = new_figure(4.6, ncols=3, width_ratios=(1.25, 1.0, 1.25))
    _draw_shifts(axes[0, 0], shifts)
    _draw_delays(axes[0, 1], delays)
    _draw_drift(axes[0, 2], drift)
    legend_below(figure, axes[0, 0], columns=3)
    return figure


def _draw_shifts(axes: Axes, rows: Sequence[SuccessRow]) -> None:
    checkpoints = sorted({row.samples for row in rows})
    for name in dict.fromkeys(row.strategy for row in rows):
        points = [success_after(rows, name, samples) for samples in checkpoints]
        middle = [point.mean for point in points]
        errors = [[p.mean - p.lower for p in points], [p.upper - p.mean for p in points]]
        line = ":" if name in (EXPERT, PRETRAINED) else "-"
        axes.errorbar(
            checkpoints, middle, np.array(errors), label=name, color=_COLOURS[name], linestyle=line, marker="o",
            markersize=4, capsize=2,
        )  # fmt: skip
    axes.set(title="Ten successive plants", xlabel="labels since the shift", ylabel="success", ylim=(-0.03, 1.05))


def _draw_delays(axes: Axes, rows: Sequence[DelayRow]) -> None:
    names = list(dict.fromkeys(row.strategy for row in rows))
    labels, width = ["1", "2", "3", "4", "5", "6+", "none"], 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        found = [row.delay for row in rows if row.strategy == name and row.shift > 0]
        places = [6 if delay is None else min(delay, 6) - 1 for delay in found]
        shares = np.bincount(places, minlength=len(labels)) / max(len(places), 1)
        axes.bar(np.arange(len(labels)) + (index - (len(names) - 1) / 2) * width, shares, width, color=_COLOURS[name])
    axes.set_xticks(range(len(labels)), labels)
    axes.set(title="Labels until noticed", xlabel="labels since the shift", ylabel="share of the shifts")


def _draw_drift(axes: Axes, rows: Sequence[SuccessRow]) -> None:
    checkpoints = sorted({row.samples for row in rows})
    for name in dict.fromkeys(row.strategy for row in rows):
        middle = [success_after(rows, name, samples).mean for samples in checkpoints]
        line = ":" if name in (EXPERT, PRETRAINED) else "-"
        axes.plot(checkpoints, middle, color=_COLOURS[name], linestyle=line)
    axes.set(title="A slow drift", xlabel="labels", ylabel="success on the plant of the moment", ylim=(-0.03, 1.05))
