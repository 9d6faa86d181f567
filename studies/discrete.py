"""Discrete actions: success on the shifted plant against the number of labels, for all rules of the softmax link.

The actions are two forces of 15 N either way, or five (0, 2 and 15 N). A label is the expert's distribution over them
or, for the methods named so, the action that it takes. Learning rates and noise variances were chosen on seed 0
(warm start's of 1e-3, 3e-3, 1e-2 and 3e-2, of which all but the first tie; noise of 1e-3, 1e-2 and 1e-1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.policies import DISCRETE_HEAD
from studies import plots
from studies.curve import CurveTrial, grid
from studies.curve import run as run
from studies.methods import EXPERT, PRETRAINED, two_layers, warm_start
from studies.table import Table, Text
from studies.trial import Method, Size

CHECKPOINTS = (0, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200)
TASKS = ("two forces", "five forces")
PRETRAINING = PretrainConfig(steps=2_500)


def _rule(rule: str, words: str = "", **settings: Any) -> Method:
    wide = {"rule": rule, "last_variance": DISCRETE_HEAD.last_variance}
    return two_layers(f"KBT, rule {rule}{words}", **wide, **settings)


ACTION_LABELS = _rule("laplace", ", labels are actions")
METHODS = (
    warm_start(25, 1e-2), warm_start(50, 1e-2), _rule("laplace"), _rule("fisher"), _rule("taylor", noise_variance=1e-1),
    _rule("replace_softmax", noise_variance=1e-2), ACTION_LABELS, PRETRAINED, EXPERT,
)  # fmt: skip


def plan(size: Size) -> list[CurveTrial]:
    """All methods with either set of forces, on 3 streams of each of 2 policies."""
    small = {"checkpoints": (0, 20, 50, 100), "starts": 20} if size.quick else {"checkpoints": CHECKPOINTS}
    return [
        replace(trial, actions_only=trial.method == ACTION_LABELS)
        for task in (TASKS[:1] if size.quick else TASKS)
        for trial in size.trials(
            CurveTrial, METHODS, streams=3, study="discrete", task=task, pretraining=PRETRAINING, **small
        )
    ]


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """Success with either set of forces, and a panel for each."""
    for task, rows in table.by("task").items():
        yield grid(rows, f"Success after n labels, {task}", "success", (20, 50, 100, 200))
    axes = {"ylabel": "share of starts that succeed", "ylim": (-0.03, 1.03)}
    yield plots.Picture("discrete", [
        plots.Panel(f"Success, {task}", rows.where(metric="success"), axes, few_labels=True)
        for task, rows in table.by("task").items()
    ], 5.2)  # fmt: skip
