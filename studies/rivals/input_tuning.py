"""Input-space tuning: an affine transform in front of the network learns, and the head or its bias."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from kbt_rl.networks.normaliser import Normaliser
from studies.rivals.adam import Adam
from studies.rivals.base import Acting, Start


class Transformed(Acting):
    """A policy that sees transformed observations."""

    def __init__(self, policy: Any, normaliser: Normaliser | None, transform: nn.Linear) -> None:
        super().__init__(policy, normaliser)
        self.transform = transform

    @torch.no_grad()
    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """See ``Acting``."""
        rows = torch.as_tensor(self.normalised(observation), dtype=torch.float32)
        return self.policy.predict(self.transform(rows).numpy(), state, episode_start, deterministic)


class InputTuning(Adam):
    """One step of Adam for each label on ``A x + b``, the identity at first, of normalised observations ``x``.

    The linear input network of speaker adaptation (Neto et al. 1995). The hidden layers stay as they are.

    Args:
        start: Where it starts; observations are vectors.
        learning_rate: Step size.
        head: Whether the bias of the last layer learns as well, or the whole layer.
    """

    def __init__(self, start: Start, learning_rate: float, head: Literal["bias", "layer"] = "bias") -> None:
        super().__init__(start, learning_rate, "last")
        size = self.inputs(start.states[:1]).shape[1]
        self.transform = nn.Linear(size, size)
        nn.init.eye_(self.transform.weight)
        nn.init.zeros_(self.transform.bias)
        self.body = nn.Sequential(self.transform, *self.body)
        self.policy = Transformed(start.policy, start.normaliser, self.transform)
        self.last.weight.requires_grad_(head == "layer")
        self.weights = [weight for weight in self.body.parameters() if weight.requires_grad]
        self.optimiser = torch.optim.Adam(self.weights, lr=learning_rate, fused=True)
