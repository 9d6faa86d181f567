"""Strategies against a world that moves: what they do to the posterior, what is logged, what is saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from learners import NOMINAL, SHIFTED, Recorder, expert, kbt, states
from stable_baselines3.common.callbacks import BaseCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kbt_rl import KBT, KalmanAdapter, LQRExpert, Sample
from kbt_rl.callbacks import AdaptationStrategy, Forgetting, ProcessNoise, ReopenOnDetection, TowardsPrior
from kbt_rl.envs import ScheduledShifts
from kbt_rl.inference.monitor import Cusum, NoiseReference, WindowedChiSquare

NEXT_PLANT = {"cart_mass": 1.5, "pole_mass": 0.3, "pole_half_length": 0.4}


def teach(
    model: KBT, strategy: AdaptationStrategy | None, count: int, seed: int = 0, plant: str = SHIFTED
) -> list[bool]:
    """Labels of the plant's expert with noise of 1 N, one at a time; what the strategy answered."""
    observations = states(count, seed)
    noise = np.random.default_rng(seed).standard_normal((count, 1)) / 120.0
    labels = expert(plant).label(observations) + noise
    noticed = []
    for row, target in zip(observations, labels, strict=True):
        info = model.update(Sample(row, target))
        noticed.append(strategy is not None and strategy.after_update(model, info))  # type: ignore[arg-type]
    return noticed


def noisy_kbt() -> KBT:
    model = kbt()
    model.policy.head.set_noise(1.0 / 120.0**2)
    return model


def dense(model: KBT) -> torch.Tensor:
    return model.policy.head.state.dense_cov()


@pytest.mark.parametrize(
    ("strategy", "by_hand"),
    [
        (Forgetting(0.9), lambda head: head.forget(0.9)),
        (ProcessNoise(0.01), lambda head: head.add_process_noise(0.01)),
        (TowardsPrior(0.02), lambda head: head.reopen(0.02)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_constant_remedies_act_after_each_update(strategy: AdaptationStrategy, by_hand: Any) -> None:
    model, manual, untouched = kbt(), kbt(), kbt()
    assert teach(model, strategy, 3) == [False] * 3
    assert strategy.alarms == 0
    for row in range(3):
        observation = states(3)[row]
        label = expert().label(states(3))[row] + np.random.default_rng(0).standard_normal((3, 1))[row] / 120.0
        manual.update(Sample(observation, label))
        by_hand(manual.policy.head)
    teach(untouched, None, 3)
    assert torch.equal(dense(model), dense(manual))
    assert torch.equal(model.policy.head.mean, manual.policy.head.mean)
    assert not torch.allclose(dense(model), dense(untouched), rtol=1e-6)


@pytest.mark.parametrize("monitor", [Cusum(1e-5), WindowedChiSquare(1e-5)], ids=["cusum", "window"])
def test_a_change_is_noticed_and_learned(monitor: Any) -> None:
    """From one plant to another and back: the posterior opens once and follows; alone it would not."""
    model, alone, strategy = noisy_kbt(), noisy_kbt(), ReopenOnDetection(monitor)
    assert not any(teach(model, strategy, 100))
    teach(alone, None, 100)
    noticed = teach(model, strategy, 30, seed=1, plant=NOMINAL)
    assert noticed.index(True) < 5
    assert strategy.alarms == sum(noticed) == 1
    teach(alone, None, 30, seed=1, plant=NOMINAL)
    target = expert(NOMINAL).label(states(200, seed=2))

    def error(learner: KBT) -> float:
        return float(np.sqrt(np.mean((learner.policy.predict(states(200, seed=2))[0] - target) ** 2)))

    assert error(model) < 0.4 * error(alone)


def test_an_alarm_opens_the_covariance_and_keeps_the_means() -> None:
    model, strategy = noisy_kbt(), ReopenOnDetection(WindowedChiSquare(1e-5, window=1))
    teach(model, strategy, 60)
    head = model.policy.head
    observation = states(1, seed=3)[0]
    far = np.asarray(model.policy.predict(observation)[0], dtype=np.float64) + 1.0  # 120 N off
    info = model.update(Sample(observation, far))
    means = head.mean.clone()
    assert strategy.after_update(model, info)
    assert torch.equal(head.mean, means)
    assert all(torch.equal(mine, prior) for mine, prior in zip(head.state.cov, head._prior_cov(), strict=True))


def test_the_nis_is_judged_with_misfit_and_lagged_noise() -> None:
    """The same records through the parts by hand, in units of the target scale."""
    model = noisy_kbt()
    strategy = ReopenOnDetection(Cusum(1e-3), misfit=0.02, noise_lag=2, rest=0)
    reference, monitor = NoiseReference(0.02, 2), Cusum(1e-3)
    unit = model.policy.head.mean_square_scale
    rng = np.random.default_rng(4)
    for index, row in enumerate(states(20)):
        model.policy.head.set_noise((1.0 + index) / 120.0**2)
        info = model.update(Sample(row, rng.standard_normal(1) / 20.0))
        nis = reference.restate(info.nis, info.epistemic_variance / unit, info.predictive_variance / unit)
        assert monitor.observe(nis) == strategy.after_update(model, info)
        assert strategy.monitor.statistic == pytest.approx(monitor.statistic, rel=1e-12)  # type: ignore[attr-defined]


@pytest.mark.parametrize("rest", [0, 3])
def test_after_an_alarm_the_test_rests(rest: int) -> None:
    """Labels that are always implausible: an alarm, then so many updates without one."""
    model, strategy = noisy_kbt(), ReopenOnDetection(WindowedChiSquare(1e-5, window=1), rest=rest)
    info = model.update(Sample(states(1, seed=3)[0], np.array([0.1])))
    wild = dataclasses.replace(info, nis=1e6)
    noticed = [strategy.after_update(model, wild) for _ in range(9)]
    assert noticed == [index % (rest + 1) == 0 for index in range(9)]
    assert strategy.alarms == sum(noticed)


def test_missing_labels_do_not_reach_the_strategy() -> None:
    model, strategy = kbt(n_envs=1), ReopenOnDetection()
    adapter = KalmanAdapter(lambda observations: np.full((len(observations), 1), np.nan), strategy=strategy)
    model.learn(5, callback=adapter)
    assert strategy.monitor.samples == 0


class Plants(Recorder):
    """The step at which each alarm came."""

    def __init__(self, adapter: KalmanAdapter) -> None:
        super().__init__("infos")
        self.adapter, self.alarms = adapter, []  # type: ignore[var-annotated]

    def _on_step(self) -> bool:
        assert self.adapter.strategy is not None
        self.alarms.append(self.adapter.strategy.alarms)
        return super()._on_step()


def test_a_rollout_through_a_scheduled_shift(tmp_path: Path) -> None:
    """The adapter's expert follows the plant, the monitor notices the shift, TensorBoard shows it."""
    env = ScheduledShifts(gym.make(SHIFTED), [(60, NEXT_PLANT)])
    model = kbt(tensorboard_log=str(tmp_path), n_steps=5)
    model.set_env(env)
    model.policy.head.set_noise(1.0 / 120.0**2)
    adapter = KalmanAdapter(LQRExpert.for_env(env, tracking=True), strategy=ReopenOnDetection())
    watch = Plants(adapter)
    callbacks: list[BaseCallback] = [adapter, watch]
    model.learn(80, callback=callbacks)
    masses = [step["infos"][0]["dynamics"]["pole_mass"] for step in watch.steps]
    assert masses == [1.0] * 60 + [0.3] * 20
    assert watch.alarms[59] == 0
    assert watch.alarms[65] >= 1
    (run,) = tmp_path.iterdir()
    log = EventAccumulator(str(run))
    log.Reload()
    shown = {event.step: event.value for event in log.Scalars("kalman/alarms")}
    assert shown == {step: watch.alarms[step - 1] for step in range(5, 85, 5)}


def test_the_monitor_is_saved_with_the_model(tmp_path: Path) -> None:
    """A loaded model and a new strategy answer as the ones that were never interrupted."""
    model, strategy = noisy_kbt(), ReopenOnDetection(Cusum(1e-2, inflation=1.5), noise_lag=4)
    strategy.attach(model)
    teach(model, strategy, 40)
    model.save(tmp_path / "model")
    loaded, fresh = KBT.load(tmp_path / "model"), ReopenOnDetection(Cusum(1e-2, inflation=1.5), noise_lag=4)
    fresh.attach(loaded)
    assert fresh.monitor.samples == strategy.monitor.samples > 0
    assert fresh.monitor is not strategy.monitor
    noticed = teach(model, strategy, 30, seed=5, plant=NOMINAL)
    assert any(noticed)
    assert teach(loaded, fresh, 30, seed=5, plant=NOMINAL) == noticed
    assert fresh.alarms == strategy.alarms
    other = ReopenOnDetection(Cusum(1e-3, inflation=1.5), noise_lag=4)
    other.attach(loaded)
    assert other.monitor.samples == 0  # another test starts afresh


def test_a_strategy_serves_several_models_and_a_new_start_forgets() -> None:
    strategy, first, second = ReopenOnDetection(), kbt(), kbt()
    strategy.attach(first)
    teach(first, strategy, 3)
    strategy.attach(second)
    assert strategy.monitor.samples == 0
    strategy.attach(first)
    assert strategy.monitor.samples == 3
    first.start_from(second)
    strategy.attach(first)
    assert strategy.monitor.samples == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Forgetting(0.0), "forgetting factor is 0.0"),
        (lambda: Forgetting(1.5), "forgetting factor is 1.5"),
        (lambda: ProcessNoise(-1.0), "process noise is -1.0"),
        (lambda: TowardsPrior(0.0), "fraction is 0.0"),
        (lambda: ReopenOnDetection(fraction=2.0), "fraction is 2.0"),
        (lambda: ReopenOnDetection(misfit=-1.0), "floor is -1.0"),
        (lambda: ReopenOnDetection(noise_lag=-1), "lag is -1"),
        (lambda: ReopenOnDetection(rest=-1), "rest is -1"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
