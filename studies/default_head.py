"""Which head KBT has by default: success and regret of the candidates, on tuning seeds.

One layer that also sees the observation, with the label noise that it is told; one without the observation; and the
paper's two layers, without and with it. Beside them stand the warm starts, whose regret the default has to stay below
at every number of labels. Like ``tune`` it starts from seed 0, so that the choice is not made on what is reported.
"""

from __future__ import annotations

from collections.abc import Iterator

from studies.curve import CurveTrial, grid, minus_warm_starts
from studies.curve import run as run
from studies.methods import two_layers, warm_start
from studies.table import Table, Text
from studies.trial import Method, Size

NOISES = (1e-4, 1e-5, 1e-6, 1e-7)
MEMORIES = (10, 25, 50, 100)
_SHOWN = (5, 10, 20, 30, 50, 100, 200, 400)


def _one_layer(noise: float, skip: str) -> Method:
    words = "one layer" if skip == "none" else f"one layer + {skip}"
    return Method(f"{words}, noise {noise:g}", "kbt", {"head": {"layers": 1, "noise_variance": noise}, "skip": skip})


CANDIDATES = (
    *(_one_layer(noise, "observation") for noise in NOISES), _one_layer(1e-6, "none"),
    two_layers("two layers (the paper's head)"),
    Method("two layers + observation", "kbt", {"head": {"layers": 2}, "skip": "observation"}),
)  # fmt: skip


def plan(size: Size) -> list[CurveTrial]:
    """Every candidate and warm start on 2 streams of each of 2 policies."""
    methods = (*CANDIDATES, *map(warm_start, MEMORIES))
    checkpoints = _SHOWN[:3] if size.quick else _SHOWN
    return size.tuning().trials(CurveTrial, methods, streams=2, study="default_head", checkpoints=(0, *checkpoints))


def report(table: Table) -> Iterator[Text]:
    """Success, regret, and how far the regret is from the best warm start's."""
    yield grid(table, "Success after n labels", "success", _SHOWN, intervals=False)
    yield grid(table, "Regret after n labels", "regret", _SHOWN, intervals=False)
    regrets = table.where(metric="regret")
    body = []
    for method in table.distinct("method")[: len(CANDIDATES)]:
        worst = [max(rows.curve()[n].mean for rows in minus_warm_starts(regrets, method).values()) for n in
                 table.distinct("labels")[1:]]  # fmt: skip
        body.append([method, *(f"{value:+.1e}" for value in worst)])
    header = ["candidate", *map(str, table.distinct("labels")[1:])]
    yield Text("Regret minus that of the best warm start", header, body)
