"""Figure 4: seconds per sample of every method, measured in turns within one process.

A machine's speed wavers by a factor of two within minutes (other tenants, clock, cache). Methods that are timed one
after another are then compared with each other's weather. Here each takes a few samples at a time, in turn, so that all
of them see the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.experiments.config import Method, Trial
from kbt_rl.experiments.learners import LabelStream, build
from kbt_rl.experiments.printed import PrintedKBT
from kbt_rl.models.context import ContextWindow

# Samples of one turn: the first is slower, since the others have emptied the caches.
_TURN = 10


@dataclass
class _Timed:
    """A learner with its measured seconds a sample; ``warm_up`` samples are run and not told."""

    learner: OnlineAlgorithm
    block: int
    update: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether it does nothing any more, which takes no time worth telling."""
        return isinstance(self.learner, PrintedKBT) and self.learner.failed_after is not None

    def take(self, state: Any, label: Any) -> None:
        """One sample, as a rollout would process it."""
        context = self.learner.policy.start(state)
        begin = time.perf_counter()
        features = self.learner.policy.encode(context)
        encoded = time.perf_counter()
        self.learner.update(Sample(context, label, features=features))
        done = time.perf_counter()
        if not self.failed:
            self.update.append(done - encoded)
            self.encode.append(encoded - begin)

    def record(self) -> dict[str, float]:
        """Medians; a block of warm start is paid for once every ``memory`` samples: the mean over whole blocks."""
        skipped = min(max(self.block, _TURN), len(self.update) - self.block)
        update, encode = np.asarray(self.update[skipped:]), np.asarray(self.encode[skipped:])
        whole = len(update) - len(update) % self.block
        blocks = update[:whole].reshape(-1, self.block).mean(axis=1) if whole else update
        alone, encoder = float(np.median(blocks)), float(np.median(encode))
        return {"update_s": alone, "encoder_s": encoder, "sample_to_posterior_s": alone + encoder}


def encode_by_pytorch(policy: TransformerPolicy, context: ContextWindow) -> Tensor:
    """Features of a context of the state alone by PyTorch's own layers, ``(n, 1, width)``."""
    transformer = policy.transformer
    with torch.inference_mode():
        tokens: Tensor = transformer.embed_state(torch.from_numpy(context.observations) / transformer.observation_scale)
        for layer in transformer.encoder.layers:
            tokens = layer(tokens)
    return tokens


class _PyTorchEncoder:
    """A pass of the encoder by PyTorch's own layers, which others would use, to compare with."""

    def __init__(self, policy: TransformerPolicy) -> None:
        self._policy, self._seconds = policy, list[float]()

    def take(self, state: Any, label: Any) -> None:
        """One state; the label is not used."""
        context = self._policy.start(state)
        begin = time.perf_counter()
        encode_by_pytorch(self._policy, context)
        self._seconds.append(time.perf_counter() - begin)

    def median(self) -> float:
        """Seconds of a pass."""
        return float(np.median(self._seconds[_TURN:]))


def timing_record(trial: Trial, pretrained: OnlineAlgorithm) -> dict[str, Any]:
    """Seconds per sample for the update alone and from sample to posterior, encoder included, by method."""
    timed = {method.name: _Timed(build(method, pretrained), _block(method)) for method in trial.methods}
    encoder = _PyTorchEncoder(pretrained.policy)
    turns: list[_Timed | _PyTorchEncoder] = [encoder, *timed.values()]
    stream = LabelStream(trial)
    states = stream.states(trial.samples)
    labels = stream.label(states)
    for start in range(0, trial.samples, _TURN):
        for each in turns:
            for i in range(start, min(start + _TURN, trial.samples)):
                each.take(states[i : i + 1], labels[i : i + 1])
    pytorch = {"pytorch_encoder_s": encoder.median()}
    return {"methods": {name: {**each.record(), **pytorch} for name, each in timed.items()}}


def _block(method: Method) -> int:
    return int(method.settings.get("memory", 1))
