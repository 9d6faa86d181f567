"""What a policy is besides its numbers: plain settings, taken from a policy, and checked before one is built from them.

A file from a stranger decides how large a network is built. So every setting has to be of its type and finite, and
every size has to agree with the shapes of the tensors in the file, before anything of that size is made.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from gymnasium import spaces
from torch import Tensor

from kbt_rl.agents.actions import action_format
from kbt_rl.agents.policies import DecisionTransformerPolicy, Sampling, Skip
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.models.decision_transformer import DecisionTransformer, DecisionTransformerConfig

POLICIES: dict[str, type[TransformerPolicy]] = {
    kind.__name__: kind for kind in (TransformerPolicy, DecisionTransformerPolicy)
}
WEIGHTS = "policy."
_SPACES = "spaces."
_TRANSFORMER = WEIGHTS + "transformer."
_BOXES = ("observation_space", "action_space")
# A noise that never changes is learned with an infinite memory; nothing else may be infinite.
_MAY_BE_INFINITE = ("noise_memory",)
# What no tensor has the size of: terms of a series, and steps of a context.
_LARGEST = {"relu_order": 100, "context_length": 100_000}

Config = TypeVar("Config")


def settings_of(policy: TransformerPolicy) -> dict[str, Any]:
    """All that the constructor needs besides numbers that are in tensors, as JSON gives it back."""
    settings: dict[str, Any] = {
        "policy": type(policy).__name__,
        "transformer": asdict(policy.transformer_config),
        **{name: _described(getattr(policy, name)) for name in _BOXES},
    }
    if isinstance(policy, DecisionTransformerPolicy):
        settings.update(head=asdict(policy.head_config), sampling=policy.sampling)
        settings.update(skip=policy.skip, posteriors=len(policy.heads))
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def tensors_of(policy: TransformerPolicy) -> dict[str, Tensor]:
    """Weights, buffers, and the bounds of boxes, which may be infinite, as JSON's numbers may not."""
    tensors = {WEIGHTS + name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    return tensors | bounds_of(policy)


def bounds_of(policy: TransformerPolicy) -> dict[str, Tensor]:
    """The bounds of boxes."""
    boxes = {name: getattr(policy, name) for name in _BOXES}
    return {
        f"{_SPACES}{name}.{end}": torch.from_numpy(getattr(box, end).copy())
        for name, box in boxes.items()
        if isinstance(box, spaces.Box)
        for end in ("low", "high")
    }


def _described(space: spaces.Space[Any]) -> dict[str, Any]:
    if isinstance(space, spaces.Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    assert isinstance(space, spaces.Box)  # the policy has checked it
    return {"kind": "Box", "dtype": str(space.dtype)}


# ---------------------------------------------------------------------- a policy from settings


def built(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransformerPolicy:
    """A new policy from the settings and tensors of a file, of which nothing is believed.

    Raises:
        ValueError: A setting is of another type, not finite, or of another size than the tensors.
        RuntimeError: The tensors are no weights, or no posterior, of such a policy.
    """
    kind = POLICIES.get(str(settings.get("policy")))
    if kind is None:
        raise ValueError(
            f"the file holds a {settings.get('policy')}; this version of kbt_rl knows {', '.join(POLICIES)}"
        )
    expected = {"policy", "transformer", *_BOXES}
    if kind is DecisionTransformerPolicy:
        expected |= {"head", "sampling", "skip", "posteriors"}
    _check_names("the settings", settings, expected)
    observations, actions = (_space(name, settings[name], tensors) for name in _BOXES)
    transformer = _typed(DecisionTransformerConfig, settings["transformer"])
    sizes = observations.shape[0], action_format(actions).size
    _check_transformer(transformer, sizes, tensors)
    arguments: dict[str, Any] = {
        "transformer": transformer,
        "observation_scale": tensors[_TRANSFORMER + "observation_scale"].numpy(),
    }
    if kind is DecisionTransformerPolicy:
        own = {name: settings[name] for name in ("sampling", "skip", "posteriors")}
        for name, hint in (("sampling", Sampling), ("skip", Skip), ("posteriors", int)):
            _check_type(name, own[name], hint)
        head = _typed(HeadConfig, settings["head"])
        features = transformer.width + (sizes[0] if own["skip"] == "observation" else 0)
        _check_head(head, features, sizes[1], own["posteriors"], tensors)
        arguments.update(head=head, **own)
    policy = kind(observations, actions, **arguments)
    weights = {name.removeprefix(WEIGHTS): value for name, value in tensors.items() if name.startswith(WEIGHTS)}
    policy.load_state_dict(weights)
    return policy


def _space(name: str, described: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(described, dict) or described.get("kind") not in ("Box", "Discrete"):
        raise ValueError(f"{name} is {described!r}; expected a Box or a Discrete space")
    if described["kind"] == "Discrete":
        _check_names(name, described, {"kind", "n", "start"})
        for part in ("n", "start"):
            _check_type(f"{name}.{part}", described[part], int)
        return spaces.Discrete(described["n"], start=described["start"])
    _check_names(name, described, {"kind", "dtype"})
    low, high = (_tensor(tensors, f"{_SPACES}{name}.{end}").numpy() for end in ("low", "high"))
    if described["dtype"] != str(low.dtype) or low.dtype != high.dtype or low.ndim != 1 or low.shape != high.shape:
        raise ValueError(
            f"{name} has bounds of {low.dtype}{list(low.shape)} and {high.dtype}{list(high.shape)}; expected two "
            f"vectors of {described['dtype']}"
        )
    if not (low <= high).all():
        raise ValueError(f"{name} has lower bounds {low} above the upper ones {high}")
    return spaces.Box(low, high, dtype=low.dtype.type)


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the tensor {name} is missing")
    return tensors[name]


# ---------------------------------------------------------------------- types


def _typed(kind: type[Config], values: Any) -> Config:
    """A configuration from JSON all of whose fields are there, of their types, and finite."""
    if not isinstance(values, dict):
        raise ValueError(f"the {kind.__name__} is {values!r}; expected its settings by name")
    hints = get_type_hints(kind)
    _check_names(kind.__name__, values, {field.name for field in fields(kind)})  # type: ignore[arg-type]
    for name, value in values.items():
        _check_type(name, value, hints[name])
    return kind(**values)


def _check_names(what: str, found: Mapping[str, Any], expected: set[str]) -> None:
    if found.keys() != expected:
        raise ValueError(
            f"{what} lack {sorted(expected - found.keys())} and have {sorted(found.keys() - expected)} besides"
        )


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError unless a value from JSON has the type of a setting."""
    if get_origin(hint) in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and types.NoneType in options:
            return
        hint = next(option for option in options if option is not types.NoneType)
    if get_origin(hint) is Literal:
        good, wanted = value in get_args(hint), f"one of {', '.join(get_args(hint))}"
    elif hint is float:
        good, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a finite number"
        good = good and (math.isfinite(value) or (name in _MAY_BE_INFINITE and value > 0))
    else:
        good, wanted = type(value) is hint, {int: "a whole number", bool: "true or false"}.get(hint, "text")
    if good and hint is int and value > _LARGEST.get(name, 2**62):
        good, wanted = False, f"at most {_LARGEST.get(name, 2**62)}"
    if not good:
        raise ValueError(f"{name} is {value!r}; expected {wanted}")


# ---------------------------------------------------------------------- sizes


def _check_transformer(
    config: DecisionTransformerConfig, sizes: tuple[int, int], tensors: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless the file has the tensors of such a transformer."""
    if config.layers > len(tensors):  # each has several
        raise ValueError(f"layers is {config.layers} and the file has {len(tensors)} tensors; another architecture")
    with torch.device("meta"):  # shapes without memory
        shapes = {name: value.shape for name, value in DecisionTransformer(*sizes, config).state_dict().items()}
    for name, shape in shapes.items():
        _check_shape(_TRANSFORMER + name, shape, tensors)


def _check_head(
    config: HeadConfig, features: int, outputs: int, posteriors: int, tensors: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless the file has posteriors of as many numbers as such heads have."""
    prefix, several = WEIGHTS + ("head." if posteriors == 1 else "head_of_env."), posteriors != 1
    means = _tensor(tensors, prefix + "mean")
    if config.layers > means.numel():
        raise ValueError(f"layers is {config.layers} and the head has {means.numel()} weights; another architecture")
    spec, _ = config.resolve(features, outputs)
    weights = sum(spec.sizes)
    _check_shape(prefix + "mean", (posteriors, weights) if several else (weights,), tensors)
    found = sum(value.numel() for name, value in tensors.items() if name.startswith(prefix + "cov_"))
    expected = posteriors * STRUCTURES[spec.structure].sizes(spec.shapes)
    if not expected <= found:  # there may be more, where labels have told outputs apart
        raise ValueError(f"the covariance has {found} numbers and such a head {expected}; another architecture")


def _check_shape(name: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> None:
    found = tuple(_tensor(tensors, name).shape)
    if found != tuple(shape):
        raise ValueError(f"{name} has shape {found}, and such a policy has {tuple(shape)}: another architecture")
