"""What the tests of the studies share: a policy that was hardly trained, and trials that take no time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from studies.cloned import Setting
from studies.curve import CurveTrial
from studies.executors import MakeExecutor, Serial
from studies.methods import ONE_LAYER
from studies.runner import Store, run_all
from studies.table import Table
from studies.trial import Trial

PRETRAINING = PretrainConfig(samples=500, steps=60, batch_size=32)


@lru_cache
def _content(task: str) -> bytes:
    return trial(task=task).source.make()


def setting(task: str = "shifted") -> Setting:
    return trial(task=task).setting(_content(task))


def trial(**fields: Any) -> CurveTrial:
    small: dict[str, Any] = {"checkpoints": (0, 2, 4), "starts": 2, "pretraining": PRETRAINING}
    first = {"study": "success", "method": ONE_LAYER, "policy_seed": 0, "stream_seed": 0}
    return CurveTrial(**{**first, **small, **fields})


def plan(count: int) -> list[Trial]:
    return [trial(stream_seed=seed) for seed in range(count)]


def run(trials: list[Trial], out: Path, make_executor: MakeExecutor = Serial) -> Table:
    return run_all(trials, Store(out, out / "models"), make_executor, Console(quiet=True))


def files(out: Path) -> Iterator[Path]:
    return (out / "trials").glob("*.json")
