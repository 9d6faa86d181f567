"""A policy as a safetensors file: numbers and a JSON header, so that reading one from a stranger runs no code.

SB3's zip and PyTorch's own files hold pickles, which can run anything when they are loaded. This file holds the
transformer, the posterior and the scales as tensors, and in its header the spaces, the configurations, the version of
the format and the SHA-256 of all of that. Everything is checked before anything is built or changed, and what was
written is read back before it takes the place of an old file.

What belongs to training only (the label stream, the settings of SB3, a memory of samples) is not in it; ``save`` keeps
that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kbt_rl.agents.export_settings import POLICIES, WEIGHTS, bounds_of, built, settings_of, tensors_of
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.files import write_bytes
from kbt_rl.inference.loading import check_fits
from kbt_rl.inference.transactions import with_writers_held

if TYPE_CHECKING:
    from types import ModuleType

#: Raised by one when a file can no longer be read as before.
FORMAT_VERSION = 2
_STATED = ("format_version", "settings", "forces")
# Every entry is divided by one of these.
_POSITIVE = ("observation_scale", "action_scale", "return_scale")


def save_safetensors(model: OnlineAlgorithm | TransformerPolicy, path: str | Path) -> Path:
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
    library, policy = _library(), _policy(model)
    if type(policy) is not POLICIES.get(type(policy).__name__):
        raise TypeError(
            f"{type(policy).__name__} is not one of {', '.join(POLICIES)}; its code would have to be in the file"
        )
    target = _with_suffix(path)
    header = {
        "format": "kbt_rl policy",
        "format_version": str(FORMAT_VERSION),
        "settings": json.dumps(settings_of(policy), sort_keys=True),
        "forces": json.dumps(_forces(model)),
    }

    def content() -> bytes:
        tensors = tensors_of(policy)
        whole: bytes = library.save(tensors, header | {"sha256": digest(header, tensors)})
        _check_loadable(whole, policy, target)
        return whole

    write_bytes(target, with_writers_held(policy, content))
    return target


def load_safetensors(path: str | Path, into: OnlineAlgorithm | TransformerPolicy | None = None) -> TransformerPolicy:
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
    source = _existing(path)
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


def digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over what the header states, and the name, shape, dtype and bytes of each tensor."""
    layout = sorted((name, list(value.shape), str(value.dtype)) for name, value in tensors.items())
    found = hashlib.sha256(json.dumps([[header[name] for name in _STATED], layout]).encode())
    for name, *_ in layout:
        array: Any = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found.update(array)
    return found.hexdigest()


# ---------------------------------------------------------------------- the file


def _library() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('safetensors files need an extra: pip install "kbt_rl[export]"') from error
    module: ModuleType = safetensors.torch
    return module


def _with_suffix(path: str | Path) -> Path:
    return Path(path) if Path(path).suffix else Path(f"{path}.safetensors")


def _existing(path: str | Path) -> Path:
    candidates = dict.fromkeys((Path(path), _with_suffix(path)))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"there is no file {' or '.join(map(str, candidates))}; save_safetensors writes one")


def _read(content: bytes, name: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a file that is whole, and of numbers that a policy can have."""
    library = _library()
    from safetensors import SafetensorError

    try:
        tensors = library.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, KeyError, RuntimeError) as error:  # KeyError: a dtype that PyTorch lacks
        raise ValueError(f"{name} is truncated or no safetensors file: {error}") from error
    missing = {"format", "sha256", *_STATED} - header.keys()
    if header.get("format") != "kbt_rl policy" or missing & {"format", "format_version"}:
        raise ValueError(f"{name} is a safetensors file but no policy of kbt_rl: its header lacks {sorted(missing)}")
    if header["format_version"] != str(FORMAT_VERSION):
        raise ValueError(
            f"{name} has format version {header['format_version']}; this version of kbt_rl reads {FORMAT_VERSION}"
        )
    if missing or digest(header, tensors) != header["sha256"]:
        raise ValueError(f"{name} is damaged: its content has not the SHA-256 that its header states")
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


def _policy(model: OnlineAlgorithm | TransformerPolicy) -> TransformerPolicy:
    return model.policy if isinstance(model, OnlineAlgorithm) else model


def _forces(model: OnlineAlgorithm | TransformerPolicy) -> dict[str, Any]:
    """What the actions stand for, as far as it is known."""
    if isinstance(model, OnlineAlgorithm):
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
