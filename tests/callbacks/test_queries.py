"""Query rules, budgets and delays of the adapter: which rows are asked for, and when they arrive."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from learners import Updates, changed, curve, events, expert, kbt, states, warm_start, weights

from kbt_rl import KBT, KalmanAdapter, OnlineAdapter
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.callbacks import Always, IidStream, QueryRule, Random, RecordedStream, UncertainStream, VarianceGate
from kbt_rl.callbacks.queries import epistemic_variance, noise_variance


class Asked:
    """An expert that remembers what it was asked."""

    def __init__(self) -> None:
        self.states: list[np.ndarray] = []

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        self.states.append(np.array(observations))
        return np.asarray(expert().predict(observations)[0])


class Alternate(QueryRule):
    """Every other row of a batch."""

    def wants(self, model: OnlineAlgorithm, features: torch.Tensor) -> np.ndarray:
        return np.arange(len(features)) % 2 == 0


def test_only_wanted_rows_are_asked_for_and_learned() -> None:
    model, ask = kbt(n_envs=4), Asked()
    adapter = KalmanAdapter(ask, query=Alternate())
    model.learn(12, callback=adapter)
    assert [len(rows) for rows in ask.states] == [2, 2, 2]
    assert (adapter.asked, adapter.saved, model.labels_used) == (6, 6, 6)


def test_the_budget_ends_the_questions_in_the_middle_of_a_batch() -> None:
    model, ask = kbt(n_envs=3), Asked()
    adapter = KalmanAdapter(ask, budget=5)
    model.learn(12, callback=adapter)
    assert [len(rows) for rows in ask.states] == [3, 2]
    assert (adapter.asked, adapter.saved, model.labels_used) == (5, 7, 5)


def test_no_budget_changes_nothing() -> None:
    model = kbt()
    before = weights(model)
    model.learn(5, callback=KalmanAdapter(expert(), budget=0))
    assert not changed(before, weights(model))


@pytest.mark.parametrize("delay", [0, 1, 4])
def test_a_label_arrives_after_its_delay(delay: int) -> None:
    model, seen = kbt(), []
    updates = Updates(model)

    class Watch(KalmanAdapter):
        def _on_step(self) -> bool:
            going_on = super()._on_step()
            seen.append(len(updates.samples))
            return going_on

    rows = states(10)
    model.learn(10, callback=Watch(None, RecordedStream(rows, expert().predict(rows)[0]), delay=delay))
    assert seen == [max(0, step - delay) for step in range(1, 11)]
    for sample, row in zip(updates.samples, rows, strict=False):
        np.testing.assert_array_equal(sample.context.newest[0], row)


def test_a_delayed_label_is_learned_as_a_prompt_one() -> None:
    prompt, late = kbt(), kbt()
    rows = states(10)
    labels = expert().predict(rows)[0]
    prompt.learn(8, callback=KalmanAdapter(None, RecordedStream(rows[:8], labels[:8])))
    late.learn(10, callback=KalmanAdapter(None, RecordedStream(rows, labels), delay=2))
    assert not changed(weights(prompt), weights(late))


def test_labels_on_the_way_do_not_reach_another_model_or_another_encoder() -> None:
    first, second = kbt(), kbt()
    adapter = KalmanAdapter(expert(), "visited", delay=5)
    first.learn(10, callback=adapter)
    assert first.labels_used == 5
    second.learn(3, callback=adapter)
    assert second.labels_used == 0
    second.learn(3, callback=adapter, reset_num_timesteps=False)
    assert second.labels_used == 1  # asked for in the call before
    second.start_from(first)
    second.pretrain_info = copy.copy(first.pretrain_info)  # as after a training of its own
    second.learn(3, callback=adapter, reset_num_timesteps=False)
    assert second.labels_used == 0


def test_the_gate_takes_the_variance_of_logits_where_labels_have_no_noise() -> None:
    model = KBT(env=gym.make("kbt_rl/DiscreteInvertedPendulum-v0"), seed=0)
    features = model.policy.encode(model.policy.start(states(9)))
    variance = epistemic_variance(model, features)
    threshold = float(np.median(variance))
    np.testing.assert_array_equal(VarianceGate(threshold).wants(model, features), variance > threshold)


def test_the_gate_asks_where_the_posterior_is_unsure_and_stops_when_it_is_not() -> None:
    model = kbt()
    features = model.policy.encode(model.policy.start(states(50)))
    ratio = epistemic_variance(model, features) / noise_variance(model)
    middle = float(np.median(ratio))
    np.testing.assert_array_equal(VarianceGate(middle).wants(model, features), ratio > middle)
    adapter = KalmanAdapter(expert(), "visited", query=VarianceGate(2.0))
    model.learn(100, callback=adapter)
    assert 0 < adapter.asked < 100
    assert adapter.asked + adapter.saved == 100


def test_epistemic_variance_is_that_of_the_policy() -> None:
    model = kbt()
    moments = model.policy.predict_moments(states(5))
    features = model.policy.encode(model.policy.start(states(5)))
    unit = float(model.policy.head.target_scale[0]) ** 2
    np.testing.assert_allclose(epistemic_variance(model, features) * unit, moments.epistemic[:, 0, 0], rtol=1e-10)
    assert noise_variance(model) * unit == pytest.approx(float(moments.aleatoric[0, 0, 0]))


def test_random_queries_draw_from_the_model_and_resume() -> None:
    first, second = kbt(seed=3), kbt(seed=3)
    first.learn(30, callback=KalmanAdapter(expert(), query=Random(0.3)))
    second.learn(30, callback=KalmanAdapter(expert(), query=Random(0.3)))
    assert first.labels_used == second.labels_used
    assert 2 <= first.labels_used <= 20
    assert not changed(weights(first), weights(second))


def test_the_most_uncertain_of_a_pool_is_chosen_for_each_environment() -> None:
    model = kbt(n_envs=3, seed=1)
    stream = UncertainStream(pool=6)
    # The pool, of which the stream shows the chosen states only.
    twin = IidStream()._draw(kbt(n_envs=3, seed=1), 18)
    batch = stream.next(model, {})
    variance = epistemic_variance(model, model.policy.encode(model.policy.start(twin))).reshape(3, 6)
    expected = twin.reshape(3, 6, 4)[np.arange(3), variance.argmax(axis=1)]
    np.testing.assert_array_equal(batch.context.newest, expected)
    assert batch.features is not None
    torch.testing.assert_close(batch.features, model.policy.encode(batch.context), rtol=1e-5, atol=1e-6)


def test_the_uncertain_stream_has_a_name_and_leaves_the_generator_alone_when_checked() -> None:
    model = kbt(seed=2)
    before = model.stream_rng.bit_generator.state
    UncertainStream().check(model)
    assert model.stream_rng.bit_generator.state == before
    model.learn(5, callback=KalmanAdapter(expert(), "uncertain"))
    assert model.labels_used == 5


def test_asked_and_saved_labels_are_logged(tmp_path: Path) -> None:
    model = kbt(n_envs=2, tensorboard_log=str(tmp_path), n_steps=5)
    model.learn(20, callback=KalmanAdapter(expert(), query=Alternate()))
    log = events(tmp_path)
    assert curve(log, "kalman/labels_asked") == {10: 5.0, 20: 10.0}
    assert curve(log, "kalman/labels_saved") == {10: 5.0, 20: 10.0}


def test_missing_labels_count_as_asked_and_teach_nothing() -> None:
    model = kbt()
    before = weights(model)
    adapter = KalmanAdapter(lambda rows: np.full((len(rows), 1), np.nan))
    model.learn(4, callback=adapter)
    assert (adapter.asked, model.labels_used) == (4, 0)
    assert not changed(before, weights(model))


def test_rules_that_need_a_posterior_say_so_before_anything_runs() -> None:
    model = warm_start()
    with pytest.raises(TypeError, match="WarmStart has no posterior to ask"):
        model.learn(5, callback=OnlineAdapter(expert(), query=VarianceGate()))
    with pytest.raises(TypeError, match="WarmStart has no posterior to ask"):
        model.learn(5, callback=OnlineAdapter(expert(), "uncertain"))
    certain = kbt()
    certain.policy.head.set_noise(0.0)
    with pytest.raises(ValueError, match="noise variance is 0"):
        certain.learn(5, callback=KalmanAdapter(expert(), query=VarianceGate()))
    model.learn(5, callback=OnlineAdapter(expert(), query=Always(), budget=3))
    assert model.labels_used == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Random(0.0), r"probability is 0.0; it must lie in \(0, 1\]"),
        (lambda: VarianceGate(-1.0), "threshold is -1.0"),
        (lambda: UncertainStream(pool=0), "pool is 0"),
        (lambda: KalmanAdapter(expert(), budget=-1), "budget is -1"),
        (lambda: KalmanAdapter(expert(), delay=-1), "delay is -1"),
        (lambda: KalmanAdapter(expert(), budget=float("nan")), "budget is nan"),
        (lambda: KalmanAdapter(expert(), delay=float("nan")), "delay is nan"),
    ],
)
def test_bad_settings_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
