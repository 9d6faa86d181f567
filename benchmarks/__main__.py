"""``python -m benchmarks``: run everything in one process and write JSON, a page and figures."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from benchmarks import accuracy, adapted, blocks, layers, page, rows, speed
from studies.cloned import ClonedTrial
from studies.methods import DEFAULT, kbt
from studies.runner import Store, make


class Found(NamedTuple):
    """What has been measured so far.

    Attributes:
        rows: Times.
        scores: Accuracy.
        compared: Blocks of rows.
        missing: Why rivals could not run, by name.
    """

    rows: list[rows.Row]
    scores: list[accuracy.Score]
    compared: list[blocks.BlockRow]
    missing: dict[str, str]

    def score(self, make: Callable[[int], accuracy.Task], seed: int) -> None:
        """Let all learners learn a task."""
        task = make(seed)
        chosen = accuracy.choose(task)
        scores, missing = accuracy.score(task, seed, chosen)
        ablated = accuracy.ablation(task, seed, chosen)
        self.scores.extend([*scores, *(each._replace(task=f"{task.name}: ablation") for each in ablated)])
        self.missing.update(missing)
        self.compared.extend(blocks.compare(task, seed, chosen))


@dataclass
class Bench:
    """Measure speed, memory and accuracy of the update beside public peers.

    Writes bench.json, benchmarks.md and two figures to --out.
    """

    out: Path = Path("results/bench")
    """Folder of the results."""
    quick: bool = False
    """Short measurements, one seed, narrow heads; for a look."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the toys and of the pendulum's labels."""
    only: str = ""
    """Run the parts whose name has this in it."""

    def run(self, console: Console) -> Path:
        """Run all parts with a progress bar, write what there is after each, and return the page's path."""
        found = Found([], [], [], {})
        parts = {name: part for name, part in self._parts(found).items() if self.only in name}
        if not parts:
            raise SystemExit(f"--only {self.only!r} is in no name; there are {', '.join(self._parts(found))}")
        about = _about()
        torch.set_num_threads(1)
        with Progress(console=console) as progress:
            bar = progress.add_task("benchmarks", total=len(parts))
            for name, part in parts.items():
                progress.update(bar, description=name)
                part()
                written = page.write(
                    self.out, found.rows, found.scores, found.compared, {**about, "missing": found.missing}
                )
                progress.advance(bar)
        console.print(f"results in {written}")
        return written

    def _parts(self, found: Found) -> dict[str, Callable[[], None]]:
        seconds = 0.15 if self.quick else 1.5

        def beside(measured: tuple[list[rows.Row], dict[str, str]]) -> None:
            found.rows.extend(measured[0])
            found.missing.update(measured[1])

        parts: dict[str, Callable[[], None]] = {
            speed.PAPER: lambda: beside(speed.paper_head(seconds)),
            "shared layer": lambda: beside(layers.shared_layer(seconds, self.quick)),
            "several noises": lambda: found.rows.extend(adapted.several_noises(seconds)),
            "adapted policies": lambda: found.rows.extend(adapted.adapted_policies(seconds)),
            "classes": lambda: found.rows.extend(layers.classes(seconds, self.quick)),
            "every layer": lambda: found.rows.extend(layers.every_layer(seconds)),
            "sweeps": lambda: found.rows.extend(speed.sweeps(seconds / 3, 64 if self.quick else 1024)),
            speed.INDEPENDENT: lambda: found.rows.extend(
                speed.independent_heads(seconds / 3, 64 if self.quick else 4096)
            ),
            "samples seen": lambda: found.rows.extend(speed.samples_seen(seconds / 3, 10**4 if self.quick else 10**6)),
        }
        for seed in self.seeds[:1] if self.quick else self.seeds:
            tasks = {
                "toy, in span": lambda s: accuracy.toy(s, in_span=True),
                "toy, out of span": lambda s: accuracy.toy(s, in_span=False),
                "pendulum": lambda s: _pendulum(self.out, s),
            }
            for name, task in tasks.items():
                parts[f"{name}, seed {seed}"] = partial(found.score, task, seed)
        return parts


def _pendulum(out: Path, seed: int) -> accuracy.Task:
    trial, store = (
        ClonedTrial(study="bench", method=DEFAULT, policy_seed=1000, stream_seed=seed),
        Store(out, out / "models"),
    )
    if store.content(trial.source) is None:
        store.keep(trial.source, make(trial.source))
    return accuracy.pendulum(kbt(trial.setting(store.content(trial.source)), skip="none"), seed)


def _about() -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "numba")}
    return {
        "machine": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        **versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    tyro.cli(Bench).run(Console())
