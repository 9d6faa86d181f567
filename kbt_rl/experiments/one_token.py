"""Many decision transformers with different weights on contexts of one state, as batched products.

Evaluating twenty snapshots of a warm start on fifty starts takes 500 passes of twenty small networks, and training ten
of them as many forwards and backwards. Stacked, each layer is one product; a single token attends to itself alone, so
that attention is its value projection, and queries and keys have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from kbt_rl.models.decision_transformer import DecisionTransformerConfig


class StackedTransformers:
    """``DecisionTransformer`` for contexts of one state, with the weights of several stacked in front.

    Args:
        snapshots: State dicts of transformers of the same size.
        config: Their size.

    Attributes:
        weights: The stacked entries of the state dicts, by name; those that are to be trained may require a gradient.

    Raises:
        ValueError: Their context has more than one token.
    """

    def __init__(self, snapshots: list[dict[str, Tensor]], config: DecisionTransformerConfig) -> None:
        if config.context_length != 1 or config.target_return is not None:
            raise ValueError("stacked transformers take a context of one state; these have more tokens")
        self.config = config
        self.weights = {name: torch.stack([each[name] for each in snapshots]) for name in snapshots[0]}

    def __call__(self, observations: Tensor) -> Tensor:
        """Actions of each transformer for observations of its own, ``(S, n, o)`` to ``(S, n, a)``."""
        weights = self.weights
        tokens = self._linear("embed_state.", observations / weights["observation_scale"].unsqueeze(1))
        for depth in range(self.config.layers):
            layer = f"encoder.layers.{depth}."
            for norm, part in (("norm1", self._attention), ("norm2", self._feedforward)):
                if self.config.norm_first:
                    tokens = tokens + part(layer, self._norm(layer + norm, tokens))
                else:
                    tokens = self._norm(layer + norm, tokens + part(layer, tokens))
        return self._linear("linear.", tokens) * weights["action_scale"].unsqueeze(1)

    def _attention(self, layer: str, tokens: Tensor) -> Tensor:
        values = slice(2 * self.config.width, 3 * self.config.width)  # after queries and keys
        return self._linear(layer + "self_attn.out_proj.", self._linear(layer + "self_attn.in_proj_", tokens, values))

    def _feedforward(self, layer: str, tokens: Tensor) -> Tensor:
        return self._linear(layer + "linear2.", torch.relu(self._linear(layer + "linear1.", tokens)))

    def _norm(self, name: str, tokens: Tensor) -> Tensor:
        plain = functional.layer_norm(tokens, tokens.shape[-1:])
        weights = self.weights
        return torch.addcmul(weights[name + ".bias"].unsqueeze(1), plain, weights[name + ".weight"].unsqueeze(1))

    def _linear(self, prefix: str, inputs: Tensor, rows: slice = slice(None)) -> Tensor:
        weight, bias = self.weights[prefix + "weight"], self.weights[prefix + "bias"]
        return torch.baddbmm(bias[:, rows].unsqueeze(1), inputs, weight[:, rows].mT)
