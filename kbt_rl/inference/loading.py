"""Whether saved weights and buffers fit a module, asked before the first of them is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def check_fits(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Raise RuntimeError if a shape or, where ``strict``, a name is another one; PyTorch asks while it copies."""
    own = module.state_dict()
    for name, value in own.items():
        loaded = state_dict.get(name, value)
        if loaded.shape != value.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(loaded.shape)} in what is loaded and {tuple(value.shape)} in this "
                f"{type(module).__name__}, which has another architecture and is unchanged"
            )
    names = own.keys()
    if strict and names != state_dict.keys():
        raise RuntimeError(
            f"what is loaded is of another architecture than this {type(module).__name__}, which is unchanged: it "
            f"lacks {sorted(names - state_dict.keys())} and has {sorted(state_dict.keys() - names)} besides"
        )
