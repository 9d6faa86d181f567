"""Many small transformers as one: their weights stacked, so that each layer is one product for all of them.

A network of width 16 waits for Python most of the time. Twenty snapshots that act side by side, or five learners that
retrain at the same label, share that wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from kbt_rl.agents.sample import Sample
from kbt_rl.agents.warm_start import WarmStart, WarmStartInfo
from kbt_rl.inference.errors import UpdateError
from kbt_rl.models.decision_transformer import DecisionTransformer, DecisionTransformerConfig


def sees_one_state(config: DecisionTransformerConfig) -> bool:
    """Whether its context is a single token, which attends to itself alone: attention is its value projection."""
    return config.context_length == 1 and config.target_return is None


class StackedTransformers:
    """``DecisionTransformer`` for contexts of one state, with the weights of several in front.

    Args:
        transformers: Of one size; they are copied.

    Attributes:
        weights: All that they learn, flat. Its ``grad`` is where ``backward`` adds the gradients, so that a step of an
            optimiser is one operation.

    Raises:
        ValueError: Their context has more than one token.
    """

    def __init__(self, transformers: Sequence[DecisionTransformer]) -> None:
        self._config = transformers[0].config
        if not sees_one_state(self._config):
            raise ValueError(f"stacked transformers see one state; these have the context of {self._config}")
        states = [each.state_dict() for each in transformers]
        whole = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        self._observation_scale = whole["observation_scale"].unsqueeze(1)
        self._action_scale = whole["action_scale"].unsqueeze(1)
        # matrices (S, inputs, outputs) and vectors (S, 1, size)
        parts = {
            name: part.mT if part.ndim == 3 else part.unsqueeze(1)
            for name, _ in transformers[0].named_parameters()
            for part in [whole[name][:, self._used(name)]]
        }
        self.weights = torch.cat([part.flatten() for part in parts.values()])
        self.weights.grad = torch.zeros_like(self.weights)
        sizes = [part.numel() for part in parts.values()]
        views = zip(parts.items(), self.weights.split(sizes), self.weights.grad.split(sizes), strict=True)
        self._parts: dict[str, Tensor] = {}
        for (name, part), weights, gradient in views:
            held = self._parts[name] = weights.view(part.shape).detach().requires_grad_()
            held.grad = gradient.view(part.shape)

    def _used(self, name: str) -> slice:
        """Rows of a parameter that a lone token makes use of: of the attention, those that make the values."""
        return slice(2 * self._config.width, None) if "in_proj" in name else slice(None)

    @torch.no_grad()
    def write(self, index: int, transformer: DecisionTransformer) -> None:
        """Copy the weights of one of them into a transformer, whose queries and keys stay as they are."""
        for name, parameter in transformer.named_parameters():
            part = self._parts[name][index]
            parameter[self._used(name)] = part.mT if parameter.ndim == 2 else part[0]

    def are_finite(self, index: int) -> bool:
        """Whether all weights of one of them are."""
        return all(bool(part[index].isfinite().all()) for part in self._parts.values())

    def __call__(self, observations: Tensor) -> Tensor:
        """Actions of each for observations of its own, ``(S, n, o)`` to ``(S, n, a)``."""
        tokens = self._linear("embed_state.", observations / self._observation_scale)
        for layer in (f"encoder.layers.{depth}." for depth in range(self._config.layers)):
            for norm, part in (("norm1", self._attend), ("norm2", self._feed)):
                if self._config.norm_first:
                    tokens = tokens + part(layer, self._normalise(layer + norm, tokens))
                else:
                    tokens = self._normalise(layer + norm, tokens + part(layer, tokens))
        return self._linear("linear.", tokens) * self._action_scale

    def _attend(self, layer: str, tokens: Tensor) -> Tensor:
        return self._linear(layer + "self_attn.out_proj.", self._linear(layer + "self_attn.in_proj_", tokens))

    def _feed(self, layer: str, tokens: Tensor) -> Tensor:
        return self._linear(layer + "linear2.", torch.relu(self._linear(layer + "linear1.", tokens)))

    def _normalise(self, name: str, tokens: Tensor) -> Tensor:
        plain = functional.layer_norm(tokens, tokens.shape[-1:])
        return plain * self._parts[name + ".weight"] + self._parts[name + ".bias"]

    def _linear(self, prefix: str, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self._parts[prefix + "bias"], inputs, self._parts[prefix + "weight"])


class WarmStarts:
    """What each of several ``WarmStart`` learns from labels of its own, in one batch for all.

    Args:
        learners: With one setting, from one pre-trained policy; their policies learn.
    """

    def __init__(self, learners: Sequence[WarmStart]) -> None:
        self._learners = learners
        self._stored: list[Sequence[Sample]] = []

    def update(self, samples: Sequence[Sample]) -> list[WarmStartInfo | UpdateError]:
        """Learn from a labelled state for each.

        Returns:
            Of each what ``WarmStart.update`` tells, without innovation and loss; or why its training failed.
        """
        first = self._learners[0]
        self._stored.append(samples)
        waiting = len(self._stored)
        if waiting < first.memory:
            return [WarmStartInfo(1, math.nan, waiting)] * len(samples)
        memories, self._stored = list(zip(*self._stored, strict=True)), []
        states, labels = (
            torch.stack([torch.cat([torch.as_tensor(sample[field]) for sample in memory]) for memory in memories])
            for field in (0, 1)
        )  # fmt: skip
        stacked = StackedTransformers([learner.policy.transformer for learner in self._learners])
        optimiser = torch.optim.Adam([stacked.weights], lr=first.step_size, fused=True)
        target, scale = labels.flatten(0, 1).float(), first.policy.transformer.action_scale
        for _ in range(first.epochs):
            loss = first.policy.actions.loss(stacked(states).flatten(0, 1), target, scale)
            optimiser.zero_grad(set_to_none=False)
            (len(samples) * loss).backward()  # the mean over all rows is that of each learner over their number
            optimiser.step()
        return [self._taken_over(index, stacked) for index in range(len(samples))]

    def _taken_over(self, index: int, stacked: StackedTransformers) -> WarmStartInfo | UpdateError:
        if not stacked.are_finite(index):
            return UpdateError(f"training of learner {index} leaves weights that are not finite; it has not changed")
        stacked.write(index, self._learners[index].policy.transformer)
        return WarmStartInfo(1, math.nan, trainings=1)
