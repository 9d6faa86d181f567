"""Plants that change by themselves: against ``set_dynamics`` called by hand, and the laws of the walk."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from kbt_rl import LQRExpert
from kbt_rl.envs import NOMINAL, PLANT_RANGES, InvertedPendulumEnv, RandomWalkDrift, ScheduledShifts

ID = "kbt_rl/InvertedPendulum-v0"
SHIFTS = [(3, {"pole_mass": 1.0}), (7, {"cart_mass": 2.0, "pole_half_length": 3.0}), (10, {"pole_mass": 0.2})]
WRAPPERS = [lambda env: ScheduledShifts(env, SHIFTS), lambda env: RandomWalkDrift(env, rate=0.05)]
EITHER = pytest.mark.parametrize("wrap", WRAPPERS, ids=["shifts", "drift"])
ACTION = np.array([0.1], dtype=np.float32)


def plant(info: dict[str, Any]) -> tuple[float, ...]:
    return tuple(info["dynamics"].values())


def test_shifts_inside_an_episode_are_those_made_by_hand() -> None:
    env, manual = ScheduledShifts(gym.make(ID), SHIFTS), gym.make(ID)
    observation, _ = env.reset(seed=3)
    expected, _ = manual.reset(seed=3)
    for step in range(20):
        assert np.array_equal(observation, expected)
        for time, dynamics in SHIFTS:
            if step == time:
                manual.get_wrapper_attr("set_dynamics")(**dynamics)
        observation, _, _, _, info = env.step(ACTION)
        expected, _, _, _, expected_info = manual.step(ACTION)
        assert info == expected_info
    assert plant(info) == (2.0, 0.2, 3.0)


def test_time_goes_on_over_episodes_and_a_reset_shows_the_new_plant() -> None:
    env = ScheduledShifts(gym.make(ID, max_episode_steps=5), [(5, {"pole_mass": 1.0}), (7, {"pole_mass": 0.5})])
    _, info = env.reset(seed=0)
    masses = [info["dynamics"]["pole_mass"]]
    for _ in range(2):
        ended = False
        while not ended:
            _, _, _, ended, info = env.step(ACTION)
            masses.append(info["dynamics"]["pole_mass"])
        _, info = env.reset()
        masses.append(info["dynamics"]["pole_mass"])
    assert masses == [0.1] * 6 + [1.0] * 3 + [0.5] * 4


@EITHER
def test_equal_seeds_give_equal_runs(wrap: Any) -> None:
    env = wrap(gym.make(ID))

    def run() -> list[Any]:
        found = [env.reset(seed=5)]
        found += [env.step(ACTION) for _ in range(12)]
        found.append(env.reset())
        return [*found, *(env.step(ACTION) for _ in range(3))]

    first, second = run(), run()
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one[0], other[0])
        assert one[1:] == other[1:]
    assert plant(first[0][-1]) == plant({"dynamics": NOMINAL.dynamics})
    assert plant(first[-1][-1]) != plant(first[0][-1])


def test_the_drift_leaves_the_starts_alone() -> None:
    env, still = RandomWalkDrift(gym.make(ID)), gym.make(ID)
    for seed in (4, None):
        assert np.array_equal(env.reset(seed=seed)[0], still.reset(seed=seed)[0])
        env.step(ACTION)


def test_the_drift_is_a_random_walk_of_the_logarithms() -> None:
    """Mean 0, variance n rate^2, steps independent between parameters and in time; far from the bounds."""
    rate, steps = 0.01, 4_000
    wide = {name: (value * 1e-3, value * 1e3) for name, value in NOMINAL.dynamics.items()}
    env = RandomWalkDrift(InvertedPendulumEnv(), rate=rate, bounds=wide)
    _, info = env.reset(seed=6)
    walk = [plant(info)]
    for _ in range(steps):
        walk.append(plant(env.step(ACTION)[-1]))
    moves = np.diff(np.log(walk), axis=0)[1:]  # the first step is taken with the plant that was wrapped
    assert np.array_equal(walk[0], walk[1])
    count = moves.size
    assert abs(moves.mean()) < 6 * rate / np.sqrt(count)
    assert abs(moves.var() / rate**2 - 1) < 6 * np.sqrt(2 / count)
    correlations = [np.mean(moves[:, 0] * moves[:, 1]), np.mean(moves[1:] * moves[:-1])]
    assert np.abs(correlations).max() / rate**2 < 6 / np.sqrt(len(moves))


def test_the_drift_stays_within_its_bounds_and_reaches_them() -> None:
    env = RandomWalkDrift(InvertedPendulumEnv(), rate=0.5)
    env.reset(seed=7)
    walk = np.array([plant(env.step(ACTION)[-1]) for _ in range(2_000)])
    low, high = np.array(list(PLANT_RANGES.values())).T
    assert (walk >= low * (1 - 1e-12)).all()
    assert (walk <= high * (1 + 1e-12)).all()
    # Reflected walks are uniform in the long run; a tenth of the range (of the logarithm) is visited at either end.
    place = np.log(walk / low) / np.log(high / low)
    np.testing.assert_allclose([(place < 0.1).mean(), (place > 0.9).mean()], 0.1, atol=0.04)


@EITHER
@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version")
def test_both_checkers_are_silent(wrap: Any) -> None:
    gymnasium_check_env(wrap(InvertedPendulumEnv()), skip_render_check=True)
    sb3_check_env(wrap(gym.make(ID)))


@EITHER
def test_a_copy_goes_on_alike(wrap: Any) -> None:
    env = wrap(InvertedPendulumEnv())
    env.reset(seed=1)
    for _ in range(5):
        env.step(ACTION)
    other = copy.deepcopy(env)
    for _ in range(8):
        assert plant(env.step(ACTION)[-1]) == plant(other.step(ACTION)[-1])


@pytest.mark.parametrize("subprocesses", [False, True])
def test_in_an_sb3_vector_environment_with_an_expert_that_follows(subprocesses: bool) -> None:
    settings: dict[str, Any] = {"vec_env_cls": SubprocVecEnv, "vec_env_kwargs": {"start_method": "spawn"}}
    envs = make_vec_env(
        ID, 2, seed=0, wrapper_class=ScheduledShifts, wrapper_kwargs={"shifts": SHIFTS},
        **(settings if subprocesses else {}),
    )  # fmt: skip
    expert = LQRExpert.for_env(envs, tracking=True)
    envs.reset()
    before = expert.gain
    for _ in range(4):
        _, _, _, infos = envs.step(np.full((2, 1), 0.1, dtype=np.float32))
    assert [info["dynamics"]["pole_mass"] for info in infos] == [1.0, 1.0]
    assert not np.allclose(expert.gain, before)
    envs.close()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda env: ScheduledShifts(env, [(5, {}), (5, {})]), ValueError, r"must increase, got \[5, 5\]"),
        (lambda env: ScheduledShifts(env, [(-1, {})]), ValueError, "time of a shift is -1"),
        (lambda env: ScheduledShifts(env, [(0.5, {})]), TypeError, "whole number of steps, got 0.5"),
        (lambda env: ScheduledShifts(env, [(1, {"mass": 1.0})]), TypeError, r"no parameters \['mass'\]"),
        (lambda env: ScheduledShifts(env, [(1, {"pole_mass": -1.0})]), ValueError, "pole_mass must be positive"),
        (lambda env: RandomWalkDrift(env, rate=-1.0), ValueError, "rate is -1.0"),
        (lambda env: RandomWalkDrift(env, bounds={"mass": (1, 2)}), TypeError, r"no parameters \['mass'\]"),
        (lambda env: RandomWalkDrift(env, bounds={"pole_mass": (1, 2)}), ValueError, "outside of its bounds"),
        (lambda env: RandomWalkDrift(env, bounds={"pole_mass": (2, 1)}), ValueError, "expected an interval"),
        (lambda env: RandomWalkDrift(env, bounds={"pole_mass": (0, 1)}), ValueError, "must be positive"),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(gym.make(ID))
