"""The suite of trained policies: what is stored is what was trained, and shares are of the same starts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import trim_mean
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from kbt_rl.envs.plant import DT, rk4_step
from studies.policies import report
from studies.policies import run as run_policies
from studies.rivals.registry import CANDIDATES
from studies.statistics import interquartile
from studies.suite import stored, train
from studies.suite.methods import FIXED, KBT, NONE, TEACHER, build
from studies.suite.report import Summary, areas, shares
from studies.suite.setting import Setting, SuiteTrial, returns, samples, walk
from studies.suite.swing_up import LONG_POLE, NOMINAL, SwingUp, SwingUpExpert, observe
from studies.suite.tasks import SUITE
from studies.table import Row, Table
from studies.trial import Fixed, Method

SMALL: dict[str, Any] = {"policy_seed": 0, "stream_seed": 0, "checkpoints": (2, 4), "episodes": 1}


@pytest.mark.parametrize("task", SUITE)
def test_a_teacher_earns_more_after_the_change_than_the_policy_it_teaches(task: str) -> None:
    setting = Setting.of(task)
    envs = [setting.task.env() for _ in range(3)]
    assert returns(setting.taught, envs, 7).mean() > returns(setting.nominal.acting, envs, 7).mean()


def test_the_stored_policies_are_small() -> None:
    assert sum(path.stat().st_size for path in stored.FOLDER.iterdir()) < 5e6
    named = {f"{name}.safetensors" for task in SUITE.values() for name in task.policies.values()}
    assert {path.name for path in stored.FOLDER.iterdir()} == named


@pytest.mark.parametrize(
    ("algorithm", "task", "normalised"),
    [(PPO, "CartPole", False), (PPO, "InvertedPendulum", True), (SAC, "Pendulum, SAC", False)],
)
def test_what_is_stored_acts_as_what_was_trained(
    algorithm: Any, task: str, normalised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "FOLDER", tmp_path)
    envs: Any = DummyVecEnv([lambda: SUITE[task].env(shifted=False)])
    envs = VecNormalize(envs) if normalised else envs
    more = {"n_steps": 16, "batch_size": 16} if algorithm is PPO else {"learning_starts": 8}
    model = algorithm("MlpPolicy", envs, seed=0, device="cpu", **more).learn(32)
    stored.save("mine", model, {}, {"seed": 0})
    read = stored.load("mine", SUITE[task])
    raw = np.stack([SUITE[task].env().observation_space.sample() for _ in range(9)])
    raw = np.clip(raw, -2.0, 2.0).astype(np.float32)
    seen = model.get_vec_normalize_env().normalize_obs(raw) if normalised else raw
    assert np.array_equal(read.acting.predict(raw, deterministic=True)[0], model.predict(seen, deterministic=True)[0])
    assert read.told == {"seed": 0}


def test_a_policy_that_was_never_made_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no nobody\.safetensors in .*suite\.train makes it"):
        stored.load("nobody", SUITE["CartPole"])


def test_the_script_makes_a_policy_and_its_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stored, "FOLDER", tmp_path)
    monkeypatch.setattr(train, "EPISODES", 1)
    recipe = train.Recipe("InvertedPendulum", PPO, 32, 32, {"n_steps": 16, "batch_size": 16}, normalised=True)
    monkeypatch.setitem(train.RECIPES, "inverted-pendulum", recipe)
    train.make("inverted-pendulum")
    before, after = (
        stored.load(f"inverted-pendulum-{role}", SUITE["InvertedPendulum"]) for role in ("nominal", "teacher")
    )
    assert before.told["steps"] == after.told["steps"] == 32
    weights: list[Any] = [found.policy.get_parameter("action_net.weight") for found in (before, after)]
    assert not torch.equal(*weights)
    counts: list[Any] = [found.statistics.obs_rms.count for found in (before, after)]  # type: ignore[union-attr]
    assert counts[0] < counts[1]
    assert "'before':" in capsys.readouterr().out


# ---------------------------------------------------------------------- labels and returns


def test_labels_come_from_the_learners_own_path_every_5th_step() -> None:
    setting = Setting.of("Pendulum, PPO")
    acting = setting.nominal.acting
    path = walk(acting, setting.task.env(), 3, 1)
    every = [next(path) for _ in range(11)]
    labelled = samples(acting, setting, 3, 5)
    for step in (0, 5, 10):
        sample = next(labelled)
        assert np.array_equal(sample.context, every[step])
        assert sample.kind == "output"
        assert np.array_equal(sample.target, setting.labeller.ask(every[step]))


def test_a_teacher_of_another_kind_is_asked_for_actions() -> None:
    setting = Setting.of("Pendulum, SAC teaches PPO")
    sample = next(samples(setting.nominal.acting, setting, 0, 5))
    assert sample.kind == "action"
    assert np.array_equal(sample.target, setting.taught.predict(sample.context, deterministic=True)[0])


def test_returns_are_of_whole_episodes_from_the_same_starts() -> None:
    setting = Setting.of("CartPole")
    envs = [setting.task.env() for _ in range(4)]
    together = returns(setting.nominal.acting, envs, 5)
    for place in range(4):
        env = setting.task.env()
        observation, total, ended = env.reset(seed=500 + place)[0], 0.0, False
        while not ended:
            action = setting.nominal.acting.predict(observation[np.newaxis], deterministic=True)[0][0]
            observation, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + float(reward), terminated or truncated
        assert together[place] == total


# ---------------------------------------------------------------------- learners


@pytest.mark.parametrize("method", [KBT, FIXED[1]], ids=lambda method: method.name)
def test_an_adapted_policy_acts_as_the_nominal_one_before_a_label(method: Method) -> None:
    setting = Setting.of("InvertedPendulum")
    learner = build(method, setting)
    raw = setting.states[:20]
    before = setting.nominal.acting.predict(raw, deterministic=True)[0]
    assert np.allclose(learner.policy.predict(raw, deterministic=True)[0], before, atol=1e-6)


def test_a_trial_earns_more_after_its_labels() -> None:
    setting = Setting.of("InvertedPendulum")
    trial = SuiteTrial(study="policies", method=KBT, task="InvertedPendulum", **{**SMALL, "checkpoints": (1, 40)})
    rows = Table(run_policies(trial, setting)).where(metric="return")
    fixed = SuiteTrial(study="policies", method=NONE, task="InvertedPendulum", **SMALL)
    assert isinstance(build(NONE, setting), Fixed)
    none = Table(run_policies(fixed, Setting.of("InvertedPendulum"))).where(metric="return").values()
    assert none[0] == none[1]
    assert rows.where(labels=40).values()[0] > 10 * none[0]


# ---------------------------------------------------------------------- shares


def _row(method: str, value: float, *, stream: int = 0, task: str = "a", labels: int = 50) -> Row:
    return Row("policies", task, method, 0, stream, labels, "return", value)


def test_shares_compare_with_the_same_starts() -> None:
    table = Table([
        _row(NONE.name, 10.0), _row(TEACHER.name, 30.0), _row("x", 15.0),
        _row(NONE.name, 0.0, stream=1), _row(TEACHER.name, 10.0, stream=1), _row("x", -5.0, stream=1),
    ])  # fmt: skip
    assert shares(table).values() == [0.25, -0.5]
    assert shares(table).distinct("metric") == ["share"]


def test_the_interquartile_mean_leaves_out_the_ends_and_resamples_each_task_alone() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=20).tolist(), (5.0 + 0.01 * rng.normal(size=20)).tolist()]
    found = interquartile(groups)
    assert found.mean == pytest.approx(trim_mean(np.concatenate(groups), 0.25))
    assert found.lower < found.mean < found.upper
    assert interquartile([[1.0, 2.0, 3.0, 100.0]]).mean == 2.5
    apart = interquartile([[0.0] * 20, [1.0] * 20])
    assert apart[:3] == (0.5, 0.5, 0.5)  # resampled together they would change places
    with pytest.raises(ValueError, match="no values"):
        interquartile([[1.0], []])


def test_the_area_of_a_trial_is_its_mean_over_the_numbers_of_labels() -> None:
    table = Table([_row("x", 0.2), _row("x", 0.6, labels=100), _row("x", 1.0, stream=1)])
    assert areas(table).values() == [pytest.approx(0.4), 1.0]


def test_the_report_writes_the_summary_and_a_picture(tmp_path: Path) -> None:
    trials = [
        SuiteTrial(study="policies", method=method, task="InvertedPendulum", **{**SMALL, "stream_seed": seed})
        for method in (NONE, TEACHER, KBT) for seed in (0, 1)
    ]  # fmt: skip
    table = tiny.run(trials, tmp_path)  # type: ignore[arg-type]
    shown = list(report(table))
    (summary,) = [one for one in shown if isinstance(one, Summary)]
    lines = list(csv.DictReader(summary.write(tmp_path).read_text().splitlines()))
    assert [(line["task"], line["method"], line["labels"]) for line in lines] == [
        ("InvertedPendulum", KBT.name, "2"), ("InvertedPendulum", KBT.name, "4"),
    ]  # fmt: skip
    assert all(float(line["low"]) <= float(line["share"]) <= float(line["high"]) for line in lines)


def test_rivals_were_tuned_for_every_task() -> None:
    best = json.loads((Path(stored.__file__).parent / "tuned.json").read_text())
    assert set(best) == set(SUITE)
    (names,) = {tuple(settings) for settings in best.values()}
    assert {"warm start, memory 50", "Adam", "RLS"} <= set(names) <= set(CANDIDATES)
    for settings in best.values():
        for name, found in settings.items():
            assert found in [method.settings for method in CANDIDATES[name]]


# ---------------------------------------------------------------------- the swing-up


@pytest.mark.parametrize("plant", [NOMINAL, LONG_POLE])
def test_the_expert_accelerates_the_cart_as_it_wants_and_brings_the_energy_to_that_of_the_top(plant: Any) -> None:
    rng = np.random.default_rng(1)
    states = rng.uniform([-0.1, -0.1, 1.5, -4.0], [0.1, 0.1, 4.5, 4.0], (200, 4))
    length, tiny_step = plant.pole_half_length, 1e-5

    def energy(state: Any) -> Any:
        return 2.0 / 3.0 * length * state[..., 3] ** 2 + plant.gravity * (np.cos(state[..., 2]) - 1.0)

    actions = SwingUpExpert(plant)(observe(states))[:, 0]
    free = np.abs(actions) < 1.0
    after = rk4_step(states, plant.max_force * actions, plant, tiny_step)
    acceleration = (after[:, 1] - states[:, 1]) / tiny_step
    rate = (energy(after) - energy(states)) / tiny_step
    assert np.allclose(rate[free], (-acceleration * states[:, 3] * np.cos(states[:, 2]))[free], atol=1e-2)
    wanted = np.clip(
        energy(states) * states[:, 3] * np.cos(states[:, 2]) - 2.0 * states[:, 0] - 3.0 * states[:, 1], -20.0, 20.0
    )
    assert np.allclose(acceleration[free], wanted[free], atol=1e-2)
    assert free.sum() > 50


@pytest.mark.parametrize("plant", [NOMINAL, LONG_POLE])
def test_the_expert_swings_the_pole_up_and_holds_it(plant: Any) -> None:
    env = SwingUp(plant)
    expert = SwingUpExpert(plant)
    observation, _ = env.reset(seed=0)
    for _ in range(round(10.0 / DT)):
        observation, reward, terminated, _, _ = env.step(expert(observation[np.newaxis])[0])
        assert not terminated
    assert reward > 0.95
