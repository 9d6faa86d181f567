"""Decision transformers of Hugging Face: ``transformers.DecisionTransformerModel``.

Such a model acts on the last steps of an episode and on the return that it is to reach. Both travel in the ``state`` of
``predict``, as the hidden state of a recurrent policy does, so that nothing is kept between calls.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from kbt_rl.models.context import ContextWindow, advance_window, start_window, with_action
from kbt_rl.networks.base import Array, Call, Network, State, linears
from kbt_rl.networks.links import link_for

FAMILY = "DecisionTransformerModel"


class Memory(NamedTuple):
    """The context of ``n`` episodes, the newest step last; the ``state`` that ``predict`` returns.

    Attributes:
        observations: ``(n, K, state_dim)``, not normalised.
        actions: ``(n, K, act_dim)``, as the model was trained on them; the newest is the one just chosen.
        timesteps: Step of the newest observation in its episode, ``(n,)``.
        returns: Scaled returns-to-go, ``(n, K)``.
        next_return: Scaled return-to-go of the next step, ``(n,)``.
    """

    observations: Array
    actions: Array
    timesteps: Array
    returns: Array
    next_return: Array

    @property
    def window(self) -> ContextWindow:
        """Without returns."""
        return ContextWindow(*self[:3])


class HuggingFaceTransformer:
    """A ``DecisionTransformerModel`` with what it needs to act, for ``adapt``.

    Args:
        model: In evaluation mode from now on.
        target_return: Return that an episode is to reach, in units of the rewards.
        scale: What returns were divided by in training.
        context: Steps that the model sees, the newest included.
        state_mean: Mean of the observations that the model was trained on, ``(state_dim,)``; 0 if None.
        state_std: Their standard deviation, ``(state_dim,)``; 1 if None.
        env: Whose observation and action space the policy has; else any observation, and actions in [-1, 1]. With a
            Tanh in the model, [-1, 1] stands for the whole range of an action.

    Raises:
        ImportError: The package transformers is missing.
        TypeError: It is another model.
        ValueError: A number is out of range, or the environment has other spaces.

    Example:
        >>> model = DecisionTransformerModel.from_pretrained("decision-transformer-hopper")
        >>> policy = adapt(HuggingFaceTransformer(model, target_return=3_600, scale=1_000), states=env)
        >>> action, state = policy.predict(observation, state)
        >>> policy.update(None, correction)
    """

    def __init__(
        self,
        model: Any,
        *,
        target_return: float,
        scale: float = 1.0,
        context: int = 20,
        state_mean: npt.ArrayLike | None = None,
        state_std: npt.ArrayLike | None = None,
        env: gym.Env[Any, Any] | VecEnv | None = None,
    ) -> None:
        if not isinstance(model, family()):
            raise TypeError(f"HuggingFaceTransformer takes a {FAMILY} of transformers; got {type(model).__name__}")
        self.model: nn.Module = model.eval()
        self.config: Any = model.config
        if not np.isfinite(target_return) or not (np.isfinite(scale) and scale > 0.0):
            raise ValueError(f"target_return is {target_return} and scale {scale}; finite numbers, the scale positive")
        longest = self.config.n_positions // 3  # three tokens a step
        if not 1 <= context <= longest:
            raise ValueError(f"context is {context}; this model sees 1 to {longest} steps")
        self.target_return, self.scale, self.context = float(target_return), float(scale), int(context)
        self.state_mean = self._statistic("state_mean", state_mean, 0.0)
        self.state_std = self._statistic("state_std", state_std, 1.0)
        if not (self.state_std > 0.0).all():
            raise ValueError(f"state_std is {self.state_std}; standard deviations are positive")
        observations, actions = (self.config.state_dim,), (self.config.act_dim,)
        self.observation_space: Any = spaces.Box(-np.inf, np.inf, observations, np.float32)
        self.action_space: Any = spaces.Box(-1.0, 1.0, actions, np.float32)
        if env is not None:
            self.observation_space, self.action_space = env.observation_space, env.action_space
        fits = isinstance(self.action_space, spaces.Box) and self.action_space.shape == actions
        if not fits or self.observation_space.shape != observations:
            raise ValueError(
                f"the environment has observations {self.observation_space} and actions {self.action_space}; this "
                f"model is for {observations[0]} numbers and {actions[0]} continuous actions"
            )
        if self.squashed and not self.action_space.is_bounded():
            raise ValueError(f"the action space {self.action_space} has no bounds, and the model's Tanh needs some")

    @property
    def squashed(self) -> bool:
        """Whether the model ends in a Tanh."""
        return any(isinstance(part, nn.Tanh) for part in self.model.get_submodule("predict_action").modules())

    def with_reward(self, state: State, reward: Any) -> State:
        """The state after the reward of the step that was just taken: its return-to-go falls by it.

        Without it the return-to-go stays at ``target_return``.

        Args:
            state: What ``predict`` returned.
            reward: A number, or one for each episode ``(n,)``.
        """
        memory = _memory(state)
        return memory._replace(next_return=memory.next_return - np.asarray(reward, dtype=np.float32) / self.scale)

    def with_action(self, state: State, actions: Array) -> State:
        """The state where others acted than the policy: the model sees what was done.

        Args:
            state: What ``predict`` returned.
            actions: Of the environment, ``(n, act_dim)`` or ``(act_dim,)``.
        """
        memory, low, high = _memory(state), self.action_space.low, self.action_space.high
        taken = np.asarray(actions, dtype=np.float32).reshape(len(memory.timesteps), -1)
        if self.squashed:
            taken = 2.0 * (taken - low) / (high - low) - 1.0
        return memory._replace(actions=with_action(memory.window, taken).actions)

    def advanced(self, state: State, observations: Array, episode_start: Any) -> Memory:
        """The state with new observations ``(n, state_dim)``; episodes that start have no other step."""
        target, n = np.float32(self.target_return / self.scale), len(observations)
        if state is None:
            window = start_window(observations, self.context, self.config.act_dim)
            returns = np.full((n, self.context), target)
        else:
            before = _memory(state)
            starts = np.zeros(n, dtype=bool) if episode_start is None else np.asarray(episode_start, dtype=bool)
            window = advance_window(before.window, observations, starts)
            newest = np.where(starts, target, before.next_return)[:, None]
            returns = np.concatenate([before.returns[:, 1:], newest], axis=1, dtype=np.float32)
        return Memory(*window, returns, returns[:, -1].copy())

    def _statistic(self, name: str, given: npt.ArrayLike | None, usual: float) -> Array:
        values = np.full(self.config.state_dim, usual, np.float32) if given is None else np.asarray(given, np.float32)
        if values.shape != (self.config.state_dim,) or not np.isfinite(values).all():
            raise ValueError(f"{name} has shape {values.shape}; expected ({self.config.state_dim},), all finite")
        return values


class HuggingFaceNetwork(Network):
    """The network of a ``HuggingFaceTransformer``.

    The head sees the last hidden state of the newest observation, and besides this observation as ``embed_state`` does.
    """

    recurrent = True

    def __init__(self, source: HuggingFaceTransformer) -> None:
        self.source, self.module = source, source.model
        self.observation_space, self.action_space = source.observation_space, source.action_space
        *hidden, self.layer = [layer for _, layer in linears(self.module.get_submodule("predict_action"))]
        first: Any = self.module.get_submodule("embed_state")
        self.before = [first, *hidden]
        self.link = link_for(self.action_space, source.squashed)

    def run(self, call: Call) -> tuple[Array, State]:
        """See ``Network``."""
        assert not isinstance(call.observation, dict)
        single, shape = self.is_single(call.observation), self.observation_space.shape
        rows = np.asarray(call.observation[np.newaxis] if single else call.observation, dtype=np.float32)
        if rows.shape[1:] != shape:
            raise ValueError(
                f"the observation has shape {np.shape(call.observation)}; expected {shape} or (n, *{shape})"
            )
        memory = self.source.advanced(call.state, rows, call.episode_start)
        low, high = self.source.action_space.low, self.source.action_space.high
        said = self._said(memory).float().cpu().numpy()
        actions = low + 0.5 * (said + 1.0) * (high - low) if self.source.squashed else np.clip(said, low, high)
        return (actions[0] if single else actions), self.source.with_action(memory, actions)

    def rows(self, features: Tensor) -> Tensor:
        """See ``Network``; those of the newest step."""
        return features[:, -1]

    def with_action(self, state: State, actions: Array) -> State:
        """See ``Network``."""
        return self.source.with_action(state, actions)

    def copied(self, model: Any) -> tuple[Any, nn.Module]:
        """See ``Network``; a ``HuggingFaceTransformer``, whose ``model`` is the copy."""
        copied = copy.deepcopy(self.source)
        return copied, copied.model

    def fingerprint(self) -> str:
        """See ``Network``; with the settings that change what the head sees. The target may be another one."""
        source = self.source
        settings = np.concatenate([[source.context, source.scale], source.state_mean, source.state_std])
        return hashlib.sha256(super().fingerprint().encode() + settings.astype(np.float64).tobytes()).hexdigest()

    @torch.no_grad()
    def _said(self, memory: Memory) -> Tensor:
        """The model's own prediction of the newest action, ``(n, act_dim)``."""
        source = self.source
        known = min(source.context, int(memory.timesteps.max()) + 1)
        steps = memory.timesteps[:, None] - np.arange(known)[::-1]
        like = self.layer.weight
        states = (memory.observations[:, -known:] - source.state_mean) / source.state_std
        # Not model(...): a subclass for training may return its loss alone.
        output = family().forward(
            self.module,
            states=torch.as_tensor(states).to(like),
            actions=torch.as_tensor(memory.actions[:, -known:]).to(like),
            returns_to_go=torch.as_tensor(memory.returns[:, -known:, None]).to(like),
            timesteps=torch.as_tensor(steps.clip(0, source.config.max_ep_len - 1)).to(like.device),
            attention_mask=torch.as_tensor(steps >= 0).to(like),
            return_dict=True,
        )
        said: Tensor = output.action_preds[:, -1]
        return said


def family() -> Any:
    """The class ``transformers.DecisionTransformerModel``.

    Raises:
        ImportError: The package transformers is missing.
    """
    try:
        from transformers import DecisionTransformerModel
    except ImportError as error:
        raise ImportError('models of Hugging Face need an extra: pip install "kbt_rl[huggingface]"') from error
    return DecisionTransformerModel


def _memory(state: State) -> Memory:
    if state is None:
        raise ValueError("state is None; pass the one that predict() returned")
    return state if isinstance(state, Memory) else Memory(*state)
