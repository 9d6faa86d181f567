"""The last linear layer of a frozen network, heard while the network runs, and answered in its place.

The network stays the user's own. Hooks on it do nothing except during the calls that this library makes, so that the
network alone goes on doing what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Answer = Callable[[Tensor, Tensor], Tensor]


class Heard(NamedTuple):
    """What a call of the network was heard to do.

    Attributes:
        features: Inputs of the tapped layers side by side, the last layer's first, ``(n, d)``.
        result: What the call returned.
    """

    features: Tensor
    result: Any


class _Call:
    """A call in progress in one thread.

    Attributes:
        inputs: Of the tapped layers, the last layer's first; None where one has not run yet.
        features: See ``Heard``; None until they are asked for.
        answer: See ``Tap.hear``.
    """

    def __init__(self, layers: int, answer: Answer | None) -> None:
        self.inputs: list[Tensor | None] = [None] * layers
        self.features: Tensor | None = None
        self.answer = answer

    def joined(self) -> Tensor:
        """The features, put together from what the layers were given."""
        last, *skipped = self.inputs
        if last is None:
            raise ValueError("the network ran without its tapped layer; tap the layer that its actions come from")
        parts = [last]
        for other in skipped:
            if other is not None and other.ndim == 2 < last.ndim and len(other) == len(last):  # of a chunk
                other = other.reshape(len(last), *[1] * (last.ndim - 2), -1).expand(*last.shape[:-1], -1)
            if other is None or other.shape[:-1] != last.shape[:-1]:
                raise ValueError("a tapped layer did not run, or with other rows than the last one; use skip='none'")
            parts.append(other)
        features = torch.cat(parts, dim=-1) if skipped else last
        return features.detach() if features.requires_grad else features


class Tap:
    """Hooks on a linear layer and on layers before it.

    Args:
        layer: The last linear layer.
        skipped: Layers whose inputs the head sees besides.
    """

    def __init__(self, layer: nn.Linear, skipped: Sequence[nn.Linear] = ()) -> None:
        self.layer, self.skipped = layer, tuple(skipped)
        self._calls: dict[int, _Call] = {}  # by thread
        self._handles = [layer.register_forward_hook(_Mouth(self))]
        for index, source in enumerate(skipped, start=1):
            self._handles.append(source.register_forward_pre_hook(_Ear(self, index)))

    def hear(self, call: Callable[[], T], answer: Answer | None = None) -> Heard:
        """Run ``call``, which runs the network in this thread.

        Args:
            call: Anything that calls the network.
            answer: What the layer returns instead, given the features ``(n, d)`` and its own output.
        """
        thread = get_ident()
        if thread in self._calls:
            raise RuntimeError("the tapped network calls itself")
        now = self._calls[thread] = _Call(len(self._handles), answer)
        try:
            result = call()
            return Heard(now.joined() if now.features is None else now.features, result)
        finally:
            del self._calls[thread]

    def remove(self) -> None:
        """Take the hooks off; the network is as before, to the bit."""
        for handle in self._handles:
            handle.remove()

    def current(self) -> _Call | None:
        """The call in progress in this thread."""
        return self._calls.get(get_ident())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        """A copy of the network is another network, which nobody listens to."""
        return self


class _Hook:
    """Of a tap, on one of its layers."""

    def __init__(self, tap: Tap, index: int = 0) -> None:
        self._tap, self._index = tap, index


class _Ear(_Hook):
    """Tells a tap what one of the skipped layers was given."""

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        now = self._tap.current()
        if now is not None:
            now.inputs[self._index] = inputs[0]


class _Mouth(_Hook):
    """Tells a tap what the last layer was given, and answers in its place."""

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        now = self._tap.current()
        if now is None:
            return None
        now.inputs[0] = inputs[0]
        if now.answer is None:
            return None
        now.features = now.joined()
        return now.answer(now.features, output)


def untapped(module: nn.Module) -> None:
    """Take the hooks of all taps off a copy of a tapped network."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
