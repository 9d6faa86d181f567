"""Shifts that really apply: each parameter moves the next states, and nothing else does."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env

from kbt_rl.envs import DynamicsShift
from kbt_rl.envs.parameters import Parameter, World

CLASSIC = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0")
MUJOCO = ("InvertedPendulum-v5", "InvertedDoublePendulum-v5", "HalfCheetah-v5", "Hopper-v5", "Reacher-v5")
# Friction between bodies that never touch in 200 random steps, and the mass of what never moves.
IDLE = {
    "InvertedPendulum-v5": ("friction",),
    "InvertedDoublePendulum-v5": ("friction",),
    "Reacher-v5": ("friction", "gravity", "mass.target"),
    "HalfCheetah-v5": tuple(f"friction.{part}" for part in ("torso", "head", "bthigh", "bshin", "fthigh")),
    "Hopper-v5": ("friction.torso_geom", "friction.thigh_geom", "friction.leg_geom"),
}


@functools.cache
def names(env_id: str) -> tuple[str, ...]:
    idle = IDLE.get(env_id, ())
    found = DynamicsShift(gym.make(env_id)).parameters
    return tuple(name for name in found if not any(name == one or name.startswith(f"{one}.") for one in idle))


def rollout(env: gym.Env[Any, Any], steps: int = 200, seed: int = 3) -> np.ndarray:
    """States of random actions, which do not depend on the environment."""
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    seen = [observation]
    for _ in range(steps):
        observation, *_ = env.unwrapped.step(env.action_space.sample())
        seen.append(observation)
    return np.array(seen)


CASES = [(env_id, name) for env_id in (*CLASSIC, *MUJOCO) for name in names(env_id)]


@pytest.mark.filterwarnings("ignore:.*calling 'step\\(\\)' even though")
@pytest.mark.parametrize(("env_id", "name"), CASES)
def test_every_parameter_moves_the_states_and_its_nominal_value_brings_them_back(env_id: str, name: str) -> None:
    plain = rollout(gym.make(env_id))
    env = DynamicsShift(gym.make(env_id))
    nominal = env.parameters[name].nominal
    np.testing.assert_array_equal(rollout(env), plain)
    env.shift({name: 1.5 * nominal})
    moved = rollout(env)
    np.testing.assert_array_equal(moved[0], plain[0])
    assert not np.array_equal(moved, plain)
    env.shift({name: nominal})
    np.testing.assert_array_equal(rollout(env), plain)


def test_derived_values_of_cartpole_follow() -> None:
    env = DynamicsShift(gym.make("CartPole-v1"), {"masspole": 0.5, "length": 3.0})
    inner: Any = env.unwrapped
    assert inner.total_mass == 1.5
    assert inner.polemass_length == 1.5
    assert gym.make("CartPole-v1").unwrapped.total_mass == 1.1  # type: ignore[attr-defined]


def test_a_heavier_body_is_the_model_that_mujoco_compiles_with_that_mass() -> None:
    env = DynamicsShift(gym.make("HalfCheetah-v5"), {"mass.bshin": 5.0})
    inner: Any = env.unwrapped
    plain: Any = gym.make("HalfCheetah-v5").unwrapped
    body = mujoco.mj_name2id(inner.model, mujoco.mjtObj.mjOBJ_BODY, "bshin")
    np.testing.assert_allclose(inner.model.body_inertia[body], 5.0 * plain.model.body_inertia[body])
    heavier = plain.model.body_subtreemass[0] + 4.0 * plain.model.body_mass[body]
    assert inner.model.body_subtreemass[0] == pytest.approx(heavier)
    assert (inner.model.dof_invweight0 != plain.model.dof_invweight0).any()


def test_gears_of_all_and_of_one_multiply() -> None:
    env = DynamicsShift(gym.make("HalfCheetah-v5"), {"gear": 2.0, "gear.bshin": -0.5})
    gears = env.unwrapped.model.actuator_gear[:, 0]  # type: ignore[attr-defined]
    np.testing.assert_allclose(gears, [240.0, -90.0, 120.0, 240.0, 120.0, 60.0])


def test_a_shift_in_an_episode_leaves_its_state() -> None:
    env = DynamicsShift(gym.make("HalfCheetah-v5"))
    env.reset(seed=0)
    for _ in range(5):
        env.step(env.action_space.sample())
    data: Any = env.unwrapped.data  # type: ignore[attr-defined]
    before = data.qpos.copy(), data.qvel.copy()
    env.shift({"mass": 2.0, "gravity": 1.5})
    np.testing.assert_array_equal(data.qpos, before[0])
    np.testing.assert_array_equal(data.qvel, before[1])


def test_shifts_at_given_times_count_steps_over_episodes() -> None:
    env = DynamicsShift(gym.make("Pendulum-v1"), {"m": 1.2}, at=[(3, {"m": 1.5}), (250, {"g": 15.0})])
    seen = []
    for _ in range(2):
        _, info = env.reset(seed=0)
        assert info["dynamics"]["l"] == 1.0
        for _ in range(200):
            info = env.step(env.action_space.sample())[-1]
            seen.append((info["dynamics"]["m"], info["dynamics"]["g"]))
    assert seen == [(1.2, 10.0)] * 3 + [(1.5, 10.0)] * 247 + [(1.5, 15.0)] * 150


def test_drift_ends_at_a_bound() -> None:
    env = DynamicsShift(gym.make("Pendulum-v1"), drift={"m": 0.1, "l": -1e-3}, bounds={"m": (0.5, 1.25)})
    env.reset(seed=0)
    values = [env.step(env.action_space.sample())[-1]["dynamics"] for _ in range(5)]
    np.testing.assert_allclose([value["m"] for value in values], [1.0, 1.1, 1.2, 1.25, 1.25])
    np.testing.assert_allclose([value["l"] for value in values], [1.0, 0.999, 0.998, 0.997, 0.996])
    assert env.unwrapped.m == 1.25  # type: ignore[attr-defined]


def test_each_reset_draws_within_its_range_and_by_its_seed() -> None:
    env = DynamicsShift(gym.make("CartPole-v1"), ranges={"length": (0.5, 3.0)})
    drawn = [env.reset(seed=seed)[1]["dynamics"]["length"] for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    more = [env.reset()[1]["dynamics"]["length"] for _ in range(200)]
    assert 0.5 <= min(more) < 0.6
    assert 2.9 < max(more) <= 3.0


@pytest.mark.filterwarnings(
    "ignore:.*is different from the unwrapped version", "ignore:.*symmetric and normalized space"
)
def test_it_is_an_environment_as_any_other() -> None:
    check_env(DynamicsShift(gym.make("Pendulum-v1"), {"m": 1.5}), skip_render_check=True)
    envs = make_vec_env("Pendulum-v1", 2, wrapper_class=DynamicsShift, wrapper_kwargs={"values": {"g": 15.0}})
    assert envs.env_method("get_wrapper_attr", "dynamics")[1]["g"] == 15.0


class Spring(World):
    """The only parameter of an environment of one's own."""

    def __init__(self, env: Any) -> None:
        self.parameters, self._env = {"stiffness": Parameter(1.0, 0.1, 10.0)}, env

    def set(self, values: Any) -> None:
        """Everything that follows from it."""
        self._env.stiffness = values["stiffness"]


def test_a_world_of_ones_own() -> None:
    class Oscillator(gym.Env[Any, Any]):
        observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (1,))
        stiffness = 1.0

    with pytest.raises(TypeError, match="pass it as world="):
        DynamicsShift(Oscillator())
    inner = Oscillator()
    env = DynamicsShift(inner, {"stiffness": 2.0}, world=Spring(inner))
    assert inner.stiffness == 2.0
    assert env.parameters == {"stiffness": Parameter(1.0, 0.1, 10.0)}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"values": {"mass": 1.0}}, TypeError, "this world has no parameter 'mass'; it has g, m, l"),
        ({"values": {"m": "heavy"}}, TypeError, "expected a number"),
        ({"values": {"m": -1.0}}, ValueError, r"m is -1.0, outside of its bounds \[0.001, 1000\]"),
        ({"values": {"m": float("nan")}}, ValueError, "outside of its bounds"),
        ({"values": {"m": 3.0}, "bounds": {"m": (0.5, 2.0)}}, ValueError, r"outside of its bounds \[0.5, 2\]"),
        ({"at": [(5, {"m": 1.0}), (5, {"m": 2.0})]}, ValueError, "must increase"),
        ({"drift": {"x": 1.0}}, TypeError, "no parameter 'x'"),
        ({"drift": {"m": float("inf")}}, ValueError, "the drift of m is inf"),
        ({"ranges": {"m": (2.0, 1.0)}}, ValueError, "the smallest value comes first"),
        ({"bounds": {"x": (0.0, 1.0)}}, TypeError, "no parameter 'x'"),
    ],
)
def test_what_makes_no_shift_is_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DynamicsShift(gym.make("Pendulum-v1"), **settings)
