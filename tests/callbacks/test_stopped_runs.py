"""Runs that end early, by a callback, an error, Ctrl-C or with the process: what is logged, and how they go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from learners import NOMINAL, SHIFTED, changed, curve, events, expert, kbt, states, warm_start, weights
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnvWrapper

from kbt_rl import KBT, KalmanAdapter, OnlineAdapter, WarmStart, adapt
from kbt_rl.agents.identification import SelfTuningLQR
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.callbacks import IdentificationCallback, RecordedStream

LEARNERS = pytest.mark.parametrize("make", [kbt, warm_start], ids=["kbt", "warm start"])
pytestmark = pytest.mark.filterwarnings("ignore:nothing was learned")


def adapter(model: OnlineAlgorithm, *args: Any, **options: Any) -> OnlineAdapter:
    return (KalmanAdapter if isinstance(model, KBT) else OnlineAdapter)(*args, **options)


class At(BaseCallback):
    """Does something in one of its steps; asks to stop if it returns False."""

    def __init__(self, step: int, act: Callable[[], bool]) -> None:
        super().__init__()
        self.step, self.act = step, act

    def _on_step(self) -> bool:
        return self.act() if self.n_calls == self.step else True


def interrupt() -> bool:
    raise KeyboardInterrupt


def fail() -> bool:
    raise OSError("the disk is full")


def stop() -> bool:
    return False


class Film(VecEnvWrapper):
    """What really happened: the observation before each step, the action, and what came; None while it is stepped."""

    def __init__(self, venv: Any) -> None:
        super().__init__(venv)
        self.shown: np.ndarray | None = None
        self.steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.during: Callable[[], bool] | None = None

    def reset(self) -> Any:
        self.shown = self.venv.reset()
        return self.shown

    def step_wait(self) -> Any:
        before, self.shown = self.shown, None
        observations, rewards, dones, infos = self.venv.step_wait()
        if self.during is not None:
            during, self.during = self.during, None
            during()
        after = observations.copy()
        for row in np.flatnonzero(dones):
            after[row] = infos[row]["terminal_observation"]
        self.steps.append((before, self.actions_taken, after))
        self.shown = observations
        return observations, rewards, dones, infos

    def step_async(self, actions: np.ndarray) -> None:
        self.actions_taken = np.array(actions)
        self.venv.step_async(actions)


class Heard(SelfTuningLQR):
    """Keeps the transitions that it was shown."""

    def observe(self, states: Any, actions: Any, next_states: Any) -> int:
        seen = self.__dict__.setdefault("seen", [])
        seen += [tuple(np.array(part) for part in row) for row in zip(states, actions, next_states, strict=True)]
        return super().observe(states, actions, next_states)


# ---------------------------------------------------------------------- transitions


@pytest.mark.parametrize("ending", [stop, interrupt, fail, "in the step"])
@pytest.mark.parametrize("at", [1, 3, 5, 7])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_a_callback_sees_transitions_that_happened(ending: Any, at: int, n_envs: int) -> None:
    """Also across the end of an episode, which is every fifth step here, and on with the same episode or a new one."""
    model, teacher = kbt(n_steps=4), Heard.for_env(gym.make(NOMINAL))
    film = Film(make_vec_env(SHIFTED, n_envs, env_kwargs={"max_episode_steps": 5}))
    model.set_env(film)
    watch = IdentificationCallback(teacher)
    error = {interrupt: KeyboardInterrupt, fail: OSError, "in the step": KeyboardInterrupt}.get(ending)
    if ending == "in the step":
        ending = lambda: setattr(film, "during", interrupt) or True  # noqa: E731  # in the step after this one
    if error is None:
        model.learn(20 * n_envs, callback=[watch, At(at, ending)])
    else:
        with pytest.raises(error):
            model.learn(20 * n_envs, callback=[watch, At(at, ending)])
    before = len(teacher.seen)
    model.learn(7 * n_envs, callback=watch, reset_num_timesteps=False)
    assert len(teacher.seen) == before + 7 * n_envs
    happened = {
        tuple(part[row].tobytes() for part in step)
        for step in film.steps
        for row in range(n_envs)
        if step[0] is not None
    }
    for transition in teacher.seen:
        assert tuple(part.astype(np.float32).tobytes() for part in transition) in happened


def test_a_run_that_is_stopped_and_continued_is_the_run_that_was_not() -> None:
    """The same episode, context and actions."""
    whole, halves = kbt(), kbt()
    for model in (whole, halves):
        model.set_env(make_vec_env(SHIFTED, env_kwargs={"max_episode_steps": 6}, seed=3))
    whole.learn(20, callback=adapter(whole, expert(), "visited"))
    halves.learn(20, callback=[adapter(halves, expert(), "visited"), At(9, stop)])
    halves.learn(11, callback=adapter(halves, expert(), "visited"), reset_num_timesteps=False)
    assert (halves.num_timesteps, halves.labels_used) == (20, 20)
    assert not changed(weights(whole), weights(halves))
    np.testing.assert_array_equal(halves._last_obs, whole._last_obs)


# ---------------------------------------------------------------------- the log


@LEARNERS
@pytest.mark.parametrize("ending", [stop, interrupt, fail])
@pytest.mark.parametrize("log_interval", [1, 3])
def test_the_last_entry_of_the_log_is_what_was_reached(
    make: Any, ending: Any, log_interval: int, tmp_path: Path
) -> None:
    model = make(tensorboard_log=str(tmp_path))
    callbacks = [adapter(model, expert()), At(17, ending)]
    if ending is stop:
        model.learn(100, callback=callbacks, log_interval=log_interval)
    else:
        with pytest.raises((KeyboardInterrupt, OSError)):
            model.learn(100, callback=callbacks, log_interval=log_interval)
    assert model.labels_used == 17
    expected = {10: 10.0, 17: 17.0} if log_interval == 1 else {17: 17.0}
    assert curve(events(tmp_path), "kalman/labels") == expected


def test_a_run_that_is_no_multiple_of_the_interval_ends_in_the_log_too(tmp_path: Path) -> None:
    model = kbt(tensorboard_log=str(tmp_path))
    model.learn(47, callback=KalmanAdapter(expert()), log_interval=2)
    shown = curve(events(tmp_path), "kalman/labels")
    assert shown == {20: 20.0, 40: 40.0, 47: 47.0}
    assert list(curve(events(tmp_path), "kalman/smallest_variance")) == [20, 40, 47]


def test_no_log_is_no_log(tmp_path: Path) -> None:
    model = kbt(tensorboard_log=str(tmp_path))
    model.learn(7, callback=[KalmanAdapter(expert()), At(5, stop)], log_interval=0)
    assert events(tmp_path).Tags()["scalars"] == []


@LEARNERS
@pytest.mark.parametrize("episodes", [1, 2])
def test_the_episode_that_ends_a_run_counts(make: Any, episodes: int, tmp_path: Path) -> None:
    model = make(tensorboard_log=str(tmp_path))
    model.set_env(make_vec_env(NOMINAL, env_kwargs={"max_episode_steps": 13}))
    model.learn(1_000, callback=StopTrainingOnMaxEpisodes(episodes))
    steps = 13 * episodes
    assert (model.num_timesteps, len(model.ep_info_buffer)) == (steps, episodes)
    log = events(tmp_path)
    assert curve(log, "rollout/ep_len_mean")[steps] == 13.0
    assert steps in curve(log, "rollout/success_rate")


# ---------------------------------------------------------------------- budgets and labels on the way


def loaded(model: Any, path: Path, n_envs: int = 1) -> Any:
    model.save(path)
    return type(model).load(path, env=make_vec_env(SHIFTED, n_envs=n_envs), device="cpu")


@LEARNERS
@pytest.mark.parametrize("continued", [False, True])
def test_a_budget_is_one_for_all_runs_of_a_model(make: Any, continued: bool, tmp_path: Path) -> None:
    model = make()
    model.learn(6, callback=adapter(model, expert(), budget=8))
    for path, asked in (("a", 8), ("b", 8)):
        model = loaded(model, tmp_path / path)
        going_on = adapter(model, expert(), budget=8)
        model.learn(6, callback=going_on, reset_num_timesteps=not continued)
        assert (going_on.asked, model.labels_used) == (asked, asked)
    assert going_on.saved == 10
    model = loaded(model, tmp_path / "c")
    model.learn(6, callback=adapter(model, expert(), budget=11))
    assert model.labels_used == 11  # three more


@LEARNERS
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("cut", [3, 8, 14])
@pytest.mark.parametrize("by", ["save", "checkpoint"])
def test_labels_on_the_way_arrive_after_a_load(make: Any, n_envs: int, cut: int, by: str, tmp_path: Path) -> None:
    rows = states(40)
    labels = expert().label(rows)

    def late(model: Any) -> OnlineAdapter:
        return adapter(model, None, RecordedStream(rows, labels), delay=5)

    whole, first = make(n_envs=n_envs), make(n_envs=n_envs)
    whole.learn(20 * n_envs, callback=late(whole))
    assert whole.labels_used == 15 * n_envs
    if by == "save":
        first.learn(cut * n_envs, callback=late(first))
        second = loaded(first, tmp_path / "model", n_envs)
    else:
        first.learn(20 * n_envs, callback=[late(first), CheckpointCallback(cut, str(tmp_path))])
        path = tmp_path / f"rl_model_{cut * n_envs}_steps"
        second = type(first).load(path, env=make_vec_env(SHIFTED, n_envs=n_envs), device="cpu")
    second.learn((20 - cut) * n_envs, callback=late(second), reset_num_timesteps=False)
    assert second.labels_used == whole.labels_used
    assert not changed(weights(second), weights(whole))


def test_each_of_several_adapters_goes_on_with_its_own(tmp_path: Path) -> None:
    model = kbt()
    model.learn(5, callback=[KalmanAdapter(expert(), "iid", budget=3), KalmanAdapter(expert(), "visited", budget=4)])
    model = loaded(model, tmp_path / "a")
    visited, iid, another = (KalmanAdapter(expert(), stream, budget=5) for stream in ("visited", "iid", "iid"))
    model.learn(9, callback=[visited, iid, another])
    assert (visited.asked, iid.asked, another.asked) == (5, 5, 5)
    assert model.labels_used == 7 + 1 + 2 + 5


def test_two_adapters_of_one_kind_keep_their_order(tmp_path: Path) -> None:
    model = kbt()
    model.learn(5, callback=[KalmanAdapter(expert(), budget=1), KalmanAdapter(expert(), budget=4)])
    model = loaded(model, tmp_path / "a")
    both = [KalmanAdapter(expert(), budget=9), KalmanAdapter(expert(), budget=9)]
    model.learn(2, callback=both)
    assert [one.asked for one in both] == [3, 6]


def test_a_new_adapter_in_the_same_process_has_a_budget_of_its_own() -> None:
    model = kbt()
    for _ in range(3):
        model.learn(5, callback=KalmanAdapter(expert(), budget=2))
    assert model.labels_used == 6
    assert len(model.adapter_state) == 1


def test_one_that_serves_several_models_counts_for_each() -> None:
    first, second, one = kbt(), kbt(), KalmanAdapter(expert(), budget=3)
    for model in (first, second, first):
        model.learn(4, callback=one)
        assert (one.asked, model.labels_used) == (3, 3)


def test_a_new_start_forgets_what_was_saved(tmp_path: Path) -> None:
    model = kbt()
    model.learn(6, callback=KalmanAdapter(expert(), budget=6, delay=4))
    model = loaded(model, tmp_path / "a")
    model.start_from(kbt())
    fresh = KalmanAdapter(expert(), budget=6, delay=4)
    model.learn(6, callback=fresh)
    assert (fresh.asked, model.labels_used) == (6, 2)


@LEARNERS
def test_an_interrupt_loses_no_label_on_the_way_and_learns_none_twice(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = make(), make()
    rows, labels = states(12), expert().label(states(12))
    whole.learn(10, callback=adapter(whole, None, RecordedStream(rows, labels), delay=2))
    teacher = adapter(model, None, RecordedStream(rows, labels), delay=2)
    update = model.update

    def interrupted(before: bool) -> Any:
        def run(sample: Any) -> Any:
            monkeypatch.setattr(model, "update", update)
            if not before:
                update(sample)
            raise KeyboardInterrupt

        return run

    for before in (True, False):
        monkeypatch.setattr(model, "update", interrupted(before))
        with pytest.raises(KeyboardInterrupt):
            model.learn(10, callback=teacher, reset_num_timesteps=False)
    model.learn(10 - model.num_timesteps, callback=teacher, reset_num_timesteps=False)
    assert model.labels_used == whole.labels_used == 8
    assert not changed(weights(model), weights(whole))


def test_labels_on_the_way_to_an_adapted_policy_arrive_in_the_next_run() -> None:
    pytest.importorskip("safetensors")
    from stable_baselines3 import PPO

    policy = adapt(PPO("MlpPolicy", SHIFTED, n_steps=8, batch_size=8, seed=0), states=states(50))
    late = KalmanAdapter(expert(), "visited", delay=4)
    for _ in range(2):
        policy.learn(SHIFTED, 6, callback=late, seed=0)
    assert (late.asked, policy.head.labels_seen) == (12, 8)


def test_warm_start_counts_what_it_learned(tmp_path: Path) -> None:
    """With the memory partly full and labels on the way, at every step of a run."""
    model = warm_start(memory=4)
    teacher = OnlineAdapter(expert(), delay=3)
    model.learn(11, callback=[teacher, CheckpointCallback(1, str(tmp_path))])
    for step in range(1, 12):
        found = WarmStart.load(tmp_path / f"rl_model_{step}_steps")
        (progress,) = found.adapter_state.values()
        assert (progress.asked, len(progress.on_the_way)) == (step, min(step, 3))
        assert found.labels_used == step - min(step, 3)
