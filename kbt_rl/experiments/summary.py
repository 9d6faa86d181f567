"""The summary of an experiment as JSON: figures to reach, seeds, configuration, versions, and the worst encoder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kbt_rl.experiments.aggregate import success_by_encoder, summary_rows
from kbt_rl.experiments.tables import Result, Tables, write_rows
from kbt_rl.experiments.targets import compare_warm_starts, targets
from kbt_rl.files import write_text


def summarise(results: Sequence[Result], tables: Tables, tuning: dict[str, Any] | None = None) -> dict[str, Any]:
    """What ``summary.json`` holds: figures to reach, worst encoder, seeds, configuration and versions.

    Args:
        results: Contents of the trials' files.
        tables: Their rows.
        tuning: What the baselines were tuned to and on which seeds, kept as it is.
    """
    trials = [result["trial"] for result in results]
    by_encoder = success_by_encoder(tables.figure3)
    worst = min(by_encoder, key=lambda seed: by_encoder[seed], default=None)
    return {
        "targets": [asdict(target) for target in targets(tables)],
        "worst_encoder": {
            "pretrain_seed": worst,
            "mean_success_of_kbt_from_10_to_50_samples": by_encoder.get(worst) if worst is not None else None,
            "all": {str(seed): value for seed, value in by_encoder.items()},
        },
        "seeds": {
            "pretraining": sorted({trial["pretrain_seed"] for trial in trials}),
            "streams": sorted({trial["stream_seed"] for trial in trials}),
            "tuning": (tuning or {}).get("seeds"),
        },
        "tuning": tuning,
        "configuration": _configuration(trials),
        "versions": _distinct(result.get("versions") for result in results),
    }


def _configuration(trials: Iterable[Result]) -> dict[str, Any]:
    """By kind of trial: its methods with their settings, and every other option with the values it had."""
    configuration: dict[str, Any] = {}
    for trial in trials:
        kind = configuration.setdefault(trial["kind"], {"trials": 0, "methods": {}})
        kind["trials"] += 1
        kind["methods"][trial["method"]["name"]] = trial["method"]["settings"]
        for name in ("samples", "starts", "checkpoints", "noise_variance", "stream", "pretraining"):
            values = kind.setdefault(name, [])
            if trial[name] not in values:
                values.append(trial[name])
    return configuration


def _distinct(values: Iterable[Any]) -> list[Any]:
    distinct: list[Any] = []
    for value in values:
        if value is not None and value not in distinct:
            distinct.append(value)
    return distinct


def write_summary(results: Sequence[Result], tables: Tables, out: Path, tuning: dict[str, Any] | None = None) -> Path:
    """Write ``summary.json`` under ``out``, and its means as ``figure3_summary.csv`` and ``comparison.csv``."""
    if rows := summary_rows(tables.figure3):
        write_rows(out / "figure3_summary.csv", rows)
    if compared := compare_warm_starts(tables.figure3):
        write_rows(out / "comparison.csv", compared)
    path = out / "summary.json"
    text = json.dumps(_finite(summarise(results, tables, tuning)), indent=2, allow_nan=False)
    write_text(path, text + "\n")
    return path


def _finite(value: Any) -> Any:
    """The same with None for each number that JSON cannot hold."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
