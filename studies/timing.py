"""Figure 4: computation time for each labelled sample, of all methods in turns within one process.

A machine's speed wavers by a factor of two within minutes. Methods that are timed one after another would be compared
with each other's weather; here each takes a few samples at a time, in turn, so that all see the same. It runs when
everything else is done, with nothing beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.models.context import ContextWindow
from studies import plots
from studies.cloned import ClonedTrial, Setting
from studies.methods import PRINTED, build, warm_start
from studies.pendulum import LabelStream
from studies.success import HEADS, MEMORIES, QUICK_MEMORIES
from studies.table import Row, Table, Text
from studies.trial import Method, Size

UPDATE, WHOLE, PYTORCH = "update, ms", "from sample to posterior, ms", "PyTorch's encoder, ms"
# Samples of one turn: the first is slower, since the others have emptied the caches.
_TURN = 10


@dataclass(frozen=True, kw_only=True)
class TimingTrial(ClonedTrial):
    """All methods in turns.

    Attributes:
        methods: Who takes turns.
        samples: Labels for each; at least two blocks of the largest memory.
    """

    study: str = "timing"
    methods: tuple[Method, ...]
    samples: int


def plan(size: Size) -> list[TimingTrial]:
    """One trial, alone."""
    memories = QUICK_MEMORIES if size.quick else MEMORIES
    methods = (*HEADS, PRINTED, *map(warm_start, memories))
    options = {"methods": methods, "samples": 200, "alone": True}
    return size.trials(TimingTrial, [Method("all in turns", "timing")], policies=1, streams=1, **options)


class _Timed:
    """A learner and its seconds for each sample."""

    def __init__(self, method: Method, setting: Setting) -> None:
        self._learner: Any = build(method, setting)
        self._block = int(method.settings.get("memory", 1))
        self._update: list[float] = []
        self._encode: list[float] = []

    def take(self, state: Any, label: Any) -> None:
        """One sample, as a rollout would process it."""
        context = self._learner.policy.start(state)
        begin = time.perf_counter()
        # A learner of every layer makes passes of its own.
        features = self._learner.policy.encode(context) if isinstance(self._learner, OnlineAlgorithm) else None
        encoded = time.perf_counter()
        self._learner.update(Sample(context, label, features=features))
        self._update.append(time.perf_counter() - encoded)
        self._encode.append(encoded - begin)

    def medians(self) -> dict[str, float]:
        """In ms; a training of warm start is paid for once every ``memory`` samples: the mean over whole blocks."""
        skipped = max(self._block, _TURN)
        update = np.asarray(self._update[skipped:])
        blocks = update[: len(update) - len(update) % self._block].reshape(-1, self._block).mean(axis=1)
        alone = 1e3 * float(np.median(blocks))
        return {UPDATE: alone, WHOLE: alone + 1e3 * float(np.median(self._encode[skipped:]))}


def encode_by_pytorch(policy: TransformerPolicy, context: ContextWindow) -> torch.Tensor:
    """Features of a context of the state alone by PyTorch's own layers, which others would use, ``(n, 1, width)``."""
    transformer = policy.transformer
    with torch.inference_mode():
        scaled = torch.from_numpy(context.observations) / transformer.observation_scale
        tokens: torch.Tensor = transformer.embed_state(scaled)
        for layer in transformer.encoder.layers:
            tokens = layer(tokens)
    return tokens


def run(trial: TimingTrial, setting: Setting) -> Iterator[Row]:
    """Milliseconds a sample of the update and of the encoder."""
    turns = {method.name: _Timed(method, setting) for method in trial.methods}
    policy, seconds = setting.pretrained.policy, list[float]()
    stream = LabelStream(setting.task, trial.stream_seed)
    states = stream.states(trial.samples)
    labels = stream.label(states)
    for start in range(0, trial.samples, _TURN):
        rows = [slice(i, i + 1) for i in range(start, min(start + _TURN, trial.samples))]
        for row in rows:
            context = policy.start(states[row])
            begin = time.perf_counter()
            encode_by_pytorch(policy, context)
            seconds.append(time.perf_counter() - begin)
        for each in turns.values():
            for row in rows:
                each.take(states[row], labels[row])
    yield trial.row(trial.samples, PYTORCH, 1e3 * float(np.median(seconds[_TURN:])))
    for name, each in turns.items():
        for metric, value in each.medians().items():
            yield trial.row(trial.samples, metric, value)._replace(method=name)


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """Times, how often they go into PyTorch's pass of the encoder, and Figure 4."""
    (pytorch,) = table.where(metric=PYTORCH).values()
    timed = table.where(metric=(UPDATE, WHOLE))
    yield Text.of("Computation time for each labelled sample", timed, {"method": "method"}, {
        UPDATE: lambda rows: rows.mean(UPDATE, 3), WHOLE: lambda rows: rows.mean(WHOLE, 3),
        f"update over PyTorch's encoder ({pytorch:.3g} ms)": lambda rows: rows.mean(UPDATE, 2, 1.0 / pytorch),
    })  # fmt: skip
    axes = {"xlabel": "milliseconds, log scale (dotted: one pass of PyTorch's encoder)", "xscale": "log"}
    panel = plots.Panel("Computation time for each labelled sample", timed, axes, "rows", by="metric", along="method",
                        lines=(pytorch,))  # fmt: skip
    yield plots.Picture("figure4", [panel], 0.4 * len(timed.distinct("method")) + 1.8)
