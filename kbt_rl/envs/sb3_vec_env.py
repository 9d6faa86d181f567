"""The vector form of the inverted pendulum behind Stable-Baselines3's VecEnv interface."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from kbt_rl.arguments import shown
from kbt_rl.envs.discrete import DiscreteInvertedPendulumVectorEnv
from kbt_rl.envs.plant import InvertedPendulumParams
from kbt_rl.envs.vector import InvertedPendulumVectorEnv, check_count

_VECTOR_FORMS = {
    f"{form.__module__}:{form.__name__}" for form in (InvertedPendulumVectorEnv, DiscreteInvertedPendulumVectorEnv)
}
_DYNAMICS = tuple(InvertedPendulumParams().dynamics)


class InvertedPendulumSB3VecEnv(VecEnv):
    """Thousands of plants for ``evaluate_policy``, PPO and all else that takes a Stable-Baselines3 ``VecEnv``.

    Finished sub-environments start again within the same step. The infos are those of a ``DummyVecEnv`` of monitored
    environments: ``terminal_observation``, ``TimeLimit.truncated``, ``is_success`` and, at the end, ``episode``.

    Args:
        env_id: ``kbt_rl/InvertedPendulum-v0`` or another id of this package.
        num_envs: Number of sub-environments.
        **kwargs: Further arguments of :class:`~kbt_rl.envs.InvertedPendulumVectorEnv`, such as ``pole_mass``.
    """

    def __init__(self, env_id: str, num_envs: int = 1, **kwargs: Any) -> None:
        num_envs = check_count(num_envs)
        if not isinstance(env_id, str):
            raise TypeError(f"env_id is {shown(env_id)}; expected an id such as 'kbt_rl/InvertedPendulum-v0'")
        try:
            spec = gym.spec(env_id)
        except gym.error.Error as error:
            raise ValueError(f"env_id is {env_id!r}, which is no id of an environment: {error}") from error
        if spec.vector_entry_point not in _VECTOR_FORMS:
            raise TypeError(f"{env_id} is not an inverted pendulum; use make_vec_env of Stable-Baselines3 for it")
        envs = gym.make_vec(env_id, num_envs=num_envs, autoreset_mode=AutoresetMode.SAME_STEP.value, **kwargs)
        assert isinstance(envs, InvertedPendulumVectorEnv)
        self._envs = envs
        super().__init__(num_envs, envs.single_observation_space, envs.single_action_space)
        self._actions = np.zeros((num_envs, 1), dtype=np.float32)
        self._returns = np.zeros(num_envs)
        self._lengths = np.zeros(num_envs, dtype=np.int64)
        self._start_time = time.time()

    def reset(self) -> npt.NDArray[np.float32]:
        """Start an episode in all sub-environments, with the seeds and options that were set for it."""
        observations, infos = self._envs.reset(seed=self._seeds, options=self._take_start())
        self.reset_infos = self._split(infos)
        self._reset_seeds()
        self._reset_options()
        self._returns[:] = 0.0
        self._lengths[:] = 0
        return observations

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Keep the actions, ``(n, 1)``, or ``(n,)`` if they are discrete, for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(
        self,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """Step all sub-environments.

        Returns:
            Observations ``(n, 4)``, rewards ``(n,)``, dones ``(n,)`` and a list of infos.
        """
        observations, rewards, terminated, truncated, vector_infos = self._envs.step(self._actions)
        self._returns += rewards
        self._lengths += 1
        dones = terminated | truncated
        infos = self._split(vector_infos)
        for info, timed_out in zip(infos, (truncated & ~terminated).tolist(), strict=True):
            info["TimeLimit.truncated"] = timed_out
        if dones.any():
            last_infos = self._split(vector_infos["final_info"])
            for index in np.flatnonzero(dones).tolist():
                self.reset_infos[index] = {key: infos[index].pop(key) for key in last_infos[index]}
                infos[index] |= last_infos[index]
                infos[index]["terminal_observation"] = vector_infos["final_obs"][index]
                infos[index]["episode"] = self._finish_episode(index)
        return observations, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Release resources."""
        self._envs.close()

    def get_images(self) -> Sequence[npt.NDArray[np.uint8] | None]:
        """Draw each sub-environment, ``(H, W, 3)`` each."""
        return self._envs.render() or [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of the single environment, such as ``params``, for each chosen sub-environment."""
        chosen = self._chosen(indices)
        if attr_name in _DYNAMICS:
            return [getattr(self._envs.params[index], attr_name) for index in chosen]
        if attr_name in ("params", "state", "np_random", "np_random_seed"):
            values = getattr(self._envs, attr_name)
            return [values[index] for index in chosen]
        value = getattr(self._envs, f"single_{attr_name}", None) or getattr(self._envs, attr_name)
        return [value for _ in chosen]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set one of the three parameters of the dynamics; there is nothing else to set."""
        if attr_name not in _DYNAMICS:
            raise AttributeError(f"cannot set {attr_name!r} of the sub-environments, only one of {list(_DYNAMICS)}")
        self._envs.set_dynamics(indices=self._chosen(indices), **{attr_name: value})

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call ``set_dynamics`` on the chosen sub-environments, with one value or one per chosen sub-environment."""
        if method_name != "set_dynamics":
            raise AttributeError(f"the sub-environments have no method {method_name!r}, only 'set_dynamics'")
        chosen = self._chosen(indices)
        self._envs.set_dynamics(*method_args, indices=chosen, **method_kwargs)
        return [None for _ in chosen]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Answer True for ``Monitor``, whose ``episode`` entry the infos have, and False for every other wrapper."""
        return [wrapper_class is Monitor for _ in self._chosen(indices)]

    def _chosen(self, indices: VecEnvIndices) -> list[int]:
        chosen: Iterable[int] = self._get_indices(indices)
        return [int(index) for index in chosen]

    def _take_start(self) -> dict[str, Any] | None:
        """The options set by ``set_options``, one dict per sub-environment, as options of the vector form."""
        if not any(self._options):
            return None
        if not all(options.keys() == {"state"} for options in self._options):
            raise ValueError(f"reset options must be {{'state': ...}} in every sub-environment, got {self._options}")
        return {"state": np.stack([options["state"] for options in self._options])}

    def _finish_episode(self, index: int) -> dict[str, Any]:
        """Monitor's summary of the episode that has just ended in one sub-environment."""
        summary = {
            "r": round(float(self._returns[index]), 6),
            "l": int(self._lengths[index]),
            "t": round(time.time() - self._start_time, 6),
        }
        self._returns[index], self._lengths[index] = 0.0, 0
        return summary

    def _split(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        """One dict per sub-environment of infos in Gymnasium's vector form."""
        success, cost = infos["is_success"].tolist(), infos["cost"].tolist()
        columns = [infos["dynamics"][name].tolist() for name in _DYNAMICS]
        return [
            {"is_success": s, "cost": c, "dynamics": dict(zip(_DYNAMICS, values, strict=True))}
            for s, c, *values in zip(success, cost, *columns, strict=True)
        ]
