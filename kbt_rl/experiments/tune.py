"""The baselines at their best: learning rates of warm start and epsilon of the printed method, on seeds of their own.

Tuning uses stream and pre-training seeds below 100; reported figures use seeds from 1000 up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from kbt_rl.experiments.config import (
    FIRST_REPORTED_SEED,
    KBT_METHOD,
    MEMORIES,
    Method,
    Trial,
    printed_method,
    warm_start_method,
)
from kbt_rl.experiments.runner import Result, read_results, run_all, versions, write_json

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# A coarser grid than the reported one: evaluation is most of the time.
_CHECKPOINTS = (10, 20, 30, 50, 75, 100, 150, 200, 300, 400)
EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def tuning_plan(streams: int, policies: int, seed: int = 0) -> list[Trial]:
    """Every candidate on every pair of stream and pre-training seed."""
    if seed + max(streams, policies) > 100:
        raise ValueError("tuning uses seeds 0 to 99; choose fewer streams or a smaller seed")
    assert FIRST_REPORTED_SEED >= 100
    candidates = [warm_start_method(memory, rate) for memory in MEMORIES for rate in LEARNING_RATES]
    candidates += [printed_method(epsilon) for epsilon in EPSILONS]
    base = Trial("adapt", KBT_METHOD, seed, seed, starts=25, checkpoints=_CHECKPOINTS)
    return [
        replace(base, method=method, pretrain_seed=seed + p, stream_seed=seed + s)
        for p in range(policies)
        for s in range(streams)
        for method in candidates
    ]


def tune(plan: Sequence[Trial], out: Path, jobs: int, console: Console, target: Path) -> dict[str, Any]:
    """Run the plan and write the best settings, with the score of every candidate, to ``target``."""
    run_all(plan, out, jobs, console)
    scores = score(read_results(plan, out))
    best: dict[str, Any] = {"learning_rate": {}, "epsilon": _best(scores["KBT as printed"], "epsilon")}
    for memory in MEMORIES:
        best["learning_rate"][str(memory)] = _best(scores[f"warm start {memory}"], "learning_rate")
    best["scores"] = scores
    best["seeds"] = {
        "stream": sorted({trial.stream_seed for trial in plan}),
        "pretrain": sorted({trial.pretrain_seed for trial in plan}),
    }
    best["versions"] = versions()
    write_json(best, target)
    return best


def score(results: Sequence[Result]) -> dict[str, list[dict[str, float]]]:
    """Mean success of each candidate over checkpoints and trials; its mean log regret settles near ties."""
    runs: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    settings: dict[tuple[str, str], dict[str, float]] = {}
    for result in results:
        method = Method(**result["trial"]["method"])
        key = (method.name, repr(sorted(method.settings.items())))
        settings[key] = method.settings
        regret = np.asarray(result["record"]["regret"])
        runs[key].append(
            (float(np.mean(result["record"]["success"])), float(np.mean(np.log(np.maximum(regret, 1e-4)))))
        )
    table: dict[str, list[dict[str, float]]] = defaultdict(list)
    for key, values in runs.items():
        success, log_regret = np.mean(values, axis=0)
        table[key[0]].append({**settings[key], "success": float(success), "log_regret": float(log_regret)})
    return dict(table)


def _best(candidates: Sequence[dict[str, float]], name: str) -> float:
    """The setting with the highest mean success; among those within 0.005 of it, the lowest regret."""
    top = max(candidate["success"] for candidate in candidates)
    close = [candidate for candidate in candidates if candidate["success"] >= top - 0.005]
    return min(close, key=lambda candidate: candidate["log_regret"])[name]
