"""The plant against independent oracles, and the environment against what Gymnasium and its users expect."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from scipy.integrate import solve_ivp
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import kbt_rl  # noqa: F401  (registers the environments)
from kbt_rl.envs import (
    DT,
    LABEL_BOX,
    NOMINAL,
    OBSERVATION_BOX,
    SHIFTED,
    START_BOX,
    InvertedPendulumEnv,
    InvertedPendulumParams,
    dynamics,
    is_settled,
    is_upright,
    linearize,
    rk4_step,
    stage_cost,
)

IDS = ("kbt_rl/InvertedPendulum-v0", "kbt_rl/ShiftedInvertedPendulum-v0")
PLANTS = (NOMINAL, SHIFTED, InvertedPendulumParams(cart_mass=2.5, pole_mass=0.7, pole_half_length=1.3, gravity=3.7))

states = st_numpy.arrays(np.float64, 4, elements=st.floats(-3, 3))
forces = st.floats(-120, 120)
plants = st.builds(
    InvertedPendulumParams,
    cart_mass=st.floats(0.1, 10),
    pole_mass=st.floats(0.01, 10),
    pole_half_length=st.floats(0.1, 10),
)


def energy(state: np.ndarray, params: InvertedPendulumParams) -> np.ndarray:
    """Kinetic and potential energy of cart and uniform rod, J, from the velocity of the rod's centre of mass."""
    _, v, theta, omega = np.moveaxis(state, -1, 0)
    length, rod = params.pole_half_length, params.pole_mass
    rod_velocity = np.square(v + length * omega * np.cos(theta)) + np.square(length * omega * np.sin(theta))
    rod_inertia = rod * params.pole_length**2 / 12
    kinetic = params.cart_mass * v**2 + rod * rod_velocity + rod_inertia * omega**2
    return kinetic / 2 + rod * params.gravity * length * np.cos(theta)


# --- the physics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", PLANTS)
def test_linearization_matches_complex_step(params: InvertedPendulumParams) -> None:
    step = 1e-30
    A, B = linearize(params)
    for column in range(4):
        state = np.zeros(4, dtype=complex)
        state[column] = step * 1j
        np.testing.assert_allclose(dynamics(state, 0.0, params).imag / step, A[:, column], rtol=1e-14, atol=1e-14)
    slope = dynamics(np.zeros(4, dtype=complex), step * 1j, params).imag / step
    np.testing.assert_allclose(slope, B[:, 0], rtol=1e-14, atol=1e-14)


@given(state=states, params=plants)
def test_power_without_force_is_zero(state: np.ndarray, params: InvertedPendulumParams) -> None:
    step = 1e-30  # derivative of the energy along the motion, by complex step: exact to rounding
    moved = state + 1j * step * dynamics(state, 0.0, params)
    scale = 1 + abs(energy(np.abs(state), params)) * (1 + np.abs(dynamics(state, 0.0, params)).max())
    assert abs(energy(moved, params).imag / step) <= 1e-12 * scale


@given(state=states, force=forces, params=plants)
def test_force_gives_its_power_and_momentum(state: np.ndarray, force: float, params: InvertedPendulumParams) -> None:
    derivative = dynamics(state, force, params)
    _, _, theta, omega = state
    _, x_acc, _, theta_acc = derivative
    moment = params.pole_mass * params.pole_half_length
    momentum_rate = params.total_mass * x_acc + moment * (theta_acc * np.cos(theta) - omega**2 * np.sin(theta))
    assert momentum_rate == pytest.approx(
        force, abs=1e-9 * (1 + abs(theta_acc) * moment + params.total_mass * abs(x_acc))
    )


@pytest.mark.parametrize(("params", "drift"), [(NOMINAL, 2e-7), (SHIFTED, 5e-8)])
def test_integration_conserves_energy_for_ten_seconds(params: InvertedPendulumParams, drift: float) -> None:
    state = np.array([0.0, 0.5, 0.2, 0.0])
    start = energy(state, params)
    for _ in range(500):
        state = rk4_step(state, 0.0, params)
        assert abs(energy(state, params) / start - 1) < drift
    assert np.abs(state - [0.0, 0.5, 0.2, 0.0]).max() > 0.1


@pytest.mark.parametrize("params", PLANTS)
def test_integration_matches_scipy(params: InvertedPendulumParams) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        state, force = rng.uniform(-1, 1, 4) * LABEL_BOX, rng.uniform(-120, 120)
        reference = solve_ivp(
            lambda _, y, force=force: dynamics(y, force, params),
            (0.0, DT),
            state,
            method="DOP853",
            rtol=1e-12,
            atol=1e-13,
        ).y[:, -1]
        np.testing.assert_allclose(rk4_step(state, force, params), reference, rtol=0, atol=1e-5)


@given(state=states, force=forces, params=plants)
def test_mirror_image_of_a_motion_is_a_motion(state: np.ndarray, force: float, params: InvertedPendulumParams) -> None:
    np.testing.assert_array_equal(rk4_step(-state, -force, params), -rk4_step(state, force, params))


def test_functions_broadcast_over_leading_axes() -> None:
    rng = np.random.default_rng(1)
    batch, force = rng.uniform(-1, 1, (3, 5, 4)), rng.uniform(-50, 50, (3, 5))
    for function in (dynamics, rk4_step):
        together = function(batch, force, SHIFTED)
        assert together.shape == (3, 5, 4)
        np.testing.assert_allclose(together[2, 1], function(batch[2, 1], force[2, 1], SHIFTED), rtol=1e-13)
    assert stage_cost(batch, force).shape == is_upright(batch).shape == is_settled(batch).shape == (3, 5)
    assert stage_cost(batch, force)[0, 3] == pytest.approx(batch[0, 3] @ batch[0, 3] + force[0, 3] ** 2)


def test_cartpole_of_gymnasium_has_the_same_accelerations() -> None:
    cartpole = gym.make("CartPole-v1").unwrapped
    cartpole.reset(seed=0)
    for action in (0, 1):
        state = np.array([0.3, -0.4, 0.1, 0.7])
        cartpole.state = state.copy()
        cartpole.step(action)
        euler = state + cartpole.tau * dynamics(state, 10.0 if action else -10.0, NOMINAL)
        np.testing.assert_allclose(cartpole.state, euler, rtol=1e-14)


@pytest.mark.parametrize("params", [NOMINAL, SHIFTED])
def test_mujoco_has_the_same_accelerations(params: InvertedPendulumParams) -> None:
    length, mass = params.pole_half_length, params.pole_mass
    across = mass * params.pole_length**2 / 12
    model = mujoco.MjModel.from_xml_string(
        f"""<mujoco><compiler inertiafromgeom="false" angle="radian"/><option gravity="0 0 -{params.gravity}"/>
        <worldbody><body>
          <inertial pos="0 0 0" mass="{params.cart_mass}" diaginertia="1 1 1"/>
          <joint name="x" type="slide" axis="1 0 0"/>
          <body>
            <inertial pos="0 0 {length}" mass="{mass}" diaginertia="{across} {across} 1e-9"/>
            <joint name="theta" type="hinge" axis="0 1 0"/>
          </body></body></worldbody>
        <actuator><motor joint="x"/></actuator></mujoco>"""
    )
    data = mujoco.MjData(model)
    rng = np.random.default_rng(2)
    for _ in range(10):
        state, force = rng.uniform(-1, 1, 4) * LABEL_BOX, rng.uniform(-120, 120)
        data.qpos[:], data.qvel[:], data.ctrl[0] = state[[0, 2]], state[[1, 3]], force
        mujoco.mj_forward(model, data)
        np.testing.assert_allclose(data.qacc, dynamics(state, force, params)[[1, 3]], rtol=1e-6)


@pytest.mark.parametrize(
    ("state", "settled"),
    [
        ([0.99, -0.49, 0.049, -0.099], True),
        ([1.0, 0.0, 0.0, 0.0], False),
        ([0.0, -0.5, 0.0, 0.0], False),
        ([0.0, 0.0, 0.05, 0.0], False),
        ([0.0, 0.0, 0.0, -0.1], False),
    ],
)
def test_settled(state: list[float], settled: bool) -> None:
    assert is_settled(np.array(state)) == settled
    horizontal = np.array([0.0, 0.0, math.pi / 2, 0.0])
    assert is_upright(horizontal)
    assert is_upright(-horizontal)
    assert not is_upright(horizontal * (1 + 1e-12))


# --- the parameters ---------------------------------------------------------------------------------------------------

NAMES = ("cart_mass", "pole_mass", "pole_half_length", "gravity", "max_force")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, -1e-300, -math.inf, math.nan, math.inf])
def test_parameters_must_be_positive_and_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value!r}".replace("+", r"\+")):
        InvertedPendulumParams(**{name: value})


@pytest.mark.parametrize("value", ["1", None, [1.0], 1j])
def test_parameters_must_be_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="pole_mass must be a real number"):
        InvertedPendulumParams(pole_mass=value)


def test_derived_values_follow_a_replaced_parameter() -> None:
    params = replace(NOMINAL, pole_mass=3, pole_half_length=2)
    assert (params.total_mass, params.pole_length) == (4.0, 4.0)
    assert type(params.pole_mass) is float
    with pytest.raises(FrozenInstanceError):
        params.pole_mass = 1.0  # type: ignore[misc]


# --- the environment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", IDS)
def test_checkers_pass_without_a_warning(env_id: str) -> None:
    env = gym.make(env_id)
    gymnasium_check_env(env.unwrapped, skip_render_check=True)
    sb3_check_env(env)


def test_ids_differ_by_their_plant_only() -> None:
    nominal, shifted = (gym.make(env_id) for env_id in IDS)
    assert nominal.get_wrapper_attr("params") == NOMINAL
    assert shifted.get_wrapper_attr("params") == SHIFTED
    assert type(nominal.unwrapped) is type(shifted.unwrapped)
    assert nominal.observation_space == shifted.observation_space
    assert nominal.action_space == shifted.action_space
    assert nominal.spec is not None
    assert nominal.spec.max_episode_steps == 500


@pytest.mark.parametrize("env_id", IDS)
def test_spec_survives_json(env_id: str) -> None:
    text = gym.make(env_id, cart_mass=2.0).spec.to_json()
    json.loads(text)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(text))
    assert again.get_wrapper_attr("params").cart_mass == 2.0


def test_episode_is_truncated_after_ten_seconds_and_not_before() -> None:
    for limit, last in ((None, 500), (20, 20), (-1, 700)):
        env = gym.make(IDS[1], **({} if limit is None else {"max_episode_steps": limit}))
        env.reset(options={"state": [0.0, 0.0, 0.0, 0.0]})
        ends = [env.step(np.zeros(1, dtype=np.float32))[2:4] for _ in range(last)]
        assert ends == [(False, False)] * (last - 1) + [(False, limit != -1)]


def test_step_is_the_plant() -> None:
    env = InvertedPendulumEnv(pole_mass=0.3)
    start = np.array([0.1, -0.2, 0.15, 0.05])
    env.reset(options={"state": start})
    observation, reward, terminated, truncated, info = env.step(np.array([0.25], dtype=np.float32))
    after = rk4_step(start, 30.0, replace(NOMINAL, pole_mass=0.3))
    np.testing.assert_array_equal(env.state, after)
    np.testing.assert_array_equal(observation, after.astype(np.float32))
    assert observation.dtype == np.float32
    assert type(reward) is float
    assert reward == pytest.approx(1 / (1 + start @ start + 900.0), rel=1e-14)
    assert info["cost"] == pytest.approx((start @ start + 900.0) * DT, rel=1e-14)
    assert (terminated, truncated) == (False, False)
    assert info["dynamics"] == {"cart_mass": 1.0, "pole_mass": 0.3, "pole_half_length": 0.5}


def test_actuator_saturates() -> None:
    after = []
    for action in (1.0, 7.5):
        env = InvertedPendulumEnv(max_force=20.0)
        env.reset(seed=0)
        after.append(env.step([action])[0])
    np.testing.assert_array_equal(*after)


@pytest.mark.parametrize("action", [[], 0.5, [[0.5]], [0.1, 0.2], [math.nan], [math.inf]])
def test_bad_actions_change_nothing(action: Any) -> None:
    env = InvertedPendulumEnv()
    env.reset(seed=0)
    before = env.state
    with pytest.raises(ValueError, match="the action must"):
        env.step(action)
    np.testing.assert_array_equal(env.state, before)


def test_starts_fill_the_start_box() -> None:
    env = InvertedPendulumEnv()
    starts = np.array([env.reset(seed=seed)[0] for seed in range(400)])
    assert np.all(np.abs(starts) <= START_BOX)
    assert np.all(np.abs(starts).max(axis=0) > 0.97 * np.array(START_BOX))
    assert np.all(np.abs(starts.mean(axis=0)) < 6 * np.array(START_BOX) / math.sqrt(3 * 400))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": -1}, r"unknown reset options \['low'\]"),
        ({"state": [0.0] * 3}, r"must have shape \(4,\)"),
        ({"state": [[0.0] * 4]}, r"must have shape \(4,\)"),
        ({"state": [0.0, 0.0, math.nan, 0.0]}, "upright and within"),
        ({"state": [0.0, 0.0, 1.6, 0.0]}, "upright and within"),
        ({"state": [2e4, 0.0, 0.0, 0.0]}, "upright and within"),
    ],
)
def test_bad_reset_options_change_nothing(options: dict[str, Any], message: str) -> None:
    env = InvertedPendulumEnv()
    env.reset(seed=0)
    before = env.state
    with pytest.raises(ValueError, match=message):
        env.reset(seed=1, options=options)
    np.testing.assert_array_equal(env.state, before)


def test_start_state_is_copied() -> None:
    env, start = InvertedPendulumEnv(), np.zeros(4)
    env.reset(options={"state": start})
    start[:] = 1.0
    env.state[:] = 2.0
    np.testing.assert_array_equal(env.state, np.zeros(4))


def test_step_needs_a_reset() -> None:
    with pytest.raises(gym.error.ResetNeeded):
        InvertedPendulumEnv().step([0.0])


# --- success and the end of an episode --------------------------------------------------------------------------------


def test_success_is_told_at_every_step() -> None:
    env = InvertedPendulumEnv()
    _, info = env.reset(options={"state": [0.5, 0.0, 0.01, 0.0]})
    assert info["is_success"] is True
    _, info = env.reset(options={"state": [1.5, 0.0, 0.01, 0.0]})
    assert info["is_success"] is False
    env.reset(options={"state": [0.999, 0.4, 0.0, 0.0]})
    successes = [env.step([0.0])[4]["is_success"] for _ in range(3)]
    assert successes == [False] * 3  # it rolls out of the settled box
    env.reset(options={"state": [-1.001, 0.4, 0.0, 0.0]})
    assert [env.step([0.0])[4]["is_success"] for _ in range(3)] == [True] * 3


def test_fall_ends_the_episode_and_its_success_for_good() -> None:
    env = InvertedPendulumEnv()
    env.reset(options={"state": [0.0, 0.0, 1.57, 1.0]})
    observation, _, terminated, truncated, info = env.step([0.0])
    assert (terminated, truncated, info["is_success"]) == (True, False, False)
    assert observation in env.observation_space
    env._state = np.zeros(4)  # as if the pole had come up again
    assert env.step([0.0])[2] is True
    assert env.step([0.0])[4]["is_success"] is False
    assert env.reset(options={"state": [0.0] * 4})[1]["is_success"] is True


def test_cart_may_go_far_but_not_out_of_the_space() -> None:
    env = InvertedPendulumEnv()
    env.reset(options={"state": [500.0, 0.0, 0.0, 0.0]})
    assert env.step([0.0])[2] is False
    env.reset(options={"state": [9999.99, 100.0, 0.0, 0.0]})
    observation, _, terminated, _, _ = env.step([0.0])
    assert terminated is True
    assert observation[0] == OBSERVATION_BOX[0]
    assert observation in env.observation_space


@pytest.mark.parametrize("env_id", IDS)
def test_bounds_hold_what_ten_seconds_of_full_force_can_reach(env_id: str) -> None:
    env = gym.make(env_id).unwrapped
    speed = env.params.max_force * 10.0 / env.params.total_mass
    assert speed + 100 < OBSERVATION_BOX[1]
    assert speed * 10.0 / 2 + 100 < OBSERVATION_BOX[0]
    reached = np.zeros(4)
    for first in np.linspace(-1, 1, 9):  # bang-bang: swing the pole over the half-plane at full force
        env.reset(options={"state": [0.0, 0.0, -1.57, 0.0]})
        terminated, steps = False, 0
        while not terminated and steps < 500:
            action = first if steps < 5 else -1.0
            observation, _, terminated, _, _ = env.step([action])
            reached, steps = np.maximum(reached, np.abs(observation)), steps + 1
    assert np.all(reached < 0.5 * np.array(OBSERVATION_BOX))
    assert reached[2] > math.pi / 2


# --- changing the dynamics --------------------------------------------------------------------------------------------


def test_dynamics_change_through_wrappers_and_last_over_resets() -> None:
    env = gym.make(IDS[0])
    env.reset(seed=0)
    env.get_wrapper_attr("set_dynamics")(pole_mass=1.0)
    env.get_wrapper_attr("set_dynamics")(pole_half_length=5.0)
    for _ in range(2):
        _, info = env.reset(seed=3)
        assert info["dynamics"] == {"cart_mass": 1.0, "pole_mass": 1.0, "pole_half_length": 5.0}
    other = gym.make(IDS[1])
    other.reset(seed=3)
    action = np.array([0.3], dtype=np.float32)
    np.testing.assert_array_equal(env.step(action)[0], other.step(action)[0])


@pytest.mark.parametrize("bad", [{"pole_mass": -1.0}, {"cart_mass": math.nan}, {"pole_half_length": 0.0}])
def test_bad_dynamics_change_nothing(bad: dict[str, float]) -> None:
    env = InvertedPendulumEnv()
    with pytest.raises(ValueError, match="must be positive and finite"):
        env.set_dynamics(**{"cart_mass": 3.0, "pole_mass": 3.0, "pole_half_length": 3.0, **bad})
    assert env.params == NOMINAL


def test_infos_share_nothing() -> None:
    env = InvertedPendulumEnv()
    first = env.reset(seed=0)[1]
    first["dynamics"]["cart_mass"] = -1.0
    second = env.step([0.0])[4]
    assert second["dynamics"]["cart_mass"] == 1.0
    assert env.params == NOMINAL


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_copies_go_on_alike_and_apart(copier: Any) -> None:
    env = gym.make(IDS[0])
    env.reset(seed=5)
    twin = copier(env)
    action = np.array([0.1], dtype=np.float32)
    np.testing.assert_array_equal(env.step(action)[0], twin.step(action)[0])
    np.testing.assert_array_equal(env.reset()[0], twin.reset()[0])
    twin.get_wrapper_attr("set_dynamics")(pole_mass=2.0)
    assert env.get_wrapper_attr("params") == NOMINAL


def test_label_space_is_the_label_box() -> None:
    space = gym.make(IDS[0]).get_wrapper_attr("label_space")
    np.testing.assert_allclose(space.high, LABEL_BOX)
    np.testing.assert_array_equal(space.low, -space.high)
    assert space.dtype == np.float32
