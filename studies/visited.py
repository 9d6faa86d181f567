"""Success by where labels are asked: at i.i.d. states, or at the states that the learner visits itself.

A well-controlled path excites little, so that labels along it say less. Labels are asked at every 5th step of the
learner's own path, with a new start after a fall or 10 s. Beside them stand the same learners on i.i.d. labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from studies import plots
from studies.curve import VISITED, CurveTrial, grid, side_by_side
from studies.curve import run as run
from studies.methods import PRINTED, warm_start
from studies.success import HEADS
from studies.table import Table, Text
from studies.trial import Size

CHECKPOINTS = (0, 10, 20, 30, 50, 75, 100, 150, 200)


def plan(size: Size, *, with_iid: bool = True) -> list[CurveTrial]:
    """Five methods on 5 streams of one policy, with either kind of labels.

    Args:
        size: How large.
        with_iid: Whether i.i.d. labels are run here; ``success`` has the same trials.
    """
    small = {"checkpoints": (0, 20, 50), "starts": 25} if size.quick else {"checkpoints": CHECKPOINTS}
    trials: list[CurveTrial] = []
    for states in ("visited", "iid") if with_iid else ("visited",):
        fields: dict[str, Any] = {"policies": 1, "study": "visited", "states": states, **small}
        trials += side_by_side(size, [warm_start(50)], **fields) + size.trials(CurveTrial, [PRINTED, *HEADS], **fields)
    return trials


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """Success with either kind of labels, and a panel for each method."""
    table = Table(
        row if VISITED in row.task else row._replace(task=f"{row.task}, labels at i.i.d. states") for row in table
    )
    for task, rows in table.by("task").items():
        yield grid(rows, f"Success: {task}", "success", CHECKPOINTS[1:])
    panels = []
    for method, rows in table.by("method").items():
        title = (
            method.replace(", ", "\n", 1)
            .replace(" (", "\n(")
            .replace("\nmemory", ", memory")
            .replace(" the obs", "\nthe obs")
        )
        falls = rows.mean("falls while learning", 1, plain=True)
        axes = {"xlabel": f"labels; {falls} falls a run while learning", "ylim": (-0.03, 1.03)}
        panels.append(plots.Panel(title, rows.where(metric="success"), axes, by="task"))
    yield plots.Picture("visited", panels, 7.4, columns=3)
