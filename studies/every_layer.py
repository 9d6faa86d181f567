"""Every layer of the transformer by a low-rank Kalman filter (``LinearisedHead``), behind the learners' interface.

Beside the transformer there is a straight path from the observation to the action, as KBT's head has one: zero at
first, and free, since the new plant's law is linear in the state. All that has been trained is held tight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kbt_rl.agents.sample import Sample
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.linearised import LinearisedHead
from kbt_rl.inference.types import UpdateInfo
from kbt_rl.models.context import ContextWindow
from studies.cloned import Setting
from studies.straight_path import StraightPathPolicy


class _OfState(nn.Module):
    """The policy as a function of the state alone, which is all that a context of one step holds."""

    def __init__(self, policy: StraightPathPolicy) -> None:
        super().__init__()
        self.transformer, self.straight = policy.transformer, policy.straight

    def forward(self, states: Tensor) -> Tensor:
        """``(B, 4)`` to ``(B, 1)``."""
        zeros, scale = states.new_zeros(len(states), 1, 1), self.transformer.observation_scale
        actions: Tensor = self.transformer(states.unsqueeze(1), zeros, torch.zeros(len(states), dtype=torch.int64))
        straight: Tensor = self.straight(states / scale) * self.transformer.action_scale
        return actions[:, -1] + straight


class EveryLayer:
    """A policy that has the mean of the posterior as its weights after every label.

    Args:
        setting: Where to start.
        prior: Variance of the weights by name, of ``straight.weight`` and the transformer's.
        **head: Further fields of the ``HeadConfig``.
    """

    def __init__(self, setting: Setting, prior: dict[str, float], **head: Any) -> None:
        self.policy = StraightPathPolicy(setting.pretrained.policy)
        self.head = LinearisedHead(
            _OfState(self.policy), 1, HeadConfig(structure="low_rank", **head), prior_variance=prior,
            target_scale=self.policy.transformer.action_scale.double(),
        )  # fmt: skip

    def update(self, sample: Sample) -> UpdateInfo:
        """Learn from states and labels."""
        context = sample.context
        states = context.newest if isinstance(context, ContextWindow) else np.asarray(context)
        info = self.head.update(torch.as_tensor(states), np.asarray(sample.target))
        self.policy.load_state_dict(self.head.parameters_of_mean(), strict=False)
        return info
