"""Several warm-start learners trained in one batch, each on its own memory and with its own weights.

The networks are so small that a training waits for Python most of the time. Learners of the same size whose memories
are full at the same moment, as on different streams, can share that wait: their weights are stacked and go through one
vectorised pass. Every number is that of a learner trained alone but for the rounding of its matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from kbt_rl.agents.warm_start import WarmStart


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
    template, form = first.policy.transformer, first.policy.actions
    weights, buffers = stack_module_state(transformers)
    memories = [learner._memory_tensors() for learner in learners]
    inputs = [torch.stack(parts) for parts in zip(*(inputs for inputs, _ in memories), strict=True)]
    targets = torch.stack([target for _, target in memories])

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor], inputs: list[Tensor], target: Tensor) -> Tensor:
        actions = functional_call(template, (weights, buffers), tuple(inputs))
        return form.loss(actions[:, -1], target, buffers["action_scale"])

    optimiser = torch.optim.Adam(weights.values(), lr=first.step_size, fused=True)
    template.train()
    with sdpa_kernel(SDPBackend.MATH):  # the one that can be vectorised
        for _ in range(first.epochs):
            losses = vmap(loss)(weights, buffers, inputs, targets)
            optimiser.zero_grad()
            losses.sum().backward()
            optimiser.step()
    template.eval()
    with torch.no_grad():
        for index, (learner, transformer) in enumerate(zip(learners, transformers, strict=True)):
            for name, weight in transformer.named_parameters():
                weight.copy_(weights[name][index])
            learner._forget_memory()
