"""``adapt``: any trained policy becomes one that learns from labels while it runs."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize
from torch import Tensor, nn

from kbt_rl.agents.adapted_policy import AdaptedPolicy
from kbt_rl.agents.tapped_policy import Head, Start, arrays
from kbt_rl.arguments import choice, instance, shown, whole
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.model_average import ModelAverage
from kbt_rl.networks.base import Call, Network, Observation, finite
from kbt_rl.networks.links import LinkName
from kbt_rl.networks.normaliser import Normaliser
from kbt_rl.networks.registry import network_of
from kbt_rl.networks.tap import Tap

Skip = Literal["hidden", "observation", "none"]

# Of the average deviation of a layer's units, the least that a unit is scaled by: many never fire on nominal states.
DEAD = 0.1
NOMINAL_STEPS = 1_000


def adapt(
    model: Any,
    *,
    states: Observation | gym.Env[Any, Any] | VecEnv | None = None,
    head: HeadConfig | None = None,
    skip: Skip = "hidden",
    layer: str = "auto",
    link: LinkName = "auto",
    vec_normalize: VecNormalize | str | Path | None = None,
    history: int = 0,
) -> AdaptedPolicy:
    """Freeze a trained policy and put a Gaussian posterior in the place of its last linear layer.

    The model itself is not changed; ``detach`` of what is returned takes the last trace of this off it.

    Args:
        model: An SB3 or sb3-contrib model or policy, a ``HuggingFaceTransformer``, or a module from observations to
            outputs ``(n, o)`` or chunks of actions ``(n, chunk, a)``.
        states: Observations that the policy was trained on ``(n, ...)``, some hundreds, or an environment (a ``VecEnv``
            where the policy needs one) to collect 1,000 in; what the head sees is put into units by them. Without them
            features keep the network's units.
        head: One layer with a noise that you state; by default the noise is found out, see ``ModelAverage``.
        skip: What the head sees besides the last hidden layer: the first ``hidden`` one and the observation, the
            ``observation`` alone, or ``none``. Their weights start at 0, so that nothing changes before the first
            label.
        layer: Name of the last linear layer of a module, where it is not found by itself.
        link: What the outputs of a module's last layer stand for, see ``ModuleNetwork``; an SB3 policy knows it.
        vec_normalize: The ``VecNormalize`` that the policy was trained in, or the file of its ``save``; by default the
            one of the model's environment. The policy then takes raw observations, ``states`` included.
        history: Updates to keep for ``rollback``.

    Raises:
        TypeError: The model is of no kind that is known.
        ValueError: Its last layer is not to be found, or an argument is out of range.

    Example:
        >>> policy = adapt(SAC.load("trained.zip"), states=nominal_env)
        >>> action, _ = policy.predict(observation, deterministic=True)
        >>> policy.update(observation, correction)
    """
    choice("skip", skip, ("hidden", "observation", "none"))
    if not isinstance(layer, str):
        raise TypeError(f"layer is {shown(layer)}; expected the name of a layer, or 'auto'")
    if head is not None:
        instance("head", head, HeadConfig)
    history = whole("history", history, 0, "a whole number of updates to keep")
    if not (vec_normalize is None or isinstance(vec_normalize, (VecNormalize, str, Path))):
        raise TypeError(f"vec_normalize is {shown(vec_normalize)}; expected a VecNormalize, or the file of its save")
    if vec_normalize is None and isinstance(model, BaseAlgorithm):
        vec_normalize = model.get_vec_normalize_env()
    normaliser = None if vec_normalize is None else Normaliser.of(vec_normalize)
    network = network_of(model, layer, states if isinstance(states, np.ndarray) else None, link)
    tap = Tap(network.layer, _skipped(network, skip))
    try:
        width = sum(part.in_features for part in (network.layer, *_skipped(network, skip)))
        if states is None:
            warnings.warn(
                "no nominal states were given, so that features keep the network's own units; pass states=, some "
                "hundreds of observations that the policy was trained on, or an environment to collect them in",
                stacklevel=2,
            )
            start, square = _unscaled(network, width), float(width)
        else:
            start, square = _start(network, tap, _nominal(network, tap, states, normaliser))
        posterior = _head(network, width, head, 1.0 / square, history).to(network.layer.weight.device)
        return AdaptedPolicy(model, network, tap, posterior, start, normaliser)
    except BaseException:
        tap.remove()
        raise


def _skipped(network: Network, skip: Skip) -> tuple[nn.Linear, ...]:
    """Layers whose inputs the head sees besides: the second, which sees the first hidden layer, and the first."""
    if skip == "none":
        return ()
    hidden = network.before[1:2] if skip == "hidden" else ()
    return (*hidden, *network.before[:1])


def _head(network: Network, width: int, config: HeadConfig | None, variance: float, history: int) -> Head:
    outputs = network.link.outputs
    if config is None:
        return ModelAverage(width, outputs, variance, history=history)
    if config.link != "identity":
        raise ValueError(
            f"rule {config.rule!r} has a {config.link} link, and adapt() learns scores of discrete actions as numbers; "
            "use rule='measure'"
        )
    if config.layers != 1 and config.last_variance is None:
        return BayesianHead(width, outputs, replace(config, history=history or config.history))
    given = variance if config.last_variance is None else config.last_variance
    return BayesianHead(width, outputs, replace(config, last_variance=given, history=history or config.history))


def _unscaled(network: Network, width: int) -> Start:
    scale = torch.from_numpy(network.link.units(None))
    return Start(torch.zeros(width), torch.ones(width), scale, float(width))


def _start(network: Network, tap: Tap, features: Tensor) -> tuple[Start, float]:
    """Units of the head from nominal features, and the mean square of these in the units, bias included."""
    if len(features) < 2 or not bool(torch.isfinite(features).all()):
        raise ValueError(f"states gave {len(features)} rows of features; at least 2 are needed, and finite ones")
    mean, deviation = features.mean(0), features.std(0)
    scales = []
    for part in deviation.split([layer.in_features for layer in (network.layer, *tap.skipped)]):
        usual = part.square().mean().sqrt()
        scales.append(torch.maximum(part, DEAD * usual) if usual > 0.0 else torch.ones_like(part))
    scale = torch.cat(scales)
    scaled = ((features - mean) / scale).square().sum(1).mean()
    if not scaled > 0.0:
        raise ValueError("all states look the same to the network; pass observations of several episodes")
    weight, bias = network.linear()
    own = features[:, : weight.shape[1]].to(weight) @ weight.mT + bias
    units = torch.from_numpy(network.link.units(own.cpu().numpy()))
    return Start(mean, scale, units, float(scaled)), 1.0 + float(scaled)


def _nominal(network: Network, tap: Tap, states: Any, normaliser: Normaliser | None) -> Tensor:
    """Features of nominal states ``(n, d)``."""
    if isinstance(states, (gym.Env, VecEnv)):
        return _collected(network, tap, states, normaliser)
    numbers = arrays(states)
    call = Call(finite(numbers if normaliser is None else normaliser(numbers)))
    return network.rows(tap.hear(lambda: network.run(call)).features).double()


def _collected(network: Network, tap: Tap, env: gym.Env[Any, Any] | VecEnv, normaliser: Normaliser | None) -> Tensor:
    """Features of the policy's own episodes in its nominal environment, a recurrent one's with its state."""
    envs = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: env])
    normalised = unwrap_vec_normalize(envs)
    if normalised is not None and normalised.norm_obs:
        raise ValueError("states is an environment that normalises its observations; pass the one inside it (venv)")
    envs.seed(0)
    observation: Any = envs.reset()
    seen: list[Tensor] = []
    call = Call(observation, None, np.ones(envs.num_envs, dtype=bool))
    while len(seen) * envs.num_envs < NOMINAL_STEPS:
        call = call._replace(observation=observation if normaliser is None else normaliser(observation))
        heard = tap.hear(functools.partial(network.run, call))
        seen.append(network.rows(heard.features).double())
        actions, state = heard.result
        observation, _, start, _ = envs.step(actions)
        call = call._replace(state=state, episode_start=start)
    return torch.cat(seen)
