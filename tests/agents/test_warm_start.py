"""The baseline against a literal re-implementation of what the paper describes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from learners import (
    LONGER,
    NOMINAL,
    SHIFTED,
    TINY,
    Recorder,
    changed,
    expert,
    kbt,
    learner,
    pretrained,
    states,
    warm_start,
    weights,
)
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from kbt_rl import OnlineAdapter, Sample, WarmStart
from kbt_rl.inference.errors import UpdateError
from kbt_rl.models.decision_transformer import DecisionTransformer

STATES, LABELS = states(40, seed=1), expert(SHIFTED).label(states(40, seed=1))


def transformer_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(model).items() if name.startswith("transformer.")}


def teach(model: WarmStart, start: int, stop: int) -> list[Any]:
    return [model.update(Sample(STATES[i], LABELS[i])) for i in range(start, stop)]


def retrain(net: DecisionTransformer, observations: Any, labels: Any, epochs: int, learning_rate: float) -> None:
    """Section V of the paper: full-batch Adam on the block, all weights, a fresh optimiser."""
    optimiser = torch.optim.Adam(net.parameters(), lr=learning_rate)
    inputs = torch.from_numpy(observations).unsqueeze(1)
    targets = torch.from_numpy(labels).float()
    scale = float(net.action_scale)
    for _ in range(epochs):
        actions = net(inputs, torch.zeros(len(labels), 1, 1), torch.zeros(len(labels), dtype=torch.long))[:, 0]
        loss = torch.mean(((actions - targets) / scale) ** 2)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def test_until_the_first_block_it_is_the_pretrained_policy() -> None:
    model = warm_start(memory=5)
    teach(model, 0, 4)
    assert not changed(transformer_weights(pretrained()), transformer_weights(model))
    teach(model, 4, 5)
    assert changed(transformer_weights(pretrained()), transformer_weights(model))


def test_a_training_moves_all_weights_and_no_scale() -> None:
    model = warm_start(memory=5)
    before = transformer_weights(model)
    teach(model, 0, 5)
    trained = {f"transformer.{name}" for name, _ in model.policy.transformer.named_parameters()}
    assert changed(before, transformer_weights(model)) == trained


def test_it_trains_on_each_block_and_drops_it() -> None:
    infos = teach(warm_start(memory=3), 0, 8)
    assert [info.trainings for info in infos] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert [info.memory for info in infos] == [1, 2, 0, 1, 2, 0, 1, 2]
    assert [np.isfinite(info.loss) for info in infos] == [info.trainings == 1 for info in infos]


@pytest.mark.parametrize("memory", [1, 10])
def test_it_equals_the_procedure_of_the_paper(memory: int) -> None:
    """100 epochs of full-batch Adam on all weights, a fresh optimiser for each block, the samples then dropped."""
    model = learner(WarmStart, memory=memory, learning_rate=2e-3)
    net = copy.deepcopy(pretrained().policy.transformer).train()
    for start in range(0, 2 * memory, memory):
        teach(model, start, start + memory)
        retrain(net, STATES[start : start + memory], LABELS[start : start + memory], 100, 2e-3)
    for name, value in net.state_dict().items():
        # One token attends to itself whatever its query and key are: their gradient is rounding, which Adam amplifies.
        rows = slice(2 * net.config.width, None) if "in_proj" in name else slice(None)
        found = model.policy.transformer.state_dict()[name]
        torch.testing.assert_close(torch.atleast_1d(found)[rows], torch.atleast_1d(value)[rows])
    np.testing.assert_allclose(
        model.predict(STATES, deterministic=True)[0][:, 0],
        net(torch.from_numpy(STATES).unsqueeze(1), torch.zeros(40, 1, 1), torch.zeros(40, dtype=torch.long))
        .detach()
        .flatten()
        .clamp(-1, 1),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("memory", [5, 40])
def test_rows_of_a_batch_count_one_by_one(memory: int) -> None:
    single, batched = warm_start(memory=memory), warm_start(memory=memory)
    teach(single, 0, 12)
    info = batched.update(Sample(STATES[:12], LABELS[:12]))
    assert info.trainings == 12 // memory
    assert info.memory == 12 % memory
    assert not changed(transformer_weights(single), transformer_weights(batched))


def test_rows_without_a_label_are_not_stored() -> None:
    model = warm_start(memory=5)
    before = weights(model)
    labels = LABELS[:4].copy()
    labels[1:3] = np.nan
    assert model.update(Sample(STATES[:4], labels)).memory == 2
    model.update(Sample(STATES[:1], np.array([[np.nan]])))
    assert model.labels_used == 2
    assert not changed(before, weights(model))


def test_innovation_is_the_error_before_the_update() -> None:
    model = warm_start(memory=1)
    action = model.policy.act(model.policy.encode(model.policy.start(STATES[:1])))
    assert teach(model, 0, 1)[0].innovation == pytest.approx(abs(float(LABELS[0, 0] - action.item())))


def test_it_starts_as_the_same_policy_as_kbt() -> None:
    baseline, bayesian = warm_start(), kbt()
    assert not changed(transformer_weights(baseline), transformer_weights(bayesian))
    for deterministic in (True, False):
        actions, _ = baseline.predict(STATES, deterministic=deterministic)
        np.testing.assert_allclose(actions, bayesian.predict(STATES, deterministic=True)[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("again", ["pretrain", "start_from"])
def test_starting_again_forgets_the_memory(again: str) -> None:
    model = warm_start(memory=5)
    teach(model, 0, 3)
    if again == "pretrain":
        model.pretrain(expert(NOMINAL), TINY, progress_bar=False)
    else:
        model.start_from(pretrained())
    assert [info.memory for info in teach(model, 0, 2)] == [1, 2]


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("stream", ["iid", "visited"])
def test_rollouts_use_the_new_weights_at_once(n_envs: int, stream: str) -> None:
    model = warm_start(memory=4, n_envs=n_envs)
    expected: list[np.ndarray] = []

    class Next(BaseCallback):
        """What the policy, as it is after the update, would do next."""

        def _on_step(self) -> bool:
            policy = model.policy
            expected.append(policy.clip(policy.act(policy.encode(self.locals["context"]))))
            return True

    recorder = Recorder("actions")
    model.learn(8 * n_envs, callback=[recorder, OnlineAdapter(expert(), stream), Next()])
    assert model.labels_used == 8 * n_envs
    for step, actions in zip(recorder.steps[1:], expected[:-1], strict=True):
        np.testing.assert_array_equal(step["actions"], actions)


def test_a_label_that_would_make_every_weight_nan_is_refused() -> None:
    model = warm_start(memory=2)
    teach(model, 0, 1)
    before = weights(model)
    with pytest.raises(UpdateError, match="times the scale of the actions"):
        model.update(Sample(STATES[:1], np.full((1, 1), 1e38)))
    assert not changed(before, weights(model))
    assert [info.trainings for info in teach(model, 1, 2)] == [1]
    assert model.labels_used == 2


def test_a_training_that_leaves_no_finite_weights_changes_nothing() -> None:
    model = warm_start(memory=3, epochs=50, learning_rate=1e38)
    teach(model, 0, 2)
    before = weights(model)
    with pytest.raises(UpdateError, match="Lower the learning rate"):
        teach(model, 2, 3)
    assert not changed(before, weights(model))
    # Another update would train.
    assert (model.labels_used, len(model._stored)) == (2, 2)


def test_longer_contexts_are_stored_whole() -> None:
    env = make_vec_env(SHIFTED, n_envs=1)
    model = WarmStart(env=env, memory=6, epochs=2, policy_kwargs={"transformer": LONGER}, seed=0)
    before = weights(model)
    model.learn(6, callback=OnlineAdapter(expert(), "visited"))
    moved = changed(before, weights(model))
    assert "transformer.embed_action.weight" in moved  # the first step has no action to look back on, later ones have
    assert not torch.equal(
        before["transformer.embed_timestep.weight"][6], weights(model)["transformer.embed_timestep.weight"][6]
    )


@pytest.mark.parametrize(
    "settings", [{"memory": 0}, {"epochs": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        WarmStart(env=make_vec_env(SHIFTED), **settings)


def test_a_bayesian_head_is_not_trained_by_gradient() -> None:
    with pytest.raises(TypeError, match="use TransformerPolicy"):
        WarmStart("DecisionTransformerPolicy", make_vec_env(SHIFTED))
