"""The buffers of a head on a stack's memory: they tell the stack when one is replaced, and when one is handed out.

So a call on a thousand heads need not look into each of them first. Whoever replaces a buffer does so in this mapping,
``torch.func.functional_call`` too; and only a tensor that somebody has got from it can be watched, by a cache or by a
saved graph, for changes of its version counter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Protocol

from torch import Tensor


class Watcher(Protocol):
    """Who wants to know.

    Attributes:
        replaced: Another object after each time that a buffer may have been replaced.
        handed_out: Receives the mean of each head whose buffers somebody has looked at, by the head's index.
    """

    replaced: object
    handed_out: dict[int, Tensor]


def _watched(method: Callable[..., Any], *, replaces: bool = False) -> Any:
    """The method of ``dict``, and a word to the watcher before what it gives away is there, or after a change."""

    @wraps(method)
    def call(self: StackedBuffers, *args: Any, **keywords: Any) -> Any:
        if not self.looked_at:
            self.watcher.handed_out[self.index] = dict.__getitem__(self, "mean")
            self.looked_at = True
        if not replaces:
            return method(self, *args, **keywords)
        try:
            return method(self, *args, **keywords)
        finally:  # not before: another thread may just now find everything in its place
            self.watcher.replaced = object()

    return call


class StackedBuffers(dict[str, Any]):
    """As the dictionary that it is made of; copied or pickled, it is a plain one.

    Args:
        buffers: Of the head.
        watcher: Who wants to know.
        index: Of the head, for the watcher.
    """

    __slots__ = ("index", "looked_at", "watcher")

    def __init__(self, buffers: Mapping[str, Tensor | None], watcher: Watcher, index: int) -> None:
        super().__init__(buffers)
        self.watcher, self.index, self.looked_at = watcher, index, False

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (dict(self.items()),)

    __getitem__ = _watched(dict.__getitem__)
    __or__ = _watched(dict.__or__)
    __ror__ = _watched(dict.__ror__)
    copy = _watched(dict.copy)
    get = _watched(dict.get)
    values = _watched(dict.values)
    items = _watched(dict.items)
    __setitem__ = _watched(dict.__setitem__, replaces=True)
    __delitem__ = _watched(dict.__delitem__, replaces=True)
    __ior__ = _watched(dict.__ior__, replaces=True)
    pop = _watched(dict.pop, replaces=True)
    popitem = _watched(dict.popitem, replaces=True)
    clear = _watched(dict.clear, replaces=True)
    update = _watched(dict.update, replaces=True)
    setdefault = _watched(dict.setdefault, replaces=True)
