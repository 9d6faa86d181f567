"""A decision transformer as an SB3 policy: contexts in, actions out; the posterior comes with ``policies``.

The context travels through the ``state`` argument of ``predict``; nothing of an episode is kept on ``self``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor

from kbt_rl.agents.actions import action_format
from kbt_rl.agents.fallback import Choice, Fallback
from kbt_rl.agents.learner_arguments import is_path
from kbt_rl.arguments import flag, instance, shown
from kbt_rl.files import sealed, unsealed, write_bytes
from kbt_rl.inference.checks import as_array
from kbt_rl.inference.loading import check_fits, load_whole
from kbt_rl.inference.transactions import with_writers_held
from kbt_rl.models.context import ContextWindow, advance_window, start_window
from kbt_rl.models.context import with_action as with_remembered
from kbt_rl.models.decision_transformer import DecisionTransformer, DecisionTransformerConfig

Array = npt.NDArray[Any]
Self = TypeVar("Self", bound="TransformerPolicy")

# In units of the observation space: beyond, float32 layers overflow and an action would be NaN.
LARGEST_OBSERVATION = 1e15


class TransformerPolicy(BasePolicy):
    """A decision transformer as an SB3 policy; the baseline acts with it.

    Args:
        observation_space: A flat, finite ``Box``.
        action_space: A flat ``Box``, or ``Discrete``, whose actions the transformer gives logits of.
        lr_schedule: Ignored; SB3 passes it to every policy.
        transformer: Size and context.
        observation_scale: What observations are divided by, ``(observation size,)``; 1 if None.

    Attributes:
        fallback: Who acts where the policy is too uncertain; None here, see ``DecisionTransformerPolicy``.
    """

    fallback: Fallback | None = None

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box | spaces.Discrete,
        lr_schedule: Schedule | None = None,
        *,
        transformer: DecisionTransformerConfig | None = None,
        observation_scale: npt.ArrayLike | None = None,
        **unknown: Any,
    ) -> None:
        _check_keywords(type(self).__name__, unknown)
        _check_box("observation space", observation_space)
        self.actions = action_format(action_space)
        super().__init__(observation_space, action_space)
        self.observation_size = observation_space.shape[0]
        self.action_size = self.actions.size
        if transformer is not None:
            instance("transformer", transformer, DecisionTransformerConfig)
        self.transformer_config = DecisionTransformerConfig() if transformer is None else transformer
        self.transformer = DecisionTransformer(self.observation_size, self.action_size, self.transformer_config)
        given = None if observation_scale is None else as_array(observation_scale, "the values of observation_scale")
        self._given_scale = None if given is None else given.astype(np.float32)
        if self._given_scale is not None:
            good = np.isfinite(self._given_scale) & (self._given_scale > 0)
            if self._given_scale.shape != (self.observation_size,) or not good.all():
                raise ValueError(
                    f"observation_scale is {self._given_scale}; expected {self.observation_size} positive numbers"
                )
            self.transformer.observation_scale.copy_(torch.from_numpy(self._given_scale))
        self.set_training_mode(False)  # torch's encoder rounds differently in training mode

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "transformer": self.transformer_config,
            "observation_scale": self._given_scale,
        }

    @property
    def feature_size(self) -> int:
        """Entries of what ``encode`` returns for a context."""
        return self.transformer_config.width

    def start(self, observations: Array) -> ContextWindow:
        """Contexts of episodes that start with ``observations``, ``(n, observation size)``."""
        observations = self.check_observations(observations)
        return start_window(observations, self.transformer_config.context_length, self.action_size)

    def advance(
        self, context: ContextWindow, observations: Array, episode_start: npt.NDArray[np.bool_]
    ) -> ContextWindow:
        """Contexts one step on; rows where ``episode_start`` is set begin anew."""
        self.check_context(context)
        return advance_window(context, self.check_observations(observations), episode_start)

    def encode(self, context: ContextWindow) -> Tensor:
        """Features of the newest step of each context, ``(n, feature_size)``: T1 of the paper, without gradient."""
        with torch.inference_mode():
            like = self.transformer.observation_scale  # the encoder may be cast, by .half() for one
            observations, actions = (torch.from_numpy(array).to(like) for array in context[:2])
            timesteps = torch.from_numpy(context.timesteps).to(like.device)
            return self.transformer.encode(observations, actions, timesteps)[:, -1]

    def act(self, features: Tensor) -> Array:
        """Mean actions for encoded contexts, ``(n, action size)``, unclipped float64; or probabilities."""
        with torch.inference_mode():
            scaled = self.transformer.linear(features) * self.transformer.action_scale
            actions: Array = self.actions.mean(scaled.double()).cpu().numpy()
            return actions

    def sample_actions(self, features: Tensor) -> Array:
        """What to act on when ``deterministic=False``: one-hot draws of discrete actions, else the mean once more."""
        means = self.act(features)
        return means if self.actions.link == "identity" else drawn(torch.from_numpy(means))

    def choose(self, context: ContextWindow, features: Tensor, deterministic: bool = True) -> Choice:
        """Actions of the environment in contexts that ``encode`` made ``features`` of, by whoever may act in each.

        Args:
            context: ``(n, ...)``, as ``start`` and ``advance`` return them.
            features: ``(n, width)``.
            deterministic: The mean if set, or the most probable of discrete actions; else a sample.
        """
        means = self.act(features) if deterministic else self.sample_actions(features)
        return Choice(self.clip(means), np.zeros(len(means), dtype=bool))

    def predict(
        self,
        observation: Array | dict[str, Array],
        state: tuple[Array, ...] | None = None,
        episode_start: Array | None = None,
        deterministic: bool = False,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Actions for observations, as SB3's recurrent policies do it.

        Args:
            observation: ``(observation size,)`` or ``(n, observation size)``.
            state: What the previous call returned; None at the start.
            episode_start: Rows whose episode begins with this observation, ``(n,)``; None for none.
            deterministic: The mean, or the most probable of discrete actions, if set; else a sample.

        Returns:
            Actions inside the action space, and the contexts that belong to them, a ``ContextWindow``.

        Raises:
            ValueError: An observation of the wrong shape, not finite or outside its space, or a state of another size.
        """
        if isinstance(observation, dict):
            raise ValueError("this policy takes flat observations; wrap the environment in FlattenObservation")
        self.set_training_mode(False)
        array = as_array(observation, "observations")
        batched = array[np.newaxis] if array.ndim == 1 else array
        self.check_size(batched)
        begins = flags("episode_start", np.zeros(len(batched), dtype=bool) if episode_start is None else episode_start)
        context = self.start(batched) if state is None else self.advance(_as_window(state), batched, begins)
        actions = self.choose(context, self.encode(context), flag("deterministic", deterministic)).actions
        context = self.with_action(context, actions)
        return (actions[0] if array.ndim == 1 else actions), context

    def clip(self, actions: Array) -> Array:
        """Means as actions of the space: cut to a ``Box``, in its dtype; the most probable of discrete ones."""
        return self.actions.decide(actions)

    def with_action(self, context: ContextWindow, actions: Array) -> ContextWindow:
        """The same context with the newest actions of the environment filled in."""
        return with_remembered(context, self.actions.remember(actions))

    def check_observations(self, observations: Array) -> Array:
        """Observations as ``(n, observation size)`` float32, or an error that says what came."""
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        with np.errstate(over="ignore"):  # what float32 does not hold is refused below
            array = as_array(observations, "observations").astype(np.float32, copy=False)
        self.check_size(array)
        low, high = space.low.astype(np.float32), space.high.astype(np.float32)  # as the observation is
        inside = (array >= low) & (array <= high) & (np.abs(array) <= LARGEST_OBSERVATION)
        if not inside.all():  # NaN fails the comparison too
            row = int(np.flatnonzero(~inside.all(axis=1))[0])
            raise ValueError(
                f"observation {array[row]} (row {row}) is not finite, absurdly large or outside the observation space "
                f"[{space.low}, {space.high}]; check the sensor, or widen the space"
            )
        return array

    def check_size(self, observations: Array) -> None:
        """Raise ValueError unless there are rows of observations of the right size."""
        if observations.ndim != 2 or observations.shape[1] != self.observation_size:
            raise ValueError(f"observations have shape {observations.shape}; expected (n, {self.observation_size})")

    def check_context(self, context: ContextWindow) -> None:
        """Raise ValueError unless the context has the shape of this policy's."""
        length = self.transformer_config.context_length
        for name, size in (("observations", self.observation_size), ("actions", self.action_size)):
            found = getattr(context, name).shape
            if found[1:] != (length, size):
                raise ValueError(f"the context's {name} have shape {found}; expected (n, {length}, {size})")

    def save(self, path: str | Path | io.BufferedIOBase) -> None:
        """SB3's ``save``, but a file is replaced as a whole and ends in the SHA-256 of its content.

        Killed at any moment, the process leaves the old file or the new one. PyTorch and SB3 read it as any other.

        Raises:
            RuntimeError: ``load`` would refuse the file; an old one is still there.
        """
        named = is_path(path, "write")
        content = with_writers_held(self, self._content)
        if named:
            write_bytes(path, content)  # type: ignore[arg-type]
        else:
            path.write(content)  # type: ignore[union-attr]

    def _content(self) -> bytes:
        """The file that ``save`` writes."""
        buffer = io.BytesIO()
        super().save(buffer)  # type: ignore[arg-type]  # torch writes to files as well
        content = sealed(buffer.getvalue())
        buffer.seek(0)
        check_fits(self, torch.load(buffer, map_location="cpu", weights_only=False)["state_dict"])
        return content

    @classmethod
    def load(cls: type[Self], path: str | Path | io.BufferedIOBase, device: torch.device | str = "auto") -> Self:
        """SB3's ``load`` of what ``save`` has written, once its content is found to be what was saved.

        Raises:
            ValueError: The file is damaged, or was written by another program or an older version.
        """
        content = Path(path).read_bytes() if is_path(path, "read") else path.read()  # type: ignore[arg-type, union-attr]
        return super().load(unsealed(content, path), device)  # type: ignore[arg-type]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over saved weights and buffers, all or none.

        Raises:
            RuntimeError: They are of another architecture, or a posterior is of another dtype; nothing has changed.
        """
        return load_whole(self, state_dict, strict, assign)

    def start_state(self, transformer: DecisionTransformer) -> dict[str, Any]:
        """The ``state_dict`` of this policy as it starts from a pre-trained transformer of its size."""
        return {f"transformer.{name}": value for name, value in transformer.state_dict().items()}

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        assert isinstance(observation, Tensor)
        context = self.start(observation.cpu().numpy())
        actions = self.choose(context, self.encode(context), deterministic).actions
        return torch.as_tensor(actions, device=self.device)


def drawn(probabilities: Tensor) -> Array:
    """One-hot rows ``(n, size)`` of actions drawn with these probabilities."""
    classes = torch.multinomial(probabilities, 1).squeeze(-1)
    drawn: Array = torch.nn.functional.one_hot(classes, probabilities.shape[-1]).double().cpu().numpy()
    return drawn


def _as_window(state: tuple[Array, ...]) -> ContextWindow:
    if not isinstance(state, tuple) or len(state) != len(ContextWindow._fields):
        found = f"has {len(state)} arrays" if isinstance(state, tuple) else f"is {shown(state)}"
        raise ValueError(f"state {found}; expected the ContextWindow that predict returned")
    kinds = [getattr(part, "dtype", np.dtype(object)).kind for part in state]
    if not all(kind in "fiu" for kind in kinds) or any(isinstance(part, np.ma.MaskedArray) for part in state):
        raise ValueError(f"state is {shown(state)}; expected the ContextWindow that predict returned")
    return ContextWindow(*state)


def flags(name: str, values: Any) -> npt.NDArray[np.bool_]:
    """One flag a row, ``(n,)``; numbers count where they are 0 or 1.

    Raises:
        TypeError: They are no flags.
    """
    array = np.atleast_1d(as_array(values, f"the flags of {name}"))
    if not ((array == 0) | (array == 1)).all():
        raise TypeError(f"{name} is {shown(values)}; expected True or False for each row")
    return array.astype(bool)


def _check_keywords(policy: str, unknown: dict[str, Any]) -> None:
    if "use_sde" in unknown:  # what PPO and A2C pass to every policy
        raise TypeError(
            f"{policy} has no value function and no log-probabilities, which PPO and A2C need; use it with KBT or "
            "WarmStart, and an ActorCriticPolicy with them"
        )
    if unknown:
        raise TypeError(f"{policy} takes no argument {', '.join(map(repr, unknown))}")


def _check_box(name: str, space: spaces.Space[Any]) -> None:
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"the {name} is {space}; this policy needs a Box with one axis (see FlattenObservation)")
