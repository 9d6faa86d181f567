"""Whether saved weights and buffers fit a module, asked before the first of them is taken over, and make sense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kbt_rl.inference.state import HeadState


def check_fits(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Raise an error where PyTorch would raise one while it copies, or cast what must keep its digits.

    Raises:
        RuntimeError: A shape, the dtype of a posterior or, where ``strict``, a name is another one.
    """
    for path, part in module.named_modules():
        if getattr(part, "keeps_dtype", False):
            check_dtypes(part, state_dict, f"{path}." if path else "")
    own = module.state_dict()
    for name, value in own.items():
        loaded = state_dict.get(name, value)
        if loaded.shape != value.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(loaded.shape)} in what is loaded and {tuple(value.shape)} in this "
                f"{type(module).__name__}, which has another architecture (policy_kwargs, HeadConfig) and is unchanged"
            )
    names = own.keys()
    if strict and names != state_dict.keys():
        raise RuntimeError(
            f"what is loaded is of another architecture (policy_kwargs, HeadConfig) than this {type(module).__name__}, "
            f"which is unchanged: it lacks {sorted(names - state_dict.keys())} and has "
            f"{sorted(state_dict.keys() - names)} besides"
        )


def check_dtypes(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise RuntimeError if a buffer of the module's own, saved under ``prefix``, has another dtype."""
    for name, buffer in module.named_buffers(recurse=False):
        loaded = state_dict.get(prefix + name)
        if loaded is not None and loaded.dtype != buffer.dtype:
            raise RuntimeError(
                f"{prefix + name} is {loaded.dtype} in the file and {buffer.dtype} in the head; a posterior that "
                "was cast has lost digits it needs, save it again without casting, or load it into a head of its "
                "own dtype (HeadConfig.dtype)"
            )


def check_covariance(state: HeadState) -> None:
    """Raise ValueError unless the covariance is symmetric and positive semi-definite, to the rounding of its dtype.

    A Cholesky factorisation of the correlations, to which that rounding has been added: ``P^3 / 3`` operations for
    ``P`` weights that are correlated with each other.
    """
    smallest = float(state.variances().min())
    if not smallest >= 0.0:
        raise ValueError(f"the posterior has the negative variance {smallest:.3g}")
    for block in state.correlated_blocks():
        wide, size = block.double(), block.shape[-1]
        deviations = wide.diagonal(dim1=-2, dim2=-1).sqrt()
        scale = torch.where(deviations > 0.0, deviations, 1.0)
        correlations = wide / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
        rounding = size * torch.finfo(block.dtype).eps
        if bool(((correlations - correlations.mT).abs() > rounding).any()):
            raise ValueError("the posterior's covariance is not symmetric: it is no covariance")
        correlations.diagonal(dim1=-2, dim2=-1).add_(rounding)
        if bool(torch.linalg.cholesky_ex(correlations).info.any()):
            raise ValueError("the posterior's covariance is not positive semi-definite: it is no covariance")
