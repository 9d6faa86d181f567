"""The loop of all online learners: act on the mean, advance the context, encode each new observation once.

The callback's update and the next action share the features. What a learner does with a label is in
:mod:`kbt_rl.agents.online`.
"""

from __future__ import annotations

import sys
import time
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import safe_mean
from torch import Tensor

from kbt_rl.agents.checkpoints import CheckpointedAlgorithm
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.models.context import ContextWindow

Self = TypeVar("Self", bound="RolloutAlgorithm")


class RolloutAlgorithm(CheckpointedAlgorithm):
    """An SB3 algorithm whose transformer policy acts while callbacks teach it.

    Attributes:
        n_steps: Environment steps between two writes of the log.
    """

    policy: TransformerPolicy
    n_steps: int
    # Of the observations that the policy acts on next; None before the first, and after a change of what they are from.
    _context: ContextWindow | None = None
    _features: Tensor | None = None

    def learn(
        self: Self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Act on the mean for ``total_timesteps`` steps while callbacks update the model.

        The callbacks find in their locals ``context`` and ``features`` of the new observations and the rows
        ``taken_over`` in which a fallback controller acted, beside the names that SB3 provides. With a fallback the
        share of its actions since the last write is logged as ``kalman/fallback_share``.
        """
        if self.env is None:
            raise ValueError("the model has no environment; call set_env first")
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        rollouts = 0
        while self.num_timesteps < total_timesteps and self._roll_out(callback, total_timesteps):
            rollouts += 1
            if log_interval and rollouts % log_interval == 0:
                self.dump_logs()
        callback.on_training_end()
        return self

    def _roll_out(self, callback: BaseCallback, total_timesteps: int) -> bool:
        """``n_steps`` steps of the environment; False if a callback asked to stop."""
        assert self.env is not None
        self._on_rollout_start()
        callback.on_rollout_start()
        assert self._context is not None
        for _ in range(self.n_steps):
            if self.num_timesteps >= total_timesteps:
                break
            if self._features is None:  # an update has changed the encoder
                self._features = self.policy.encode(self._context)
            actions, taken_over = self.policy.choose(self._context, self._features)
            if self.policy.fallback is not None:
                self.logger.record_mean("kalman/fallback_share", float(taken_over.mean()))
            new_obs, rewards, dones, infos = self.env.step(actions)
            assert isinstance(new_obs, np.ndarray)
            self.num_timesteps += self.env.num_envs
            context = self.policy.advance(self.policy.with_action(self._context, actions), new_obs, dones)
            features = self.policy.encode(context)
            self._context, self._features = context, features
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            self._last_obs, self._last_episode_starts = new_obs, dones
        callback.on_rollout_end()
        return True

    def _on_rollout_start(self) -> None:
        """Encode the first observation of a run; later ones were encoded when they arrived."""
        if self._context is None:
            assert isinstance(self._last_obs, np.ndarray)
            self._context = self.policy.start(self._last_obs)
        if self._features is None:
            self._features = self.policy.encode(self._context)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        before = self._last_obs
        out = super()._setup_learn(*args, **kwargs)
        self._features = None  # the encoder may have changed since
        if self._last_obs is not before:  # the environment was reset
            self._context = None
        return out

    def dump_logs(self) -> None:
        """Write what was recorded since the last call, with the statistics of finished episodes."""
        infos, successes = self.ep_info_buffer, self.ep_success_buffer
        if infos:
            self.logger.record("rollout/ep_rew_mean", safe_mean([info["r"] for info in infos]))
            self.logger.record("rollout/ep_len_mean", safe_mean([info["l"] for info in infos]))
        if successes:
            self.logger.record("rollout/success_rate", safe_mean(successes))
        elapsed = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / elapsed))
        self.logger.record("time/time_elapsed", int(elapsed), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_context", "_features"]
