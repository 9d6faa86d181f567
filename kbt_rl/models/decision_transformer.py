"""A causal decision transformer ``T = T2 . T1``: ``encode`` is T1, the last linear layer is T2.

The default is the paper's policy: two encoder layers, two heads, feed-forward 8, width 16, one state token in, one
action out. With a longer context it is a decision transformer proper (Chen et al. 2021): tokens of return-to-go
(optional), state and action with an embedding of the time step, read causally, the action predicted at the state token.

Inputs are scaled by buffers, so that the network sees numbers of order one and the caller keeps its units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kbt_rl.arguments import MOST, between, flag, shown

# What float32 holds, with room for products.
LARGEST_RETURN = 1e30
# ``nn.Module._parameters``, typed loosely since a layer may lack a bias.
Parameters = dict[str, Any]


@dataclass(frozen=True)
class DecisionTransformerConfig:
    """Size and context of the transformer.

    Attributes:
        context_length: Time steps ``K`` the policy sees; 1 is the paper's, the state alone.
        width: Size of a token.
        layers: Encoder layers.
        heads: Attention heads.
        feedforward: Hidden units of the feed-forward blocks.
        norm_first: Normalise before each block rather than after it. The residual stream then carries the embedded
            state unnormalised to the last layer, where a new control law is close to linear in it.
        target_return: Return that the policy is asked for at run time; None leaves out the return-to-go tokens. SB3's
            ``predict`` never sees a reward, hence a constant.
        max_timestep: Time steps with an embedding of their own; later ones share the last. Used if K > 1.
    """

    context_length: int = 1
    width: int = 16
    layers: int = 2
    heads: int = 2
    feedforward: int = 8
    norm_first: bool = True
    target_return: float | None = None
    max_timestep: int = 500

    def __post_init__(self) -> None:
        for name in ("context_length", "width", "layers", "heads", "feedforward", "max_timestep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
                raise ValueError(f"{name} is {shown(value)}; it must be a whole number of at least 1")
        flag("norm_first", self.norm_first)
        if self.target_return is not None:
            expected = "it must be finite, or None for none"
            between("target_return", self.target_return, -LARGEST_RETURN, LARGEST_RETURN, expected=expected)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")


class OneTokenBlock:
    """What an encoder layer makes of a single token, which attends to itself alone: attention is its value projection.

    For a token of width 16 most of a layer's time goes into modules that look up and call each other. This one goes
    through the same parameters in a third of it. It refers to the dictionaries that hold them, so that parameters which
    are loaded, moved or replaced are seen.

    Args:
        layer: One that evaluates as in training, without dropout.
        config: Its sizes.
    """

    def __init__(self, layer: nn.TransformerEncoderLayer, config: DecisionTransformerConfig) -> None:
        self._norms: tuple[tuple[Parameters, float], ...] = (
            (layer.norm1._parameters, layer.norm1.eps),
            (layer.norm2._parameters, layer.norm2.eps),
        )
        self._attention: tuple[Parameters, Parameters] = (
            layer.self_attn._parameters,
            layer.self_attn.out_proj._parameters,
        )
        self._feedforward: tuple[Parameters, Parameters] = layer.linear1._parameters, layer.linear2._parameters
        self._width, self._norm_first = config.width, config.norm_first

    def __call__(self, tokens: Tensor) -> Tensor:
        """``(B, 1, width)`` to the same."""
        for norm, part in zip(self._norms, (self._attend, self._feed), strict=True):
            if self._norm_first:
                tokens = tokens + part(self._normalise(tokens, norm))
            else:
                tokens = self._normalise(tokens + part(tokens), norm)
        return tokens

    def _normalise(self, tokens: Tensor, norm: tuple[Parameters, float]) -> Tensor:
        held, eps = norm
        return functional.layer_norm(tokens, (self._width,), held["weight"], held["bias"], eps)

    def _attend(self, tokens: Tensor) -> Tensor:
        inner, outer = self._attention
        projected = functional.linear(tokens, inner["in_proj_weight"], inner["in_proj_bias"])
        values = projected[..., 2 * self._width :]  # after queries and keys
        return functional.linear(values, outer["weight"], outer["bias"])

    def _feed(self, tokens: Tensor) -> Tensor:
        wide, narrow = self._feedforward
        hidden = torch.relu(functional.linear(tokens, wide["weight"], wide["bias"]))
        return functional.linear(hidden, narrow["weight"], narrow["bias"])


class DecisionTransformer(nn.Module):
    """States, actions and returns of the last ``K`` steps in, actions out.

    The buffers ``observation_scale``, ``action_scale`` and ``return_scale`` divide what comes in; the action comes out
    in its own unit. ``feature_mean`` remembers the mean features of pre-training for whoever puts a head on them.

    Args:
        observation_size: Entries of a flat observation.
        action_size: Entries of an action.
        config: Size and context.
    """

    observation_scale: Tensor
    action_scale: Tensor
    return_scale: Tensor
    feature_mean: Tensor

    def __init__(
        self, observation_size: int, action_size: int, config: DecisionTransformerConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config = DecisionTransformerConfig() if config is None else config
        self.register_buffer("observation_scale", torch.ones(observation_size))
        self.register_buffer("action_scale", torch.ones(action_size))
        self.register_buffer("return_scale", torch.ones(()))
        self.register_buffer("feature_mean", torch.zeros(config.width))
        self.embed_state = nn.Linear(observation_size, config.width)
        if config.context_length > 1:
            self.embed_action = nn.Linear(action_size, config.width)
            self.embed_timestep = nn.Embedding(config.max_timestep, config.width)
        if config.target_return is not None:
            self.embed_return = nn.Linear(1, config.width)
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            config.feedforward,
            dropout=0.0,
            batch_first=True,
            norm_first=config.norm_first,
        )
        self.encoder = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
        self._blocks = [OneTokenBlock(layer, config) for layer in self.encoder.layers]
        self.linear = nn.Linear(config.width, action_size)

    def forward(
        self, observations: Tensor, actions: Tensor, timesteps: Tensor, returns: Tensor | None = None
    ) -> Tensor:
        """Actions at every step of the window, ``(B, K, action size)``; see ``encode`` for the arguments."""
        scaled: Tensor = self.linear(self.encode(observations, actions, timesteps, returns))
        return scaled * self.action_scale

    def encode(self, observations: Tensor, actions: Tensor, timesteps: Tensor, returns: Tensor | None = None) -> Tensor:
        """Features at the state tokens: T1 of the paper.

        Args:
            observations: ``(B, K, observation size)``, the newest last, padded on the left.
            actions: ``(B, K, action size)``; the newest is not looked at.
            timesteps: Step of the newest observation in its episode, ``(B,)``.
            returns: Returns-to-go ``(B, K)``; the constant target where None.

        Returns:
            ``(B, K, width)``.
        """
        tokens, per_step = self._tokens(observations, actions, timesteps, returns)
        if tokens.shape[1] == 1:
            return self._through_layers(tokens, None)
        blocked = self._attention_mask(timesteps, observations.shape[1], per_step, tokens.shape[1])
        features = self._through_layers(tokens, blocked)
        state_token = per_step - 2 if self.config.context_length > 1 else per_step - 1
        return features[:, state_token::per_step]

    def _through_layers(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """``self.encoder(tokens, mask)``, by a shorter way for one token."""
        if mask is None:
            for block in self._blocks:
                tokens = block(tokens)
            return tokens
        for layer in self.encoder.layers:  # without self.encoder's checks for nested tensors
            tokens = layer(tokens, src_mask=mask)
        return tokens

    def _tokens(
        self, observations: Tensor, actions: Tensor, timesteps: Tensor, returns: Tensor | None
    ) -> tuple[Tensor, int]:
        """Embedded tokens, interleaved as (return), state, action; without the action of the newest step."""
        kinds = [self.embed_state(observations / self.observation_scale)]
        if self.config.target_return is not None:
            if returns is None:
                returns = observations.new_full(observations.shape[:2], self.config.target_return)
            kinds.insert(0, self.embed_return((returns / self.return_scale).unsqueeze(-1)))
        if self.config.context_length > 1:
            kinds.append(self.embed_action(actions / self.action_scale))
            position = self.embed_timestep(self._steps(timesteps, observations.shape[1]).clamp(0, None))
            kinds = [kind + position for kind in kinds]
        if len(kinds) == 1:
            return kinds[0], 1
        tokens = torch.stack(kinds, dim=2).flatten(1, 2)
        return (tokens[:, :-1] if self.config.context_length > 1 else tokens), len(kinds)

    def _steps(self, timesteps: Tensor, length: int) -> Tensor:
        """Time step of each position, ``(B, K)``; negative where the window is padding."""
        ages = torch.arange(length - 1, -1, -1, device=timesteps.device)
        return (timesteps.unsqueeze(-1) - ages).clamp(max=self.config.max_timestep - 1)

    def _attention_mask(self, timesteps: Tensor, length: int, per_step: int, tokens: int) -> Tensor:
        """True where a token must not look, ``(B heads, T, T)``: at the future, and at padding other than itself."""
        ages = torch.arange(length - 1, -1, -1, device=timesteps.device)
        padding = (ages > timesteps.unsqueeze(-1)).repeat_interleave(per_step, dim=1)[:, :tokens]
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=timesteps.device).triu(1)
        itself = torch.eye(tokens, dtype=torch.bool, device=timesteps.device)
        blocked = (future | padding.unsqueeze(1)) & ~itself
        return blocked.repeat_interleave(self.config.heads, dim=0)
