"""Several warm-start learners trained in one batch, each on its own memory and with its own weights.

The networks are so small that a training waits for Python most of the time. Learners of the same size whose memories
are full at the same moment, as on different streams, can share that wait: their weights are stacked and go through one
pass. Every number is that of a learner trained alone but for the rounding of its matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kbt_rl.agents.behaviour_cloning import Array
from kbt_rl.agents.warm_start import WarmStart, WarmStartInfo
from kbt_rl.experiments.one_token import StackedTransformers
from kbt_rl.models.context import ContextWindow


class WaitingWarmStart(WarmStart):
    """A learner that keeps a full memory until ``train_together`` is called, which has to be before the next label.

    It does not tell the innovation, for which each state would go through the network once more.
    """

    def _update(self, context: ContextWindow, target: Array, features: Tensor | None, rows: Array) -> WarmStartInfo:
        self._stored += [(context.rows(slice(i, i + 1)), target[i : i + 1]) for i in range(len(target))]
        return WarmStartInfo(
            labels=len(target), innovation=math.nan, memory=len(self._stored), trainings=int(self.full)
        )

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
    unit = stacked.action_scale[:, 0].repeat_interleave(observations.shape[1], dim=0)  # of each row
    weights = _as_views_of_one(stacked)
    optimiser = torch.optim.Adam([weights], lr=first.step_size, fused=True)
    for _ in range(first.epochs):
        loss = first.policy.actions.loss(stacked(observations).flatten(0, 1), targets, unit)
        optimiser.zero_grad(set_to_none=False)
        (len(learners) * loss).backward()  # the mean over all rows is that of each learner over their number
        optimiser.step()
    for index, (learner, transformer) in enumerate(zip(learners, transformers, strict=True)):
        stacked.write(index, transformer)
        learner._forget_memory()


def _as_views_of_one(stacked: StackedTransformers) -> Tensor:
    """One tensor of all weights and, as its ``grad``, of all gradients, so that a step of Adam is one operation."""
    sizes = [part.numel() for part in stacked.parts.values()]
    whole = torch.cat([part.flatten() for part in stacked.parts.values()])
    whole.grad = torch.zeros_like(whole)
    pairs = zip(whole.split(sizes), whole.grad.split(sizes), strict=True)
    for (name, part), (weights, gradient) in zip(stacked.parts.items(), pairs, strict=True):
        own = stacked.parts[name] = weights.view_as(part).detach().requires_grad_()
        own.grad = gradient.view_as(part)  # which backward adds to in place
    return whole
