"""Adapters: who may be the expert, and what TensorBoard shows of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from learners import (
    NOMINAL,
    SHIFTED,
    Recorder,
    Updates,
    changed,
    curve,
    events,
    expert,
    kbt,
    pretrained,
    states,
    warm_start,
    weights,
)
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kbt_rl import KBT, KalmanAdapter, LQRExpert, OnlineAdapter
from kbt_rl.agents.experts import as_labeller
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv

LEARNERS = pytest.mark.parametrize("make", [kbt, warm_start], ids=["kbt", "warm start"])
SHARED = {f"kalman/{name}" for name in ("labels", "labels_asked", "labels_saved", "update_ms", "innovation")}
POSTERIOR = {
    "kalman/predictive_variance",
    "kalman/epistemic_variance",
    "kalman/nis",
    "kalman/smallest_variance",
    "kalman/repairs",
}


def adapter(model: OnlineAlgorithm, *args: Any) -> OnlineAdapter:
    return (KalmanAdapter if isinstance(model, KBT) else OnlineAdapter)(*args)


@LEARNERS
def test_learning_without_a_teacher_says_so(make: Any) -> None:
    model = make()
    with pytest.warns(UserWarning, match="nothing was learned: learn\\(\\) acts, and a callback teaches"):
        model.learn(2, callback=Recorder("dones"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(2, callback=adapter(model, expert()))


def test_an_expert_from_vec_normalize_sees_what_it_was_trained_on() -> None:
    envs = VecNormalize(make_vec_env(SHIFTED, 2))
    trained = PPO("MlpPolicy", envs, n_steps=32, seed=0).learn(64)
    rows = states(5)
    ask = as_labeller(trained, trained.observation_space, trained.action_space)
    expected = trained.predict(envs.normalize_obs(rows), deterministic=True)[0]
    np.testing.assert_array_equal(ask(rows), expected)
    assert not np.array_equal(trained.predict(rows, deterministic=True)[0], expected)
    recurrent = RecurrentPPO("MlpLstmPolicy", SHIFTED, n_steps=32)
    with pytest.raises(TypeError, match="a recurrent expert has to see every observation"):
        as_labeller(recurrent, recurrent.observation_space, recurrent.action_space)


# ---------------------------------------------------------------------- TensorBoard


@pytest.mark.parametrize("n_envs", [1, 2])
def test_tensorboard_shows_the_posterior(n_envs: int, tmp_path: Path) -> None:
    model = kbt(n_envs=n_envs, tensorboard_log=str(tmp_path), n_steps=5)
    seen = Updates(model)
    model.learn(15 * n_envs, callback=KalmanAdapter(expert()))
    log = events(tmp_path)
    assert set(log.Tags()["scalars"]) >= SHARED | POSTERIOR
    assert log.Tags()["histograms"] == log.Tags()["tensors"] == []
    steps = [5 * n_envs, 10 * n_envs, 15 * n_envs]
    assert curve(log, "kalman/labels") == dict(zip(steps, steps, strict=True))
    for name, scale in (("predictive_variance", 1), ("epistemic_variance", 1), ("nis", n_envs), ("innovation", 1)):
        shown = curve(log, f"kalman/{name}")
        assert list(shown) == steps
        np.testing.assert_allclose(list(shown.values()), np.array(seen.means(name, 5)) / scale, rtol=1e-5)
    assert all(value > 0 for value in curve(log, "kalman/update_ms").values())
    smallest = float(model.policy.head.variances().min())
    assert curve(log, "kalman/smallest_variance")[steps[-1]] == pytest.approx(smallest)


def test_warm_start_shows_what_means_the_same(tmp_path: Path) -> None:
    model = warm_start(tensorboard_log=str(tmp_path), n_steps=5)
    seen = Updates(model)
    model.learn(10, callback=OnlineAdapter(expert()))
    log = events(tmp_path)
    tags = {tag for tag in log.Tags()["scalars"] if tag.startswith("kalman/")}
    assert tags == SHARED
    assert curve(log, "kalman/labels") == {5: 5.0, 10: 10.0}
    np.testing.assert_allclose(list(curve(log, "kalman/innovation").values()), seen.means("innovation", 5), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:nothing was learned")
@LEARNERS
def test_success_rate_of_finished_episodes(make: Any, tmp_path: Path) -> None:
    model = make(tensorboard_log=str(tmp_path))
    model.set_env(gym.make(NOMINAL, max_episode_steps=60))
    recorder = Recorder("infos", "dones")
    model.learn(300, callback=recorder)
    successes, expected = [], {}
    for number, step in enumerate(recorder.steps, 1):
        if step["dones"][0]:
            successes.append(step["infos"][0]["is_success"])
        if number % 10 == 0 and successes:
            expected[number] = float(np.mean(successes))
    shown = curve(events(tmp_path), "rollout/success_rate")
    assert shown == pytest.approx(expected)
    assert min(shown) == 60  # the first episode that ends
    assert set(curve(events(tmp_path), "rollout/ep_len_mean").values()) == {60.0}


@LEARNERS
def test_success_rate_of_evaluations(make: Any, tmp_path: Path) -> None:
    model = make(tensorboard_log=str(tmp_path))
    watch = EvalCallback(make_vec_env(SHIFTED, n_envs=2), n_eval_episodes=2, eval_freq=6, verbose=0)
    model.learn(12, callback=[adapter(model, expert()), watch])
    log = events(tmp_path)
    for tag in ("eval/success_rate", "eval/mean_reward", "eval/mean_ep_length"):
        assert list(curve(log, tag)) == [6, 12]
    assert curve(log, "eval/success_rate")[6] in (0.0, 0.5, 1.0)


def test_runs_of_one_name_continue_the_curve(tmp_path: Path) -> None:
    model = kbt(tensorboard_log=str(tmp_path), n_steps=5)
    model.learn(5, callback=KalmanAdapter(expert()), tb_log_name="run")
    model.learn(5, callback=KalmanAdapter(expert()), tb_log_name="run", reset_num_timesteps=False)
    (folder,) = tmp_path.iterdir()
    assert folder.name == "run_1"
    steps = set()
    for file in folder.iterdir():
        accumulator = EventAccumulator(str(file))
        accumulator.Reload()
        steps |= set(curve(accumulator, "kalman/labels").items())
    assert steps == {(5, 5.0), (10, 10.0)}


def test_the_log_interval_thins_the_curve(tmp_path: Path) -> None:
    model = kbt(tensorboard_log=str(tmp_path), n_steps=5)
    seen = Updates(model)
    model.learn(20, callback=KalmanAdapter(expert()), log_interval=2)
    shown = curve(events(tmp_path), "kalman/innovation")
    assert list(shown) == [10, 20]
    np.testing.assert_allclose(list(shown.values()), seen.means("innovation", 10), rtol=1e-5)


# ---------------------------------------------------------------------- experts


def ppo() -> PPO:
    return PPO("MlpPolicy", NOMINAL, n_steps=2, batch_size=2, seed=0)


@LEARNERS
@pytest.mark.parametrize("form", ["lqr", "policy", "algorithm", "learner", "callable"])
def test_experts_come_in_many_forms(make: Any, form: str) -> None:
    teachers: dict[str, Any] = {
        "lqr": expert(),
        "policy": ppo().policy,
        "algorithm": ppo(),
        "learner": pretrained(),
        "callable": lambda observations: observations[:, :1] * [[0.25]],
    }
    teacher, model, targets = teachers[form], make(), []
    update = model.update

    def noted(sample: Any) -> Any:
        targets.append((sample.context.newest, sample.target))
        return update(sample)

    model.update = noted
    model.learn(4, callback=adapter(model, teacher))
    assert model.labels_used == len(targets) == 4
    for observations, target in targets:
        if form == "lqr":
            expected = -observations.astype(np.float64) @ teacher.gain.T / 120.0
        elif form == "callable":
            expected = 0.25 * observations[:, :1]
        else:
            expected = teacher.predict(observations, deterministic=True)[0]
        np.testing.assert_allclose(target, expected, rtol=1e-9)


@LEARNERS
def test_rows_of_nan_have_no_label(make: Any, tmp_path: Path) -> None:
    model = make(n_envs=3, tensorboard_log=str(tmp_path), n_steps=2)

    def partly(observations: np.ndarray) -> np.ndarray:
        labels = expert().label(observations)
        labels[1] = np.nan
        return labels

    model.learn(12, callback=adapter(model, partly))
    assert model.num_timesteps == 12
    assert model.labels_used == 8
    assert curve(events(tmp_path), "kalman/labels") == {6: 4.0, 12: 8.0}


@LEARNERS
@pytest.mark.parametrize("stream", ["iid", "visited"])
def test_a_silent_expert_changes_nothing_and_stops_nothing(make: Any, stream: str, tmp_path: Path) -> None:
    model = make(tensorboard_log=str(tmp_path), n_steps=2)
    before = weights(model)
    model.learn(6, callback=adapter(model, lambda observations: np.full((len(observations), 1), np.nan), stream))
    assert model.num_timesteps == 6
    assert not changed(before, weights(model))
    assert set(curve(events(tmp_path), "kalman/labels").values()) == {0.0}


def test_a_wrong_answer_in_the_middle_leaves_the_last_good_posterior() -> None:
    model, calls = kbt(), []

    def failing(observations: np.ndarray) -> np.ndarray:
        calls.append(weights(model))
        return expert().label(observations) if len(calls) < 4 else np.zeros(3)

    with pytest.raises(ValueError, match=r"with shape \(3,\); expected \(1, 1\)"):
        model.learn(10, callback=KalmanAdapter(failing))
    assert model.labels_used == 3
    assert not changed(calls[-1], weights(model))


def test_a_tracking_expert_follows_the_plant() -> None:
    env = make_vec_env(NOMINAL)
    model = kbt()
    model.set_env(env)
    adapted = KalmanAdapter(LQRExpert.for_env(env, tracking=True))
    model.learn(2, callback=adapted)
    env.env_method("set_dynamics", pole_mass=1.0, pole_half_length=5.0)
    targets: list[Any] = []
    update = model.update
    model.update = lambda sample: (targets.append(sample), update(sample))[1]  # type: ignore[method-assign, assignment]
    model.learn(1, callback=adapted, reset_num_timesteps=False)
    np.testing.assert_allclose(targets[0].target, expert(SHIFTED).label(targets[0].context.newest))


# ---------------------------------------------------------------------- with other callbacks


@LEARNERS
def test_a_callback_can_stop_the_run(make: Any) -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 3

    model = make()
    model.learn(100, callback=[adapter(model, expert()), Stop()])
    assert model.num_timesteps == model.labels_used == 3


def test_an_adapter_can_serve_again() -> None:
    adapter, first, second = KalmanAdapter(expert()), kbt(), kbt()
    for model in (first, second):
        model.learn(4, callback=adapter)
    assert not changed(weights(first), weights(second))


def test_workers_in_other_processes() -> None:
    """An environment that states neither a force limit nor a label box must not bring its worker down."""
    env = SubprocVecEnv([lambda: gym.make("Pendulum-v1")], start_method="spawn")
    try:
        model = KBT(env=env, seed=0)
        assert np.isnan(model.max_force)
        assert model.label_space == env.observation_space
        model.learn(3, callback=KalmanAdapter(lambda observations: observations[:, :1], "visited"))
        assert model.labels_used == 3
    finally:
        env.close()


def test_predictions_are_better_after_the_run_than_before() -> None:
    model = kbt()

    def error() -> float:
        actions, _ = model.predict(states(200, seed=5), deterministic=True)
        return float(np.mean((actions - expert().label(states(200, seed=5)).clip(-1, 1)) ** 2))

    before = error()
    model.learn(40, callback=KalmanAdapter(expert()))
    assert error() < 0.05 * before


def test_a_tracking_expert_labels_each_plant_of_a_vector_env() -> None:
    env = InvertedPendulumSB3VecEnv(SHIFTED, 2)
    env.env_method("set_dynamics", pole_mass=0.5, indices=[1])
    model = kbt()
    model.set_env(env)
    model.learn(4, callback=KalmanAdapter(LQRExpert.for_env(env, tracking=True), "visited"))
    assert model.labels_used == 4


def test_every_plant_of_a_vector_env_is_held_against_the_expert() -> None:
    env = InvertedPendulumSB3VecEnv(SHIFTED, 2)
    fixed = LQRExpert.for_env(env)
    env.env_method("set_dynamics", pole_mass=0.5, indices=[1])
    model = kbt()
    model.set_env(env)
    with pytest.raises(ValueError, match="made for params"):
        model.learn(4, callback=KalmanAdapter(fixed))
