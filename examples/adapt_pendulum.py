"""Clone an expert of one plant, then adapt to another while the policy runs: one label a step, one update a label.

Takes about a minute. Look at the curves with ``tensorboard --logdir runs``.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from kbt_rl import KBT, KalmanAdapter, LQRExpert
from kbt_rl.agents.behaviour_cloning import PretrainConfig

NOMINAL = "kbt_rl/InvertedPendulum-v0"
SHIFTED = "kbt_rl/ShiftedInvertedPendulum-v0"


def success_rate(model: KBT, episodes: int) -> float:
    """Share of episodes on the shifted plant at whose end the pole is upright and the cart at rest at the origin."""
    successes: list[bool] = []

    def note(step: dict[str, Any], _: dict[str, Any]) -> None:
        if step["done"]:
            successes.append(step["info"]["is_success"])

    envs = make_vec_env(SHIFTED, n_envs=episodes, seed=1)
    evaluate_policy(model, envs, n_eval_episodes=episodes, callback=note)
    return float(np.mean(successes))


def main(
    labels: int = 400,
    episodes: int = 20,
    pretraining: PretrainConfig | None = None,
    log_folder: str = "runs",
) -> tuple[float, float]:
    """Success rates on the shifted plant before and after ``labels`` labels."""
    nominal, shifted = gym.make(NOMINAL), gym.make(SHIFTED)

    model = KBT("DecisionTransformerPolicy", nominal, tensorboard_log=log_folder, seed=0)
    info = model.pretrain(LQRExpert.for_env(nominal), pretraining)
    print(f"pre-trained on the nominal plant; error on held-out states {info.validation_rmse_newton:.2f} N")

    model.set_env(shifted)
    before = success_rate(model, episodes)
    adapter = KalmanAdapter(LQRExpert.for_env(shifted))  # labels at random states, as in the paper
    watch = EvalCallback(make_vec_env(SHIFTED, n_envs=episodes), eval_freq=50, n_eval_episodes=episodes, verbose=0)
    model.learn(labels, callback=[adapter, watch], progress_bar=True)
    after = success_rate(model, episodes)
    print(f"success on the shifted plant: {before:.2f} before, {after:.2f} after {labels} labels")

    observation, _ = shifted.reset()
    mean, epistemic, aleatoric = model.policy.predict_moments(observation)
    print(
        f"action {mean.item():.4f}, variance {epistemic.item():.1e} from the weights, {aleatoric.item():.1e} from noise"
    )
    model.save(f"{log_folder}/adapted")  # KBT.load reads it back, posterior included
    return before, after


if __name__ == "__main__":
    main()
