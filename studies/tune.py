"""The baselines at their best: warm start's learning rates and the printed method's epsilon, on seeds 0 and 1.

Writes OUT/tuned.json with the best settings and every candidate's score; ``studies/tuned.json`` came from it. Reported
figures use seeds from 1000 up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kbt_rl.files import write_text
from studies.curve import CurveTrial
from studies.curve import run as run
from studies.methods import PRINTED, warm_start
from studies.runner import versions
from studies.success import MEMORIES
from studies.table import Table, Text
from studies.trial import Method, Size

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_CHECKPOINTS = (10, 20, 30, 50, 75, 100, 150, 200, 300, 400)
_BETWEEN = ", setting "


def plan(size: Size) -> list[CurveTrial]:
    """Every candidate on 2 streams of each of 2 policies."""
    size = size.tuning()
    candidates = [
        (warm_start(memory, rate), rate)
        for memory in (MEMORIES[:1] if size.quick else MEMORIES)
        for rate in LEARNING_RATES
    ]
    candidates += [(Method(PRINTED.name, "printed", {"epsilon": epsilon}), epsilon) for epsilon in EPSILONS]
    methods = [replace(method, name=f"{method.name}{_BETWEEN}{value:g}") for method, value in candidates]
    checkpoints = _CHECKPOINTS[:4] if size.quick else _CHECKPOINTS
    return size.trials(CurveTrial, methods, streams=2, study="tune", starts=25, checkpoints=checkpoints)


def scores(table: Table) -> dict[str, dict[str, list[float]]]:
    """By method and setting: mean success over checkpoints and trials, and mean log regret."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, rows in table.by("method").items():
        method, _, setting = name.partition(_BETWEEN)
        success = float(np.mean(rows.where(metric="success").values()))
        log_regret = float(np.mean(np.log(np.maximum(rows.where(metric="regret").values(), 1e-4))))
        found.setdefault(method, {})[setting] = [round(success, 4), round(log_regret, 4)]
    return found


def best(candidates: dict[str, list[float]]) -> float:
    """The setting with the highest mean success; among those within 0.005 of it, the lowest regret."""
    top = max(success for success, _ in candidates.values())
    close = [setting for setting, (success, _) in candidates.items() if success >= top - 0.005]
    return float(min(close, key=lambda setting: candidates[setting][1]))


class Tuned(NamedTuple):
    """The best settings and where they come from."""

    content: dict[str, Any]

    def write(self, out: Path) -> Path:
        """Write ``tuned.json``."""
        write_text(out / "tuned.json", json.dumps(self.content, indent=1) + "\n")
        return out / "tuned.json"


def report(table: Table) -> Iterator[Text | Tuned]:
    """Every candidate's score, and the file."""
    found = scores(table)
    body = [[method, setting, f"{success:.3f}", f"{regret:.3f}"] for method, candidates in found.items()
            for setting, (success, regret) in candidates.items()]  # fmt: skip
    yield Text("Candidates", ["method", "setting", "mean success", "mean log regret"], body)
    warm = {name.split()[-1]: best(candidates) for name, candidates in found.items() if name.startswith("warm start")}
    yield Tuned({
        "learning_rate": warm, "epsilon": best(found[PRINTED.name]),
        "seeds": {"policies": table.distinct("policy_seed"), "streams": table.distinct("stream_seed")},
        "versions": versions(), "scores": found,
    })  # fmt: skip
