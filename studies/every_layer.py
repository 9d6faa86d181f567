"""Every layer of the transformer by a low-rank Kalman filter (``LinearisedHead``), behind the learners' interface.

The last layer is as free as in the other heads; all that lies before it is held tight, as it is good already.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kbt_rl.agents.sample import Sample
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.linearised import LinearisedHead
from kbt_rl.inference.types import UpdateInfo
from kbt_rl.models.context import ContextWindow
from studies.trial import Setting


class _OfState(nn.Module):
    """The transformer as a function of the state alone, which is all that a context of one step holds."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, states: Tensor) -> Tensor:
        """``(B, 4)`` to ``(B, 1)``."""
        zeros = states.new_zeros(len(states), 1, 1)
        actions: Tensor = self.transformer(states.unsqueeze(1), zeros, torch.zeros(len(states), dtype=torch.int64))
        return actions[:, -1]


class EveryLayer:
    """A policy whose transformer has the mean of the posterior as its weights after every label."""

    def __init__(self, setting: Setting, prior: dict[str, float], **head: Any) -> None:
        self.policy = copy.deepcopy(setting.pretrained.policy)
        transformer = self.policy.transformer
        self.head = LinearisedHead(
            _OfState(transformer), 1, HeadConfig(structure="low_rank", **head),
            prior_variance={f"transformer.{pattern}": variance for pattern, variance in prior.items()},
            target_scale=transformer.action_scale.double(),
        )  # fmt: skip

    def update(self, sample: Sample) -> UpdateInfo:
        """Learn from states and labels."""
        context = sample.context
        states = context.observations[:, -1] if isinstance(context, ContextWindow) else np.asarray(context)
        info = self.head.update(torch.as_tensor(states), np.asarray(sample.target))
        learned = {name.removeprefix("transformer."): value for name, value in self.head.parameters_of_mean().items()}
        self.policy.transformer.load_state_dict(learned, strict=False)
        return info
