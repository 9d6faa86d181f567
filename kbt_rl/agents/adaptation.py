"""Teaching an adapted policy in SB3's ``learn``, with its callbacks and its TensorBoard logs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from kbt_rl.agents import adapted_file
from kbt_rl.agents.bayesian import BayesianLearner, KBTInfo
from kbt_rl.agents.experts import Expert, label_space
from kbt_rl.agents.learner_arguments import check_env
from kbt_rl.agents.online_policy import Labeller
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.tapped_policy import TappedPolicy
from kbt_rl.agents.teachers import labeller_for
from kbt_rl.arguments import instance


class Adaptation(BayesianLearner):
    """An SB3 algorithm around an ``AdaptedPolicy``; see its ``learn``.

    Args:
        policy: To be taught.
        env: Environment to learn in, whose observations are not normalised; a Gymnasium env, a ``VecEnv`` or an id.
        n_steps: Environment steps between two writes of the log.
        stats_window_size: Episodes that rollout statistics average over.
        tensorboard_log: Folder of the TensorBoard logs; None for none.
        verbose: 0 silent, 1 training output.
        seed: Seed of the label stream and the environment.
    """

    policy: TappedPolicy
    label_every: ClassVar[int | None] = 5  # labels of successive states hardly differ

    def __init__(
        self,
        policy: TappedPolicy,
        env: GymEnv | str,
        n_steps: int = 10,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
    ) -> None:
        if policy.network.chunk > 1:
            raise ValueError("learn() asks for one action an observation, and this policy says a chunk; call update()")
        check_env(env)
        settings = {"stats_window_size": stats_window_size, "tensorboard_log": tensorboard_log, "verbose": verbose}
        super().__init__(BasePolicy, env, n_steps, seed, device="cpu", **settings)
        self.policy = policy
        self._setup_model()
        self._take_env(self.get_env())

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Move to another environment with the same spaces; the number of sub-environments may differ."""
        check_env(env)
        wrapped = self._wrap_env(env, self.verbose)
        self._take_env(wrapped)
        self.n_envs, self.label_space = wrapped.num_envs, label_space(wrapped)
        super().set_env(wrapped, force_reset)
        self._context = self._features = None

    def _take_env(self, env: VecEnv | None) -> None:
        """Raise ValueError if this policy cannot act in ``env``; else take note of it."""
        assert env is not None
        check_for_correct_spaces(env, self.policy.observation_space, self.policy.action_space)
        normalised = unwrap_vec_normalize(env)
        if normalised is not None and normalised.norm_obs:
            raise ValueError(
                "the environment normalises its observations; pass the one inside (VecNormalize.venv), and its "
                "statistics to adapt(model, vec_normalize=...)"
            )
        has_masks = self.policy.network.takes_masks and env.has_attr("action_masks")
        self.policy.masks_from = (lambda: np.stack(env.env_method("action_masks"))) if has_masks else None

    def update(self, sample: Sample) -> KBTInfo:
        """See ``OnlineAlgorithm``."""
        self.taught = True
        instance("sample", sample, Sample, "Sample(context, target)")
        features = self.policy.encode(sample.context) if sample.features is None else sample.features
        rows = np.arange(len(features)) if sample.mask is None else np.flatnonzero(sample.mask)
        target = self.policy.targets(features[rows], np.asarray(sample.target)[rows], sample.kind)
        given = ~np.isnan(target).all(axis=1)
        if not given.any():
            return KBTInfo(labels=0, innovation=float("nan"))
        return self._update(sample.context, target[given], features[rows[given]], rows[given])

    @property
    def lesson(self) -> object:
        """See ``OnlineAlgorithm``."""
        return self.policy.network

    def labeller(self, expert: Expert) -> Labeller:
        """See ``OnlineAlgorithm``."""
        return labeller_for(self.policy.network, expert)

    def save(self, path: str | Path | io.BufferedIOBase, *_: Any, **__: Any) -> None:
        """``AdaptedPolicy.save``, for callbacks that save what they train."""
        if not isinstance(path, (str, Path)):
            raise TypeError("an adapted policy is saved to a path")
        adapted_file.save(self.policy, path)

    @classmethod
    def load(cls, *_: Any, **__: Any) -> Any:
        """Not here: the file holds the posterior and not the network."""
        raise TypeError("load it by AdaptedPolicy.load(path, model), with the model that was adapted")

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return [], []
