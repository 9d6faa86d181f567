"""The expert: a linear-quadratic regulator of the plant, as a Stable-Baselines3 policy."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecEnv

from kbt_rl.agents.levels import ForceLevels
from kbt_rl.agents.lqr_gain import check_positive, lqr_gain
from kbt_rl.arguments import flag, instance, shown
from kbt_rl.envs.inverted_pendulum import real_array
from kbt_rl.envs.plant import FloatArray, InvertedPendulumParams

AnyEnv = gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv
Params = tuple[InvertedPendulumParams, ...]
# Two levels chatter about the plane where the regulator's force is 0. The state slides along it to the origin, with
# R = 1 too slowly to arrive within 10 s from every start.
_DISCRETE_FORCE_COST = 0.1


class LQRExpert(BasePolicy):
    """Linear state feedback ``action = -gain @ observation / max_force``; usually made by :meth:`for_env`.

    With discrete actions it chooses the force level nearest to ``-gain @ observation``, and its labels are
    distributions over the levels, see :class:`~kbt_rl.agents.levels.ForceLevels`.

    Args:
        observation_space: ``Box`` of shape (4,).
        action_space: ``Box`` of shape (1,), or ``Discrete`` with one action a force level.
        gain: ``(1, 4)``, newtons per unit of the state; the force is minus the gain times the state.
        max_force: Newtons that an action of 1 stands for.
        params: The plant that the gain is for, if known.
        levels: The force levels of discrete actions; None for a continuous force.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        gain: npt.ArrayLike,
        max_force: float,
        params: InvertedPendulumParams | None = None,
        levels: ForceLevels | None = None,
    ) -> None:
        for name, space in (("observation_space", observation_space), ("action_space", action_space)):
            instance(name, space, spaces.Space)
        if params is not None:
            instance("params", params, InvertedPendulumParams)
        if levels is not None:
            instance("levels", levels, ForceLevels)
        _check_spaces(observation_space, action_space, levels)
        super().__init__(observation_space, action_space)
        self.levels = levels
        self._gain = _check_gain(gain)
        self._params = params
        self._tracker: _GainTracker | None = None
        self.max_force = check_positive("max_force", max_force)

    @classmethod
    def for_env(
        cls,
        env: AnyEnv,
        Q: npt.ArrayLike | None = None,
        R: npt.ArrayLike | None = None,
        *,
        tracking: bool = False,
        temperature: float | None = None,
    ) -> LQRExpert:
        """Make the expert of an environment's plant.

        Args:
            env: An inverted pendulum: a Gymnasium environment or vector environment, wrapped or not, or a VecEnv of
                Stable-Baselines3. It must give unscaled observations.
            Q: State cost, see :func:`lqr_gain`.
            R: Force cost, see :func:`lqr_gain`; 1 by default, 0.1 with discrete actions.
            tracking: False: the gain is for the parameters that the environment has now. True: the expert holds a
                reference to the environment, looks at its parameters at every call and solves again where they have
                changed; the rows of a batch as long as ``num_envs`` may then have different plants.
            temperature: Of the labels with discrete actions, N: 0 for the nearest level alone, None for 4/3 of the
                largest level, which teaches an online learner most.

        Returns:
            The expert. Saving one that tracks saves its current gain.
        """
        if not isinstance(env, (gym.Env, VectorEnv, VecEnv)):
            raise TypeError(f"env is {shown(env)}; expected an inverted pendulum of Gymnasium or a VecEnv of them")
        tracking = flag("tracking", tracking)
        _check_wrappers(env)
        observation_space, action_space = _single_spaces(env)
        levels = _levels(env, action_space, temperature)
        tracker = _GainTracker(env, Q, _DISCRETE_FORCE_COST if R is None and levels is not None else R)
        max_force = _common(tuple(params.max_force for params in tracker.params), "max_force")
        if tracking:
            expert = cls(observation_space, action_space, tracker.gains[0], max_force, levels=levels)
            expert._tracker = tracker
            return expert
        params = _common(tracker.params, "parameters")
        return cls(observation_space, action_space, tracker.gains[0], max_force, params, levels)

    @property
    def tracking(self) -> bool:
        """Whether the expert follows the parameters of the environment it was made for."""
        return self._tracker is not None

    @property
    def params(self) -> InvertedPendulumParams | None:
        """The plant that the gain is for; of a tracking expert the current one, which must be one for all."""
        return self._params if self._tracker is None else _common(self._tracker.params, "parameters")

    @property
    def gain(self) -> FloatArray:
        """The gain, ``(1, 4)``: force = -gain @ state, in newtons. Of a tracking expert the current one."""
        if self._tracker is None:
            return np.array(self._gain)
        gains = self._tracker.gains
        _common(self._tracker.solved_for, "parameters")
        return np.array(gains[0])

    def label(self, observations: npt.ArrayLike) -> FloatArray:
        """The expert's actions, not clipped to the action space, or the probabilities of discrete ones, in float64.

        Args:
            observations: ``(n, 4)`` or ``(4,)``.

        Returns:
            ``(n, 1)`` or ``(1,)``; with discrete actions ``(n, levels)`` or ``(levels,)``, each row a distribution.

        Raises:
            ValueError: The observations have another shape or are not finite.
        """
        forces = self._forces(observations)
        return forces / self.max_force if self.levels is None else self.levels.label(forces[..., 0])

    def _forces(self, observations: npt.ArrayLike) -> FloatArray:
        """The regulator's forces, ``(n, 1)`` or ``(1,)``, in newtons."""
        states = _check_observations(observations)
        forces: FloatArray = -np.einsum("...ij,...j->...i", self._gains_for(states), states)
        return forces

    def predict(
        self,
        observation: npt.NDArray[Any] | dict[str, npt.NDArray[Any]],
        state: tuple[npt.NDArray[Any], ...] | None = None,
        episode_start: npt.NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[Any], tuple[npt.NDArray[Any], ...] | None]:
        """The expert's actions, clipped to the action space and in its dtype; of discrete actions the nearest level.

        Args:
            observation: ``(n, 4)`` or ``(4,)``.
            state: Passed through: the expert has no memory.
            episode_start: Not used.
            deterministic: Not used: the expert always is.

        Returns:
            Actions, ``(n, 1)`` or ``(1,)`` (discrete ones ``(n,)`` or ``()``), and ``state``.
        """
        if isinstance(observation, tuple | dict):
            raise ValueError(
                f"the expert takes an array, got a {type(observation).__name__}: Gymnasium's reset() returns "
                "(observation, info), of which predict takes the first"
            )
        if self.levels is not None:
            return self.levels.nearest(self._forces(observation)[..., 0]), state
        box = self.action_space
        assert isinstance(box, spaces.Box)
        return np.clip(self.label(observation), box.low, box.high).astype(box.dtype), state

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if not isinstance(observation, th.Tensor):
            raise ValueError(f"the expert takes a tensor, got a {type(observation).__name__}")
        forces = self._forces(observation.detach().cpu().numpy())
        if self.levels is not None:
            return th.as_tensor(self.levels.nearest(forces[..., 0]), device=observation.device)
        return th.as_tensor((forces / self.max_force).astype(self.action_space.dtype), device=observation.device)

    def _gains_for(self, states: FloatArray) -> FloatArray:
        """Gain of each row, ``(n, 1, 4)``, or the one for all, ``(1, 4)``."""
        if self._tracker is None:
            return self._gain
        gains = self._tracker.gains
        plants = set(self._tracker.solved_for)
        if len(plants) == 1:
            return np.asarray(gains[0])
        if states.shape != (len(gains), 4):
            raise ValueError(
                f"the {len(gains)} sub-environments have {len(plants)} different plants, so one observation of each is "
                f"needed, shape ({len(gains)}, 4); got {states.shape}"
            )
        return gains

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "gain": self.gain,
            "max_force": self.max_force,
            "params": self.params,
            "levels": self.levels,
        }


class _GainTracker:
    """Gains for the current plants of an environment, solved again only when a plant has changed."""

    def __init__(self, env: AnyEnv, Q: npt.ArrayLike | None, R: npt.ArrayLike | None) -> None:
        self._env, self._Q, self._R = env, Q, R
        self.solved_for: Params = ()
        self._gains = np.empty((0, 1, 4))

    @property
    def params(self) -> Params:
        """The current plant of each sub-environment."""
        return _current_params(self._env)

    @property
    def gains(self) -> FloatArray:
        """The gain of each sub-environment, ``(num_envs, 1, 4)``."""
        params = self.params
        if params != self.solved_for:
            solved = {plant: lqr_gain(plant, self._Q, self._R) for plant in set(params)}
            self._gains, self.solved_for = np.stack([solved[plant] for plant in params]), params
        return self._gains


def _current_params(env: AnyEnv) -> Params:
    try:
        if isinstance(env, VecEnv):
            found: Any = env.get_attr("params")
        elif isinstance(env, VectorEnv):
            base: Any = env.unwrapped
            found = base.get_attr("params") if hasattr(base, "get_attr") else base.params
        else:
            found = [env.get_wrapper_attr("params")]
    except AttributeError as error:
        raise TypeError(f"the expert needs an inverted pendulum, whose .params it reads; {env} has none") from error
    if not all(isinstance(params, InvertedPendulumParams) for params in found):
        raise TypeError(f"the expert needs an inverted pendulum; the .params of {env} are {found}")
    return tuple(found)


def _single_spaces(env: AnyEnv) -> tuple[spaces.Space[Any], spaces.Space[Any]]:
    if isinstance(env, VectorEnv):
        return env.single_observation_space, env.single_action_space
    return env.observation_space, env.action_space


def _check_wrappers(env: AnyEnv) -> None:
    """Raise ValueError for a wrapper by which states or actions are in other units than the plant's."""
    from gymnasium import wrappers

    changing = (wrappers.TransformAction, wrappers.TransformObservation, wrappers.NormalizeObservation)
    if isinstance(env, VecEnv):
        found = [kind.__name__ for kind in changing if any(env.env_is_wrapped(kind))]
    else:
        found, inner = [], env
        while isinstance(inner, gym.Wrapper):
            if isinstance(inner, changing) and not isinstance(inner, wrappers.ClipAction):
                found.append(type(inner).__name__)
            inner = inner.env
    if found:
        raise ValueError(
            f"the environment is wrapped in {found[0]}, so that its states or actions are in other units than the "
            "plant's; make the expert for the environment inside, and scale its labels yourself"
        )


def _levels(env: AnyEnv, action_space: spaces.Space[Any], temperature: float | None) -> ForceLevels | None:
    """The force levels of an environment with discrete actions, None if a force is continuous."""
    if not isinstance(action_space, spaces.Discrete):
        if temperature is not None:
            raise ValueError(
                f"temperature is for discrete actions and the action space is {action_space}; leave it out"
            )
        return None
    try:
        if isinstance(env, VecEnv):
            forces: Any = _common(tuple(env.get_attr("forces")), "forces")
        else:
            base: Any = env.unwrapped
            forces = _common(base.get_attr("forces"), "forces") if hasattr(base, "get_attr") else base.forces
    except AttributeError as error:
        raise TypeError(f"the expert needs an inverted pendulum, whose .forces it reads; {env} has none") from error
    return ForceLevels.soft(forces) if temperature is None else ForceLevels(forces, temperature)


def _check_spaces(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], levels: ForceLevels | None
) -> None:
    fits = isinstance(action_space, spaces.Box) and action_space.shape == (1,) and levels is None
    if levels is not None:
        fits = isinstance(action_space, spaces.Discrete) and action_space == spaces.Discrete(len(levels.forces))
    if observation_space.shape != (4,) or not fits:
        raise ValueError(
            "the expert observes [x, x_dot, theta, theta_dot] and acts by one force: it needs boxes of shapes (4,) and "
            f"(1,), or Discrete actions and as many levels, got {observation_space}, {action_space} and {levels}"
        )


def _common(values: tuple[Any, ...], what: str) -> Any:
    if len(set(values)) > 1:
        raise ValueError(
            f"the sub-environments have different {what}, {sorted(set(values), key=str)}, and no single gain: use "
            "for_env(..., tracking=True), which gives each row its own, or one expert per plant"
        )
    return values[0]


def _check_gain(gain: npt.ArrayLike) -> FloatArray:
    values: FloatArray = real_array("the gain", gain).copy()
    if values.shape != (1, 4) or not np.all(np.isfinite(values)):
        raise ValueError(f"the gain must be finite and of shape (1, 4), got shape {values.shape}: {gain!r}")
    return values


def _check_observations(observations: npt.ArrayLike) -> FloatArray:
    states = real_array("observations", observations)
    if states.ndim not in (1, 2) or states.shape[-1] != 4:
        raise ValueError(f"observations must have shape (n, 4) or (4,), got {states.shape}")
    if not np.all(np.isfinite(states)):
        raise ValueError(f"observations must be finite, got {states[~np.isfinite(states)]} among {states.shape}")
    return states
