"""``adapt`` on decision transformers of Hugging Face, whose context is the ``state`` of ``predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

from kbt_rl import AdaptedPolicy, Fallback, HuggingFaceTransformer, KalmanAdapter, adapt
from kbt_rl.networks.hugging_face import Memory

transformers = pytest.importorskip("transformers")

S, A, K, TARGET, SCALE = 3, 2, 4, 30.0, 10.0
MEAN, STD = np.array([0.5, 0.0, -1.0], np.float32), np.array([2.0, 1.0, 0.5], np.float32)


def model_of(tanh: bool = True, act_dim: int = A, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "n_inner": 16, "max_ep_len": 12} | settings
    config = transformers.DecisionTransformerConfig(
        state_dim=S, act_dim=act_dim, action_tanh=tanh, bos_token_id=0, eos_token_id=0, **sizes
    )
    return transformers.DecisionTransformerModel(config)


def wrapped(model: Any, **settings: Any) -> HuggingFaceTransformer:
    given: dict[str, Any] = {"target_return": TARGET, "scale": SCALE, "context": K}
    return HuggingFaceTransformer(model, **given | {"state_mean": MEAN, "state_std": STD} | settings)


def rows(count: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, S)).astype(np.float32)


def adapted(model: Any, **settings: Any) -> AdaptedPolicy:
    return adapt(wrapped(model), states=rows(), **settings)


def own(model: Any, observations: Any, actions: Any, returns: Any) -> np.ndarray:
    """What the model itself says of one episode, called as its documentation does."""
    known = slice(-K, None)
    steps = np.arange(len(observations))[known].clip(0, model.config.max_ep_len - 1)
    states = ((np.array(observations) - MEAN) / STD)[known]
    with torch.no_grad():
        found = model(
            states=torch.from_numpy(states)[None].float(),
            actions=torch.tensor(np.array([*actions, np.zeros(model.config.act_dim)])[known])[None].float(),
            rewards=None,
            returns_to_go=torch.tensor(np.array(returns)[known])[None, :, None].float(),
            timesteps=torch.from_numpy(steps)[None],
            attention_mask=torch.ones(1, len(steps)),
        )
    prediction: np.ndarray = found.action_preds[0, -1].numpy()
    return prediction


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("skip", ["hidden", "none"])
def test_it_acts_as_the_model_does_along_an_episode_longer_than_all_limits(tanh: bool, skip: Any) -> None:
    model = model_of(tanh)
    policy, transformer = adapted(model, skip=skip), wrapped(model)
    state, observations, actions, returns = None, list(rows(15)), [], [TARGET / SCALE]  # type: ignore[var-annotated]
    for step, observation in enumerate(observations):
        action, state = policy.predict(observation, state)
        expected = own(model, observations[: step + 1], actions, returns)
        np.testing.assert_allclose(action, expected, rtol=0.0, atol=1e-6)
        actions.append(action)
        if step % 2:  # a reward that is not told leaves the return-to-go
            state = transformer.with_reward(state, 0.5 * step)
            returns.append(returns[-1] - 0.5 * step / SCALE)
        else:
            returns.append(returns[-1])


def test_rows_are_episodes_that_start_when_they_are_told_to() -> None:
    model = model_of()
    policy, seen = adapted(model), rows(18).reshape(6, 3, S)
    starts = np.zeros((6, 3), dtype=bool)
    starts[0], starts[2, 1], starts[[4, 5], 2] = True, True, True
    state: Any = None
    past: list[Any] = [[], [], []]
    for observations, start in zip(seen, starts, strict=True):
        actions, state = policy.predict(observations, state, start)
        for env in range(3):
            past[env] = [] if start[env] else past[env]
            past[env].append((observations[env], actions[env]))
            given, taken = [one for one, _ in past[env]], [one for _, one in past[env]][:-1]
            expected = own(model, given, taken, [TARGET / SCALE] * len(given))
            np.testing.assert_allclose(actions[env], expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("tanh", [True, False])
def test_labels_are_actions_up_to_the_bounds(tanh: bool) -> None:
    policy = adapted(model_of(tanh))
    for observations in rows(60).reshape(20, 3, S):
        policy.predict(observations)
        policy.update(None, np.tile([1.0, -0.3], (3, 1)))
    action = policy.predict(rows(1, seed=1))[0][0]
    assert 0.8 < action[0] <= 1.0
    assert action[1] == pytest.approx(-0.3, abs=0.1)
    assert np.isfinite(policy.predict_moments(None).mean).all()


def test_actions_without_a_tanh_are_cut_to_the_bounds() -> None:
    model = model_of(tanh=False)
    with torch.no_grad():
        model.predict_action[0].bias += 5.0
    assert (adapted(model).predict(rows(3))[0] == 1.0).all()


def test_the_head_sees_the_last_hidden_state_and_the_newest_observation() -> None:
    policy = adapted(model_of())
    assert policy.tapped == (policy.model.model.predict_action[0], policy.model.model.embed_state)
    _, state = policy.predict(rows(2))
    context = policy.advance(policy.start(rows(2)), rows(2, seed=1), np.zeros(2, dtype=bool))
    np.testing.assert_allclose(context.features[:, 16:], (rows(2, seed=1) - MEAN) / STD, atol=1e-6)
    with pytest.raises(ValueError, match="a recurrent policy sees more than an observation"):
        policy.update(rows(2), np.zeros((2, A)))
    assert policy.update(rows(2), np.zeros((2, A)), state=state).labels == 2 * A


def test_the_context_remembers_the_action_that_was_taken() -> None:
    model = model_of()
    policy = adapted(model)
    _, state = policy.predict(rows(1))
    state = policy.model.with_action(state, [[0.25, -0.75]])
    np.testing.assert_array_equal(Memory(*state).actions[:, -1], [[0.25, -0.75]])
    expected = own(model, rows(2), [[0.25, -0.75]], [TARGET / SCALE] * 2)
    np.testing.assert_allclose(policy.predict(rows(2)[1], state)[0], expected, atol=1e-6)
    policy.set_fallback(Fallback(lambda seen: np.full((len(seen), A), 0.125), limit=0.0))
    _, state = policy.predict(rows(1)[0], state)
    assert (Memory(*state).actions[:, -1] == 0.125).all()


def test_it_learns_in_an_environment_whose_actions_have_another_range() -> None:
    env = gym.make("Pendulum-v1")
    policy = adapt(HuggingFaceTransformer(model_of(act_dim=1), target_return=-200.0, scale=100.0, env=env), states=env)
    before = policy.model.model.state_dict()["embed_state.weight"].clone()
    assert policy.predict(env.reset(seed=0)[0])[0] == pytest.approx(0.0, abs=0.5)
    policy.learn("Pendulum-v1", 200, KalmanAdapter(lambda seen: np.full((len(seen), 1), 1.5)), seed=0)
    assert policy.head.labels_seen == 40
    assert 0.8 < policy.predict(env.reset(seed=1)[0])[0][0] < 2.0
    evaluate_policy(policy, make_vec_env("Pendulum-v1", 2), 3)
    assert torch.equal(policy.model.model.embed_state.weight, before)
    context = policy.with_action(policy.start(rows(1)), np.array([[1.0]]))
    np.testing.assert_array_equal(context.state[1][:, -1], [[0.5]])  # the model knows actions in [-1, 1]


def test_a_checkpoint_and_an_adaptation_go_on_in_another_process(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path / "checkpoint")
    policy = adapted(model)
    policy.predict(rows(5))
    policy.update(None, np.full((5, A), 0.5))
    path = policy.save(tmp_path / "adapted")
    again = transformers.DecisionTransformerModel.from_pretrained(tmp_path / "checkpoint")
    loaded = AdaptedPolicy.load(path, wrapped(again, target_return=20.0))
    loaded.model.target_return = TARGET
    np.testing.assert_array_equal(loaded.predict(rows(5))[0], policy.predict(rows(5))[0])
    for other in (wrapped(model_of(seed=1)), wrapped(again, context=3), wrapped(again, state_mean=None)):
        with pytest.raises(ValueError, match="another model than this HuggingFaceTransformer, whose weights or"):
            AdaptedPolicy.load(path, other)


def test_bake_and_detach_give_models_of_transformers(tmp_path: Path) -> None:
    model = model_of()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    policy = adapted(model, skip="none")
    policy.predict(rows(5))
    policy.update(None, np.full((5, A), 0.5))
    baked = policy.bake()
    baked.model.save_pretrained(tmp_path / "baked")
    again = transformers.DecisionTransformerModel.from_pretrained(tmp_path / "baked").eval()
    expected = policy.predict(rows(1)[0])[0]
    np.testing.assert_allclose(own(again, rows(1), [], [TARGET / SCALE]), expected, atol=1e-6)
    assert policy.detach().model is model
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_subclass_that_returns_its_loss_is_one_too() -> None:
    class Trainable(transformers.DecisionTransformerModel):  # type: ignore[misc]
        def forward(self, **kwargs: Any) -> dict[str, Any]:
            return {"loss": super().forward(**kwargs)[1].square().mean()}

    model = model_of()
    trainable = Trainable(model.config)
    trainable.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(adapted(trainable).predict(rows(3))[0], adapted(model).predict(rows(3))[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_return": np.nan}, "target_return is nan"),
        ({"scale": 0.0}, "scale 0.0"),
        ({"context": 0}, "context is 0; this model sees 1 to 341 steps"),
        ({"context": 400}, "context is 400"),
        ({"state_mean": np.zeros(4)}, r"state_mean has shape \(4,\); expected \(3,\)"),
        ({"state_std": np.zeros(3)}, "standard deviations are positive"),
        ({"env": gym.make("CartPole-v1")}, "this model is for 3 numbers and 2 continuous actions"),
        ({"env": gym.make("Pendulum-v1")}, "this model is for 3 numbers and 2 continuous actions"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(model_of(), **settings)


def test_models_that_cannot_be_adapted_are_told_why() -> None:
    with pytest.raises(TypeError, match=r"pass HuggingFaceTransformer\(model, target_return=\.\.\.\) to adapt\(\)"):
        adapt(model_of())
    with pytest.raises(TypeError, match="takes a DecisionTransformerModel of transformers; got Linear"):
        HuggingFaceTransformer(nn.Linear(3, 2), target_return=1.0)
    with pytest.raises(ValueError, match="a decision transformer knows its own"):
        adapt(wrapped(model_of()), states=rows(), link="clipped")
    policy = adapted(model_of())
    with pytest.raises(ValueError, match=r"expected \(3,\) or \(n, \*\(3,\)\)"):
        policy.predict(np.zeros(4, np.float32))
    _, state = policy.predict(rows(2))
    with pytest.raises(ValueError, match="the context holds 2 environments and 3 observations came"):
        policy.predict(rows(3), state)
    with pytest.raises(ValueError, match=r"pass the one that predict\(\) returned"):
        policy.model.with_reward(None, 1.0)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "kbt_rl\[huggingface\]"'):
        wrapped(model)
