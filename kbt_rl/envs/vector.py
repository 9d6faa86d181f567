"""The inverted pendulum in vector form: thousands of plants stepped by array operations."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from kbt_rl.arguments import is_flat, shown, whole
from kbt_rl.envs.inverted_pendulum import (
    check_action,
    check_render_mode,
    check_seed,
    check_start,
    real_array,
    sample_start,
    symmetric_box,
)
from kbt_rl.envs.plant import (
    DT,
    LABEL_BOX,
    NOMINAL,
    OBSERVATION_BOX,
    BoolArray,
    FloatArray,
    InvertedPendulumParams,
    Observation,
    PlantArrays,
    has_ended,
    is_settled,
    observe,
    rk4_step,
    stage_cost,
)

Parameter = float | FloatArray | Sequence[float]
# Their states and infos take some hundred bytes each.
_MOST_ENVS = 10**8


class InvertedPendulumVectorEnv(VectorEnv[Observation, npt.NDArray[np.float32], npt.NDArray[Any]]):
    """Many :class:`~kbt_rl.envs.InvertedPendulumEnv` as one, made by ``gymnasium.make_vec(id, num_envs)``.

    Agrees with a ``SyncVectorEnv`` of the single environment to rounding: observations, rewards, ends, infos, and the
    start states for the same seeds, because every sub-environment has its own random generator.

    Args:
        num_envs: Number of sub-environments, n.
        max_episode_steps: Steps after which an episode is truncated; -1 or None for no limit.
        render_mode: None or ``"rgb_array"``.
        autoreset_mode: ``NEXT_STEP``: the step after the end of an episode ignores its action, whatever it is, and
            returns the start of the next one. ``SAME_STEP``: the ending step does, with the last observation in
            ``info["final_obs"]`` and the last info in ``info["final_info"]``.
        cart_mass: kg, one value for all or ``(n,)``.
        pole_mass: kg, one value for all or ``(n,)``.
        pole_half_length: m, one value for all or ``(n,)``.
        max_force: N, for all.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": round(1 / DT),
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }
    label_space: ClassVar[spaces.Box] = symmetric_box(LABEL_BOX)
    #: Tells it from other environments, through wrappers and workers too, whose ``params`` are something else.
    is_inverted_pendulum: ClassVar[bool] = True

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int | None = 500,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        cart_mass: Parameter = NOMINAL.cart_mass,
        pole_mass: Parameter = NOMINAL.pole_mass,
        pole_half_length: Parameter = NOMINAL.pole_half_length,
        max_force: float = NOMINAL.max_force,
    ) -> None:
        num_envs = check_count(num_envs)
        check_render_mode(render_mode, self.metadata)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.max_episode_steps = _check_step_limit(max_episode_steps)
        self.autoreset_mode = _check_autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = symmetric_box(OBSERVATION_BOX)
        self.single_action_space = symmetric_box((1.0,))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self._params: tuple[InvertedPendulumParams, ...] = (InvertedPendulumParams(max_force=max_force),) * num_envs
        self.set_dynamics(cart_mass=cart_mass, pole_mass=pole_mass, pole_half_length=pole_half_length)
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._seeds: list[int] = [-1] * num_envs
        self._state: FloatArray | None = None
        self._force = np.zeros(num_envs)
        self._steps = np.zeros(num_envs, dtype=np.int64)
        self._done = np.zeros(num_envs, dtype=np.bool_)

    @property
    def params(self) -> tuple[InvertedPendulumParams, ...]:
        """The current plant of each sub-environment."""
        return self._params

    @property
    def state(self) -> FloatArray:
        """A copy of the current states in full precision, ``(n, 4)``."""
        return np.array(self._current_state())

    @property  # type: ignore[misc]  # the base class has one generator, which can be set
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The random generator of each sub-environment."""
        return tuple(self._generator(index) for index in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each sub-environment's generator."""
        return tuple(self._seeds[index] for index in range(self.num_envs) if self._generator(index))

    def set_dynamics(
        self,
        *,
        indices: Sequence[int] | None = None,
        cart_mass: Parameter | None = None,
        pole_mass: Parameter | None = None,
        pole_half_length: Parameter | None = None,
    ) -> None:
        """Change plants from the next step on, until called again; parameters left out keep their value.

        Args:
            indices: The k sub-environments to change; all by default.
            cart_mass: kg, one value or ``(k,)``.
            pole_mass: kg, one value or ``(k,)``.
            pole_half_length: m, one value or ``(k,)``.
        """
        chosen = range(self.num_envs) if indices is None else _check_indices(indices, self.num_envs)
        values = {"cart_mass": cart_mass, "pole_mass": pole_mass, "pole_half_length": pole_half_length}
        columns = {name: _per_env(name, value, len(chosen)) for name, value in values.items() if value is not None}
        params = list(self._params)
        for row, index in enumerate(chosen):
            params[index] = replace(params[index], **{name: column[row] for name, column in columns.items()})
        self._params = tuple(params)  # all are valid: nothing has changed before
        self._plant = PlantArrays(*(np.array([getattr(p, name) for p in params]) for name in PlantArrays._fields))

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode in all sub-environments.

        Args:
            seed: An int for the seeds ``seed, seed + 1, ...``, or one per sub-environment, None keeping its generator.
            options: ``{"state": ...}`` starts at that state, ``(4,)`` or ``(n, 4)``, instead of random ones.

        Returns:
            Observations ``(n, 4)`` and infos.
        """
        start = check_start(options, (self.num_envs, 4))
        self._seed(seed)
        everywhere = np.ones(self.num_envs, dtype=np.bool_)
        self._state = np.zeros((self.num_envs, 4))
        self._restart(everywhere)
        if start is not None:
            self._state = start
        return observe(self._state), self._infos(np.zeros(self.num_envs), everywhere)

    def step(self, actions: npt.ArrayLike) -> tuple[Observation, FloatArray, BoolArray, BoolArray, dict[str, Any]]:
        """Hold one force per sub-environment for 0.02 s.

        Args:
            actions: ``(n, 1)``, clipped to [-1, 1]; NaN or anything else of this shape where an episode only starts.

        Returns:
            Observations ``(n, 4)``, rewards, terminations, truncations, each ``(n,)``, and infos.
        """
        state = self._current_state()
        self._force = self._forces_of(actions, self._done)
        cost = stage_cost(state, self._force)
        reward = 1.0 / (1.0 + cost)
        self._state = rk4_step(state, self._force, self._plant)
        self._steps += 1
        terminated = has_ended(self._state)
        truncated = self._steps >= self.max_episode_steps
        cost = cost * DT

        everywhere = np.ones(self.num_envs, dtype=np.bool_)
        if self.autoreset_mode == AutoresetMode.SAME_STEP:
            done = terminated | truncated
            final = self._final_infos(cost, done) if done.any() else {}
            self._restart(done)
            infos = {**final, **self._infos(np.where(done, 0.0, cost), everywhere)}
            return observe(self._state), reward, terminated, truncated, infos

        waiting = self._done  # these rows start an episode in this step, whatever the action
        self._restart(waiting)
        terminated, truncated = terminated & ~waiting, truncated & ~waiting
        self._done = terminated | truncated
        infos = self._infos(np.where(waiting, 0.0, cost), everywhere)
        return observe(self._state), np.where(waiting, 0.0, reward), terminated, truncated, infos

    def render(self) -> tuple[npt.NDArray[np.uint8], ...] | None:
        """Draw each sub-environment, ``(H, W, 3)`` each."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a mode: pass render_mode='rgb_array' to gymnasium.make_vec")
            return None
        from kbt_rl.envs.rendering import draw

        rows = zip(self._current_state(), self._force, self._params, self._steps, strict=True)
        return tuple(draw(state, force, params, time=steps * DT) for state, force, params, steps in rows)

    def _current_state(self) -> FloatArray:
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before step(), render() or reading the state")
        return self._state

    def _forces_of(self, actions: npt.ArrayLike, ignored: BoolArray) -> FloatArray:
        """The forces in newtons, ``(n,)``, that actions stand for; 0 in the rows ``ignored``."""
        values = real_array("the action", actions)
        if values.shape == (self.num_envs, 1):
            values = np.where(ignored[:, np.newaxis], 0.0, values)
        return self._params[0].max_force * check_action(values, (self.num_envs, 1))[:, 0]

    def _generator(self, index: int) -> np.random.Generator:
        generator = self._generators[index]
        if generator is None:
            generator, self._seeds[index] = seeding.np_random()
            self._generators[index] = generator
        return generator

    def _seed(self, seed: int | Sequence[int | None] | None) -> None:
        if seed is None:
            return
        if isinstance(seed, (list, tuple, np.ndarray)):
            seeds = [check_seed(value) for value in seed]
        else:
            first: Any = check_seed(seed)  # type: ignore[arg-type]
            seeds = [first + i for i in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise ValueError(f"one seed per sub-environment is needed: num_envs is {self.num_envs}, got {len(seeds)}")
        for index, value in enumerate(seeds):
            if value is not None:
                self._generators[index], self._seeds[index] = seeding.np_random(value)

    def _restart(self, rows: BoolArray) -> None:
        """Put the rows where ``rows`` is true at random start states."""
        state = self._current_state()
        for index in np.flatnonzero(rows).tolist():
            state[index] = sample_start(self._generator(index))
        self._steps[rows] = 0
        self._force = np.where(rows, 0.0, self._force)
        self._done = self._done & ~rows

    def _infos(self, cost: FloatArray, rows: BoolArray) -> dict[str, Any]:
        """Infos of the current states in Gymnasium's vector form: arrays, and under ``_key`` where they apply."""
        infos: dict[str, Any] = {"is_success": self._success() & rows, "cost": np.where(rows, cost, 0.0)}
        names = ("cart_mass", "pole_mass", "pole_half_length")
        infos["dynamics"] = _with_masks({name: np.where(rows, getattr(self._plant, name), 0.0) for name in names}, rows)
        return _with_masks(infos, rows)

    def _final_infos(self, cost: FloatArray, done: BoolArray) -> dict[str, Any]:
        """The last observations and infos of the episodes that end, as Gymnasium's same-step autoreset gives them."""
        last = np.full(self.num_envs, None, dtype=object)
        observations = observe(self._current_state())
        for index in np.flatnonzero(done):
            last[index] = observations[index]
        return _with_masks({"final_obs": last, "final_info": self._infos(cost, done)}, done)

    def _success(self) -> BoolArray:
        state = self._current_state()
        return is_settled(state) & ~has_ended(state)


def _with_masks(infos: dict[str, Any], rows: BoolArray) -> dict[str, Any]:
    return {**infos, **{f"_{name}": rows.copy() for name in infos}}


def _check_indices(indices: Sequence[int], count: int) -> list[int]:
    if not is_flat(indices):
        raise TypeError(f"indices is {shown(indices)}; expected numbers of sub-environments")
    chosen = [whole("an index", index, -count, most=count - 1) for index in indices]
    return [index % count for index in chosen]


def _per_env(name: str, value: Parameter, count: int) -> list[float]:
    array = real_array(name, value)
    if array.shape not in ((), (count,)):
        raise ValueError(f"{name} must be one number or have shape ({count},), got shape {array.shape}")
    column: list[float] = np.broadcast_to(array, (count,)).tolist()
    return column


def check_count(num_envs: int) -> int:
    """A number of sub-environments, or a TypeError or ValueError."""
    if isinstance(num_envs, numbers.Real) and num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    return whole("num_envs", num_envs, 1, most=_MOST_ENVS)


def _check_step_limit(limit: int | None) -> float:
    if limit is None or (isinstance(limit, numbers.Real) and limit == -1):
        return float("inf")
    if isinstance(limit, numbers.Real) and limit < 1:
        raise ValueError(f"max_episode_steps must be positive, or -1 for no limit, got {limit}")
    return whole("max_episode_steps", limit, 1, "a whole number of steps, -1 or None for no limit")


def _check_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    known = (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)
    found = next((one for one in known if isinstance(mode, (AutoresetMode, str)) and mode in (one, one.value)), None)
    if found is None:
        raise ValueError(f"autoreset_mode must be NEXT_STEP or SAME_STEP, got {shown(mode)}")
    return found
