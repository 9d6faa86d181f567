"""Policies of Stable-Baselines3 in a few kilobytes: the weights that decide an action, and how to build the rest.

A zip of SB3 holds optimisers and critics, which are ten times as much, and Python code, which other versions may not
read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.sac.policies import SACPolicy

from kbt_rl.files import replacing
from kbt_rl.networks.normaliser import Normaliser
from studies.rivals.base import Acting
from studies.suite.tasks import SuiteTask

FOLDER = Path(__file__).with_name("policies")


class Stored(NamedTuple):
    """A policy that was read.

    Attributes:
        policy: Of SB3.
        statistics: By which its observations are normalised, None if it takes them as they are.
        told: What its training said of it: algorithm, steps, seed, return.
    """

    policy: BasePolicy
    statistics: VecNormalize | None
    told: dict[str, Any]

    @property
    def normaliser(self) -> Normaliser | None:
        """The statistics, frozen."""
        return None if self.statistics is None else Normaliser.of(self.statistics)

    @property
    def acting(self) -> Acting:
        """The policy for raw observations."""
        return Acting(self.policy, self.normaliser)


def save(name: str, model: BaseAlgorithm, kwargs: dict[str, Any], told: dict[str, Any]) -> Path:
    """Write the acting part of a model.

    Args:
        name: Of the file, without its ending.
        model: PPO or SAC.
        kwargs: Its ``policy_kwargs``.
        told: See ``Stored``.
    """
    squashed = isinstance(model.policy, SACPolicy)
    weights = {
        part: value.contiguous()
        for part, value in model.policy.state_dict().items()
        if not part.startswith(("critic", "value_net", "mlp_extractor.value_net"))
    }
    statistics = model.get_vec_normalize_env()
    about = {"squashed": squashed, "kwargs": {"use_sde": model.use_sde, **kwargs}, "told": told, "statistics": None}
    if statistics is not None:
        seen: Any = statistics.obs_rms
        about["statistics"] = {
            "mean": seen.mean.tolist(), "var": seen.var.tolist(), "count": float(seen.count),
            "epsilon": statistics.epsilon, "clip_obs": statistics.clip_obs,
        }  # fmt: skip
    path = FOLDER / f"{name}.safetensors"
    with replacing(path) as file:
        file.write(safetensors.torch.save(weights, {"policy": json.dumps(about)}))
    return path


def load(name: str, task: SuiteTask) -> Stored:
    """Read a policy of the suite for the spaces of a task.

    Raises:
        FileNotFoundError: It was never made.
    """
    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}; python -m studies.suite.train makes it")
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["policy"])
        weights = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118  no mapping
    env = task.env(shifted=False)
    kwargs = about["kwargs"]
    if about["squashed"]:  # no critic is stored, so that it is as small as can be
        kwargs = {**kwargs, "net_arch": {"pi": kwargs.get("net_arch", [256, 256]), "qf": [1]}}
        policy: BasePolicy = SACPolicy(env.observation_space, env.action_space, _no_rate, **kwargs)  # type: ignore[arg-type]
    else:
        policy = ActorCriticPolicy(env.observation_space, env.action_space, _no_rate, **kwargs)
    policy.load_state_dict({**policy.state_dict(), **weights})
    policy.set_training_mode(False)
    statistics = None if about["statistics"] is None else _statistics(task, **about["statistics"])
    return Stored(policy, statistics, about["told"])


def _no_rate(_: float) -> float:
    return 0.0


def _statistics(task: SuiteTask, mean: list[float], var: list[float], count: float, **settings: Any) -> VecNormalize:
    env = VecNormalize(DummyVecEnv([lambda: task.env(shifted=False)]), training=False, norm_reward=False, **settings)
    space: Any = env.observation_space
    assert isinstance(space, spaces.Box)
    seen = RunningMeanStd(shape=space.shape)
    seen.mean, seen.var, seen.count = np.array(mean), np.array(var), count
    env.obs_rms = seen  # type: ignore[assignment]  # SB3 declares the dict of Dict spaces
    return env
