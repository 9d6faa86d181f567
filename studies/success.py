"""Figure 3: success and regret against the number of labels, at i.i.d. states.

A policy was cloned on a light, short pole; now the pole is ten times heavier and longer. Labels of the new plant's
optimal controller arrive one at a time at i.i.d. states of the label box, and after some of them the policy is scored
alone: success is the share of starts from which the pole stays up for 10 s and the cart ends at rest at the origin;
regret is the summed cost over the expert's, minus 1, where a fall counts as 99. The baselines have their best settings
of ``python -m studies tune``.
"""

from __future__ import annotations

from collections.abc import Iterator

from studies import methods, plots
from studies.curve import CHECKPOINTS, CurveTrial, grid, minus_warm_starts, side_by_side
from studies.curve import run as run
from studies.methods import DEFAULT, EXPERT, FLOOR, warm_start
from studies.statistics import largest_drop
from studies.table import Table, Text
from studies.trial import Size

HEADS = (methods.TWO_LAYERS, methods.ONE_LAYER, DEFAULT, methods.EVERY_LAYER)
MEMORIES = (10, 20, 25, 50, 75, 100)
QUICK_MEMORIES = (10, 50, 100)
_LEAST = 1e-6  # regret that is drawn
_SHOWN = (10, 20, 30, 50, 100, 200, 400)


def plan(size: Size) -> list[CurveTrial]:
    """Every method on 5 streams of each of 2 policies; the slowest first, so that none is left alone at the end."""
    memories = QUICK_MEMORIES if size.quick else MEMORIES
    fixed = FLOOR, methods.PRETRAINED, EXPERT
    small = {"checkpoints": (0, 10, 20, 30, 50, 100), "starts": 25} if size.quick else {"checkpoints": CHECKPOINTS}
    warm = side_by_side(size, map(warm_start, memories), study="success", **small)
    return warm + size.trials(CurveTrial, [methods.PRINTED, *HEADS, *fixed], study="success", **small)


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """Two tables, what the paper claims of them, and Figure 3."""
    table = table.by_stream()  # a trial may hold several streams
    yield grid(table, "Success after n labels, mean [95 % interval over trials]", "success", _SHOWN)
    yield grid(table, "Regret after n labels, mean over trials", "regret", _SHOWN, intervals=False)
    regrets = table.where(metric="regret")
    beside = [row._replace(method=f"minus {name}") for name, rows in minus_warm_starts(regrets, DEFAULT.name).items()
              for row in rows]  # fmt: skip
    yield grid(
        Table(beside), f"Regret of {DEFAULT.name} minus that of each warm start", "regret", _SHOWN, intervals=False
    )
    yield claims(table)
    yield figure(table)


def figure(table: Table) -> plots.Picture:
    """Figure 3: success and regret against labels; the expert's regret is zero."""
    success = Table(row for row in table.where(metric="success") if row.method != FLOOR.name)
    regret = Table(row for row in table.where(metric="regret") if row.method != EXPERT.name)
    words = {"ylabel": "share of starts that succeed", "ylim": (-0.03, 1.03)}
    log = {"ylabel": "cost / cost of the expert $-$ 1", "yscale": "log", "ylim": (_LEAST, 200)}
    return plots.Picture("figure3", [
        plots.Panel("Success on the shifted plant", success, words, few_labels=True),
        plots.Panel("Regret against the expert", regret, log, few_labels=True, least=_LEAST),
    ], 5.8)  # fmt: skip


def claims(table: Table) -> Text:
    """What the paper says of Figure 3, for each head that learns in closed form; and the regret beside warm start's."""
    rows = []
    for method in (head.name for head in HEADS if head.name in table.distinct("method")):
        ours, regrets = (table.where(method=method, metric=metric) for metric in ("success", "regret"))
        lowest, where = min(_differences(table.where(metric="success"), method))
        highest, there = max(_differences(table.where(metric="regret"), method))
        drop = largest_drop((n, found.mean) for n, found in ours.curve().items())
        single = max(
            largest_drop((row.labels, row.value) for row in trial)
            for trial in ours.by("policy_seed", "stream_seed").values()
        )
        words = [f"{found.mean:.2g} after {n}" for n, found in regrets.curve().items() if n in (20, 50, 400)]
        rows += [
            [method, "success minus warm start's, lowest of all; >= 0 in the paper", f"{lowest:+.3f} ({where})"],
            [method, "drop of success after 50 labels; none in the paper", f"{drop:.3f}, worst trial {single:.3f}"],
            [method, "regret", ", ".join(words)],
            [method, "regret minus warm start's, highest of all", f"{highest:+.1e} ({there})"],
            [method, "regret below every warm start's at every number of labels", "yes" if highest < 0.0 else "NO"],
        ]
    return Text("What the paper says of Figure 3, measured", ["method", "what", "measured"], rows)


def _differences(table: Table, method: str) -> list[tuple[float, str]]:
    """Of a method and each warm start at each number of labels: the mean difference over trials, and where."""
    return [
        (found.mean, f"{name}, {labels} labels")
        for name, rows in minus_warm_starts(table, method).items()
        for labels, found in rows.curve().items()
        if labels > 0
    ]
