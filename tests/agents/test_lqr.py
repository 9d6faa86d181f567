"""The expert: its gains, its poles, and its life as a Stable-Baselines3 policy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from scipy.linalg import solve_continuous_are
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

import kbt_rl  # noqa: F401  (registers the environments)
from kbt_rl.agents import lqr
from kbt_rl.agents import lqr_gain as lqr_gains
from kbt_rl.agents.lqr import LQRExpert
from kbt_rl.agents.lqr_gain import lqr_gain
from kbt_rl.envs import NOMINAL, SHIFTED, InvertedPendulumParams, InvertedPendulumVectorEnv, linearize
from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv

NOMINAL_ID, SHIFTED_ID = "kbt_rl/InvertedPendulum-v0", "kbt_rl/ShiftedInvertedPendulum-v0"
NOMINAL_GAIN = [[-1.0, -2.303, -31.868, -8.175]]
SHIFTED_GAIN = [[-1.0, -3.673, -80.794, -60.274]]


def closed_loop_poles(plant: InvertedPendulumParams, gain: np.ndarray) -> np.ndarray:
    A, B = linearize(plant)
    return np.sort_complex(np.linalg.eigvals(A - B @ gain))


# --- the gain ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("params", "gain"), [(NOMINAL, NOMINAL_GAIN), (SHIFTED, SHIFTED_GAIN)])
def test_gains_of_the_two_plants(params: InvertedPendulumParams, gain: list[list[float]]) -> None:
    np.testing.assert_allclose(lqr_gain(params), gain, rtol=0, atol=5e-4)


def test_shift_is_a_failure_of_the_nominal_gain_only() -> None:
    assert closed_loop_poles(SHIFTED, lqr_gain(NOMINAL)).real.max() > 0.5
    for plant in (NOMINAL, SHIFTED):
        assert closed_loop_poles(plant, lqr_gain(SHIFTED)).real.max() < 0


@pytest.mark.parametrize("R", [0.1, [[25.0]]])
def test_gain_solves_the_riccati_equation(R: Any) -> None:
    Q = np.diag([1.0, 0.0, 10.0, 2.0])
    A, B = linearize(SHIFTED)
    weight = np.atleast_2d(R)
    expected = np.linalg.solve(weight, B.T @ solve_continuous_are(A, B, Q, weight))
    np.testing.assert_allclose(lqr_gain(SHIFTED, Q, R), expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"Q": np.eye(3)}, r"Q must be a finite matrix of shape \(4, 4\), got shape \(3, 3\)"),
        ({"Q": np.full((4, 4), np.nan)}, "Q must be a finite matrix"),
        ({"Q": np.triu(np.ones((4, 4)))}, "Q must be symmetric"),
        ({"Q": np.diag([1.0, 1.0, 1.0, -0.1])}, "Q must be positive semidefinite, its lowest eigenvalue is -0.1"),
        ({"R": 0.0}, "R must be positive and finite, got 0.0"),
        ({"R": math.nan}, "R must be positive and finite"),
        ({"R": [1.0, 1.0]}, r"R must be a number or of shape \(1, 1\)"),
    ],
)
def test_bad_costs(costs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lqr_gain(NOMINAL, **costs)


@pytest.mark.parametrize("plant", [NOMINAL, SHIFTED])
def test_a_cost_that_does_not_see_a_mode_has_no_gain(plant: InvertedPendulumParams) -> None:
    """The cart's position costs nothing, so that its pole is 0 but for rounding, on either side."""
    with pytest.raises(ValueError, match=r"does not stabilise it|no stabilising gain"):
        lqr_gain(plant, Q=np.diag([0.0, 1.0, 1.0, 1.0]))
    lqr_gain(plant, Q=np.diag([1e-6, 1.0, 1.0, 1.0]))  # slowly, but it comes back


@pytest.mark.parametrize(
    "wrap",
    [
        lambda env: gym.wrappers.RescaleAction(env, np.float32(-0.5), np.float32(0.5)),
        lambda env: gym.wrappers.NormalizeObservation(env),
        lambda env: gym.wrappers.TransformObservation(env, lambda seen: 2.0 * seen, env.observation_space),
    ],
)
def test_wrappers_that_change_units_are_refused_by_name(wrap: Callable[[Any], gym.Env[Any, Any]]) -> None:
    env = wrap(gym.make("kbt_rl/InvertedPendulum-v0"))
    for subject in (env, gym.wrappers.RecordEpisodeStatistics(env), DummyVecEnv([lambda: env])):
        with pytest.raises(ValueError, match=f"is wrapped in (Transform|{type(env).__name__})"):
            LQRExpert.for_env(subject)
    LQRExpert.for_env(gym.wrappers.RecordEpisodeStatistics(gym.make("kbt_rl/InvertedPendulum-v0")))


def test_no_stabilising_gain() -> None:
    with pytest.raises(ValueError, match="stabilis"):
        lqr_gain(NOMINAL, Q=np.zeros((4, 4)))  # nothing asks the cart to come back


def test_plant_that_cannot_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    A, B = linearize(NOMINAL)
    monkeypatch.setattr(lqr_gains, "linearize", lambda params: (A, 0 * B))
    with pytest.raises(ValueError, match="stabilis"):
        lqr_gain(NOMINAL)


# --- the policy -------------------------------------------------------------------------------------------------------


def test_action_is_the_feedback_law() -> None:
    expert = LQRExpert.for_env(gym.make(SHIFTED_ID))
    np.testing.assert_allclose(expert.gain, SHIFTED_GAIN, atol=5e-4)
    assert (expert.params, expert.max_force) == (SHIFTED, 120.0)
    observations = np.random.default_rng(0).uniform(-0.3, 0.3, (7, 4))
    expected = -(observations @ expert.gain.T) / 120.0
    for dtype in (np.float32, np.float64):
        batch = observations.astype(dtype)
        actions, state = expert.predict(batch)
        assert state is None
        assert (actions.shape, actions.dtype) == ((7, 1), np.float32)
        np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=1e-7)
        single, _ = expert.predict(batch[3])
        assert single.shape == (1,)
        np.testing.assert_array_equal(single, actions[3])
    np.testing.assert_allclose(expert.label(observations), expected, rtol=1e-13)
    assert expert.label(observations[0]).shape == (1,)


def test_labels_are_not_clipped_and_actions_are() -> None:
    expert = LQRExpert.for_env(gym.make(SHIFTED_ID, max_force=10.0))
    observation = np.array([[0.0, 0.0, 0.5, 1.0]])
    label = expert.label(observation)
    assert label.dtype == np.float64
    assert label[0, 0] == pytest.approx((0.5 * 80.794 + 60.274) / 10.0, rel=1e-4)
    np.testing.assert_array_equal(expert.predict(observation)[0], [[1.0]])


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(3), r"must have shape \(n, 4\) or \(4,\), got \(3,\)"),
        (np.zeros((2, 3, 4)), r"must have shape \(n, 4\) or \(4,\), got \(2, 3, 4\)"),
        (np.array(0.0), r"must have shape"),
        (np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]]), r"must be finite, got \[nan\]"),
        (np.array([0, np.inf, 0, 0]), r"must be finite, got \[inf\]"),
        ((np.zeros(4), {}), "got a tuple"),
        ({"obs": np.zeros(4)}, "got a dict"),
    ],
)
def test_bad_observations(observation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LQRExpert.for_env(gym.make(NOMINAL_ID)).predict(observation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": [1.0, 2.0, 3.0, 4.0]}, r"the gain must be finite and of shape \(1, 4\)"),
        ({"gain": [[1.0, 2.0, 3.0, math.nan]]}, "the gain must be finite"),
        ({"max_force": -1.0}, "max_force must be positive"),
        ({"observation_space": gym.spaces.Box(-1, 1, (3,))}, r"boxes of shapes \(4,\) and \(1,\)"),
        ({"action_space": gym.spaces.Discrete(2)}, r"boxes of shapes \(4,\) and \(1,\)"),
    ],
)
def test_bad_constructor_arguments(change: dict[str, Any], message: str) -> None:
    env = gym.make(NOMINAL_ID)
    good = {"observation_space": env.observation_space, "action_space": env.action_space, "max_force": 120.0}
    with pytest.raises(ValueError, match=message):
        LQRExpert(**{**good, "gain": NOMINAL_GAIN, **change})


def test_gain_cannot_be_changed_by_accident() -> None:
    expert = LQRExpert.for_env(gym.make(NOMINAL_ID))
    expert.gain[:] = 0.0
    np.testing.assert_allclose(expert.gain, NOMINAL_GAIN, atol=5e-4)


def test_save_and_load(tmp_path: Path) -> None:
    expert = LQRExpert.for_env(gym.make(SHIFTED_ID), R=3.0)
    path = str(tmp_path / "expert.pth")
    expert.save(path)
    loaded = LQRExpert.load(path)
    np.testing.assert_array_equal(loaded.gain, expert.gain)
    assert (loaded.params, loaded.max_force) == (SHIFTED, 120.0)
    observation = np.array([0.1, 0.2, 0.1, 0.0])
    np.testing.assert_array_equal(loaded.predict(observation)[0], expert.predict(observation)[0])


@pytest.mark.parametrize(("plant", "success"), [(SHIFTED_ID, 1.0), (NOMINAL_ID, 0.0)])
def test_success_on_the_shifted_plant(plant: str, success: float) -> None:
    env = Monitor(gym.make(SHIFTED_ID))
    env.reset(seed=0)
    successes: list[bool] = []
    evaluate_policy(
        LQRExpert.for_env(gym.make(plant)),
        env,
        n_eval_episodes=20,
        callback=lambda scope, _: scope["done"] and successes.append(scope["info"]["is_success"]),
    )
    assert len(successes) == 20
    assert np.mean(successes) == success


# --- from environments ------------------------------------------------------------------------------------------------

ENVS = {
    "wrapped": lambda: Monitor(gym.make(SHIFTED_ID)),
    "bare": lambda: gym.make(SHIFTED_ID).unwrapped,
    "vector form": lambda: gym.make_vec(SHIFTED_ID, num_envs=2),
    "wrapped vector form": lambda: gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec(SHIFTED_ID, num_envs=2)),
    "sync": lambda: SyncVectorEnv([lambda: gym.make(SHIFTED_ID)] * 2),
    "DummyVecEnv": lambda: make_vec_env(SHIFTED_ID, n_envs=2),
    "adapter": lambda: InvertedPendulumSB3VecEnv(SHIFTED_ID, num_envs=2),
}


def set_dynamics(env: Any, **changes: float) -> None:
    if hasattr(env, "env_method"):
        env.env_method("set_dynamics", **changes)
    elif isinstance(env, SyncVectorEnv):
        for single in env.envs:
            single.get_wrapper_attr("set_dynamics")(**changes)
    else:
        env.unwrapped.set_dynamics(**changes)


@pytest.mark.parametrize("kind", ENVS)
def test_any_kind_of_environment(kind: str) -> None:
    env = ENVS[kind]()
    frozen, tracking = LQRExpert.for_env(env), LQRExpert.for_env(env, tracking=True)
    for expert in (frozen, tracking):
        assert expert.params == SHIFTED
        assert expert.action_space.shape == (1,)
        assert expert.predict(np.zeros((2, 4)))[0].shape == (2, 1)
    set_dynamics(env, pole_mass=0.1, pole_half_length=0.5)
    assert (frozen.params, tracking.params) == (SHIFTED, NOMINAL)
    np.testing.assert_allclose(frozen.gain, SHIFTED_GAIN, atol=5e-4)
    np.testing.assert_allclose(tracking.gain, NOMINAL_GAIN, atol=5e-4)


@pytest.mark.parametrize(
    "env", [gym.make("CartPole-v1"), gym.make_vec("CartPole-v1", num_envs=1), make_vec_env("CartPole-v1")]
)
def test_other_environments_are_refused(env: Any) -> None:
    with pytest.raises(TypeError, match="needs an inverted pendulum"):
        LQRExpert.for_env(env)


def test_tracking_solves_only_when_the_plant_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[InvertedPendulumParams] = []
    real = lqr.lqr_gain
    monkeypatch.setattr(lqr, "lqr_gain", lambda params, Q, R: solved.append(params) or real(params, Q, R))
    env = gym.make(NOMINAL_ID)
    expert = LQRExpert.for_env(env, tracking=True)
    for _ in range(3):
        expert.predict(np.zeros(4))
    assert solved == [NOMINAL]
    env.get_wrapper_attr("set_dynamics")(pole_mass=1.0, pole_half_length=5.0)
    for _ in range(3):
        expert.predict(np.zeros(4))
    assert solved == [NOMINAL, SHIFTED]


def test_tracking_gives_each_row_the_gain_of_its_plant() -> None:
    envs = InvertedPendulumVectorEnv(3)
    expert = LQRExpert.for_env(envs, tracking=True)
    envs.set_dynamics(indices=[1], pole_mass=1.0, pole_half_length=5.0)
    observations = np.random.default_rng(2).uniform(-0.2, 0.2, (3, 4))
    labels = expert.label(observations)[:, 0] * 120.0
    gains = np.array(NOMINAL_GAIN + SHIFTED_GAIN + NOMINAL_GAIN)
    np.testing.assert_allclose(labels, -np.sum(gains * observations, axis=1), atol=1e-3)
    for wrong in (np.zeros((2, 4)), np.zeros(4)):
        with pytest.raises(ValueError, match=re.escape("shape (3, 4); got")):
            expert.label(wrong)
    with pytest.raises(ValueError, match="different parameters"):
        _ = expert.gain


def test_frozen_expert_needs_one_plant() -> None:
    envs = InvertedPendulumVectorEnv(2, pole_mass=[0.1, 1.0])
    with pytest.raises(ValueError, match=r"tracking=True"):
        LQRExpert.for_env(envs)


def test_saved_tracking_expert_is_frozen(tmp_path: Path) -> None:
    env = gym.make(NOMINAL_ID)
    expert = LQRExpert.for_env(env, tracking=True)
    env.get_wrapper_attr("set_dynamics")(pole_mass=1.0, pole_half_length=5.0)
    path = str(tmp_path / "expert.pth")
    expert.save(path)
    env.get_wrapper_attr("set_dynamics")(pole_mass=0.1)
    loaded = LQRExpert.load(path)
    assert loaded.params == SHIFTED
    np.testing.assert_allclose(loaded.gain, SHIFTED_GAIN, atol=5e-4)
