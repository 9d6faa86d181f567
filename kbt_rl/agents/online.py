"""What all online learners share: the loop that acts while callbacks teach, and one method that learns from a label.

The loop acts on the mean, advances the context and encodes each new observation once, so that the callback's update and
the next action share the features. Where samples come from is the callback's business.
"""

from __future__ import annotations

import sys
import time
import warnings
from abc import abstractmethod
from typing import Any, ClassVar, TypeVar

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import safe_mean
from torch import Tensor

from kbt_rl.agents.checkpoints import CheckpointedAlgorithm
from kbt_rl.agents.experts import Expert, label_space
from kbt_rl.agents.learner_arguments import check_callback, check_env, checked_settings
from kbt_rl.agents.online_policy import Context, Labeller, OnlinePolicy
from kbt_rl.agents.sample import LearnerInfo, Sample
from kbt_rl.arguments import flag, shown, whole
from kbt_rl.arguments import seed as checked_seed

Self = TypeVar("Self", bound="OnlineAlgorithm")


class OnlineAlgorithm(CheckpointedAlgorithm):
    """An SB3 algorithm whose policy acts while callbacks teach it.

    Args:
        policy: Policy class or its name.
        env: Environment to learn in; a Gymnasium env, a ``VecEnv`` or an id.
        n_steps: Environment steps between two writes of the log.
        seed: Of the label stream and the environment.
        **settings: Of SB3's ``BaseAlgorithm``.

    Attributes:
        n_steps: Environment steps between two writes of the log.
        label_every: Steps from one visited state that is labelled by default to the next; None for i.i.d. states.
        label_space: Box that labels are asked in at i.i.d. states; None where nobody knows one.
        taught: Whether somebody was there to teach in the last ``learn``: an adapter, or a call of ``update``.
        lesson: What the model has started from; labels asked for another one are of no use.
    """

    info_type: ClassVar[type[LearnerInfo]] = LearnerInfo
    label_every: ClassVar[int | None] = None

    policy: OnlinePolicy  # type: ignore[assignment]
    n_steps: int
    label_space: spaces.Box | None
    taught: bool = False
    # Of the observations that the policy acts on next; None before the first, and after a change of what they are from.
    _context: Context | None = None
    _features: Tensor | None = None
    # Whether the environment may have moved on from ``_last_obs``: a step was interrupted, or the file is of one.
    _moved_on: bool = False

    def __init__(
        self, policy: str | type[BasePolicy], env: GymEnv | str | None, n_steps: int, seed: int | None, **settings: Any
    ) -> None:
        if env is not None:
            check_env(env)
        seed, settings = checked_seed("seed", seed), checked_settings(settings)
        super().__init__(
            policy, env, learning_rate=0.0, support_multi_env=True, monitor_wrapper=True, seed=seed, **settings
        )
        self.n_steps = whole("n_steps", n_steps, 1, "the log is written after a whole number of steps, at least 1")
        self.label_space = None if self.env is None else label_space(self.env)
        # The state of the label stream lives here rather than in a callback, so that it is saved with the model.
        # A generator of its own: pre-training draws its states from the seed itself.
        self.stream_rng = np.random.default_rng(None if seed is None else [seed, 1])
        self.stream_positions: dict[str, int] = {}
        self.strategy_state: dict[str, Any] = {}  # what a callback's strategy has to remember, saved with the model
        self.adapter_state: dict[str, Any] = {}  # what adapters have asked for, and the labels on the way to them

    @abstractmethod
    def update(self, sample: Sample) -> LearnerInfo:
        """Learn from one labelled sample, or from several rows at once.

        Args:
            sample: Context and label; see ``Sample``.

        Returns:
            What the update saw, in action units.

        Raises:
            ValueError: The sample has a wrong shape or is not finite; nothing has changed.
        """

    @property
    def context(self) -> Context:
        """Of the observations that the policy acts on next, once ``learn`` has begun."""
        assert self._context is not None
        return self._context

    @property
    @abstractmethod
    def labels_used(self) -> int:
        """Labelled rows that the learner has learned from."""

    @property
    @abstractmethod
    def lesson(self) -> object:
        """See the class."""

    @abstractmethod
    def labeller(self, expert: Expert) -> Labeller:
        """How to ask an expert for labels of this model's policy.

        Raises:
            TypeError: The expert is neither a policy nor callable.
            ValueError: The expert was made for other spaces.
        """

    def check_expert(self, expert: Expert) -> None:
        """Raise ValueError if an expert was made for another world than the training environment's."""

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

        Whoever ends the run, a callback, an error or Ctrl-C, the log ends with what was reached. With
        ``reset_num_timesteps=False`` the next call goes on in the same episode; after a step that was interrupted, in a
        new one.

        Raises:
            TypeError: ``total_timesteps`` or ``log_interval`` is no number.
            ValueError: One of them is not whole or negative, or there is no environment.
        """
        if self.env is None:
            raise ValueError("the model has no environment; call set_env first")
        total_timesteps = whole("total_timesteps", total_timesteps, 0, "a whole number of steps, not negative")
        if log_interval is not None:
            log_interval = whole("log_interval", log_interval, 0, "rollouts between two writes, 0 for no log")
        if tb_log_name is not None and not isinstance(tb_log_name, str):
            raise TypeError(f"tb_log_name is {shown(tb_log_name)}; expected the name of a run, or None")
        reset_num_timesteps = flag("reset_num_timesteps", reset_num_timesteps)
        progress_bar = flag("progress_bar", progress_bar)
        check_callback(callback)
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, name, progress_bar
        )
        self.taught = False
        callback.on_training_start(locals(), globals())
        rollouts, written = 0, self.num_timesteps
        try:
            going_on = True
            while going_on and self.num_timesteps < total_timesteps:
                going_on = self._roll_out(callback, total_timesteps)
                rollouts += 1
                if log_interval and rollouts % log_interval == 0:
                    self.dump_logs()
                    written = self.num_timesteps
        finally:
            if log_interval and self.num_timesteps > written:
                self.dump_logs()
        callback.on_training_end()
        if not self.taught:
            warnings.warn(
                "nothing was learned: learn() acts, and a callback teaches; pass callback=KalmanAdapter(expert)",
                stacklevel=2,
            )
        return self

    def _roll_out(self, callback: BaseCallback, total_timesteps: int) -> bool:
        """``n_steps`` steps of the environment; False if a callback asked to stop."""
        assert self.env is not None
        self._on_rollout_start()
        callback.on_rollout_start()
        assert self._context is not None
        going_on = True
        for _ in range(self.n_steps):
            if not going_on or self.num_timesteps >= total_timesteps:
                break
            going_on = self._take_step(callback)
        callback.on_rollout_end()
        return going_on

    def _take_step(self, callback: BaseCallback) -> bool:
        """One step of the environment; False if a callback asked to stop.

        Callbacks see ``_last_obs`` as it was before the step, as everywhere in SB3. However they end, it is then the
        observation that came.
        """
        assert self.env is not None
        assert self._context is not None
        if self._features is None:  # an update has changed the encoder
            self._features = self.policy.encode(self._context)
        actions, taken_over = self.policy.choose(self._context, self._features)
        if self.policy.fallback is not None:
            self.logger.record_mean("kalman/fallback_share", float(taken_over.mean()))
        self._moved_on = True
        new_obs, rewards, dones, infos = self.env.step(actions)
        self.num_timesteps += self.env.num_envs
        context = self.policy.advance(self.policy.with_action(self._context, actions), new_obs, dones)
        features = self.policy.encode(context)
        self._context, self._features = context, features
        callback.update_locals(locals())
        try:
            return callback.on_step()
        finally:
            self._update_info_buffer(infos, dones)
            self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]
            self._moved_on = False

    def _on_rollout_start(self) -> None:
        """Encode the first observation of a run; later ones were encoded when they arrived."""
        if self._context is None:
            assert self._last_obs is not None
            self._context = self.policy.start(self._last_obs)
        if self._features is None:
            self._features = self.policy.encode(self._context)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if reset_num_timesteps or self._moved_on:
            self._last_obs = None  # SB3 then resets the environment; also next time, if it is interrupted
        before = self._last_obs
        out = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self._moved_on, self._features = False, None  # the encoder may have changed since
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
