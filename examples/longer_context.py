"""A decision transformer that sees the last K steps, taught on the states that it visits itself.

With K > 1 the network is pre-trained on the expert's episodes instead of single states. The context travels through the
``state`` argument of ``predict``, so that SB3's ``evaluate_policy`` works as with its own recurrent policies.
"""

from __future__ import annotations

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from kbt_rl import KBT, DecisionTransformerConfig, HeadConfig, KalmanAdapter, LQRExpert
from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.callbacks import VisitedStream

NOMINAL = "kbt_rl/InvertedPendulum-v0"
SHIFTED = "kbt_rl/ShiftedInvertedPendulum-v0"


def episode_length(model: KBT, episodes: int) -> float:
    """Mean number of steps before the pole falls on the shifted plant, 500 at most."""
    envs = make_vec_env(SHIFTED, n_envs=episodes, seed=1)
    _, lengths = evaluate_policy(model, envs, n_eval_episodes=episodes, return_episode_rewards=True)
    return sum(lengths) / len(lengths)


def main(
    context_length: int = 4,
    steps: int = 2_500,
    episodes: int = 20,
    pretraining: PretrainConfig | None = None,
) -> tuple[float, float]:
    """Mean episode lengths on the shifted plant before and after ``steps`` steps on it."""
    transformer = DecisionTransformerConfig(context_length=context_length)
    # The head counts in units of the cloned labels, and those of calm episodes are below 1 N: allow for larger changes.
    head = HeadConfig(layers=1, last_variance=100.0, noise_variance=0.1)
    policy = {"transformer": transformer, "head": head}
    model = KBT(env=make_vec_env(NOMINAL, n_envs=8), policy_kwargs=policy, seed=0)
    info = model.pretrain(LQRExpert.for_env(gym.make(NOMINAL)), pretraining)
    print(f"cloned {info.samples} windows of {context_length} steps to {info.validation_rmse_newton:.2f} N")

    model.set_env(gym.make(SHIFTED))
    before = episode_length(model, episodes)
    expert = LQRExpert.for_env(gym.make(SHIFTED))
    model.learn(steps, callback=KalmanAdapter(expert, VisitedStream(every=5)))
    after = episode_length(model, episodes)
    print(f"the pole stays up for {before:.0f} steps before and {after:.0f} after {model.labels_used} labels")
    return before, after


if __name__ == "__main__":
    main()
