"""``python -m benchmarks``: run everything in one process and write JSON, a page and figures."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from benchmarks import accuracy, blocks, page, speed
from kbt_rl.experiments.config import PRETRAINING
from kbt_rl.experiments.learners import pretrain, pretrained_path


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

    def run(self, console: Console) -> Path:
        """Run all parts with a progress bar."""
        rows: list[speed.Row] = []
        scores: list[accuracy.Score] = []
        missing: dict[str, str] = {}
        compared: list[blocks.BlockRow] = []
        seconds, seeds = (0.2, self.seeds[:1]) if self.quick else (3.0, self.seeds)
        parts: list[tuple[str, Callable[[], Any]]] = []
        threads = (1,) if self.quick else (1, 2)
        parts.append(("paper's head", lambda: rows.extend(speed.paper_head(seconds, threads))))
        largest = 128 if self.quick else 1024
        parts.append(("sweeps", lambda: rows.extend(speed.sweeps(seconds / 6, largest))))
        fleet = 64 if self.quick else 4096
        parts.append((speed.INDEPENDENT, lambda: rows.extend(speed.independent_heads(seconds / 3, fleet))))
        parts.append(("samples seen", lambda: rows.extend(speed.samples_seen(seconds, 10**4 if self.quick else 10**6))))
        for seed in seeds:
            tasks = {
                "toy, in span": lambda s=seed: accuracy.toy(s, in_span=True),
                "toy, out of span": lambda s=seed: accuracy.toy(s, in_span=False),
                "pendulum": lambda s=seed: _pendulum(self.out, s),
            }
            for name, make in tasks.items():
                part = f"{name}, seed {seed}", lambda m=make, s=seed: _score(m(), s, scores, missing, compared)
                parts.append(part)
        torch.set_num_threads(1)
        with Progress(console=console) as progress:
            bar = progress.add_task("benchmarks", total=len(parts))
            for name, part in parts:
                progress.update(bar, description=name)
                part()
                progress.advance(bar)
        written = page.write(self.out, rows, scores, compared, {**_about(), "missing": missing})
        console.print(f"results in {written}")
        return written


def _pendulum(out: Path, seed: int) -> accuracy.Task:
    return accuracy.pendulum(pretrain(1000, PRETRAINING, pretrained_path(1000, PRETRAINING, out / "models")), seed)


def _score(
    task: accuracy.Task,
    seed: int,
    scores: list[accuracy.Score],
    missing: dict[str, str],
    compared: list[blocks.BlockRow],
) -> None:
    chosen = accuracy.choose(task)
    found, not_run = accuracy.score(task, seed, chosen)
    ablated = accuracy.ablation(task, seed, chosen)
    scores += [*found, *(each._replace(task=f"{task.name}: ablation") for each in ablated)]
    missing.update(not_run)
    compared += blocks.compare(task, seed, chosen)


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
