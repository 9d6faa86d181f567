"""A learner takes updates back: it acts as if it had not seen the labels."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from learners import NOMINAL, SHIFTED, changed, expert, kbt, states, weights

from kbt_rl import KBT, HeadConfig, KalmanAdapter, Sample
from kbt_rl.callbacks import Forgetting


def recorded_kbt(history: int = 20, **settings: Any) -> KBT:
    return kbt(policy_kwargs={"head": HeadConfig(history=history)}, **settings)


def feed(model: KBT, first: int, count: int, rows: int = 1) -> None:
    observations = states(100)
    for index in range(first, first + count):
        part = observations[index * rows : (index + 1) * rows]
        model.update(Sample(part, expert().label(part)))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_learner_acts_as_if_it_had_not_seen_the_labels(rows: int) -> None:
    model, never = recorded_kbt(), recorded_kbt()
    feed(model, 0, 8, rows)
    feed(never, 0, 5, rows)
    assert changed(weights(model), weights(never))
    assert model.rollback(3) == 3 * rows
    assert model.labels_used == never.labels_used == 5 * rows
    np.testing.assert_allclose(
        model.predict(states(30, seed=1), deterministic=True)[0],
        never.predict(states(30, seed=1), deterministic=True)[0],
        rtol=1e-6,
        atol=1e-6,
    )
    for part, other in zip(
        model.policy.predict_moments(states(9)), never.policy.predict_moments(states(9)), strict=True
    ):
        np.testing.assert_allclose(part, other, rtol=1e-9)


def test_a_rollout_of_several_environments_is_taken_back_step_by_step() -> None:
    model, never = recorded_kbt(n_envs=3), recorded_kbt(n_envs=3)
    never.learn(12, callback=KalmanAdapter(expert()))
    model.learn(21, callback=KalmanAdapter(expert()))
    assert model.rollback(3) == 9
    assert model.labels_used == never.labels_used == 12
    torch.testing.assert_close(model.policy.head.mean, never.policy.head.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.policy.head.variances(), never.policy.head.variances(), rtol=1e-10, atol=0.0)


def test_updates_without_a_label_do_not_count() -> None:
    model = recorded_kbt()
    feed(model, 0, 2)
    model.update(Sample(states(3), np.full((3, 1), np.nan)))
    assert model.policy.head.undoable == 2
    assert model.rollback(2) == 2
    assert model.labels_used == 0


def test_a_strategy_that_loosens_the_posterior_leaves_nothing_to_undo() -> None:
    model = recorded_kbt()
    model.learn(5, callback=KalmanAdapter(expert(), strategy=Forgetting(0.99)))
    with pytest.raises(ValueError, match=r"while 0 updates are kept.*forget"):
        model.rollback(1)
    assert model.labels_used == 5


def test_the_history_is_not_saved(tmp_path: Any) -> None:
    model = recorded_kbt()
    feed(model, 0, 3)
    model.save(tmp_path / "model")
    loaded = KBT.load(tmp_path / "model", env=gym.make(SHIFTED))
    assert not changed(weights(model), weights(loaded))
    with pytest.raises(ValueError, match="while 0 updates are kept"):
        loaded.rollback(1)
    feed(loaded, 3, 1)
    assert loaded.rollback(1) == 1
    assert loaded.labels_used == 3


def test_pretraining_starts_the_history_again() -> None:
    model = recorded_kbt(env_id=NOMINAL)
    feed(model, 0, 3)
    model.start_from(kbt(env_id=NOMINAL))
    with pytest.raises(ValueError, match="while 0 updates are kept"):
        model.rollback(1)
