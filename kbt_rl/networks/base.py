"""What this library needs to know of a trained network; each family of networks is one file that says it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from torch import Tensor, nn

from kbt_rl.networks.links import ActionLink, LinkName
from kbt_rl.networks.tap import untapped

Array = npt.NDArray[Any]
Observation = Array | dict[str, Array]
State = tuple[Array, ...] | None


class Call(NamedTuple):
    """Arguments of a ``predict``, see SB3."""

    observation: Observation
    state: State = None
    episode_start: Array | None = None
    deterministic: bool = True
    action_masks: Array | None = None


class Network(ABC):
    """A trained policy: how to run it, and where its actions come from.

    Attributes:
        observation_space: Of one observation.
        action_space: Of one action.
        module: Holds all weights that decide an action.
        layer: The last linear layer.
        before: The linear layers between the observation and it, in order.
        link: What its outputs stand for.
        link_name: How the user called it; ``auto`` where the network knows it.
        recurrent: Whether it has a state from step to step.
        takes_masks: Whether it is told which actions are possible.
        pooled: Outputs of the layer of which the mean is one output of the head.
        chunk: Rows of the layer for one observation, which are one action together.
    """

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    module: nn.Module
    layer: nn.Linear
    before: Sequence[nn.Linear]
    link: ActionLink
    link_name: LinkName = "auto"
    recurrent: bool = False
    takes_masks: bool = False
    pooled: int = 1
    chunk: int = 1

    @abstractmethod
    def run(self, call: Call) -> tuple[Array, State]:
        """The network's own actions and its next state; ``layer`` runs once."""

    def rows(self, features: Tensor) -> Tensor:
        """Of what the layer sees in a run ``(..., d)``, the rows that actions come from, ``(n * chunk, d)``."""
        return features.reshape(-1, features.shape[-1])

    def with_action(self, state: State, actions: Array) -> State:
        """The next state of a network that remembers actions, with those that were taken ``(n, ...)``."""
        return state

    def is_single(self, observation: Any) -> bool:
        """Whether it is one observation, without an axis for rows."""
        space: Any = self.observation_space
        if isinstance(space, spaces.Dict):
            name = next(iter(space.spaces))
            return np.ndim(observation[name]) == len(space[name].shape or ())
        return np.ndim(observation) == len(space.shape or ())

    def linear(self) -> tuple[Tensor, Tensor]:
        """Weight ``(o, d)`` and bias ``(o,)`` of the layer, in the head's outputs."""
        weight = self.layer.weight.detach()
        bias = self.layer.bias if self.layer.bias is not None else weight.new_zeros(len(weight))
        return self.pool(weight.mT).mT, self.pool(bias.detach())

    def pool(self, outputs: Tensor) -> Tensor:
        """Outputs of the layer ``(..., pooled * o)`` as those of the head ``(..., o)``."""
        if self.pooled == 1:
            return outputs
        pooled: Tensor = outputs.unflatten(-1, (self.pooled, self.link.outputs)).mean(-2)
        return pooled

    def replaced(self, outputs: Tensor, new: Tensor) -> Tensor:
        """Outputs of the layer whose pooled form is ``new``, and which else are as they were."""
        if self.pooled == 1:
            return new.to(outputs)
        moved = new.to(outputs) - self.pool(outputs)
        return outputs + moved.repeat(*[1] * (outputs.ndim - 1), self.pooled)

    @abstractmethod
    def copied(self, model: Any) -> tuple[Any, nn.Module]:
        """A copy of the user's model, whose layers no other has, and the ``module`` in it."""

    def baked(self, model: Any, weight: Tensor, bias: Tensor) -> Any:
        """A copy of the user's model whose layer has the weight ``(o, d)`` and bias ``(o,)`` of the head's outputs.

        Raises:
            ValueError: The layer has no bias, and the head has learned one.
        """
        copied, module = self.copied(model)
        untapped(module)
        layer: Any = module.get_submodule(self.names([self.layer])[0])
        if layer.bias is None and bool((bias.abs() > 0.0).any()):
            raise ValueError("the last layer has no bias, which the posterior has learned; this model cannot be baked")
        with torch.no_grad():
            layer.weight.copy_(self.replaced(layer.weight.mT, weight.mT).mT)
            if layer.bias is not None:
                layer.bias.copy_(self.replaced(layer.bias, bias))
        return copied

    def names(self, layers: Sequence[nn.Module]) -> list[str]:
        """What layers are called in ``module``."""
        known = {part: name for name, part in self.module.named_modules()}
        return [known[layer] for layer in layers]

    def fingerprint(self) -> str:
        """SHA-256 over the names, shapes and bytes of all weights, by which a saved posterior knows its network."""
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            array: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(array)
        return digest.hexdigest()


def finite(observation: Any) -> Any:
    """Observations, of which a network must not make an action if they are NaN or infinite.

    Raises:
        ValueError: They are.
    """
    parts = observation.items() if isinstance(observation, dict) else [("observation", observation)]
    for name, values in parts:
        array = np.asarray(values)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity: {array[~np.isfinite(array)][:3]}; check the sensor")
    return observation


def linears(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of a module with their names, in the order of their registration."""
    return [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
