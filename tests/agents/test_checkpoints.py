"""SB3's zip: what is saved, what a resumed run continues, what a wrong checkpoint leaves untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from learners import LONGER, NOMINAL, SHIFTED, Recorder, changed, expert, kbt, longer_kbt, states, warm_start, weights
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env

from kbt_rl import KBT, HeadConfig, KalmanAdapter, OnlineAdapter, Sample, WarmStart
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.callbacks import RecordedStream, SampleStream

LEARNERS = pytest.mark.parametrize("make", [kbt, warm_start], ids=["kbt", "warm start"])


def adapter(model: OnlineAlgorithm, stream: str | SampleStream = "iid") -> OnlineAdapter:
    return (KalmanAdapter if isinstance(model, KBT) else OnlineAdapter)(expert(), stream)


def recording() -> RecordedStream:
    labels = expert().label(states(30))
    labels[::7] = np.nan
    return RecordedStream(states(30), labels)


@LEARNERS
def test_zip_keeps_every_bit(make: Any, tmp_path: Path) -> None:
    model = make()
    model.learn(8, callback=adapter(model))
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    assert not changed(weights(model), weights(loaded))
    for name in ("label_space", "max_force", "pretrain_info", "labels_used", "num_timesteps", "n_steps", "seed"):
        assert getattr(loaded, name) == getattr(model, name)
    np.testing.assert_array_equal(
        loaded.predict(states(20), deterministic=True)[0], model.predict(states(20), deterministic=True)[0]
    )


@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {"transformer": LONGER},
        {"head": HeadConfig(layers=1, structure="diagonal"), "sampling": "predictive"},
        {"head": HeadConfig(layers=3, width=40, structure="neuron", noise_variance=0.2)},
    ],
)
def test_settings_of_the_policy_are_saved(policy_kwargs: dict[str, Any], tmp_path: Path) -> None:
    model = KBT(env=gym.make(SHIFTED), policy_kwargs=policy_kwargs, seed=0)
    model.update(Sample(states(2), np.ones((2, 1))))
    model.save(tmp_path / "model.zip")
    loaded = KBT.load(tmp_path / "model.zip")
    assert not changed(weights(model), weights(loaded))
    for part, other in zip(
        loaded.policy.predict_moments(states(9)), model.policy.predict_moments(states(9)), strict=True
    ):
        np.testing.assert_array_equal(part, other)


def test_warm_start_settings_are_saved(tmp_path: Path) -> None:
    model = warm_start(memory=7, epochs=2, learning_rate=0.5)
    model.save(tmp_path / "model")
    loaded = WarmStart.load(tmp_path / "model")
    assert (loaded.memory, loaded.epochs, loaded.step_size) == (7, 2, 0.5)


# ---------------------------------------------------------------------- resuming


@LEARNERS
@pytest.mark.parametrize("stream", ["iid", "recorded"])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_a_resumed_run_ends_in_the_same_bits(make: Any, stream: str, n_envs: int, tmp_path: Path) -> None:
    """Stopped in the middle of a stream and, for warm start, with a partly filled memory."""

    def source() -> str | SampleStream:
        return recording() if stream == "recorded" else stream

    whole, first = make(n_envs=n_envs), make(n_envs=n_envs)
    whole.learn(24, callback=adapter(whole, source()))
    first.learn(14, callback=adapter(first, source()))
    first.save(tmp_path / "half")
    second = type(first).load(tmp_path / "half", env=make_vec_env(SHIFTED, n_envs=n_envs), device="cpu")
    assert changed(weights(first), weights(whole))
    second.learn(10, callback=adapter(second, source()), reset_num_timesteps=False)
    assert (second.num_timesteps, second.labels_used) == (24, whole.labels_used)
    assert not changed(weights(second), weights(whole))


@pytest.mark.parametrize("memory", [5, 9])
def test_a_partly_filled_memory_is_saved(memory: int, tmp_path: Path) -> None:
    labels = expert().label(states(12))
    whole, first = warm_start(memory=memory), warm_start(memory=memory)
    whole.update(Sample(states(12), labels))
    first.update(Sample(states(12)[:7], labels[:7]))
    first.save(tmp_path / "half")
    second = WarmStart.load(tmp_path / "half", device="cpu")
    second.update(Sample(states(12)[7:], labels[7:]))
    assert not changed(weights(second), weights(whole))


@pytest.mark.filterwarnings("ignore:nothing was learned")
def test_a_closed_loop_resumes_at_the_next_episode(tmp_path: Path) -> None:
    model = longer_kbt()
    model.learn(5, callback=adapter(model, "visited"))
    model.save(tmp_path / "half")
    loaded = KBT.load(tmp_path / "half", env=gym.make(SHIFTED))
    recorder = Recorder("context")
    loaded.learn(2, callback=recorder, reset_num_timesteps=False)
    first = recorder.steps[0]["context"]
    assert first.timesteps.tolist() == [1]
    np.testing.assert_array_equal(first.observations[:, 0], 0.0)


def test_a_model_loads_into_another_number_of_environments(tmp_path: Path) -> None:
    kbt().save(tmp_path / "model")
    loaded = KBT.load(tmp_path / "model", env=make_vec_env(SHIFTED, n_envs=3))
    loaded.learn(6, callback=KalmanAdapter(expert(), "visited"))
    assert loaded.labels_used == 6


@pytest.mark.filterwarnings("ignore:nothing was learned")
def test_a_robot_needs_no_environment(tmp_path: Path) -> None:
    kbt().save(tmp_path / "model")
    loaded = KBT.load(tmp_path / "model")
    action, state = loaded.predict(states(1)[0], deterministic=True)
    before = weights(loaded)
    loaded.update(Sample(state, action + 0.1))
    assert changed(before, weights(loaded))
    with pytest.raises(ValueError, match="no environment; call set_env first"):
        loaded.learn(1)
    loaded.set_env(gym.make(SHIFTED))
    loaded.learn(1)


# ---------------------------------------------------------------------- parameters


@LEARNERS
def test_parameters_can_be_copied_over(make: Any) -> None:
    model, other = make(), make()
    for observation in states(5):
        model.update(Sample(observation, expert().label(observation)))
    assert changed(weights(model), weights(other))
    other.set_parameters(model.get_parameters())
    assert not changed(weights(model), weights(other))
    if isinstance(model, KBT):
        assert model.get_parameters()["policy"]["head.mean"].dtype == torch.float64


def test_parameters_can_be_read_from_a_file(tmp_path: Path) -> None:
    model, other = kbt(), kbt()
    model.update(Sample(states(3), expert().label(states(3))))
    model.save(tmp_path / "model")
    other.set_parameters(tmp_path / "model", device="cpu")
    assert not changed(weights(model), weights(other))


# ---------------------------------------------------------------------- wrong checkpoints


@pytest.mark.parametrize(
    "other",
    [
        longer_kbt,
        warm_start,
        lambda: KBT(env=gym.make(SHIFTED), policy_kwargs={"head": HeadConfig(layers=2)}),
        lambda: KBT(env=gym.make(SHIFTED), policy_kwargs={"head": HeadConfig(structure="neuron")}),
    ],
    ids=["context", "class", "layers", "structure"],
)
def test_parameters_of_another_architecture_change_nothing(other: Any, tmp_path: Path) -> None:
    other().save(tmp_path / "other")
    model = kbt()
    before = weights(model)
    with pytest.raises(RuntimeError, match="architecture"):
        model.set_parameters(tmp_path / "other", device="cpu")
    assert not changed(before, weights(model))


@pytest.mark.parametrize(
    ("kind", "make", "error", "message"),
    [
        (KBT, warm_start, TypeError, "KBT needs a DecisionTransformerPolicy"),
        (WarmStart, kbt, TypeError, "use TransformerPolicy"),
        (KBT, lambda: PPO("MlpPolicy", NOMINAL, n_steps=2, batch_size=2), ValueError, "was not written by this"),
    ],
)
def test_a_checkpoint_of_another_class_is_refused(
    kind: Any, make: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    make().save(tmp_path / "other")
    with pytest.raises(error, match=message):
        kind.load(tmp_path / "other")


@pytest.mark.parametrize("kind", [KBT, WarmStart])
def test_a_checkpoint_that_is_not_there_or_not_one_is_refused(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no model at .*missing"):
        kind.load(tmp_path / "missing")
    (tmp_path / "text.zip").write_text("not a zip")
    for load in (kind.load, (kbt if kind is KBT else warm_start)().set_parameters):
        with pytest.raises(ValueError, match=r"text.zip is damaged or truncated, or was not written by"):
            load(tmp_path / "text.zip")


def test_a_checkpoint_is_not_loaded_into_another_plant_or_space(tmp_path: Path) -> None:
    kbt().save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"60\.0 N in the new environment and 120\.0 N"):
        KBT.load(tmp_path / "model", env=gym.make(SHIFTED, max_force=60.0))
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        KBT.load(tmp_path / "model", env=gym.make("Pendulum-v1"))


# ---------------------------------------------------------------------- SB3's callbacks


@LEARNERS
def test_checkpoints_during_a_run_continue_it(make: Any, tmp_path: Path) -> None:
    model = make()
    model.learn(12, callback=[adapter(model), CheckpointCallback(save_freq=6, save_path=str(tmp_path))])
    resumed = type(model).load(tmp_path / "rl_model_6_steps", env=make_vec_env(SHIFTED), device="cpu")
    assert resumed.num_timesteps == resumed.labels_used == 6
    resumed.learn(6, callback=adapter(resumed), reset_num_timesteps=False)
    assert not changed(weights(resumed), weights(model))


@LEARNERS
@pytest.mark.filterwarnings("ignore:rich is experimental")  # SB3's progress bar is drawn by tqdm.rich
def test_evaluation_and_progress_bar_do_not_disturb_a_run(make: Any, tmp_path: Path) -> None:
    model, plain = make(), make()
    watch = EvalCallback(
        make_vec_env(SHIFTED, n_envs=2), n_eval_episodes=2, eval_freq=4, log_path=str(tmp_path), verbose=0
    )
    model.learn(9, callback=[adapter(model, "visited"), watch], progress_bar=True)
    plain.learn(9, callback=adapter(plain, "visited"))
    assert not changed(weights(model), weights(plain))
    log = np.load(tmp_path / "evaluations.npz")
    assert log["timesteps"].tolist() == [4, 8]
    assert log["successes"].shape == (2, 2)


def test_best_model_of_an_evaluation_loads(tmp_path: Path) -> None:
    model = kbt()
    watch = EvalCallback(
        make_vec_env(SHIFTED), n_eval_episodes=1, eval_freq=3, best_model_save_path=str(tmp_path), verbose=0
    )
    model.learn(3, callback=[adapter(model), watch])
    assert not changed(weights(KBT.load(tmp_path / "best_model", device="cpu")), weights(model))
