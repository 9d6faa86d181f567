"""A trained policy of the user's own with a Bayesian last layer: it acts as before until it has a label.

The network is frozen and stays the user's object. A tap hears what its last layer sees and answers in the layer's
place, during the calls of this class only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from torch import Tensor

from kbt_rl.agents.actions import action_format
from kbt_rl.agents.fallback import Choice, Fallback, usable
from kbt_rl.agents.moments import ActionMoments
from kbt_rl.arguments import flag, shown
from kbt_rl.inference.checks import as_array
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.model_average import ModelAverage
from kbt_rl.inference.types import UpdateInfo
from kbt_rl.networks.base import Array, Call, Network, Observation, State, finite
from kbt_rl.networks.links import LabelKind
from kbt_rl.networks.normaliser import Normaliser
from kbt_rl.networks.tap import Tap

Head = BayesianHead | ModelAverage


class Start(NamedTuple):
    """What the head starts from, besides the layer itself.

    Attributes:
        feature_mean: ``(d,)``.
        feature_scale: ``(d,)``.
        target_scale: Unit of each output, ``(o,)``.
        spread: Sum of the variances of the scaled features.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    target_scale: Tensor
    spread: float


class Glimpse(NamedTuple):
    """What a policy saw in one step of ``n`` episodes.

    Attributes:
        newest: Observations, ``(n, ...)``, or a dict of them.
        features: ``(n, d)``.
        state: Of a recurrent policy, after this step.
    """

    newest: Any
    features: Tensor
    state: State

    @property
    def episodes(self) -> int:
        """``n``."""
        return len(self.features)

    def rows(self, picked: Any) -> Glimpse:
        """Those of some episodes; without the state, which is of all."""
        if isinstance(self.newest, dict):
            newest: Any = {name: value[picked] for name, value in self.newest.items()}
        else:
            newest = self.newest[picked]
        return Glimpse(newest, self.features[picked], None)


def arrays(observation: Any) -> Any:
    """Observations as arrays.

    Raises:
        TypeError: They are not real numbers, or masked.
        ValueError: Their rows differ in length.
    """
    if isinstance(observation, dict):
        return {name: as_array(values, f"observation[{name!r}]") for name, values in observation.items()}
    return as_array(observation, "observation")


class TappedPolicy:
    """A frozen policy whose last linear layer is a Gaussian posterior: it acts, predicts and learns.

    ``AdaptedPolicy`` adds ``learn``, files, ``bake`` and ``detach``.

    Args:
        model: The user's object.
        network: What is known of it.
        tap: On the network's last layer.
        head: The posterior over that layer.
        start: What it starts from.
        normaliser: Of observations; None if the network takes them as they are.

    Attributes:
        fallback: Who acts where the policy is too uncertain, see ``Fallback``; None for nobody.
        masks_from: Where ``learn`` gets action masks.
    """

    fallback: Fallback | None = None
    masks_from: Callable[[], Array] | None = None

    def __init__(
        self, model: Any, network: Network, tap: Tap, head: Head, start: Start, normaliser: Normaliser | None = None
    ) -> None:
        self.model, self.network, self.head, self.start_units = model, network, head, start
        self.normaliser = normaliser
        self._tap: Tap | None = tap
        self._features: Tensor | None = None  # of the last prediction
        self.observation_space, self.action_space = network.observation_space, network.action_space
        self.reset()

    # ------------------------------------------------------------------ acting

    def predict(
        self,
        observation: Observation,
        state: State = None,
        episode_start: Array | None = None,
        deterministic: bool = False,
        action_masks: Array | None = None,
    ) -> tuple[Array, State]:
        """Actions of the adapted policy, in the form of SB3.

        Args:
            observation: One, or rows of them; not normalised if the policy has its ``VecNormalize``.
            state: What the previous call of a recurrent policy returned; None at the start.
            episode_start: Rows whose episode begins with this observation.
            deterministic: The policy's mean action if set; else with the noise that it was trained to act with.
            action_masks: Of MaskablePPO.

        Returns:
            Actions, and the policy's next state.
        """
        deterministic = flag("deterministic", deterministic)
        call = Call(self._normalised(observation), state, episode_start, deterministic, action_masks)
        heard = self._attached().hear(lambda: self.network.run(call), self._answer)
        features, (actions, next_state) = self.network.rows(heard.features), heard.result
        if self.fallback is not None:
            taken_over = self.fallback.exceeded(self._deviation(features))
            if taken_over.any():
                single = self.network.is_single(observation)
                rows = self._batched(observation) if single else observation
                actions = np.array(actions[np.newaxis] if single else actions)
                actions[taken_over] = self._of_fallback(rows, taken_over)
                next_state = self.network.with_action(next_state, actions)
                actions = actions[0] if single else actions
        self._features = features
        return actions, next_state

    def predict_moments(
        self, observation: Observation | None, state: State = None, episode_start: Array | None = None
    ) -> ActionMoments:
        """What action a teacher would take, and how sure that is: see ``ActionMoments``, of actions without bounds.

        Args:
            observation: One, or rows of them; None for those of the last ``predict``.
            state: Of a recurrent policy, before this observation.
            episode_start: See ``predict``.
        """
        prediction = self.head.predict(self._seen(observation, state, episode_start))
        mean, epistemic, aleatoric = (part.cpu().numpy() for part in prediction)
        return ActionMoments(*self.network.link.moments(mean, epistemic, aleatoric))

    def epistemic_std(
        self, observation: Observation | None, state: State = None, episode_start: Array | None = None
    ) -> Array:
        """Largest standard deviation over the outputs, of what the weights do not know, ``(n,)``; see ``predict``."""
        return self._deviation(self._seen(observation, state, episode_start))

    def set_fallback(self, fallback: Fallback | None) -> None:
        """Let a controller act wherever the policy is too uncertain; None for nobody. No file holds it.

        Raises:
            TypeError: The controller is neither a policy nor callable.
            ValueError: It was made for other spaces.
        """
        self.fallback = usable(fallback, self.observation_space, self.action_space)

    # ------------------------------------------------------------------ learning

    def update(
        self,
        observation: Observation | None,
        label: Any,
        kind: LabelKind = "action",
        state: State = None,
        episode_start: Array | None = None,
    ) -> UpdateInfo:
        """Learn from what would have been right: one closed-form update.

        Args:
            observation: One, or rows of them; None for those of the last ``predict``.
            label: An ``action``, in the action's shape or with a row for each observation; an ``output`` of the last
                layer of a teacher; or ``probabilities`` of discrete actions. NaN where there is none.
            kind: Which of these.
            state: Of a recurrent policy, before this observation.
            episode_start: See ``predict``.

        Returns:
            What the update saw; ``labels`` is 0 if there was nothing to learn.

        Raises:
            ValueError: Wrong shape or kind, or not finite; nothing has changed.
            UpdateError: The result would not be a proper posterior; nothing has changed.
        """
        features = self._seen(observation, state, episode_start)
        return self.head.update(features, self.targets(features, label, kind))

    def targets(self, features: Tensor, label: Any, kind: LabelKind) -> npt.NDArray[np.float64]:
        """A label as targets of the last layer's outputs ``(n, o)``, NaN where there is nothing to learn."""
        outputs = self.head.mean_outputs(features).cpu().numpy()
        return self.network.link.label(label, kind, outputs, self.start_units.target_scale.cpu().numpy())

    def rollback(self, n: int = 1) -> int:
        """Take back the last ``n`` updates; see ``BayesianHead.rollback``. Needs ``adapt(..., history=...)``."""
        return self.head.rollback(n)

    def reset(self) -> None:
        """Forget what was learned: the policy acts as it was trained."""
        weight, bias = self.network.linear()
        padded = torch.nn.functional.pad(weight, (0, self.head.in_features - weight.shape[1]))
        given: dict[str, Any] = self.start_units._asdict()
        if isinstance(self.head, BayesianHead):
            del given["spread"]
        self.head.reset(padded, bias, **given)

    @property
    def tapped(self) -> tuple[torch.nn.Linear, ...]:
        """The last layer, and those whose inputs the head sees besides."""
        tap = self._attached()
        return (tap.layer, *tap.skipped)

    # ------------------------------------------------------------------ what the loop and the callbacks ask

    @property
    def heads(self) -> tuple[Head]:
        """The posterior, as of a model with one."""
        return (self.head,)

    @property
    def feature_size(self) -> int:
        """See ``OnlinePolicy``."""
        return self.head.in_features

    @property
    def observation_size(self) -> int:
        """See ``OnlinePolicy``."""
        return int(np.prod(self.observation_space.shape or ()))

    @property
    def action_size(self) -> int:
        """See ``OnlinePolicy``."""
        return self.network.link.outputs

    def start(self, observations: Observation) -> Glimpse:
        """See ``OnlinePolicy``."""
        return self._glimpse(observations, None, None)

    def advance(self, context: Glimpse, observations: Observation, episode_start: Array) -> Glimpse:
        """See ``OnlinePolicy``."""
        return self._glimpse(observations, context.state, episode_start)

    def with_action(self, context: Glimpse, actions: Array) -> Glimpse:
        """See ``OnlinePolicy``."""
        return context._replace(state=self.network.with_action(context.state, actions))

    def encode(self, context: Glimpse) -> Tensor:
        """See ``OnlinePolicy``."""
        return context.features

    def choose(self, context: Glimpse, features: Tensor, deterministic: bool = True) -> Choice:
        """See ``OnlinePolicy``; always the mean action."""
        masks = None if self.masks_from is None else self.masks_from()
        actions = self.network.link.decide(self.head.mean_outputs(features).cpu().numpy(), masks)
        taken_over = np.zeros(len(actions), dtype=bool)
        if self.fallback is not None:
            taken_over = self.fallback.exceeded(self._deviation(features))
            if taken_over.any():
                actions[taken_over] = self._of_fallback(context.newest, taken_over)
        return Choice(actions, taken_over)

    # ------------------------------------------------------------------ parts

    def _attached(self) -> Tap:
        if self._tap is None:
            raise RuntimeError("this policy was detached from its network; call adapt() again")
        return self._tap

    def _answer(self, features: Tensor, output: Tensor) -> Tensor:
        return self.network.replaced(output, self.head.mean_outputs(features))

    def _normalised(self, observation: Any) -> Any:
        if isinstance(observation, dict) != isinstance(self.observation_space, spaces.Dict):
            raise TypeError(f"the observation is {shown(observation)}; expected one of {self.observation_space}")
        numbers = arrays(observation)
        return finite(numbers if self.normaliser is None else self.normaliser(numbers))

    def _deviation(self, features: Tensor) -> Array:
        variance = self.head.epistemic_variance(features)
        each = (variance.sqrt() * self.head.target_scale).reshape(-1, self.network.chunk * variance.shape[-1])
        deviation: Array = each.amax(-1).cpu().numpy()
        return deviation

    def _of_fallback(self, observations: Any, taken_over: npt.NDArray[np.bool_]) -> Array:
        """Actions of the fallback controller in some rows."""
        assert self.fallback is not None
        means = self.fallback.means(observations, taken_over, self.observation_space, self.action_space)
        return action_format(self.action_space).decide(means)

    def _batched(self, observation: Any) -> Any:
        if isinstance(observation, dict):
            return {name: np.asarray(value)[np.newaxis] for name, value in observation.items()}
        return np.asarray(observation)[np.newaxis]

    def _glimpse(self, observations: Observation, state: State, episode_start: Array | None) -> Glimpse:
        call = Call(self._normalised(observations), state, episode_start)
        heard = self._attached().hear(lambda: self.network.run(call))
        return Glimpse(copy.copy(observations), self.network.rows(heard.features), heard.result[1])

    def _seen(self, observation: Observation | None, state: State, episode_start: Array | None) -> Tensor:
        """Features of observations ``(n, d)``."""
        if observation is None:
            if self._features is None:
                raise ValueError("there was no prediction yet whose observation could be meant; pass the observation")
            return self._features
        if self.network.recurrent and state is None and episode_start is None:
            raise ValueError(
                "a recurrent policy sees more than an observation: pass None for that of the last predict(), or its "
                "state (and episode_start=True at the start of an episode)"
            )
        return self._glimpse(observation, state, episode_start).features
