"""Strategies against a world that moves: what they do to the posterior, what is logged, what is saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from learners import NOMINAL, SHIFTED, Recorder, Updates, changed, expert, kbt, states, weights
from stable_baselines3.common.callbacks import BaseCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kbt_rl import KBT, HeadConfig, KalmanAdapter, LQRExpert, Sample
from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.callbacks import AdaptationStrategy, Forgetting, ProcessNoise, ReopenOnDetection, TowardsPrior
from kbt_rl.envs import TWO_FORCES, ScheduledShifts
from kbt_rl.inference.change_detection import Cusum, LogLossCusum, NoiseReference, WindowedChiSquare

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


def learning_kbt() -> KBT:
    """A learner of the noise that is told of the misfit."""
    return kbt(policy_kwargs={"head": HeadConfig(noise="learned", noise_floor=0.01)})


def noise_of(model: KBT) -> tuple[float, float]:
    """What the head thinks of the noise: its variance and the labels that it rests on."""
    estimate = model.policy.head.noise_estimate
    assert estimate is not None
    return float(estimate.cov[0, 0]), estimate.labels


def mean_error(model: KBT, plant: str) -> float:
    target = expert(plant).label(states(200, seed=2))
    return float(np.sqrt(np.mean((model.policy.predict(states(200, seed=2))[0] - target) ** 2)))


def dense(model: KBT) -> torch.Tensor:
    return model.policy.head.covariance()


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
    assert mean_error(model, NOMINAL) < 0.4 * mean_error(alone, NOMINAL)


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
    assert all(torch.equal(mine, prior) for mine, prior in zip(head.state.cov, head.prior.cov, strict=True))


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


# ---------------------------------------------------------------------- a learned noise


def test_an_alarm_puts_a_learned_noise_back() -> None:
    """To what it was so many samples before, to the last bit and with the trust in it; then it is learned again."""
    model, strategy, seen = learning_kbt(), ReopenOnDetection(noise_lag=20), []
    for seed, plant, count in ((0, SHIFTED, 100), (1, NOMINAL, 6)):
        observations, labels = states(count, seed), expert(plant).label(states(count, seed))
        for row, label in zip(observations, labels, strict=True):
            info = model.update(Sample(row, label))
            seen.append(noise_of(model))
            noticed = strategy.after_update(model, info)  # type: ignore[arg-type]
            if noticed:
                break
    assert strategy.alarms == 1
    assert noise_of(model) == seen[-21]
    assert seen[-1][0] > 1.5 * seen[-21][0]  # what the test would find without the restoration
    teach(model, strategy, 1, seed=3, plant=NOMINAL)
    assert noise_of(model) != seen[-21]


def test_a_plant_is_learned_as_fast_as_if_the_noise_were_known() -> None:
    told, model, trapped = noisy_kbt(), learning_kbt(), learning_kbt()
    lagged, current = ReopenOnDetection(noise_lag=50), ReopenOnDetection()
    for learner, strategy in ((told, ReopenOnDetection()), (model, lagged), (trapped, current)):
        teach(learner, strategy, 100)
        teach(learner, strategy, 25, seed=1, plant=NOMINAL)
    assert lagged.alarms == 1
    assert mean_error(model, NOMINAL) < 1.2 * mean_error(told, NOMINAL)
    assert noise_of(model)[0] < 0.5 * noise_of(trapped)[0]


def test_a_false_alarm_leaves_the_noise_and_raises_no_other() -> None:
    model, strategy = learning_kbt(), ReopenOnDetection(noise_lag=50)
    assert not any(teach(model, strategy, 150))
    before = noise_of(model)[0]
    observation = states(1, seed=3)[0]
    far = np.asarray(model.policy.predict(observation)[0], dtype=np.float64) + 0.5  # one label that is 60 N off
    info = model.update(Sample(observation, far))
    raised = noise_of(model)[0]
    assert strategy.after_update(model, info)  # type: ignore[arg-type]
    assert noise_of(model)[0] < 1.5 * before < 0.5 * raised
    assert not any(teach(model, strategy, 150, seed=4))
    assert noise_of(model)[0] < 1.5 * before


@pytest.mark.parametrize("lag", [20, 50])  # less than the test rests, and more
def test_a_change_of_the_noise_itself_is_learned(lag: int) -> None:
    """Opening the weights does not explain it, so that an alarm soon after another leaves the noise as it is."""
    model, strategy = learning_kbt(), ReopenOnDetection(noise_lag=lag)
    teach(model, strategy, 100)
    rng, box = np.random.default_rng(5), states(600, seed=5)
    noticed, noises = [], []
    for row, label in zip(box, expert().label(box) + 5.0 / 120.0 * rng.standard_normal((600, 1)), strict=True):
        info = model.update(Sample(row, label))
        raised = noise_of(model)
        noticed.append(strategy.after_update(model, info))  # type: ignore[arg-type]
        noises.append((raised, noise_of(model)))
    first, second = np.flatnonzero(noticed)[:2]
    assert second - first <= lag + strategy.rest
    assert noises[first][1][0] < noises[first][0][0]
    assert noises[second][1] == noises[second][0]
    assert not any(noticed[400:])
    assert noise_of(model)[0] * model.policy.head.mean_square_scale * 120.0**2 == pytest.approx(25.0, rel=0.4)


def test_a_known_noise_stays_through_an_alarm() -> None:
    model, strategy = noisy_kbt(), ReopenOnDetection(noise_lag=20)
    teach(model, strategy, 60)
    model.policy.head.set_noise(2.0 / 120.0**2)
    noise = model.policy.head.noise_cov.clone()
    assert any(teach(model, strategy, 10, seed=1, plant=NOMINAL))
    assert torch.equal(model.policy.head.noise_cov, noise)


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


@pytest.mark.parametrize("make", [noisy_kbt, learning_kbt], ids=["known noise", "learned noise"])
def test_the_monitor_is_saved_with_the_model(make: Callable[[], KBT], tmp_path: Path) -> None:
    """A loaded model and a new strategy answer as the ones that were never interrupted."""
    model, strategy = make(), ReopenOnDetection(Cusum(1e-2, inflation=1.5), noise_lag=4)
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
    assert changed(weights(loaded), weights(model)) == set()  # the noise that the alarms put back among them
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


def test_a_learned_noise_without_a_lag_is_warned_of() -> None:
    model = kbt(policy_kwargs={"head": HeadConfig(noise="learned")})
    with pytest.warns(UserWarning, match="noise_lag=50"):
        ReopenOnDetection().attach(model)
    ReopenOnDetection(noise_lag=50).attach(model)  # a warning would be an error here


# ---------------------------------------------------------------------- discrete actions


def test_a_new_plant_is_noticed_by_the_log_loss_of_discrete_actions() -> None:
    nominal, shifted = (
        gym.make(f"kbt_rl/{name}DiscreteInvertedPendulum-v0", forces=TWO_FORCES) for name in ("", "Shifted")
    )
    known, new = (LQRExpert.for_env(env, temperature=0.0) for env in (nominal, shifted))
    model, strategy = KBT(env=nominal, seed=0), ReopenOnDetection()
    model.pretrain(known, PretrainConfig(samples=1_000, steps=150), progress_bar=False)
    seen = Updates(model)
    model.learn(200, callback=KalmanAdapter(known, strategy=strategy))
    assert isinstance(strategy.monitor, LogLossCusum)
    assert (strategy.alarms, strategy.monitor.samples) == (0, 200)
    model.set_env(shifted)
    model.learn(10, callback=KalmanAdapter(new, strategy=strategy), reset_num_timesteps=False)
    assert strategy.alarms == 1
    ratios = [info.log_ratio for info in seen.infos]
    assert np.mean(ratios[:200]) < 0.05 < np.mean(ratios[200:])
    assert np.isnan(kbt().update(Sample(states(1)[0], np.ones(1))).log_ratio)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("env_id", "monitor", "message"),
    [
        (
            "kbt_rl/DiscreteInvertedPendulum-v0",
            Cusum(),
            "Cusum tests innovations, and this model's actions are discrete",
        ),
        (NOMINAL, LogLossCusum(), "LogLossCusum tests the log loss, and this model's actions are continuous"),
    ],
)
def test_a_test_that_does_not_fit_the_actions_is_refused_before_anything_runs(
    env_id: str, monitor: Any, message: str
) -> None:
    model = KBT(env=gym.make(env_id), seed=0)
    with pytest.raises(ValueError, match=message):
        model.learn(
            1, callback=KalmanAdapter(lambda states: np.zeros(len(states)), strategy=ReopenOnDetection(monitor))
        )
    assert model.num_timesteps == 0
