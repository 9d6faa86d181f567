"""The rivals of ``policies`` at their best: five settings of each for each task, on streams 0 and 1.

Writes OUT/tuned.json with the settings whose share of the gap, averaged over the numbers of labels, is largest;
``studies/suite/tuned.json`` came from it. Reported figures use streams from 1000 up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kbt_rl.files import write_text
from studies.policies import run as run
from studies.rivals.registry import CANDIDATES
from studies.suite.methods import NONE, TEACHER
from studies.suite.report import areas, shares
from studies.suite.setting import SuiteTrial
from studies.suite.tasks import SUITE
from studies.table import Table, Text
from studies.trial import Size

CHECKPOINTS = (50, 100, 200)


def plan(size: Size) -> list[SuiteTrial]:
    """Every candidate on 2 streams of each task."""
    size = size.tuning()._replace(policies=1)
    rivals = list(CANDIDATES.values())[: 1 if size.quick else None]
    methods = [NONE, TEACHER, *(method for candidates in rivals for method in candidates)]
    tasks = list(SUITE)[: 1 if size.quick else None]
    return [
        trial
        for task in tasks
        for trial in size.trials(
            SuiteTrial, methods, streams=2, study="tune_rivals", task=task, checkpoints=CHECKPOINTS, episodes=5
        )
    ]


class Best(NamedTuple):
    """The settings that ``studies/suite/tuned.json`` holds, of each rival for each task."""

    settings: dict[str, dict[str, Any]]

    def write(self, out: Path) -> Path:
        """Write them; the file is replaced as a whole."""
        write_text(out / "tuned.json", json.dumps(self.settings, indent=1, sort_keys=True) + "\n")
        return out / "tuned.json"


def report(table: Table) -> Iterator[Text | Best]:
    """The share of every candidate, and the best of each rival."""
    area = areas(shares(table))
    found: dict[str, dict[str, Any]] = {}
    for task, rows in area.by("task").items():
        scores = {method: of.estimate().mean for method, of in rows.by("method").items()}
        found[task], body = {}, []
        for name, methods in CANDIDATES.items():
            known = [method for method in methods if method.name in scores]
            if not known:
                continue
            best = max(known, key=lambda method: scores[method.name])
            found[task][name] = best.settings
            body += [[method.name, f"{scores[method.name]:.3f}", "*" if method is best else ""] for method in known]
        yield Text(f"{task}: mean share of the gap", ["setting", "share", "best"], body)
    yield Best(found)
