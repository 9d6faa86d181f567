"""The expert without knowledge of the plant: what it finds, when it keeps its gain, how a rollout feeds it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from learners import NOMINAL as NOMINAL_ID
from learners import SHIFTED as SHIFTED_ID
from learners import kbt
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from kbt_rl import KalmanAdapter, LQRExpert
from kbt_rl.agents.identification import SelfTuningLQR, Solution, riccati_gain
from kbt_rl.agents.linear_model import LinearModelPosterior, discrete_rates, pendulum_prior
from kbt_rl.agents.lqr_gain import lqr_gain
from kbt_rl.callbacks import IdentificationCallback
from kbt_rl.envs import DT, NOMINAL, SHIFTED, InvertedPendulumParams, linearize, rk4_step
from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv


def expert(**options: Any) -> SelfTuningLQR:
    return SelfTuningLQR.for_env(gym.make(NOMINAL_ID), **options)


def transitions(
    plant: InvertedPendulumParams, count: int, size: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random states, actions and what the plant makes of them, in single precision as the environment shows it."""
    rng = np.random.default_rng(seed)
    states = rng.uniform(-1, 1, (count, 4)) * np.array([2.0, 1.0, 0.2, 0.3]) * size
    actions = rng.uniform(-0.2, 0.2, (count, 1)) * size
    after = rk4_step(states, plant.max_force * actions[:, 0], plant)
    return states.astype(np.float32), actions.astype(np.float32), after.astype(np.float32)


# A plant that no controller at 50 Hz sees as continuous: the cart's velocity turns round in every step.
def alternating(count: int = 3_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    states, actions, _ = transitions(SHIFTED, count)
    return states, actions, np.float32([1.0, -2.0, 1.0, 1.0]) * states


# --- what it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plant", [NOMINAL, SHIFTED])
def test_gain_of_the_true_model_is_that_of_the_oracle(plant: InvertedPendulumParams) -> None:
    gain = riccati_gain(discrete_rates(*linearize(plant), DT), DT, np.eye(4), np.eye(1))
    np.testing.assert_allclose(gain, lqr_gain(plant), rtol=1e-7)


def test_it_starts_as_the_expert_of_the_nominal_plant() -> None:
    subject, known = expert(), LQRExpert.for_env(gym.make(NOMINAL_ID))
    np.testing.assert_allclose(subject.gain, known.gain, rtol=1e-7)
    states = transitions(SHIFTED, 5)[0]
    np.testing.assert_allclose(subject.label(states), known.label(states), rtol=1e-6)
    np.testing.assert_allclose(subject.predict(states)[0], known.predict(states)[0], rtol=1e-5)
    assert subject.predict(states[0])[0].shape == (1,)
    assert (subject.transitions, subject.fallbacks, subject.gain_is_current) == (0, 0, True)


@pytest.mark.parametrize(
    "plant", [SHIFTED, InvertedPendulumParams(3.0, 0.3, 1.5), InvertedPendulumParams(0.5, 0.2, 0.4)]
)
def test_model_and_gain_converge_to_the_linearised_plant(plant: InvertedPendulumParams) -> None:
    subject, (A, B) = expert(), linearize(plant)
    errors = []
    for seed in range(4):
        subject.observe(*transitions(plant, 250, size=0.5, seed=seed))
        errors.append(np.abs(subject.gain / lqr_gain(plant) - 1).max())
    found_A, found_B = subject.model
    np.testing.assert_allclose(found_A, A, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(found_B, B, rtol=0.02, atol=0.002)
    assert errors[-1] < 0.03
    assert errors[-1] <= errors[0] + 0.01
    assert np.abs(lqr_gain(NOMINAL) / lqr_gain(plant) - 1).max() > 5 * errors[-1]  # there was something to find


def test_costs_are_those_of_the_oracle() -> None:
    Q, R = np.diag([4.0, 0.0, 1.0, 2.0]), 9.0
    subject = expert(Q=Q, R=R)
    np.testing.assert_allclose(subject.gain, lqr_gain(NOMINAL, Q, R), rtol=1e-7)
    subject.observe(*transitions(SHIFTED, 1_000, size=0.5))
    np.testing.assert_allclose(subject.gain, lqr_gain(SHIFTED, Q, R), rtol=0.03)


def test_belief_is_the_regression_on_the_transitions() -> None:
    subject, data = expert(), transitions(SHIFTED, 30)
    for row in zip(*data, strict=True):
        subject.observe(*row)
    states, actions, after = (part.astype(np.float64) for part in data)
    reference = pendulum_prior(NOMINAL)
    reference.observe(np.hstack([states, 120.0 * actions]), (after - states) / DT)
    np.testing.assert_allclose(subject.posterior.mean, reference.mean, rtol=0, atol=1e-10)
    assert subject.transitions == 30


def test_forgetting_follows_a_second_change() -> None:
    remembering, forgetting = expert(), expert(forgetting=0.98)
    for plant in (SHIFTED, InvertedPendulumParams(3.0, 0.3, 1.5)):
        for row in zip(*transitions(plant, 400, size=0.5), strict=True):
            remembering.observe(*row)
            forgetting.observe(*row)
    right = lqr_gain(InvertedPendulumParams(3.0, 0.3, 1.5))
    assert np.abs(forgetting.gain / right - 1).max() < 0.05
    assert np.abs(remembering.gain / right - 1).max() > 0.15
    remembering.forget()
    np.testing.assert_allclose(remembering.gain, lqr_gain(NOMINAL), rtol=1e-6)


def test_transitions_outside_the_region_are_left_out() -> None:
    subject, (states, actions, after) = expert(), transitions(SHIFTED, 20)
    states[3, 2], after[5, 3], states[7, 0] = 0.6, -1.1, 50.0  # the cart may be anywhere
    assert subject.observe(states, actions, after) == 18
    assert subject.transitions == 18
    everywhere = expert(region=np.full(4, np.inf))
    assert everywhere.observe(states, actions, after) == 20


def test_small_changes_of_the_model_do_not_cost_a_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []

    def counting(*args: Any) -> Any:
        solved.append(1)
        return riccati_gain(*args)

    monkeypatch.setattr("kbt_rl.agents.identification.riccati_gain", counting)
    subject = expert()
    states = transitions(SHIFTED, 3)[0]
    solved.clear()
    subject.label(states)
    assert len(solved) == 0  # nothing new
    subject.observe(*transitions(SHIFTED, 300))
    subject.label(states)
    subject.label(states)
    assert len(solved) == 1
    subject.observe(*transitions(SHIFTED, 1, seed=9))
    subject.label(states)
    assert len(solved) == 1
    subject._tolerance = 0.0  # the same expert would not have been asked so far
    subject.label(states)
    assert len(solved) == 2


# --- when there is no solution ----------------------------------------------------------------------------------------


def test_last_valid_gain_stays_in_force(caplog: pytest.LogCaptureFixture) -> None:
    subject = expert(forgetting=0.9)
    subject.observe(*transitions(SHIFTED, 50))
    before = subject.gain
    states = transitions(SHIFTED, 4)[0]
    with caplog.at_level(logging.INFO, "kbt_rl"):
        for _ in range(3):
            subject.observe(*alternating())
            np.testing.assert_array_equal(subject.gain, before)
            np.testing.assert_allclose(subject.label(states), -states @ before.T / 120.0, rtol=1e-12)
    assert not subject.gain_is_current
    assert subject.fallbacks >= 1
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1  # once, not at 50 Hz
    assert "the last valid gain stays in force" in warnings[0].getMessage()
    count = subject.fallbacks
    with caplog.at_level(logging.INFO, "kbt_rl"):
        for row in zip(*transitions(SHIFTED, 400, size=0.5), strict=True):
            subject.observe(*row)
        np.testing.assert_allclose(subject.gain, lqr_gain(SHIFTED), rtol=0.05)
    assert subject.gain_is_current
    assert subject.fallbacks == count
    assert "again" in caplog.records[-1].getMessage()


def uncontrollable() -> LinearModelPosterior:
    """Certain of a plant that falls whatever the force does."""
    rates = discrete_rates(*linearize(NOMINAL), DT)
    rates[:, 4] = 0.0
    return LinearModelPosterior(rates, np.broadcast_to(1e-6 * np.eye(5), (4, 5, 5)), np.ones(4))


def test_riccati_equation_without_a_solution() -> None:
    belief, known = uncontrollable(), LQRExpert.for_env(gym.make(NOMINAL_ID))
    with pytest.raises(ValueError, match="identified model"):
        riccati_gain(belief.mean, DT, np.eye(4), np.eye(1))
    with pytest.raises(ValueError, match="identified model"):
        SelfTuningLQR(known.observation_space, known.action_space, belief, 120.0)
    earlier = Solution(known.gain, pendulum_prior(NOMINAL).mean)
    subject = SelfTuningLQR(known.observation_space, known.action_space, belief, 120.0, solution=earlier)
    np.testing.assert_array_equal(subject.gain, known.gain)
    assert not subject.gain_is_current
    assert subject.fallbacks == 1
    assert subject.gain_is_current is False  # asked again without news: not solved again
    assert subject.fallbacks == 1


# --- bad input, saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (0, np.zeros((2, 3)), "states must have shape"),
        (0, np.zeros((3, 4)), "3 states, 2 actions and 2 next states"),
        (0, np.full((2, 4), np.nan), "states must be finite"),
        (1, np.zeros((2, 2)), "actions must have shape"),
        (1, np.full((2, 1), np.nan), "actions must be finite"),
        (1, np.full((2, 1), 1.5), "pass what was applied, after clipping"),
        (2, np.full((2, 4), np.inf), "next_states must be finite"),
        (2, "text", "could not convert"),
    ],
)
def test_bad_transitions_change_nothing(part: int, value: Any, message: str) -> None:
    subject = expert()
    subject.observe(*transitions(SHIFTED, 5))
    before = subject.posterior.mean
    data: list[Any] = list(transitions(SHIFTED, 2))
    data[part] = value
    with pytest.raises(ValueError, match=message):
        subject.observe(*data)
    np.testing.assert_array_equal(subject.posterior.mean, before)
    assert subject.transitions == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dt": 0.0}, "dt must be positive"),
        ({"tolerance": -1.0}, "tolerance must be finite and not negative"),
        ({"tolerance": np.nan}, "tolerance must be finite and not negative"),
        ({"region": (1.0, 1.0, 0.0, 1.0)}, "region must be four positive numbers"),
        ({"region": (1.0, 1.0, np.nan, 1.0)}, "region must be four positive numbers"),
        ({"region": (1.0, 1.0)}, "region must be four positive numbers"),
        ({"Q": -np.eye(4)}, "Q must be positive semidefinite"),
        ({"R": -1.0}, "R must be positive"),
        ({"spread": 1.0}, "spread is a factor above 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expert(**options)


def test_posterior_of_another_kind_or_size() -> None:
    known = LQRExpert.for_env(gym.make(NOMINAL_ID))
    spaces = known.observation_space, known.action_space
    with pytest.raises(TypeError, match="must be a LinearModelPosterior, got ndarray"):
        SelfTuningLQR(*spaces, np.eye(4), 120.0)  # type: ignore[arg-type]
    small = LinearModelPosterior(np.zeros((2, 3)), np.broadcast_to(np.eye(3), (2, 3, 3)), np.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \(4, 5\)"):
        SelfTuningLQR(*spaces, small, 120.0)


def test_the_belief_belongs_to_the_expert_alone() -> None:
    subject = expert()
    subject.posterior.observe(np.ones((1, 5)), np.ones((1, 4)))
    assert subject.transitions == 0
    subject.gain[:] = 0.0
    np.testing.assert_allclose(subject.gain, lqr_gain(NOMINAL), rtol=1e-6)


@pytest.mark.parametrize("broken", [False, True])
def test_saved_expert_goes_on_where_it_was(tmp_path: Path, broken: bool) -> None:
    subject = expert(forgetting=0.99, R=2.0)
    subject.observe(*transitions(SHIFTED, 50))
    assert subject.gain_is_current
    if broken:
        subject.observe(*alternating())
        assert not subject.gain_is_current
    subject.save(str(tmp_path / "expert"))
    loaded = SelfTuningLQR.load(str(tmp_path / "expert"))
    assert loaded.transitions == subject.transitions
    assert (loaded.fallbacks, loaded.gain_is_current) == (subject.fallbacks, subject.gain_is_current)
    np.testing.assert_array_equal(loaded.gain, subject.gain)
    for one in (subject, loaded):
        one.observe(*transitions(SHIFTED, 40, seed=3))
    np.testing.assert_array_equal(loaded.gain, subject.gain)
    np.testing.assert_array_equal(loaded.posterior.mean, subject.posterior.mean)


# --- in a rollout -----------------------------------------------------------------------------------------------------


class Fed:
    """Keeps what an expert is fed with."""

    def __init__(self, subject: SelfTuningLQR) -> None:
        self.rows: list[tuple[np.ndarray, ...]] = []
        self._observe = subject.observe
        subject.observe = self._note  # type: ignore[method-assign]

    def _note(self, *parts: Any) -> int:
        self.rows.extend(zip(*(np.array(part) for part in parts), strict=True))
        return self._observe(*parts)


class NoLastObservation(VecEnvWrapper):
    """A vector environment that does not tell where an episode ended."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        for info in infos:
            info.pop("terminal_observation", None)
        return observations, rewards, dones, infos


def short_episodes(kind: str) -> VecEnv:
    if kind == "fast":
        return InvertedPendulumSB3VecEnv(SHIFTED_ID, 3, max_episode_steps=7)
    env = DummyVecEnv([lambda: gym.make(SHIFTED_ID, max_episode_steps=7)] * 3)
    return env if kind == "SB3" else NoLastObservation(env)


@pytest.mark.parametrize(("kind", "count"), [("SB3", 60), ("fast", 60), ("no last observation", 54)])
def test_transitions_of_a_rollout_obey_the_plant_across_resets(kind: str, count: int) -> None:
    model, subject = kbt(), expert()
    model.set_env(short_episodes(kind))
    fed = Fed(subject)
    model.learn(30, callback=[IdentificationCallback(subject), KalmanAdapter(subject)])
    model.learn(30, callback=[IdentificationCallback(subject), KalmanAdapter(subject)], reset_num_timesteps=False)
    assert len(fed.rows) == count  # 20 steps of 3 environments, each with two ends
    before, actions, after = (np.array(part, dtype=np.float64) for part in zip(*fed.rows, strict=True))
    expected = rk4_step(before, 120.0 * actions[:, 0], SHIFTED)
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-5)


def test_labels_come_from_what_was_just_seen() -> None:
    """The callback that stands first feeds the expert before the adapter asks it."""
    model, subject = kbt(), expert()
    asked: list[int] = []
    label = subject.label
    subject.label = lambda observations: (asked.append(subject.transitions), label(observations))[1]  # type: ignore[method-assign, func-returns-value]
    model.learn(20, callback=[IdentificationCallback(subject), KalmanAdapter(subject)])
    assert asked == list(range(1, 21))
    assert np.abs(subject.gain / lqr_gain(SHIFTED) - 1).max() < 0.2
    assert model.labels_used == 20


@pytest.mark.filterwarnings("ignore:nothing was learned")
def test_it_logs_what_it_has_seen() -> None:
    model, subject = kbt(n_steps=50), expert()
    seen: dict[str, Any] = {}

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            seen.update(self.logger.name_to_value)
            return True

    model.learn(12, callback=[IdentificationCallback(subject), Look()])
    assert (seen["identification/transitions"], seen["identification/fallbacks"]) == (12, 0)


def test_wrong_companions() -> None:
    with pytest.raises(TypeError, match="must be a SelfTuningLQR, which takes transitions; got LQRExpert"):
        IdentificationCallback(LQRExpert.for_env(gym.make(NOMINAL_ID)))  # type: ignore[arg-type]
    ppo = PPO("MlpPolicy", make_vec_env(NOMINAL_ID), device="cpu")
    with pytest.raises(TypeError, match=r"learners of kbt_rl .*call expert\.observe"):
        ppo.learn(1, callback=IdentificationCallback(expert()))
