"""Make the policies of the suite again: ``python -m studies.suite.train [NAME ...]``.

Each is trained by SB3 on the world before the change, and its teacher goes on from there after it. Settings are those
of RL Baselines3 Zoo where it has the task, shortened where the return allows it. One core; some 40 minutes for all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from studies.rivals.base import body
from studies.suite.setting import Function, walk
from studies.suite.stored import save
from studies.suite.swing_up import NOMINAL, SwingUpExpert
from studies.suite.tasks import SUITE, SuiteTask

SEED = 0
EPISODES = 20  # behind the return that is stored


@dataclass(frozen=True)
class Recipe:
    """How a policy and its teacher are trained.

    Attributes:
        task: A name of ``SUITE``.
        algorithm: PPO or SAC.
        steps: Before the change.
        more: After it, for the teacher.
        settings: Of the algorithm.
        kwargs: Its ``policy_kwargs``.
        envs: Environments side by side.
        normalised: Whether in a ``VecNormalize``.
        episode: Longest episode in training, the task's own if None.
        seed: Of both.
        fresh: Whether the teacher starts from nothing, after the change, and is all that is stored.
    """

    task: str
    algorithm: type[BaseAlgorithm]
    steps: int
    more: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    envs: int = 1
    normalised: bool = False
    episode: int | None = None
    seed: int = SEED
    fresh: bool = False


_PENDULUM_PPO = {
    "n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "learning_rate": 1e-3, "use_sde": True, "sde_sample_freq": 4,
}  # fmt: skip
_CHEETAH = {
    "n_steps": 512, "batch_size": 64, "gamma": 0.98, "learning_rate": 2.0633e-05, "ent_coef": 0.000401762,
    "clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.92, "max_grad_norm": 0.8, "vf_coef": 0.58096,
}  # fmt: skip
_MUJOCO = {"n_steps": 512, "batch_size": 256, "gamma": 0.99, "learning_rate": 3e-4, "n_epochs": 10}
RECIPES: dict[str, Recipe] = {
    "cartpole": Recipe(
        "CartPole", PPO, 100_000, 300_000,
        {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gae_lambda": 0.8, "gamma": 0.98,
         "learning_rate": LinearSchedule(1e-3, 0.0, 1.0), "clip_range": LinearSchedule(0.2, 0.0, 1.0)},
        envs=8,
    ),
    "pendulum-ppo": Recipe("Pendulum, PPO", PPO, 150_000, 150_000, _PENDULUM_PPO, envs=4),
    "pendulum-sac": Recipe("Pendulum, SAC", SAC, 15_000, 10_000, {"learning_rate": 1e-3}),
    "pendulum-heavy-sac": Recipe("Pendulum, SAC teaches PPO", SAC, 0, 20_000, {"learning_rate": 1e-3}, fresh=True),
    "inverted-pendulum": Recipe("InvertedPendulum", PPO, 150_000, 100_000, _MUJOCO, envs=4),
    "inverted-double-pendulum": Recipe(
        "InvertedDoublePendulum", PPO, 300_000, 300_000, _MUJOCO, envs=8, normalised=True
    ),
    "half-cheetah-0": Recipe(
        "HalfCheetah, policy 0", PPO, 500_000, 400_000, _MUJOCO, envs=8, normalised=True, episode=1000
    ),
    "half-cheetah-1": Recipe(
        "HalfCheetah, policy 1", PPO, 400_000, 300_000, _MUJOCO, envs=8, normalised=True, episode=1000, seed=1
    ),
    "reacher": Recipe("Reacher", PPO, 500_000, 400_000, _MUJOCO, envs=8, normalised=True),
}  # fmt: skip


def make(name: str) -> None:
    """Train a policy and its teacher, store both, and say what each earns on either side of the change."""
    if name == "swing-up":
        _swing_up()
        return
    recipe = RECIPES[name]
    task = SUITE[recipe.task]
    torch.set_num_threads(1)
    model = _model(recipe, task, shifted=recipe.fresh)
    if recipe.fresh:
        _train(model, recipe.more)
        _store(name, recipe, task, model, recipe.more)
        return
    _train(model, recipe.steps)
    _store(f"{name}-nominal", recipe, task, model, recipe.steps)
    teacher = _model(recipe, task, shifted=True, before=model)
    _train(teacher, recipe.more)
    _store(f"{name}-teacher", recipe, task, teacher, recipe.more)


def _model(recipe: Recipe, task: SuiteTask, *, shifted: bool, before: BaseAlgorithm | None = None) -> BaseAlgorithm:
    env: VecEnv = make_vec_env(lambda: task.env(shifted=shifted, steps=recipe.episode), recipe.envs, seed=recipe.seed)
    if recipe.normalised:
        env = VecNormalize(env, gamma=recipe.settings.get("gamma", 0.99))
        old = None if before is None else before.get_vec_normalize_env()
        if old is not None:
            env.obs_rms, env.ret_rms = old.obs_rms, old.ret_rms
    model = recipe.algorithm(
        "MlpPolicy", env, seed=recipe.seed, policy_kwargs=dict(recipe.kwargs), device="cpu", **recipe.settings
    )
    if before is not None:
        parameters: Any = before.get_parameters()
        model.set_parameters(parameters, device="cpu")
    return model


def _swing_up(rounds: int = 12, episodes: int = 20, steps: int = 1_500) -> None:
    """Clone the expert of the nominal plant, each round on the states that the clone itself comes to."""
    task = SUITE["Swing-up"]
    kwargs = {"net_arch": [64, 64]}
    model = PPO("MlpPolicy", task.env(shifted=False), seed=SEED, policy_kwargs=kwargs, device="cpu")
    expert, actor = SwingUpExpert(NOMINAL), body(model.policy)
    optimizer = torch.optim.Adam(actor.parameters(), 2e-3)
    rng, seen = np.random.default_rng(SEED), np.zeros((0, 5), dtype=np.float32)
    for turn in range(rounds):
        acting: Any = Function(expert) if turn == 0 else model
        envs = [task.env(shifted=False) for _ in range(episodes)]
        walked = [walk(acting, env, 1_000 * turn + place, 1) for place, env in enumerate(envs)]
        seen = np.concatenate([seen, *(next(one) for one in walked for _ in range(task.steps))])
        inputs, labels = torch.from_numpy(seen), torch.from_numpy(expert(seen)).float()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1.0 - step / steps) + 1e-5
            rows = torch.from_numpy(rng.integers(len(seen), size=256))
            loss = (actor(inputs[rows]) - labels[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(turn, f"loss {loss.item():.4f}", flush=True)
    recipe = Recipe("Swing-up", PPO, 0, 0, kwargs=kwargs)
    _store("swing-up-nominal", recipe, task, model, rounds * episodes * task.steps)


def _train(model: BaseAlgorithm, steps: int) -> None:
    model.learn(steps, progress_bar=True)


def _store(name: str, recipe: Recipe, task: SuiteTask, model: BaseAlgorithm, steps: int) -> None:
    told: dict[str, Any] = {"algorithm": recipe.algorithm.__name__, "steps": steps, "seed": recipe.seed}
    for side, shifted in (("before", False), ("after", True)):
        told[side] = round(_return(model, partial(task.env, shifted=shifted)), 1)
    print(save(name, model, dict(recipe.kwargs), told), told, flush=True)


def _return(model: BaseAlgorithm, env: Callable[[], Any]) -> float:
    envs: VecEnv = make_vec_env(env, 1, seed=10_000)
    statistics = model.get_vec_normalize_env()
    if statistics is not None:
        envs = VecNormalize(envs, training=False, norm_reward=False)
        envs.obs_rms = statistics.obs_rms
    mean, _ = evaluate_policy(model, envs, EPISODES)
    return float(np.asarray(mean))


if __name__ == "__main__":
    for chosen in sys.argv[1:] or [*RECIPES, "swing-up"]:
        make(chosen)
