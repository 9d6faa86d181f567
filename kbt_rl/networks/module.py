"""Any PyTorch module from observations ``(n, ...)``: its last linear layer is found, or named."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from kbt_rl.networks.base import Array, Call, Network, State, linears
from kbt_rl.networks.chunks import Chunked, action_shape
from kbt_rl.networks.links import ActionLink, LinkName, Scores, link_for


class ModuleNetwork(Network):
    """A module whose outputs are actions, or whose last layer's outputs make an action by a link.

    The last layer may run on several rows of features for an observation, ``(n, chunk, d)``: each is a row to learn
    from, and an action has the shape ``(chunk, a)``.

    Args:
        module: In evaluation mode from now on.
        layer: Name of its last linear layer, as ``named_modules`` has it, or ``"auto"``.
        states: Observations that it can be run on ``(n, ...)``, from which its layers are found; None if there are
            none, when the layers' own order must tell.
        link: ``auto`` for what the module returns as it is. Else the outputs of the last layer decide: ``clipped`` to
            or ``squashed`` by a tanh into [-1, 1], or the largest of the ``scores``.

    Raises:
        ValueError: There is no linear layer, or several could be the last, or it runs on rows that are no actions.
    """

    def __init__(
        self, module: nn.Module, layer: str = "auto", states: Array | None = None, link: LinkName = "auto"
    ) -> None:
        self.module = module.eval()
        found = linears(module)
        if not found:
            raise ValueError(f"{type(module).__name__} has no nn.Linear, so there is no last layer to adapt")
        names = {part: name for name, part in found}
        order = [part for _, part in found]
        if states is not None:
            order, last = executed(module, self._tensor(states[:2]), order)
        else:
            last = order[-1:] if _is_chain(module) or len(order) == 1 else order
        if layer != "auto":
            chosen = dict(found).get(layer)
            if chosen is None:
                raise ValueError(f"layer is {layer!r}; the linear layers are {', '.join(dict(found))}")
        elif len(last) == 1:
            chosen = last[0]
        else:
            raise ValueError(
                f"several layers could be the last: {', '.join(names[part] for part in last)}; name one as layer="
                + ("" if states is not None else ", or pass states=, on which the module can be run")
            )
        self.layer = chosen
        self.before = order[: order.index(chosen)] if chosen in order else []
        inputs = (self.before[0] if self.before else chosen).in_features
        shape = (inputs,) if states is None else states.shape[1:]
        self.observation_space = spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.link_name, self.link = link, _link(link, (chosen.out_features,))
        if states is not None:
            self._find_chunk(states[:1])
        self.action_space = self.link.space

    def run(self, call: Call) -> tuple[Array, State]:
        """See ``Network``."""
        assert not isinstance(call.observation, dict)
        single = self.is_single(call.observation)
        rows = call.observation[np.newaxis] if single else call.observation
        shape = self.observation_space.shape
        if np.shape(rows)[1:] != shape:
            raise ValueError(
                f"the observation has shape {np.shape(call.observation)}; expected {shape} or (n, *{shape})"
            )
        with torch.no_grad():
            if self.link_name == "auto":
                outputs = self.module(self._tensor(rows)).cpu().numpy()
            else:
                outputs = self.link.decide(self._rows_of(self._said(rows)[0]))
        return (outputs[0] if single else outputs), call.state

    def _said(self, rows: Array) -> tuple[Tensor, Any]:
        """What the last layer says, and what the module makes of it."""
        said: list[Tensor] = []
        handle = self.layer.register_forward_hook(lambda layer, given, output: said.append(output))
        try:
            made = self.module(self._tensor(rows))
        finally:
            handle.remove()
        return said[0], made

    def _rows_of(self, said: Tensor) -> Array:
        """Outputs of the layer ``(..., o)`` as rows ``(n * chunk, o)``."""
        outputs: Array = said.reshape(-1, self.layer.out_features).double().cpu().numpy()
        return outputs

    def _find_chunk(self, observation: Array) -> None:
        """See by one observation ``(1, ...)`` on how many rows the layer runs, and what shape an action has."""
        with torch.no_grad():
            said, made = self._said(observation)
        self.chunk = said.numel() // self.layer.out_features
        if self.link_name == "scores":
            if self.chunk > 1:
                raise ValueError(f"the last layer makes {tuple(said.shape)} of one observation; one row of scores acts")
            return
        outputs = self._rows_of(said)
        shape = action_shape(said, made, (outputs, self.link.decide(outputs)))
        whole = _link(self.link_name, shape)
        self.link = whole if self.chunk == 1 else Chunked(self.link, whole.space)

    def copied(self, model: Any) -> tuple[Any, nn.Module]:
        """See ``Network``."""
        module = copy.deepcopy(self.module)
        return module, module

    def _tensor(self, rows: Array) -> Tensor:
        like = next(self.module.parameters())
        return torch.as_tensor(np.asarray(rows)).to(like)


def _link(name: LinkName, shape: tuple[int, ...]) -> ActionLink:
    if name == "scores":
        return Scores(spaces.Discrete(shape[0]))
    if name not in ("auto", "clipped", "squashed"):
        raise ValueError(f"link is {name!r}; choose 'auto', 'clipped', 'squashed' or 'scores'")
    bound = np.inf if name == "auto" else 1.0
    return link_for(spaces.Box(-bound, bound, shape, np.float32), squashed=name == "squashed")


def _is_chain(module: nn.Module) -> bool:
    """Whether the order of registration is that of execution."""
    return isinstance(module, nn.Sequential) and all(
        _is_chain(part) or not linears(part) or isinstance(part, nn.Linear) for part in module
    )


def executed(module: nn.Module, rows: Tensor, layers: list[nn.Linear]) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """The linear layers in the order in which the module runs them, and those on whose outputs no other depends."""
    order: list[nn.Linear] = []
    inputs: dict[nn.Linear, Tensor] = {}
    outputs: dict[nn.Linear, Tensor] = {}

    def hook(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        if layer not in outputs:
            order.append(layer)
        inputs[layer], outputs[layer] = given[0], output

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        with torch.enable_grad():
            module(rows.detach().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    last = []
    for index, layer in enumerate(order):
        later = [inputs[other].sum() for other in order[index + 1 :] if inputs[other].requires_grad]
        if not later:
            last.append(layer)
            continue
        total = torch.stack(later).sum()
        if torch.autograd.grad(total, outputs[layer], retain_graph=True, allow_unused=True)[0] is None:
            last.append(layer)
    return order, last
