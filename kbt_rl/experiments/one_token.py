"""Many decision transformers with different weights on contexts of one state, as batched products.

Evaluating twenty snapshots of a warm start on fifty starts takes 500 passes of twenty small networks, and training ten
of them as many forwards and backwards. Stacked, each layer is one product; a single token attends to itself alone, so
that attention is its value projection, and queries and keys have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kbt_rl.models.decision_transformer import DecisionTransformer, DecisionTransformerConfig


class StackedTransformers:
    """``DecisionTransformer`` for contexts of one state, with the weights of several stacked in front.

    Args:
        snapshots: State dicts of transformers of the same size.
        config: Their size.

    Attributes:
        parts: The parameters by name, in the form that one product takes: matrices ``(S, inputs, outputs)``, vectors
            ``(S, 1, size)``, of the attention only what makes the values. Others of these shapes may take their place.
        action_scale: ``(S, 1, a)``.

    Raises:
        ValueError: Their context has more than one token.
    """

    def __init__(self, snapshots: list[dict[str, Tensor]], config: DecisionTransformerConfig) -> None:
        if config.context_length != 1 or config.target_return is not None:
            raise ValueError("stacked transformers take a context of one state; these have more tokens")
        self.config = config
        stacked = {name: torch.stack([each[name] for each in snapshots]) for name in snapshots[0]}
        self._observation_scale = stacked["observation_scale"].unsqueeze(1)
        self.action_scale = stacked["action_scale"].unsqueeze(1)
        trained = {name: value[:, self._used(name)] for name, value in stacked.items() if "." in name}  # no buffers
        self.parts = {
            name: value.mT.contiguous() if value.ndim == 3 else value.unsqueeze(1) for name, value in trained.items()
        }

    def _used(self, name: str) -> slice:
        """Which rows of a parameter a lone token makes use of."""
        width = self.config.width
        return slice(2 * width, 3 * width) if "in_proj" in name else slice(None)  # after queries and keys

    @torch.no_grad()
    def write(self, index: int, transformer: DecisionTransformer) -> None:
        """Put the parameters of one of them into a transformer; what a lone token makes no use of stays there."""
        for name, parameter in transformer.named_parameters():
            part = self.parts[name][index]
            parameter[self._used(name)].copy_(part.mT if parameter.ndim == 2 else part[0])

    def __call__(self, observations: Tensor) -> Tensor:
        """Actions of each transformer for observations of its own, ``(S, n, o)`` to ``(S, n, a)``."""
        tokens = self._linear("embed_state.", observations / self._observation_scale)
        for depth in range(self.config.layers):
            layer = f"encoder.layers.{depth}."
            for norm, part in (("norm1", self._attention), ("norm2", self._feedforward)):
                if self.config.norm_first:
                    tokens = tokens + part(layer, self._norm(layer + norm, tokens))
                else:
                    tokens = self._norm(layer + norm, tokens + part(layer, tokens))
        return self._linear("linear.", tokens) * self.action_scale

    def _attention(self, layer: str, tokens: Tensor) -> Tensor:
        return self._linear(layer + "self_attn.out_proj.", self._linear(layer + "self_attn.in_proj_", tokens))

    def _feedforward(self, layer: str, tokens: Tensor) -> Tensor:
        return self._linear(layer + "linear2.", torch.relu(self._linear(layer + "linear1.", tokens)))

    def _norm(self, name: str, tokens: Tensor) -> Tensor:
        plain = functional.layer_norm(tokens, tokens.shape[-1:])
        return torch.addcmul(self.parts[name + ".bias"], plain, self.parts[name + ".weight"])

    def _linear(self, prefix: str, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.parts[prefix + "bias"], inputs, self.parts[prefix + "weight"])
