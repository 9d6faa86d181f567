"""Saved values taken over as a whole: everything is checked and copied before the first of them is written.

PyTorch's ``load_state_dict`` writes one tensor after another. It would leave a mixture behind where memory runs out or
a signal handler raises half way, and casts what must keep its digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.kind import Kind
from kbt_rl.inference.transactions import replace_buffers, signals_deferred, with_writers_held

# Of the buffers of a posterior: what divides, or counts, and what is a covariance of the targets.
_POSITIVE = ("feature_scale", "target_scale", "noise_labels")
_NOISES = ("noise_cov", "noise_start_cov")


def keeps_dtype(part: nn.Module) -> bool:
    """Whether a part of a model is a ``WholeModule``, which checks itself what is loaded."""
    return getattr(part, "keeps_dtype", False)


class Keys(NamedTuple):
    """What ``nn.Module.load_state_dict`` returns."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_whole(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Keys:
    """``module.load_state_dict`` that takes over all or nothing, whatever fails and whoever interrupts it.

    Args:
        module: Whose parameters and buffers change; posteriors may be part of it.
        state_dict: What ``module.state_dict()`` has returned.
        strict: Whether names must be the same.
        assign: Whether tensors are replaced rather than copied into.

    Raises:
        RuntimeError: It is of another architecture or dtype, or no posterior; nothing has changed.
    """
    check_fits(module, state_dict, strict)
    changes = [prepared(part, state_dict, prefix) for prefix, part in _parts(module)]
    own = module.state_dict().keys()
    keys = Keys([name for name in own if name not in state_dict], [name for name in state_dict if name not in own])
    _take_over(module, changes, assign)
    return keys


def load_part(
    part: Any,
    state_dict: Mapping[str, Any],
    prefix: str,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    _errors: list[str],
) -> None:
    """``nn.Module._load_from_state_dict`` of a whole module inside another: this part is taken over as a whole."""
    part.check_saved(state_dict, prefix)
    own = {prefix + name for name in part._buffers}
    lacking = sorted(own - state_dict.keys())
    inner = tuple(f"{prefix}{name}." for name in part._modules)  # which PyTorch loads by themselves
    others = [name for name in state_dict if name.startswith(prefix) and name not in own and not name.startswith(inner)]
    missing += lacking
    if strict:
        unexpected += others
    if not (strict and (lacking or others)):  # else PyTorch raises an error when it has seen all parts
        _take_over(part, [prepared(part, state_dict, prefix)], assign=False)


class _Change(NamedTuple):
    """New values for the tensors of one module itself."""

    part: Any
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


def prepared(part: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> _Change:
    """Copies of what is saved under ``prefix`` for the tensors of ``part`` itself, in their dtypes and places."""

    def copies(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        new: dict[str, Tensor] = {}
        for name, own in tensors.items():
            loaded = state_dict.get(prefix + name)
            if own is not None and loaded is not None and name not in part._non_persistent_buffers_set:
                copied = loaded.detach().to(own.device, own.dtype, copy=True).contiguous()
                new[name] = nn.Parameter(copied, own.requires_grad) if isinstance(own, nn.Parameter) else copied
        return new

    return _Change(part, copies(part._parameters), copies(part._buffers))


def _take_over(module: nn.Module, changes: Sequence[_Change], assign: bool) -> None:
    """Write what was prepared for the parts of ``module``; nothing can fail here."""

    @torch.no_grad()
    def write() -> None:
        with signals_deferred():
            for part, parameters, buffers in changes:
                if assign and not keeps_dtype(part):
                    part._parameters.update(parameters)
                    part._buffers.update(buffers)
                else:
                    replace_buffers(part._parameters, parameters)
                    replace_buffers(part._buffers, buffers)
            for part, *_ in changes:
                if keeps_dtype(part):
                    part.changed()

    with_writers_held(module, write)


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, part in module.named_modules():
        yield f"{path}." if path else "", part


def check_fits(module: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """Raise an error where PyTorch would raise one while it copies, or cast what must keep its digits.

    Raises:
        RuntimeError: A shape, the dtype of a posterior or, where ``strict``, a name is another one; or what is loaded
            is no posterior.
    """
    flexible: set[str] = set()
    for prefix, part in _parts(module):
        if keeps_dtype(part):
            whole: Any = part
            whole.check_saved(state_dict, prefix)
            flexible |= {prefix + name for name in whole.flexible()}
    own = module.state_dict()
    for name, value in own.items():
        loaded = state_dict.get(name, value)
        if not isinstance(loaded, Tensor):
            raise RuntimeError(f"{name} is a {type(loaded).__name__} in what is loaded; expected a tensor")
        if loaded.shape != value.shape and name not in flexible:
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


def check_dtype(name: str, buffer: Tensor, loaded: Any) -> None:
    """Raise RuntimeError unless what is loaded for a buffer is a tensor of its dtype."""
    if not isinstance(loaded, Tensor) or loaded.dtype != buffer.dtype:
        found = loaded.dtype if isinstance(loaded, Tensor) else type(loaded).__name__
        raise RuntimeError(
            f"{name} is {found} in the file and {buffer.dtype} in the head; a posterior that was cast has "
            "lost digits it needs, save it again without casting"
        )


def check_posterior(posterior: nn.Module, kind: Kind, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise RuntimeError unless what is saved under ``prefix`` can be this posterior, one or several stacked ones."""
    for name, buffer in posterior.named_buffers(recurse=False):
        loaded = state_dict.get(prefix + name)
        if loaded is None:
            continue
        check_dtype(prefix + name, buffer, loaded)
        groups = name in kind.cov_names and kind.spec.structure == "shared" and buffer.ndim == loaded.ndim == 3
        same = loaded.shape[1:] == buffer.shape[1:] if groups else loaded.shape == buffer.shape
        if not same:
            raise RuntimeError(
                f"{prefix + name} has shape {tuple(loaded.shape)} in what is loaded and {tuple(buffer.shape)} in this "
                "head, which has another architecture (HeadConfig) and is unchanged"
            )
        if loaded.is_floating_point() and not bool(torch.isfinite(loaded).all()):
            raise RuntimeError(f"{prefix + name} holds NaN or infinity; the posterior was broken when it was saved")
        if name in _POSITIVE and not bool((loaded > 0).all()):
            raise RuntimeError(
                f"{prefix + name} is not positive everywhere; its smallest value is {float(loaded.min())}"
            )
        if name == "labels_seen" and not bool((loaded >= 0).all()):
            raise RuntimeError(f"{prefix + name} counts labels: it is {int(loaded.min())}")
        if name in _NOISES:
            _check_noise(prefix + name, loaded)
    cov = [state_dict.get(prefix + name) for name in kind.cov_names]
    if all(block is not None for block in cov):
        try:
            STRUCTURES[kind.spec.structure].check(tuple(cov))  # type: ignore[arg-type]
        except ValueError as error:
            raise RuntimeError(f"{prefix or 'the posterior'} is not loaded: {error}") from error


def _check_noise(name: str, cov: Tensor) -> None:
    """Raise RuntimeError unless these are covariances ``(..., o, o)``."""
    smallest, rounding = float(torch.linalg.eigvalsh(cov).min()), 1e-12 * float(cov.abs().max())
    if not float((cov - cov.mT).abs().max()) <= rounding:
        raise RuntimeError(f"{name} is not symmetric: it is no covariance")
    if not smallest >= -rounding:  # a singular covariance has negative eigenvalues by rounding
        raise RuntimeError(f"{name} has the eigenvalue {smallest:.3g}: it is no covariance")
