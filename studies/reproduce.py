"""The paper's experiment in one run: Figures 3, 4 and 5, labels at visited states, and the head before any label.

It consists of the studies success, visited, timing, uncertainty and start, which can be run alone, too. Beside their
tables and figures it writes one TensorBoard run a method to OUT/tensorboard, whose curves lie over each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from studies import plots, start, success, timing, uncertainty, visited
from studies.table import Table, Text
from studies.trial import Size, Trial


class Curves(NamedTuple):
    """Success and regret as TensorBoard runs, one a method."""

    table: Table

    def write(self, out: Path) -> Path:
        """Write ``out/tensorboard/<method>``, replacing the runs of that name but nothing else in the folder.

        Scalars at the number of labels: ``eval/success_rate`` (mean over trials), ``eval/regret``, and under "Custom
        scalars" a chart of the success rate with its 95 % interval.
        """
        from torch.utils.tensorboard import SummaryWriter

        tags = ("eval/success_rate", "eval/success_rate_lower", "eval/success_rate_upper")
        for method, rows in self.table.by("method").items():
            folder = out / "tensorboard" / "_".join("".join(c if c.isalnum() else " " for c in method).split())
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
            with SummaryWriter(str(folder)) as writer:
                for labels, found in rows.where(metric="success").curve().items():
                    for tag, value in zip(tags, found[:3], strict=True):
                        writer.add_scalar(tag, value, labels)
                for labels, found in rows.where(metric="regret").curve().items():
                    writer.add_scalar("eval/regret", found.mean, labels)
                writer.add_custom_scalars({"eval": {"success rate, 95 % interval": ["Margin", list(tags)]}})
        return out / "tensorboard"


def plan(size: Size) -> list[Trial]:
    """Every trial of the parts, the longest first, so that no process is left alone with one at the end."""
    iid_is_in_success = visited.plan(size, with_iid=False)
    return [
        *uncertainty.plan(size), *success.plan(size), *iid_is_in_success, *start.plan(size), *timing.plan(size)
    ]  # fmt: skip


def report(table: Table) -> Iterator[Text | plots.Picture | Curves]:
    """What the parts report, and the TensorBoard runs."""
    parts = table.by("study")
    yield from success.report(parts["success"])
    own = {name: parts["visited"].distinct(name) for name in ("method", "policy_seed", "labels")}
    yield from visited.report(Table([*parts["visited"], *parts["success"].where(**own)]))
    yield from timing.report(parts["timing"])
    yield from uncertainty.report(parts["uncertainty"])
    yield from start.report(parts["start"])
    yield Curves(parts["success"].by_stream())
