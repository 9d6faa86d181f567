"""KBT: one closed-form Bayesian update of the policy's last layers per labelled sample."""

from __future__ import annotations

import warnings
from typing import Any

from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from kbt_rl.agents.bayesian import BayesianLearner
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.transformer_learner import TransformerLearner
from kbt_rl.arguments import flag


class KBT(BayesianLearner, TransformerLearner):
    """Kalman Bayesian Transformer as an SB3 algorithm (arXiv:2509.10695; docs/equations.md says what differs).

    The encoder is frozen after ``pretrain``; the posterior over the last layers moves with each ``update``. No sample
    is stored. ``learn`` rolls the mean policy out while a ``KalmanAdapter`` callback provides the samples.

    Args:
        policy: ``"DecisionTransformerPolicy"`` or a subclass of it.
        env: Environment to learn in; a Gymnasium env, a ``VecEnv`` or an id.
        n_steps: Environment steps between two writes of the log.
        policy_kwargs: For example ``dict(head=HeadConfig(structure="neuron"))``.
        stats_window_size: Episodes that rollout statistics average over.
        tensorboard_log: Folder of the TensorBoard logs; None for none.
        verbose: 0 silent, 1 training output.
        seed: Seed of the initial weights, the label stream and the environment.
        device: The CPU by default: one update is bound by latency.
        per_env: Whether each sub-environment of ``env`` has a posterior of its own, on the encoder that all share and
            from the same prior; else one posterior learns from all of them. With it every sample, observation and
            rollout has one row for each, in their order, and a row without a label leaves its posterior as it is.

    """

    policy: DecisionTransformerPolicy
    fallback_limit: float | None = None  # as of the last save, so that loading can say what is missing

    def __init__(
        self,
        policy: str | type[BasePolicy] = "DecisionTransformerPolicy",
        env: GymEnv | str | None = None,
        n_steps: int = 10,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: str = "cpu",
        per_env: bool = False,
        _init_setup_model: bool = True,
    ) -> None:
        self.per_env = flag("per_env", per_env)
        super().__init__(
            policy, env, n_steps, policy_kwargs, stats_window_size, tensorboard_log, verbose, seed, device,
            _init_setup_model=False,
        )  # fmt: skip
        self.posteriors = self.n_envs if per_env else 1
        if _init_setup_model:
            self._setup_model()

    def _policy_arguments(self) -> dict[str, Any]:
        arguments = super()._policy_arguments()
        if "posteriors" in arguments:
            raise ValueError("policy_kwargs state posteriors; KBT has one for each environment with per_env=True")
        return arguments if self.posteriors == 1 else {**arguments, "posteriors": self.posteriors}

    def _check_env(self, env: VecEnv) -> None:
        super()._check_env(env)
        if self.per_env and env.num_envs != self.posteriors:
            raise ValueError(
                f"the new environment has {env.num_envs} sub-environments and this model {self.posteriors} posteriors, "
                f"one for each; make it with {self.posteriors}, or take one posterior out by model.policy.select(i)"
            )

    def _setup_model(self) -> None:
        super()._setup_model()
        if not isinstance(self.policy, DecisionTransformerPolicy):
            raise TypeError(
                f"KBT needs a DecisionTransformerPolicy, whose head is Bayesian; got {type(self.policy).__name__}"
            )

    def _before_saving(self) -> None:
        self.fallback_limit = None if self.policy.fallback is None else self.policy.fallback.limit

    def _after_loading(self) -> None:
        if self.fallback_limit is not None:
            warnings.warn(
                f"this model was saved with a fallback controller (limit {self.fallback_limit}), which no file holds; "
                "the policy acts alone until set_fallback is called (set_fallback(None) before saving ends this)",
                stacklevel=3,
            )
