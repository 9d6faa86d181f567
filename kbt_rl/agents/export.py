"""A policy as a safetensors file: numbers and a JSON header, so that reading one from a stranger runs no code.

SB3's zip and PyTorch's own files hold pickles, which can run anything when they are loaded. This file holds the
transformer, the posterior and the scales as tensors, and in its header the spaces, the configurations, the version of
the format and the SHA-256 of all of that. Everything is checked before anything is built or changed, and what was
written is read back before it takes the place of an old file.

What belongs to training only (the label stream, the settings of SB3, a memory of samples) is not in it; ``save`` keeps
that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kbt_rl.agents.export_settings import POLICIES, WEIGHTS, bounds_of, built, settings_of, tensors_of
from kbt_rl.agents.tensor_file import Format, existing, library, with_suffix
from kbt_rl.agents.transformer_learner import TransformerLearner
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.files import write_bytes
from kbt_rl.inference.loading import check_fits
from kbt_rl.inference.transactions import with_writers_held

FORMAT = Format("kbt_rl policy", 2, ("settings", "forces"))
# Every entry is divided by one of these.
_POSITIVE = ("observation_scale", "action_scale", "return_scale")


def save_safetensors(model: TransformerLearner | TransformerPolicy, path: str | Path) -> Path:
    """Write a policy, posterior included, to ``path``; an old file is replaced as a whole.

    Args:
        model: A learner, of which the policy is taken, or a policy.
        path: With or without ``.safetensors``.

    Returns:
        The file's path.

    Raises:
        ImportError: The package safetensors is missing.
        TypeError: The policy is of a class of your own, which no file without code can describe.
        ValueError: ``load_safetensors`` would refuse the file; an old one is still there.
    """
    policy = _policy(model)
    if type(policy) is not POLICIES.get(type(policy).__name__):
        raise TypeError(
            f"{type(policy).__name__} is not one of {', '.join(POLICIES)}; its code would have to be in the file"
        )
    library()
    target = with_suffix(path)
    stated = {"settings": json.dumps(settings_of(policy), sort_keys=True), "forces": json.dumps(_forces(model))}

    def content() -> bytes:
        whole = FORMAT.content(stated, tensors_of(policy))
        _check_loadable(whole, policy, target)
        return whole

    write_bytes(target, with_writers_held(policy, content))
    return target


def load_safetensors(path: str | Path, into: TransformerLearner | TransformerPolicy | None = None) -> TransformerPolicy:
    """Read a policy; safe with files from strangers, as far as code goes.

    The file decides how large a network is built, but nothing larger than itself; pass ``into`` where it must be a
    certain one.

    Args:
        path: What ``save_safetensors`` wrote, with or without the suffix.
        into: A learner or policy of the same architecture that takes the weights and the posterior over; None for a new
            policy.

    Returns:
        The policy, ready to ``predict``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, no policy, of another version, damaged, or of other settings or another scale
            of actions than ``into``; the message names what is wrong, and nothing has changed.
        ImportError: The package safetensors is missing.
    """
    source = existing(path, "save_safetensors")
    header, tensors = _read(source.read_bytes(), source)
    try:
        settings, forces = json.loads(header["settings"]), json.loads(header["forces"])
        if not isinstance(settings, dict) or not isinstance(forces, dict):
            raise ValueError("its settings are no names and values")
        if into is not None:
            _check_same(settings_of(_policy(into)), settings)
            _check_same(_forces(into), forces, "the force of an action: ", known_only=True)
            _check_bounds(bounds_of(_policy(into)), tensors)
        policy = built(settings, tensors)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"{source} is not loaded, and nothing has changed: {error}") from error
    if into is None:
        return policy
    own = _policy(into)
    own.load_state_dict(policy.state_dict())
    return own


# ---------------------------------------------------------------------- the file


def _read(content: bytes, name: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file that is whole, and of numbers that a policy can have."""
    header, tensors = FORMAT.read(content, name)
    for tensor, value in tensors.items():
        if tensor.startswith(WEIGHTS) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} is not usable: {tensor} holds NaN or infinity; the policy was broken when saved")
        if tensor.endswith(_POSITIVE) and not bool((value > 0).all()):
            raise ValueError(
                f"{name} is not usable: {tensor} is not positive everywhere; its smallest value is {float(value.min())}"
            )
    return header, tensors


def _check_loadable(content: bytes, policy: TransformerPolicy, target: Path) -> None:
    """Raise ValueError if ``load_safetensors`` would refuse a file of this policy."""
    try:
        _, tensors = _read(content, target)
        weights = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
        check_fits(policy, weights)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"this policy is not saved, as it could not be loaded: {error}") from error


# ---------------------------------------------------------------------- into a learner


def _policy(model: TransformerLearner | TransformerPolicy) -> TransformerPolicy:
    return model.policy if isinstance(model, TransformerLearner) else model


def _forces(model: TransformerLearner | TransformerPolicy) -> dict[str, Any]:
    """What the actions stand for, as far as it is known."""
    if isinstance(model, TransformerLearner):
        return {"max_force": model.max_force if math.isfinite(model.max_force) else None, "forces": model.forces}
    return {"max_force": None, "forces": None}


def _check_same(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str = "", known_only: bool = False) -> None:
    """Raise ValueError at the first setting that differs; with ``known_only``, of those that neither leaves None."""
    for name in sorted(mine.keys() | theirs.keys(), key=lambda key: (key != "policy", key)):  # the class says most
        one, other = mine.get(name), theirs.get(name)
        if known_only and (one is None or other is None):
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            _check_same(one, other, f"{where}{name}.")
        elif one != other:
            raise ValueError(f"{where}{name} is {other!r} in the file and {one!r} here")


def _check_bounds(mine: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, value in mine.items():
        if name not in tensors or not torch.equal(value, tensors[name]):
            found = tensors[name].tolist() if name in tensors else "missing"
            raise ValueError(f"{name} is {found} in the file and {value.tolist()} here")
