"""A policy as a safetensors file: numbers and a JSON header, so that reading one from a stranger runs no code.

SB3's zip and PyTorch's own files hold pickles, which can run anything when they are loaded. This file holds the
transformer, the posterior and the scales as tensors, and in its header the spaces, the configurations, the version of
the format and a fingerprint of the architecture. Everything is checked before anything is changed.

What belongs to training only (the label stream, the settings of SB3, a memory of samples) is not in it; ``save`` keeps
that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.files import replacing
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.loading import check_covariance
from kbt_rl.models.decision_transformer import DecisionTransformerConfig

if TYPE_CHECKING:
    from types import ModuleType

#: Raised by one when a file can no longer be read as before.
FORMAT_VERSION = 1
_POLICIES = {kind.__name__: kind for kind in (TransformerPolicy, DecisionTransformerPolicy)}
_WEIGHTS, _SPACES = "policy.", "spaces."
# Every entry is divided by one of these, or is a variance.
_POSITIVE = ("observation_scale", "action_scale", "return_scale", "feature_scale", "target_scale")


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
    """
    library, policy = _library(), _policy(model)
    if type(policy) is not _POLICIES.get(type(policy).__name__):
        raise TypeError(
            f"{type(policy).__name__} is not one of {', '.join(_POLICIES)}; its code would have to be in the file"
        )
    tensors = {_WEIGHTS + name: value for name, value in policy.state_dict().items()} | _space_tensors(policy)
    settings = _settings(policy)
    header = {
        "format": "kbt_rl policy",
        "format_version": str(FORMAT_VERSION),
        "settings": json.dumps(settings, sort_keys=True),
        "forces": json.dumps(_forces(model)),
        "fingerprint": fingerprint(settings, tensors),
    }
    content = library.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, header)
    target = _with_suffix(path)
    with replacing(target) as file:
        file.write(content)
    return target


def load_safetensors(path: str | Path, into: OnlineAlgorithm | TransformerPolicy | None = None) -> TransformerPolicy:
    """Read a policy; safe with files from strangers, as far as code goes.

    The file decides how large a network is built; pass ``into`` where it must be a certain one.

    Args:
        path: What ``save_safetensors`` wrote, with or without the suffix.
        into: A learner or policy of the same architecture that takes the weights and the posterior over; None for a new
            policy.

    Returns:
        The policy, ready to ``predict``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, no policy, of another version, altered, or of other settings or another scale
            of actions than ``into``; the message names what is wrong, and nothing has changed.
        ImportError: The package safetensors is missing.
    """
    source = _existing(path)
    header, tensors = _read(source)
    try:
        settings = _checked_settings(header, tensors)
        forces = json.loads(header["forces"])
        if into is not None:
            _check_same(_settings(_policy(into)), settings)
            _check_same(_forces(into), forces, "the force of an action: ", known_only=True)
            _check_bounds(_space_tensors(_policy(into)), tensors)
        policy = _built(settings, tensors)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{source} is not loaded, and nothing has changed: {error}") from error
    if into is None:
        return policy
    own = _policy(into)
    own.load_state_dict(policy.state_dict())
    return own


def fingerprint(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the settings and the name, shape and dtype of each tensor."""
    layout = sorted((name, list(value.shape), str(value.dtype)) for name, value in tensors.items())
    return hashlib.sha256(json.dumps([settings, layout], sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------ what a policy is


def _policy(model: OnlineAlgorithm | TransformerPolicy) -> TransformerPolicy:
    return model.policy if isinstance(model, OnlineAlgorithm) else model


def _settings(policy: TransformerPolicy) -> dict[str, Any]:
    """All that the constructor needs besides numbers that are in tensors, as JSON gives it back."""
    settings: dict[str, Any] = {
        "policy": type(policy).__name__,
        "transformer": asdict(policy.transformer_config),
        **{name: _described(getattr(policy, name)) for name in ("observation_space", "action_space")},
    }
    if isinstance(policy, DecisionTransformerPolicy):
        settings.update(head=asdict(policy.head_config), sampling=policy.sampling)
        if len(policy.heads) > 1:
            settings["posteriors"] = len(policy.heads)
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _described(space: spaces.Space[Any]) -> dict[str, Any]:
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    assert isinstance(space, spaces.Box)  # the policy has checked it
    return {"kind": "Box", "dtype": str(space.dtype)}


def _space_tensors(policy: TransformerPolicy) -> dict[str, Tensor]:
    """The bounds of boxes, which may be infinite, as JSON's numbers may not."""
    bounds: dict[str, Tensor] = {}
    for name in ("observation_space", "action_space"):
        space = getattr(policy, name)
        if isinstance(space, spaces.Box):
            bounds |= {f"{_SPACES}{name}.{end}": torch.from_numpy(getattr(space, end)) for end in ("low", "high")}
    return bounds


def _space(name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> spaces.Space[Any]:
    if described["kind"] == "Discrete":
        return spaces.Discrete(described["n"], start=described["start"])
    low, high = (tensors[f"{_SPACES}{name}.{end}"].numpy() for end in ("low", "high"))
    return spaces.Box(low, high, dtype=np.dtype(described["dtype"]).type)


def _forces(model: OnlineAlgorithm | TransformerPolicy) -> dict[str, Any]:
    """What the actions stand for, as far as it is known."""
    if isinstance(model, OnlineAlgorithm):
        return {"max_force": model.max_force if math.isfinite(model.max_force) else None, "forces": model.forces}
    return {"max_force": None, "forces": None}


# ------------------------------------------------------------------ the file


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


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file, as copies."""
    _library()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    missing = {"format", "format_version", "settings", "forces", "fingerprint"} - header.keys()
    if header.get("format") != "kbt_rl policy" or missing:
        raise ValueError(f"{path} is a safetensors file but no policy of kbt_rl: its header lacks {sorted(missing)}")
    if header["format_version"] != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {header['format_version']}; this version of kbt_rl reads {FORMAT_VERSION}"
        )
    return header, tensors


def _checked_settings(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of a file, once they agree with its tensors and those are usable numbers."""
    settings: dict[str, Any] = json.loads(header["settings"])
    found = fingerprint(settings, tensors)
    if found != header["fingerprint"]:
        raise ValueError(
            f"the file was altered: its header states the architecture {header['fingerprint'][:12]}, its settings and "
            f"tensors are {found[:12]}"
        )
    if settings["policy"] not in _POLICIES:
        raise ValueError(f"the file holds a {settings['policy']}; this version of kbt_rl knows {', '.join(_POLICIES)}")
    for name, value in tensors.items():
        if name.startswith(_WEIGHTS) and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds NaN or infinity; the policy was broken when it was saved")
        if name.endswith(_POSITIVE) and not bool((value > 0).all()):
            raise ValueError(f"{name} is not positive everywhere; its smallest value is {float(value.min())}")
    return settings


def _built(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransformerPolicy:
    """A new policy from settings and tensors."""
    kind = _POLICIES[settings["policy"]]
    arguments: dict[str, Any] = {
        "transformer": DecisionTransformerConfig(**settings["transformer"]),
        "observation_scale": tensors[_WEIGHTS + "transformer.observation_scale"].numpy(),
    }
    if kind is DecisionTransformerPolicy:
        arguments.update(head=HeadConfig(**settings["head"]), sampling=settings["sampling"])
        arguments["posteriors"] = settings.get("posteriors", 1)
    observations, actions = (_space(name, settings[name], tensors) for name in ("observation_space", "action_space"))
    policy = kind(observations, actions, **arguments)  # type: ignore[arg-type]
    weights = {name.removeprefix(_WEIGHTS): tensors[name] for name in tensors if name.startswith(_WEIGHTS)}
    policy.load_state_dict(weights)
    if isinstance(policy, DecisionTransformerPolicy):
        for head in policy.heads:
            check_covariance(head.state)
        smallest = min(float(torch.linalg.eigvalsh(head.noise_cov)[0]) for head in policy.heads)
        if not smallest >= -1e-12 * max(float(head.noise_cov.max()) for head in policy.heads):  # by rounding
            raise ValueError(f"the covariance of the label noise has the negative eigenvalue {smallest:.3g}")
    return policy


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
        if not torch.equal(value, tensors[name]):
            raise ValueError(f"{name} is {tensors[name].tolist()} in the file and {value.tolist()} here")
