"""The head before any label: the largest difference of its mean and the pre-trained layer's, which should be rounding.

It is so for every prior variance and depth, by construction of the prior; in units of the label rms, over 1,000 states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kbt_rl.inference.config import HeadConfig, StructureName
from kbt_rl.inference.head import BayesianHead
from studies.cloned import ClonedTrial, Setting
from studies.pendulum import uniform_states
from studies.table import Row, Table, Text
from studies.trial import Method, Size

VARIANCES = tuple(10.0**power for power in range(-8, 3))


@dataclass(frozen=True, kw_only=True)
class StartTrial(ClonedTrial):
    """Heads of one depth with all prior variances."""

    study: str = "start"
    layers: int


def plan(size: Size) -> list[StartTrial]:
    """1 to 3 layers, on one policy."""
    return [
        trial
        for layers in (1, 2, 3)
        for trial in size.trials(StartTrial, [Method(f"{layers} layers", "kbt")], policies=1, streams=1, layers=layers)
    ]


def run(trial: StartTrial, setting: Setting) -> Iterator[Row]:
    """The difference for each prior variance; in structures whose machine code others need anyway, or that has none."""
    policy = setting.pretrained.policy
    layer, centre = policy.transformer.linear, policy.transformer.feature_mean
    features = policy.encode(policy.start(uniform_states(np.random.default_rng(0), (1_000,)))).double()
    wanted = features @ layer.weight.detach().double().mT + layer.bias.detach().double()
    structure: StructureName = "neuron" if trial.layers > 2 else "auto"
    for variance in VARIANCES:
        config = HeadConfig(layers=trial.layers, structure=structure, hidden_variance=variance, last_variance=variance)
        head = BayesianHead.from_linear(layer, config, feature_mean=centre)
        difference = float((head.mean_outputs(features) - wanted).abs().max())
        yield trial.row(0, "largest difference", difference, task=f"prior variance {variance:g}")


def report(table: Table) -> Iterator[Text]:
    """The largest of each depth."""
    worst = [max(rows, key=lambda row: row.value) for rows in table.by("method").values()]
    body = [[row.method, f"{row.value:.1e} ({row.task})"] for row in worst]
    yield Text("Head against the pre-trained layer before any label", ["head", "largest difference / label rms"], body)
