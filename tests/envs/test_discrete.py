"""The discrete forms of the plant against the continuous ones, and their expert against what it is built from."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import kbt_rl  # noqa: F401  (registers the environments)
from kbt_rl.agents.levels import ForceLevels
from kbt_rl.agents.lqr import LQRExpert
from kbt_rl.agents.lqr_gain import lqr_gain
from kbt_rl.envs import FIVE_FORCES, NOMINAL, SHIFTED, TWO_FORCES
from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv

NOMINAL_ID, SHIFTED_ID = "kbt_rl/DiscreteInvertedPendulum-v0", "kbt_rl/ShiftedDiscreteInvertedPendulum-v0"
IDS = (NOMINAL_ID, SHIFTED_ID)
LEVELS = (FIVE_FORCES, TWO_FORCES)


def states(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 4)) * np.array([2, 2, 0.5, 1])


# --- the environments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forces", LEVELS)
@pytest.mark.parametrize("env_id", IDS)
def test_both_checkers_are_silent(env_id: str, forces: tuple[float, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(gym.make(env_id, forces=forces).unwrapped)
        sb3_check_env(gym.make(env_id, forces=forces))


@pytest.mark.parametrize(
    ("env_id", "plant"), [(NOMINAL_ID, "InvertedPendulum"), (SHIFTED_ID, "ShiftedInvertedPendulum")]
)
def test_an_action_is_the_force_of_its_level(env_id: str, plant: str) -> None:
    ours, continuous = gym.make(env_id), gym.make(f"kbt_rl/{plant}-v0", max_force=15.0)
    mine, other = ours.reset(seed=3), continuous.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(60):
        np.testing.assert_array_equal(mine[0], other[0])
        assert mine[-1] == other[-1]
        index = int(rng.integers(5))
        mine, other = ours.step(np.int64(index)), continuous.step(np.array([FIVE_FORCES[index] / 15.0]))
        assert mine[1:4] == other[1:4]


@pytest.mark.parametrize("forces", LEVELS)
def test_vector_form_agrees_with_single_environments(forces: tuple[float, ...]) -> None:
    ours = gym.make_vec(SHIFTED_ID, num_envs=5, forces=forces, max_episode_steps=40)
    sync = SyncVectorEnv([lambda: gym.make(SHIFTED_ID, forces=forces, max_episode_steps=40)] * 5)
    assert ours.action_space == sync.action_space
    assert ours.single_action_space == sync.single_action_space
    np.testing.assert_array_equal(ours.reset(seed=7)[0], sync.reset(seed=7)[0])
    rng = np.random.default_rng(1)
    for _ in range(100):
        actions = rng.integers(len(forces), size=5)
        mine, other = ours.step(actions), sync.step(actions)
        for one, two in zip(mine[:4], other[:4], strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(mine[4]["is_success"], other[4]["is_success"])


@pytest.mark.parametrize("action", [-1, 5, 0.0, np.array([1]), np.array(2.5), np.nan, "1"])
def test_wrong_action_changes_nothing(action: Any) -> None:
    env = gym.make(NOMINAL_ID).unwrapped
    env.reset(seed=0)
    before = env.get_wrapper_attr("state")
    with pytest.raises(ValueError, match="action"):
        env.step(action)
    np.testing.assert_array_equal(env.get_wrapper_attr("state"), before)


@pytest.mark.parametrize(
    ("forces", "error", "message"),
    [
        ((15.0,), ValueError, "at least two"),
        ((-1.0, np.inf), ValueError, "finite"),
        ((1.0, 1.0), ValueError, "increase"),
        ((15.0, -15.0), ValueError, "increase"),
        (("a", "b"), TypeError, "real numbers"),
    ],
)
def test_wrong_forces(forces: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gym.make(NOMINAL_ID, forces=forces)
    with pytest.raises(error, match=message):
        gym.make_vec(NOMINAL_ID, num_envs=2, forces=forces)


def test_renders_the_force() -> None:
    pytest.importorskip("pygame")
    env = gym.make(NOMINAL_ID, render_mode="rgb_array")
    frames = []
    for action in (0, 4):
        env.reset(options={"state": np.zeros(4)})
        env.step(action)
        frames.append(env.render())
    assert isinstance(frames[0], np.ndarray)
    assert frames[0].shape == frames[1].shape  # type: ignore[union-attr]
    assert (frames[0] != frames[1]).any()


# --- the expert -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "forces"), [(NOMINAL_ID, FIVE_FORCES), (SHIFTED_ID, FIVE_FORCES), (SHIFTED_ID, TWO_FORCES)]
)
def test_expert_succeeds_in_every_episode(env_id: str, forces: tuple[float, ...]) -> None:
    """The condition on the levels: with them the task can be done at all."""
    envs = InvertedPendulumSB3VecEnv(env_id, num_envs=50, forces=forces)
    envs.seed(1000)
    successes: list[bool] = []

    def note(found: dict[str, Any], _: dict[str, Any]) -> None:
        if found["done"]:
            successes.append(found["info"]["is_success"])

    evaluate_policy(LQRExpert.for_env(envs), envs, n_eval_episodes=50, callback=note)  # type: ignore[arg-type]
    assert len(successes) >= 50
    assert all(successes)


@pytest.mark.parametrize(
    "make",
    [
        gym.make,
        lambda *a, **k: make_vec_env(*a, n_envs=2, env_kwargs=k),
        lambda *a, **k: gym.make_vec(*a, num_envs=2, **k),
    ],
)
@pytest.mark.parametrize("forces", LEVELS)
def test_expert_acts_by_the_level_nearest_to_the_regulators_force(make: Any, forces: tuple[float, ...]) -> None:
    expert = LQRExpert.for_env(make(SHIFTED_ID, forces=forces), R=0.1)
    some = states(200)
    force = -some @ lqr_gain(SHIFTED, R=0.1)[0]
    expected = [min(range(len(forces)), key=lambda i: abs(u - forces[i])) for u in force]
    actions, _ = expert.predict(some)
    assert actions.tolist() == expected
    assert expert.predict(some[0])[0] == expected[0]
    assert np.argmax(expert.label(some), axis=1).tolist() == expected
    hard = LQRExpert.for_env(make(SHIFTED_ID, forces=forces), R=0.1, temperature=0.0)
    np.testing.assert_array_equal(hard.label(some), np.eye(len(forces))[expected])


@pytest.mark.parametrize("forces", LEVELS)
def test_labels_are_the_probabilities_of_a_noisy_choice(forces: tuple[float, ...]) -> None:
    """``p_i ~ N(u; f_i, T^2)``, written out with the normal density; odds of two levels are linear in the force."""
    levels = ForceLevels(forces, temperature=7.0)
    force = np.array([-40.0, -3.0, 0.1, 12.0])
    density = np.exp(-((force[:, None] - np.array(forces)) ** 2) / (2 * 7.0**2))
    np.testing.assert_allclose(levels.label(force), density / density.sum(axis=1, keepdims=True), rtol=1e-12)
    far = levels.label(np.array([1e6, -1e6]))
    np.testing.assert_array_equal(far, np.eye(len(forces))[[-1, 0]])
    odds = np.diff(np.log(levels.label(np.array([0.0, 1.0, 2.0]))[:, [0, 1]]), axis=1)[:, 0]
    assert odds[1] - odds[0] == pytest.approx((forces[1] - forces[0]) / 49.0)
    assert odds[2] - odds[1] == pytest.approx((forces[1] - forces[0]) / 49.0)


def test_tracking_expert_follows_the_plant() -> None:
    env = gym.make(NOMINAL_ID)
    expert = LQRExpert.for_env(env, tracking=True)
    some = states(100)
    env.get_wrapper_attr("set_dynamics")(**SHIFTED.dynamics)
    levels = ForceLevels.soft(FIVE_FORCES)
    np.testing.assert_allclose(expert.label(some), levels.label(-some @ lqr_gain(SHIFTED, R=0.1)[0]))
    assert expert.params is not None
    assert expert.params.dynamics != NOMINAL.dynamics


def test_expert_needs_to_know_the_forces() -> None:
    env = gym.make(SHIFTED_ID)
    with pytest.raises(ValueError, match="as many levels"):
        LQRExpert(env.observation_space, env.action_space, np.ones((1, 4)), 15.0)
    with pytest.raises(ValueError, match="as many levels"):
        LQRExpert(env.observation_space, env.action_space, np.ones((1, 4)), 15.0, levels=ForceLevels(TWO_FORCES))
