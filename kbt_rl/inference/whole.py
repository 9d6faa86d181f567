"""A module whose buffers change as a whole or not at all, and which is copied, moved, saved and loaded so.

What it is to threads, signals, forks and files does not depend on what the buffers mean: a posterior, many of them, or
the weights of a mixture.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from kbt_rl.inference import checks, loading
from kbt_rl.inference.transactions import register_writer, signals_deferred

Self = TypeVar("Self", bound="WholeModule")


class WholeModule(nn.Module, ABC):
    """Buffers that keep their dtype, whatever the rest of a model is cast to.

    The lock is held while they change, and by whoever reads several of them.
    """

    keeps_dtype = True

    def __init__(self) -> None:
        super().__init__()
        self._own_lock()

    def _own_lock(self) -> None:
        self._lock = threading.RLock()
        register_writer(self)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """All of a change or, to other threads and to an interrupt, none of it."""
        with self._lock, signals_deferred():
            yield

    def copied_buffers(self) -> dict[str, Tensor]:
        """Copies of all buffers, of one moment."""
        with self._lock:
            return {name: buffer.clone() for name, buffer in self.named_buffers(recurse=False)}

    @abstractmethod
    def check_saved(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Raise RuntimeError unless what is saved under ``prefix`` can be the buffers of this module."""

    def flexible(self) -> frozenset[str]:
        """Buffers whose shape what is loaded decides, as far as ``check_saved`` lets it."""
        return frozenset()

    def changed(self) -> None:
        """Hook: forget what was derived from the buffers, which were replaced from outside; cannot fail."""

    def _fresh(self) -> dict[str, Any]:
        """Attributes that a copy has for itself."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # not of a moment in the middle of a change
            state = {**self.__dict__, "_buffers": self.copied_buffers(), **self._fresh()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._own_lock()

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow a change of device, but never of dtype."""
        moved = {
            name: checks.moved(buffer, fn(buffer).device)
            for name, buffer in self._buffers.items()
            if buffer is not None
        }
        with self._changing():
            self._buffers.update(moved)
            self.changed()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over saved buffers, all or none.

        Raises:
            RuntimeError: They are of another architecture or dtype, or broken.
        """
        return loading.load_whole(self, state_dict, strict)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], strict: bool, *lists: Any
    ) -> None:
        """As a part of another module, which PyTorch loads part by part: this one is taken over as a whole."""
        loading.load_part(self, state_dict, prefix, strict, *lists)
