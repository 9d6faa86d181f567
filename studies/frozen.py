"""A learner's policy as it is now, to be evaluated while the learner goes on, and many of them side by side.

A two-layer head acts by the variances of its hidden units, which it takes from the root of its whole covariance with
every action. For the thousands of actions of an evaluation each unit's covariance is taken once: the same actions to
rounding, in a twentieth of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor

from kbt_rl.agents.behaviour_cloning import Array
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.inference.moments import gaussian_cdf, gaussian_pdf
from kbt_rl.inference.network import augment, weights_of
from kbt_rl.models.context import ContextWindow
from studies.episodes import Policy
from studies.stacked import StackedTransformers, sees_one_state
from studies.straight_path import StraightPathPolicy


class OneLayer(NamedTuple):
    """All that the mean of a one-layer head depends on; several in one, with a dimension in front.

    Attributes:
        weights: Mean weights, ``(a, d + 1)``.
    """

    weights: Tensor

    def mean(self, inputs: Tensor) -> Tensor:
        """Of the outputs for features in the head's units, ``(B, d)`` to ``(B, a)``."""
        return augment(inputs) @ self.weights.mT


class TwoLayers(NamedTuple):
    """All that the mean of a two-layer head with one output depends on; several in one, with a dimension in front.

    Attributes:
        first: Mean weights of the hidden layer, ``(n, d + 1)``.
        last: Mean weights of the output, ``(1, n + 1)``.
        units: Covariance of the weights of each hidden unit, ``(n, d + 1, d + 1)``.
        coupling: Covariance of those with the unit's weight in the last layer, ``(n, d + 1)``.
        feature_variance: Of each feature, ``()``.
    """

    first: Tensor
    last: Tensor
    units: Tensor
    coupling: Tensor
    feature_variance: Tensor

    def mean(self, inputs: Tensor) -> Tensor:
        """Of the output for features in the head's units, ``(B, d)`` to ``(B, 1)``; Eqs. (18) to (22)."""
        rows = augment(inputs)
        variances = self.units[..., :-1, :-1].diagonal(dim1=-2, dim2=-1)
        of_features = variances.sum(-1) + self.first[..., :-1].square().sum(-1)
        squares = (rows.unsqueeze(-1) * rows.unsqueeze(-2)).flatten(-2)  # so that all forms are one matrix product
        forms = squares @ self.units.flatten(-2).mT
        variance = forms + (self.feature_variance[..., None] * of_features).unsqueeze(-2)
        mean, deviation = rows @ self.first.mT, variance.clamp_min(1e-300).sqrt()
        ratio = mean / deviation
        slope = gaussian_cdf(ratio)
        output = augment(mean * slope + deviation * gaussian_pdf(ratio)) @ self.last.mT
        # E[w z] = E[w] E[z] + Cov(w, z), with Cov(w, relu(u)) = Cov(w, u) Phi
        return output + (slope * (rows @ self.coupling.mT)).sum(-1, keepdim=True)


def unit_covariances(cov: Tensor, units: int) -> Tensor:
    """Covariance of the weights of each hidden unit, ``(n, k, k)``, from that of all first-layer weights."""
    blocks = cov.view(units, cov.shape[0] // units, units, -1)
    return torch.stack([blocks[unit, :, unit] for unit in range(units)])


class FrozenPolicy(TransformerPolicy):
    """Acts as a policy with a head did, on the encoder that the policy goes on with.

    Args:
        policy: Its encoder, which does not learn, and the units of its head.
        layers: What the head was.
    """

    def __init__(self, policy: DecisionTransformerPolicy, layers: OneLayer | TwoLayers) -> None:
        super().__init__(policy.observation_space, policy.action_space, transformer=policy.transformer_config)  # type: ignore[arg-type]
        self.transformer = policy.transformer
        self.layers, self._encode, head = layers, policy.encode, policy.head
        self._centre, self._divisor = head.feature_mean.clone(), head.feature_scale.clone()
        self._scale = head.target_scale.clone()

    def encode(self, context: ContextWindow) -> Tensor:
        """See ``TransformerPolicy.encode``; with what the head sees beside it."""
        return self._encode(context)

    def act(self, features: Tensor) -> Array:
        """See ``TransformerPolicy.act``."""
        return self.act_by(self.layers, features)

    def act_by(self, layers: OneLayer | TwoLayers, features: Tensor) -> Array:
        """Mean actions by these layers, ``(..., n, d)`` to ``(..., n, a)``."""
        with torch.inference_mode():
            output = layers.mean((features.double() - self._centre) / self._divisor)
            actions: Array = self.actions.mean(output * self._scale).numpy()
            return actions


def two_layers(policy: DecisionTransformerPolicy) -> TwoLayers:
    """The head of a policy as it is now."""
    head = policy.head
    (n, k), cov = head.spec.shapes[0], head.covariance()
    above = cov[n * k : n * k + n, : n * k].view(n, n, k)
    first, last = (weight.clone() for weight in weights_of(head.state))
    units, coupling = unit_covariances(cov[: n * k, : n * k], n), torch.stack([above[j, j] for j in range(n)])
    return TwoLayers(first, last, units, coupling, first.new_tensor(head.spec.feature_variance))


def frozen(policy: Any) -> Policy:
    """The policy as it is now, whatever it learns later; with a ``freeze`` of its own, by that."""
    if hasattr(policy, "freeze"):
        own: Policy = policy.freeze()
        return own
    if type(policy) is DecisionTransformerPolicy and len(policy.heads) == 1 and policy.actions.link == "identity":
        head = policy.head
        if len(head.spec.shapes) == 1:
            return FrozenPolicy(policy, OneLayer(weights_of(head.state)[0].clone()))
        if len(head.spec.shapes) == 2 and head.spec.outputs == 1 and head.config.propagation == "moments":
            return FrozenPolicy(policy, two_layers(policy))
    copied: Policy = copy.deepcopy(policy)
    return copied


class SideBySide:
    """Policies of one kind as one policy, whose rows are theirs in equal parts: a step takes one pass of the network.

    The same actions as of each by ``predict``, to the rounding of larger products. On one encoder it encodes all
    contexts at once; transformers that differ throughout are stacked.

    Args:
        policies: See ``go_side_by_side``.
    """

    def __init__(self, policies: Sequence[TransformerPolicy]) -> None:
        self._policies, self._means = policies, self._of_parts
        if not _on_one_encoder(policies):
            self._means = self._of_stacked
            self._stacked = StackedTransformers([policy.transformer for policy in policies])
            straight = [policy.straight_weights() for policy in policies if isinstance(policy, StraightPathPolicy)]
            self._straight = torch.stack(straight) if straight else None
        elif layers := [policy.layers for policy in policies if isinstance(policy, FrozenPolicy)]:
            self._means = self._of_layers
            self._layers = type(layers[0])(*map(torch.stack, zip(*layers, strict=True)))

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Array, tuple[Array, ...]]:
        """Mean actions."""
        first = self._policies[0]
        context = first.start(observation) if state is None else first.advance(state, observation, episode_start)
        actions = first.clip(self._means(context))
        return actions, first.with_action(context, actions)

    def _of_parts(self, context: ContextWindow) -> Array:
        parts = self._policies[0].encode(context).chunk(len(self._policies))
        return np.concatenate([policy.act(part) for policy, part in zip(self._policies, parts, strict=True)])

    def _of_layers(self, context: ContextWindow) -> Array:
        first = self._policies[0]
        assert isinstance(first, FrozenPolicy)
        actions = first.act_by(self._layers, first.encode(context).unflatten(0, (len(self._policies), -1)))
        return actions.reshape(-1, actions.shape[-1])

    def _of_stacked(self, context: ContextWindow) -> Array:
        states = torch.from_numpy(context.newest).unflatten(0, (len(self._policies), -1))
        with torch.inference_mode():
            actions = self._stacked(states)
            if self._straight is not None:
                actions = torch.baddbmm(actions, states, self._straight)
            means: Array = self._policies[0].actions.mean(actions.flatten(0, 1).double()).numpy()
            return means


def go_side_by_side(policies: Sequence[Policy]) -> TypeGuard[Sequence[TransformerPolicy]]:
    """Whether ``SideBySide`` can act for them: policies of one kind, on one encoder or transformers of one state."""
    for kind in (TransformerPolicy, StraightPathPolicy):
        if all(type(policy) is kind and sees_one_state(policy.transformer_config) for policy in policies):
            return True
    plain = any(all(type(policy) is kind for policy in policies) for kind in (DecisionTransformerPolicy, FrozenPolicy))
    return plain and _on_one_encoder(policies)  # type: ignore[arg-type]


def _on_one_encoder(policies: Sequence[TransformerPolicy]) -> bool:
    """Whether the policies differ in their last layers alone."""
    first, *others = (
        [value for name, value in policy.transformer.state_dict().items() if not name.startswith("linear.")]
        for policy in policies
    )
    return all(all(map(torch.equal, first, other)) for other in others)
