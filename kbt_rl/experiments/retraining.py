"""Several warm-start learners trained in one batch, each on its own memory and with its own weights.

The networks are so small that a training waits for Python most of the time. Learners of the same size whose memories
are full at the same moment, as on different streams, can share that wait: their weights are stacked and go through one
pass. Every number is that of a learner trained alone but for the rounding of its matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kbt_rl.agents.warm_start import WarmStart
from kbt_rl.experiments.one_token import StackedTransformers


class WaitingWarmStart(WarmStart):
    """A learner that keeps a full memory until ``train_together`` is called, which has to be before the next label."""

    def _train_on_memory(self) -> float:
        return math.nan

    @property
    def full(self) -> bool:
        """Whether a training is due."""
        return len(self._stored) >= self.memory


def train_together(learners: Sequence[WaitingWarmStart]) -> None:
    """What ``WarmStart`` does with a full memory, for all learners at once; they differ in weights and memory only."""
    first = learners[0]
    transformers = [learner.policy.transformer for learner in learners]
    memories = [learner._memory_tensors() for learner in learners]
    observations = torch.stack([inputs[0][:, -1] for inputs, _ in memories])
    targets = torch.cat([target for _, target in memories])
    stacked = StackedTransformers([each.state_dict() for each in transformers], first.policy.transformer_config)
    trained = {name: stacked.weights[name].requires_grad_() for name, _ in transformers[0].named_parameters()}
    unit = stacked.weights["action_scale"].repeat_interleave(observations.shape[1], dim=0)  # of each row
    optimiser = torch.optim.Adam(trained.values(), lr=first.step_size, fused=True)
    for _ in range(first.epochs):
        loss = first.policy.actions.loss(stacked(observations).flatten(0, 1), targets, unit)
        optimiser.zero_grad()
        (len(learners) * loss).backward()  # the mean over all rows is that of each learner over their number
        optimiser.step()
    with torch.no_grad():
        for index, (learner, transformer) in enumerate(zip(learners, transformers, strict=True)):
            for name, weight in transformer.named_parameters():
                weight.copy_(trained[name][index])
            learner._forget_memory()
