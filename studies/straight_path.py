"""A transformer whose action also has a straight path from the observation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kbt_rl.agents.behaviour_cloning import Array
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.models.context import ContextWindow


class StraightPathPolicy(TransformerPolicy):
    """A transformer policy with a straight path from the scaled observation to the action.

    Args:
        policy: Whose transformer it starts from.
    """

    def __init__(self, policy: TransformerPolicy) -> None:
        super().__init__(policy.observation_space, policy.action_space, transformer=policy.transformer_config)  # type: ignore[arg-type]
        self.transformer.load_state_dict(policy.transformer.state_dict())
        self.straight = nn.Linear(
            len(self.transformer.observation_scale), len(self.transformer.action_scale), bias=False
        )
        nn.init.zeros_(self.straight.weight)

    def straight_weights(self) -> Tensor:
        """What the straight path multiplies an observation by, ``(o, a)``."""
        transformer = self.transformer
        return self.straight.weight.detach().mT / transformer.observation_scale.unsqueeze(1) * transformer.action_scale

    def encode(self, context: ContextWindow) -> Tensor:
        """The transformer's features and the scaled observation, see ``TransformerPolicy.encode``."""
        scale = self.transformer.observation_scale
        return torch.cat([super().encode(context), torch.from_numpy(context.newest).to(scale) / scale], dim=-1)

    def act(self, features: Tensor) -> Array:
        """See ``TransformerPolicy.act``."""
        hidden, observation = features.tensor_split([self.transformer.config.width], dim=-1)
        with torch.inference_mode():
            straight = self.straight(observation) * self.transformer.action_scale
            actions: Array = super().act(hidden) + straight.double().numpy()
            return actions
