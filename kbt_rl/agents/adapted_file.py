"""An adapted policy as a safetensors file: posterior, units, statistics and the fingerprint of the frozen network.

The network itself stays in the user's own file. Whoever loads brings the model, and another one than that which was
adapted is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kbt_rl.agents.tapped_policy import Head, Start, TappedPolicy
from kbt_rl.agents.tensor_file import Format, existing, library, with_suffix
from kbt_rl.files import write_bytes
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.loading import check_fits
from kbt_rl.inference.model_average import ModelAverage
from kbt_rl.inference.transactions import with_writers_held
from kbt_rl.networks.base import Network
from kbt_rl.networks.normaliser import Normaliser
from kbt_rl.networks.registry import network_of
from kbt_rl.networks.tap import Tap

FORMAT = Format("kbt_rl adaptation", 1, ("settings",))
Policy = TypeVar("Policy", bound=TappedPolicy)
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError)


def save(policy: TappedPolicy, path: str | Path) -> Path:
    """See ``AdaptedPolicy.save``.

    Raises:
        ImportError: The package safetensors is missing.
        RuntimeError: ``load`` would refuse the file; an old one is still there.
    """
    library()
    target = with_suffix(path)
    network = policy.network
    settings = {
        "network": type(network).__name__,
        "link": network.link_name,
        "fingerprint": network.fingerprint(),
        "layers": network.names(policy.tapped),
        "observation_shape": None if network.observation_space.shape is None else list(network.observation_space.shape),
        "head": _settings(policy.head),
        "spread": policy.start_units.spread,
    }

    def content() -> bytes:
        tensors = {f"head.{name}": value for name, value in policy.head.state_dict().items()}
        units = policy.start_units._asdict().items()
        tensors |= {f"start.{name}": value for name, value in units if isinstance(value, Tensor)}
        if policy.normaliser is not None:
            tensors |= {f"normaliser.{name}": value for name, value in policy.normaliser.tensors().items()}
        whole = FORMAT.content({"settings": json.dumps(settings, sort_keys=True)}, _own(tensors))
        check_fits(policy.head, _part(FORMAT.read(whole, target)[1], "head."))  # else ``load`` would refuse it
        return whole

    write_bytes(target, with_writers_held(policy.head, content))
    return target


def load(path: str | Path, model: Any, kind: type[Policy]) -> Policy:
    """See ``AdaptedPolicy.load``; makes a policy of the class ``kind``."""
    source = existing(path, "AdaptedPolicy.save")
    header, tensors = FORMAT.read(source.read_bytes(), source)
    try:
        settings = json.loads(header["settings"])
        network = _network(model, settings)
        if network.fingerprint() != settings["fingerprint"]:
            raise ValueError(
                f"it was saved of another model than this {type(model).__name__}, whose weights or settings "
                "differ; load the one that was adapted"
            )
        modules = dict(network.module.named_modules())
        layers: list[Any] = [modules[name] for name in settings["layers"]]
        head = _head(settings["head"], tensors["start.feature_mean"], network)
        head.to(network.layer.weight.device)
        start = Start(**_part(tensors, "start."), spread=float(settings["spread"]))
        found = _part(tensors, "normaliser.")
        normaliser = Normaliser.from_tensors(found) if found else None
        tap = Tap(layers[0], layers[1:])
        try:
            policy = kind(model, network, tap, head, start, normaliser)
            policy.head.load_state_dict(_part(tensors, "head."))
        except BaseException:
            tap.remove()
            raise
    except _BROKEN as error:
        raise ValueError(f"{source} is not loaded: {error}") from error
    return policy


def _settings(head: Head) -> dict[str, Any]:
    if isinstance(head, BayesianHead):
        return {"config": asdict(head.config)}
    return head.settings()


def _head(settings: Mapping[str, Any], features: Tensor, network: Network) -> Head:
    sizes = len(features), network.link.outputs
    if "config" in settings:
        return BayesianHead(*sizes, HeadConfig(**settings["config"]))
    return ModelAverage(*sizes, **settings)


def _network(model: Any, settings: Mapping[str, Any]) -> Network:
    shape = settings["observation_shape"]
    probe = None if shape is None else np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    return network_of(model, settings["layers"][0], probe, settings["link"])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies: safetensors takes no tensors that share memory."""
    return {name: torch.as_tensor(value).detach().cpu().clone() for name, value in tensors.items()}
