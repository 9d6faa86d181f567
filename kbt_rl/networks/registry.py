"""Which family of networks a user's model is of: a new family is one file and one line here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kbt_rl.networks.base import Array, Network
from kbt_rl.networks.hugging_face import FAMILY, HuggingFaceNetwork, HuggingFaceTransformer
from kbt_rl.networks.links import LinkName
from kbt_rl.networks.module import ModuleNetwork
from kbt_rl.networks.sb3 import SB3Network, policy_of


def network_of(model: Any, layer: str, states: Array | None, link: LinkName) -> Network:
    """The network of a model.

    Raises:
        TypeError: It is of no family that is known.
        ValueError: Its last layer is not to be found, or the link not that of the policy.
    """
    policy = policy_of(model)
    if policy is not None:
        if link != "auto":
            raise ValueError(f"link is {link!r}; an SB3 policy knows its own, so leave it at 'auto'")
        return SB3Network(policy)
    if isinstance(model, HuggingFaceTransformer):
        if link != "auto":
            raise ValueError(f"link is {link!r}; a decision transformer knows its own, so leave it at 'auto'")
        return HuggingFaceNetwork(model)
    if any(kind.__name__ == FAMILY for kind in type(model).__mro__):
        raise TypeError(
            f"a {FAMILY} acts for a return that somebody asks for: pass HuggingFaceTransformer(model, "
            "target_return=...) to adapt()"
        )
    if isinstance(model, nn.Module):
        return ModuleNetwork(model, layer, states, link)
    raise TypeError(
        f"adapt() takes a model or policy of Stable-Baselines3 or a torch.nn.Module; got {type(model).__name__}"
        + (f"; load it first, as in SAC.load({str(model)!r})" if isinstance(model, (str, Path)) else "")
    )
