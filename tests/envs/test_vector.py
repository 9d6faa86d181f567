"""The vector form against the single environment, and its adapter against Stable-Baselines3."""

from __future__ import annotations

import math
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

import kbt_rl  # noqa: F401  (registers the environments)
from kbt_rl.agents.lqr import LQRExpert
from kbt_rl.envs import NOMINAL, SHIFTED, InvertedPendulumVectorEnv
from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv

NOMINAL_ID, SHIFTED_ID = "kbt_rl/InvertedPendulum-v0", "kbt_rl/ShiftedInvertedPendulum-v0"
MODES = (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)


def assert_same(actual: Any, expected: Any) -> None:
    """Assert that two infos have the same keys and types, and values equal to rounding."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
        return
    assert actual.dtype == expected.dtype
    if expected.dtype == object:
        for mine, other in zip(actual, expected, strict=True):
            assert (mine is None) == (other is None)
            if other is not None:
                assert_same(mine, other)
    elif expected.dtype == bool:
        np.testing.assert_array_equal(actual, expected)
    else:
        np.testing.assert_allclose(actual, expected, rtol=1e-9 if expected.dtype == np.float64 else 1e-6, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("env_id", "limit"), [(NOMINAL_ID, 30), (SHIFTED_ID, 110)])
def test_agrees_with_single_environments(env_id: str, limit: int, mode: AutoresetMode) -> None:
    count = 6
    ours = gym.make_vec(env_id, num_envs=count, max_episode_steps=limit, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is mode
    sync = SyncVectorEnv([lambda: gym.make(env_id, max_episode_steps=limit)] * count, autoreset_mode=mode)
    rng = np.random.default_rng(0)
    assert (ours.action_space, ours.single_action_space) == (sync.action_space, sync.single_action_space)
    assert ours.single_observation_space == sync.single_observation_space
    ends = np.zeros(2, dtype=int)
    for mine, other in zip(ours.reset(seed=7), sync.reset(seed=7), strict=True):
        assert_same(mine, other)
    for _ in range(500):
        actions = rng.uniform(-0.3, 0.3, (count, 1)).astype(np.float32)
        mine, other = ours.step(actions), sync.step(actions)
        for one, two in zip(mine, other, strict=True):
            assert_same(one, two)
        ends += [mine[2].sum(), mine[3].sum()]
    assert np.all(ends > 5)  # falls and time limits both happened


def test_rows_with_different_plants_are_independent() -> None:
    envs = InvertedPendulumVectorEnv(2, pole_mass=[0.1, 1.0], pole_half_length=np.array([0.5, 5.0]))
    assert envs.params == (NOMINAL, SHIFTED)
    envs.reset(options={"state": [0.1, 0.0, 0.1, 0.0]})
    after = envs.step([[0.2], [0.2]])[0]
    for row, env_id in enumerate((NOMINAL_ID, SHIFTED_ID)):
        env = gym.make(env_id)
        env.reset(options={"state": [0.1, 0.0, 0.1, 0.0]})
        np.testing.assert_allclose(after[row], env.step(np.array([0.2]))[0], rtol=1e-6)


def test_set_dynamics_of_some_rows_lasts() -> None:
    envs = InvertedPendulumVectorEnv(3)
    envs.set_dynamics(pole_mass=1.0)
    envs.set_dynamics(pole_half_length=[5.0, 2.0, 0.5])
    envs.set_dynamics(indices=[2], cart_mass=4.0)
    for infos in (envs.reset(seed=0)[1], envs.step(np.zeros((3, 1)))[4]):
        np.testing.assert_array_equal(infos["dynamics"]["pole_mass"], [1.0, 1.0, 1.0])
        np.testing.assert_array_equal(infos["dynamics"]["pole_half_length"], [5.0, 2.0, 0.5])
        np.testing.assert_array_equal(infos["dynamics"]["cart_mass"], [1.0, 1.0, 4.0])


@pytest.mark.parametrize("bad", [{"pole_mass": [1.0, 1.0, -1.0]}, {"pole_mass": [1.0, 2.0]}, {"cart_mass": math.nan}])
def test_bad_dynamics_change_nothing(bad: dict[str, Any]) -> None:
    envs = InvertedPendulumVectorEnv(3)
    with pytest.raises(ValueError, match=next(iter(bad))):
        envs.set_dynamics(**{"pole_half_length": 3.0, **bad})
    assert envs.params == (NOMINAL,) * 3
    infos = envs.reset(seed=0)[1]
    np.testing.assert_array_equal(infos["dynamics"]["pole_half_length"], [0.5] * 3)


def test_seeds() -> None:
    envs = InvertedPendulumVectorEnv(3)
    first = envs.reset(seed=4)[0]
    assert envs.np_random_seed == (4, 5, 6)
    np.testing.assert_array_equal(envs.reset(seed=[4, 5, 6])[0], first)
    mixed = envs.reset(seed=[4, None, 6])[0]
    np.testing.assert_array_equal(mixed[[0, 2]], first[[0, 2]])
    assert not np.array_equal(mixed[1], first[1])
    assert not np.array_equal(envs.reset()[0], first)
    with pytest.raises(ValueError, match="one seed per sub-environment"):
        envs.reset(seed=[1, 2])


def test_start_states() -> None:
    envs = InvertedPendulumVectorEnv(2)
    same = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(envs.reset(options={"state": same})[0], [same, same], rtol=1e-7)
    own = np.array([same, -same])
    np.testing.assert_allclose(envs.reset(options={"state": own})[0], own, rtol=1e-7)
    with pytest.raises(ValueError, match=r"must have shape \(2, 4\)"):
        envs.reset(options={"state": np.zeros((3, 4))})
    with pytest.raises(ValueError, match="unknown reset options"):
        envs.reset(options={"reset_mask": np.ones(2, dtype=bool)})
    np.testing.assert_array_equal(envs.state, own)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"max_episode_steps": 0}, "max_episode_steps must be positive"),
        ({"autoreset_mode": AutoresetMode.DISABLED}, "NEXT_STEP or SAME_STEP"),
        ({"render_mode": "human"}, "render_mode must be None or one of"),
        ({"pole_mass": [0.1, 0.1, 0.1]}, r"pole_mass must be one number or have shape \(2,\)"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InvertedPendulumVectorEnv(**{"num_envs": 2, **kwargs})


@pytest.mark.parametrize("actions", [np.zeros(2), np.zeros((3, 1)), [[0.0], [math.nan]]])
def test_bad_actions_change_nothing(actions: Any) -> None:
    envs = InvertedPendulumVectorEnv(2)
    envs.reset(seed=0)
    before = envs.state
    with pytest.raises(ValueError, match="the action must"):
        envs.step(actions)
    np.testing.assert_array_equal(envs.state, before)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("ignored", [math.nan, math.inf, -1e300, 99.0])
def test_the_action_of_a_row_that_only_restarts_is_ignored(discrete: bool, ignored: float) -> None:
    """Whatever it is; the others are held to the same rules as ever, and what they do is the same."""
    env_id = f"kbt_rl/{'Discrete' if discrete else ''}InvertedPendulum-v0"
    envs, twin = (gym.make_vec(env_id, num_envs=3, max_episode_steps=50) for _ in range(2))
    for each in (envs, twin):
        each.reset(seed=0, options={"state": np.array([[0, 0, 1.57, 5.0], [0, 0, 0, 0], [0, 0, -1.57, -5.0]])})
    for step in range(6):
        actions = np.ones(3) if discrete else np.full((3, 1), 0.25)
        waiting = [0, 2] if step == 1 else []
        plain = twin.step(actions.astype(np.int64) if discrete else actions)
        actions[waiting] = ignored
        found = envs.step(actions if waiting or not discrete else actions.astype(np.int64))
        for one, other in zip(found[:4], plain[:4], strict=True):
            np.testing.assert_array_equal(one, other)
        if step == 0:
            assert found[2].tolist() == [True, False, True]
            before = envs.unwrapped.state
            with pytest.raises(ValueError, match="action"):
                envs.step(np.array([0, math.nan, 0]) if discrete else np.array([[0], [math.nan], [0]]))
            with pytest.raises(ValueError, match="must have shape"):
                envs.step(np.zeros((2, 1)))
            np.testing.assert_array_equal(envs.unwrapped.state, before)


@pytest.mark.parametrize("discrete", [False, True])
def test_an_episode_that_has_started_again_heeds_its_action(discrete: bool) -> None:
    env_id = f"kbt_rl/{'Discrete' if discrete else ''}InvertedPendulum-v0"
    for mode, steps in ((AutoresetMode.NEXT_STEP, 2), (AutoresetMode.SAME_STEP, 1)):
        envs = gym.make_vec(env_id, num_envs=2, max_episode_steps=1, autoreset_mode=mode)
        envs.reset(seed=0)
        for _ in range(steps):
            envs.step(np.zeros(2, dtype=np.int64) if discrete else np.zeros((2, 1)))
        with pytest.raises(ValueError, match="action"):
            envs.step(np.full(2, math.nan) if discrete else np.full((2, 1), math.nan))


@pytest.mark.parametrize(
    "spoil",
    [lambda a: a + 1j, lambda a: a.astype(str), lambda a: a.astype(object), lambda a: np.ma.array(a, mask=True)],
)
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_actions_that_are_no_real_numbers_are_refused(spoil: Any, discrete: bool, single: bool) -> None:
    env_id = f"kbt_rl/{'Discrete' if discrete else ''}InvertedPendulum-v0"
    env: Any = gym.make(env_id).unwrapped if single else gym.make_vec(env_id, num_envs=2)
    env.reset(seed=0)
    good = np.zeros(env.action_space.shape, dtype=np.int64 if discrete else np.float64)
    message = "an action is a whole number" if discrete else "expected an array of real|could not convert it to real"
    with pytest.raises((TypeError, ValueError), match=message):
        env.step(spoil(good))
    env.step(good)


def test_nothing_returned_is_used_again() -> None:
    envs = InvertedPendulumVectorEnv(2)
    first, infos = envs.reset(options={"state": [0.0] * 4})
    first[:] = 9.0
    infos["dynamics"]["cart_mass"][:] = 9.0
    after, rewards, _, _, infos = envs.step(np.zeros((2, 1)))
    np.testing.assert_array_equal(after, np.zeros((2, 4)))
    np.testing.assert_array_equal(infos["dynamics"]["cart_mass"], [1.0, 1.0])
    np.testing.assert_array_equal(rewards, [1.0, 1.0])


# --- the adapter to Stable-Baselines3 ---------------------------------------------------------------------------------


def test_adapter_agrees_with_monitored_environments() -> None:
    count, limit = 4, 50
    ours = InvertedPendulumSB3VecEnv(SHIFTED_ID, num_envs=count, max_episode_steps=limit)
    theirs = make_vec_env(SHIFTED_ID, n_envs=count, env_kwargs={"max_episode_steps": limit})
    for envs in (ours, theirs):
        envs.seed(3)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    assert ours.reset_infos == theirs.reset_infos
    rng = np.random.default_rng(1)
    episodes = 0
    for _ in range(200):
        actions = rng.uniform(-1.2, 1.2, (count, 1)).astype(np.float32)
        mine, other = ours.step(actions), theirs.step(np.clip(actions, -1, 1))
        np.testing.assert_allclose(mine[0], other[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mine[1], other[1], rtol=1e-6)
        assert mine[1].dtype == other[1].dtype
        np.testing.assert_array_equal(mine[2], other[2])
        for info, expected in zip(mine[3], other[3], strict=True):
            assert info.keys() == expected.keys()
            assert info["TimeLimit.truncated"] is expected["TimeLimit.truncated"]
            assert info["is_success"] is expected["is_success"]
            assert info["dynamics"] == expected["dynamics"]
            assert info["cost"] == pytest.approx(expected["cost"], rel=1e-9)
            if "episode" in expected:
                episodes += 1
                np.testing.assert_allclose(info["terminal_observation"], expected["terminal_observation"], rtol=1e-5)
                assert info["episode"]["l"] == expected["episode"]["l"]
                assert info["episode"]["r"] == pytest.approx(expected["episode"]["r"], abs=2e-6)
                assert info["episode"]["t"] > 0
        assert [i["cost"] for i in ours.reset_infos] == [0.0] * count
    assert episodes >= 8


def test_fall_in_the_last_step_is_no_time_limit() -> None:
    envs = InvertedPendulumSB3VecEnv(NOMINAL_ID, num_envs=2, max_episode_steps=1)
    envs.set_options([{"state": [0.0, 0.0, angle, 1.0]} for angle in (0.0, 1.57)])
    envs.reset()
    _, _, dones, infos = envs.step(np.zeros((2, 1), dtype=np.float32))
    np.testing.assert_array_equal(dones, [True, True])
    assert [info["TimeLimit.truncated"] for info in infos] == [True, False]


def test_adapter_reads_and_changes_the_dynamics_by_index() -> None:
    envs = InvertedPendulumSB3VecEnv(NOMINAL_ID, num_envs=3)
    wrapped = VecNormalize(envs)
    wrapped.env_method("set_dynamics", pole_mass=1.0, pole_half_length=5.0, indices=[0, 2])
    assert wrapped.get_attr("params") == [SHIFTED, NOMINAL, SHIFTED]
    assert wrapped.get_attr("params", indices=1) == [NOMINAL]
    envs.env_method("set_dynamics", cart_mass=[2.0, 3.0], indices=[1, 2])
    envs.set_attr("pole_mass", 0.7, indices=1)
    assert envs.get_attr("cart_mass") == [1.0, 2.0, 3.0]
    assert envs.get_attr("pole_mass") == [1.0, 0.7, 1.0]
    envs.reset()
    infos = envs.step(np.zeros((3, 1), dtype=np.float32))[3]
    assert [info["dynamics"]["pole_mass"] for info in infos] == [1.0, 0.7, 1.0]


def test_adapter_refuses_what_it_cannot_do() -> None:
    envs = InvertedPendulumSB3VecEnv(NOMINAL_ID, num_envs=2)
    with pytest.raises(AttributeError, match="only one of"):
        envs.set_attr("gravity", 1.6)
    with pytest.raises(AttributeError, match="only 'set_dynamics'"):
        envs.env_method("reset")
    with pytest.raises(AttributeError):
        envs.get_attr("not_there")
    with pytest.raises(TypeError, match="is not an inverted pendulum"):
        InvertedPendulumSB3VecEnv("CartPole-v1")


def test_adapter_answers_for_the_single_environment() -> None:
    envs, env = InvertedPendulumSB3VecEnv(NOMINAL_ID, num_envs=2), gym.make(NOMINAL_ID)
    assert envs.observation_space == env.observation_space
    assert envs.get_attr("action_space") == [env.action_space] * 2
    assert envs.get_attr("label_space") == [env.get_wrapper_attr("label_space")] * 2
    assert envs.get_attr("render_mode") == [None, None]
    assert envs.env_is_wrapped(Monitor) == [True, True]
    assert envs.env_is_wrapped(gym.wrappers.TimeLimit, indices=[0]) == [False]


def test_adapter_uses_seeds_and_options_once() -> None:
    envs = InvertedPendulumSB3VecEnv(NOMINAL_ID, num_envs=2)
    envs.set_options([{"state": [0.1, 0.0, 0.0, 0.0]}, {"state": [0.2, 0.0, 0.0, 0.0]}])
    np.testing.assert_allclose(envs.reset()[:, 0], [0.1, 0.2], rtol=1e-6)
    assert np.all(envs.reset()[:, 1] != 0.0)
    envs.seed(5)
    first = envs.reset()
    assert not np.array_equal(envs.reset(), first)
    envs.seed(5)
    np.testing.assert_array_equal(envs.reset(), first)
    envs.set_options([{"state": [0.0] * 4}, {}])
    with pytest.raises(ValueError, match="in every sub-environment"):
        envs.reset()


def test_adapter_draws() -> None:
    pytest.importorskip("pygame")
    envs = InvertedPendulumSB3VecEnv(NOMINAL_ID, num_envs=2, render_mode="rgb_array")
    envs.reset()
    images = envs.get_images()
    assert [image.shape for image in images if image is not None] == [(480, 800, 3)] * 2
    tiled = envs.render("rgb_array")
    assert tiled is not None
    assert tiled.size == 2 * 480 * 800 * 3
    envs.close()


def test_evaluate_policy_sees_monitored_episodes_and_agrees_with_single_environments() -> None:
    envs = InvertedPendulumSB3VecEnv(SHIFTED_ID, num_envs=10)
    expert = LQRExpert.for_env(envs)
    envs.seed(0)
    successes = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards, lengths = evaluate_policy(
            expert,
            envs,
            n_eval_episodes=10,
            return_episode_rewards=True,
            callback=lambda scope, _: scope["done"] and successes.append(scope["info"]["is_success"]),
        )
    assert lengths == [500] * 10
    assert successes == [True] * 10
    env = gym.make(SHIFTED_ID)
    observation, _ = env.reset(seed=0)
    total, done = 0.0, False
    while not done:
        observation, reward, terminated, truncated, _ = env.step(expert.predict(observation)[0])
        total, done = total + float(reward), terminated or truncated
    assert min(abs(total - reward) for reward in rewards) < 1e-3
