"""What all rivals share: where they start, how they act, what a label means, and what happens when one diverges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from kbt_rl.agents.sample import Sample
from kbt_rl.networks.normaliser import Normaliser
from kbt_rl.networks.sb3 import SB3Network

Array = npt.NDArray[Any]
Layers = Literal["last", "all"]
#: Beyond this a weight counts as diverged: float32 outputs of such a network soon overflow.
LARGEST_WEIGHT = 1e6


class Start(NamedTuple):
    """What a rival starts from.

    Attributes:
        policy: Trained on the nominal task; a fresh copy, which the rival changes.
        normaliser: Of observations, frozen; None if the policy takes them as they are.
        states: Nominal observations ``(n, obs)``, not normalised.
    """

    policy: BasePolicy
    normaliser: Normaliser | None
    states: Array


class DivergedError(ArithmeticError):
    """An update would leave numbers that are not finite, or too large."""


class Acting:
    """An SB3 policy that takes observations as they come from the environment."""

    def __init__(self, policy: BasePolicy, normaliser: Normaliser | None) -> None:
        self.policy, self.normaliser = policy, normaliser

    def normalised(self, observation: Any) -> Array:
        """Observations as the policy was trained on them."""
        found: Array = np.asarray(observation) if self.normaliser is None else self.normaliser(observation)
        return found

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Actions for observations ``(n, obs)``; see SB3."""
        return self.policy.predict(self.normalised(observation), state, episode_start, deterministic)


def body(policy: Any) -> nn.Sequential:
    """The policy's own layers, from normalised observations ``(n, obs)`` to the last layer's outputs ``(n, o)``.

    The last part is the last linear layer; a tanh behind it is left out.
    """
    if hasattr(policy, "actor"):  # SAC, TD3
        first, hidden = policy.actor.features_extractor, getattr(policy.actor, "latent_pi", nn.Sequential())
        last = policy.actor.mu
    else:  # PPO, A2C
        first, hidden, last = policy.pi_features_extractor, policy.mlp_extractor.policy_net, policy.action_net
    parts = [*hidden, *(last if isinstance(last, nn.Sequential) else [last])]
    while not isinstance(parts[-1], nn.Linear):
        parts.pop()
    return nn.Sequential(first, *parts)


class Rival(ABC):
    """A learner that changes the weights of a policy in place.

    At large learning rates a rival may diverge. An update after which a weight is not finite or beyond
    ``LARGEST_WEIGHT`` is taken back: the rival acts by its last finite weights, and ``failed`` counts the update. So is
    one whose label is beyond it.

    Args:
        start: Where it starts.
        layers: Whether the weights of all layers learn, or those of the last alone.

    Attributes:
        policy: What acts; one object that changes in place.
        failed: Updates that were taken back.
        body: From normalised observations to outputs, see ``body``.
        hidden: The body without the last layer.
        last: The last linear layer.
        weights: Those that learn.
        units: Scale of each output, ``(1, o)``; errors are measured in it.
    """

    def __init__(self, start: Start, layers: Layers = "all") -> None:
        start.policy.set_training_mode(False)
        self.policy, self.failed = Acting(start.policy, start.normaliser), 0
        self.body = body(start.policy)
        self.hidden = nn.Sequential(*list(self.body)[:-1])
        self.last: Any = self.body[-1]
        self.weights = list((self.body if layers == "all" else self.last).parameters())
        start.policy.requires_grad_(False)
        for weight in self.weights:
            weight.requires_grad_(True)
        self._link = SB3Network(start.policy).link
        self._units = self._link.units(self.outputs(self.inputs(start.states)))
        self.units = torch.as_tensor(self._units, dtype=torch.float32).reshape(1, -1)

    def update(self, sample: Sample) -> None:
        """Learn from one observation and its label; a label of NaN changes nothing.

        Raises:
            ValueError: More than one observation, or no label of its kind.
        """
        inputs = self.inputs(getattr(sample.context, "newest", sample.context))
        if len(inputs) != 1:
            raise ValueError(f"the sample has {len(inputs)} observations; a rival learns from one at a time")
        label = self._link.label(sample.target, sample.kind, self.outputs(inputs), self._units)
        target = torch.from_numpy(label).float()
        if bool(target.isnan().all()):
            return
        before = parameters_to_vector(self.weights).detach()
        try:
            self.check(target[~target.isnan()])
            self.learn(inputs, target)
            self.check(parameters_to_vector(self.weights).detach())
        except DivergedError:
            vector_to_parameters(before, self.weights)
            self.failed += 1

    @abstractmethod
    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """Change the weights for one label.

        Args:
            inputs: A normalised observation, ``(1, obs)``.
            target: What the outputs should have been, ``(1, o)``, NaN where there is nothing to learn.

        Raises:
            DivergedError: The result would not be finite; what else the rival remembers has not changed.
        """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the mean squared error in units, over the outputs ``(n, o)`` that have a label."""
        errors = (outputs - targets) / self.units
        return 0.5 * errors[~targets.isnan()].square().mean()

    def gradient(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Of the loss by the weights, as one vector."""
        loss = self.loss(self.body(inputs), targets)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self.weights)])

    def vector(self) -> Tensor:
        """The weights as one vector, a copy."""
        return parameters_to_vector(self.weights).detach()

    def put(self, vector: Tensor) -> None:
        """Take over weights from one vector."""
        self.check(vector)
        vector_to_parameters(vector.clone(), self.weights)

    @staticmethod
    def check(vector: Tensor) -> None:
        """Raise DivergedError for numbers that are not finite or beyond ``LARGEST_WEIGHT``."""
        if not bool(vector.abs().max() <= LARGEST_WEIGHT):
            raise DivergedError

    def inputs(self, observations: Any) -> Tensor:
        """Observations as the body takes them, ``(n, obs)``."""
        rows = self.policy.normalised(np.asarray(observations))
        return torch.as_tensor(rows.reshape(len(rows), -1), dtype=torch.float32)

    @torch.no_grad()
    def outputs(self, inputs: Tensor) -> Array:
        """Of the last layer for normalised observations, ``(n, o)``."""
        outputs: Array = self.body(inputs).double().numpy()
        return outputs
