"""Policies and learners with discrete actions: labels, contexts, learning end to end, save and load."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from kbt_rl import KBT, KalmanAdapter, LQRExpert, OnlineAdapter, Sample, WarmStart
from kbt_rl.agents.actions import ContinuousActions, DiscreteActions, action_format
from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.experts import as_labeller
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.envs import TWO_FORCES
from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv
from kbt_rl.inference.config import HeadConfig
from kbt_rl.models.decision_transformer import DecisionTransformerConfig

NOMINAL_ID, SHIFTED_ID = "kbt_rl/DiscreteInvertedPendulum-v0", "kbt_rl/ShiftedDiscreteInvertedPendulum-v0"
SHORT = PretrainConfig(samples=400, steps=60)
LONGER = DecisionTransformerConfig(context_length=3)


@functools.cache
def pretrained(transformer: DecisionTransformerConfig | None) -> WarmStart:
    env = gym.make(NOMINAL_ID)
    model = WarmStart(env=env, seed=0, policy_kwargs={"transformer": transformer})
    model.pretrain(LQRExpert.for_env(env), SHORT, progress_bar=False)
    return model


def learner(kind: type[KBT] | type[WarmStart] = KBT, **settings: Any) -> Any:
    model = kind(env=gym.make(NOMINAL_ID), seed=0, **settings)
    model.start_from(pretrained(settings.get("policy_kwargs", {}).get("transformer")))
    return model


def observations(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (count, 4)).astype(np.float32)


class Telemetry(BaseCallback):
    """What the adapter has logged at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.rows.append(dict(self.logger.name_to_value))
        return True


# --- labels -----------------------------------------------------------------------------------------------------------


def test_an_action_and_its_one_hot_row_are_the_same_label() -> None:
    one, other = learner(), learner()
    for index, state in enumerate(observations(8)):
        info = one.update(Sample(state, np.int64(index % 5)))
        assert info == other.update(Sample(state, np.eye(5)[index % 5]))
        assert info.labels == 1
    assert torch.equal(one.policy.head.mean, other.policy.head.mean)
    one.update(Sample(observations(3), np.array([0, 4, 2])))
    other.update(Sample(observations(3), np.eye(5)[[0, 4, 2]]))
    assert torch.equal(one.policy.head.mean, other.policy.head.mean)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (np.array([5]), "not among"),
        (np.array([-1]), "not among"),
        (np.array([[1]]), "not among"),
        (np.array([1.0]), "target has shape"),
        (np.array([0.5, 0.4, 0.0, 0.0, 0.0]), "no distribution"),
        (np.array([1.5, -0.5, 0.0, 0.0, 0.0]), "no distribution"),
        (np.array([np.inf, 0.0, 0.0, 0.0, 0.0]), "no distribution"),
        (np.array([np.nan, 1.0, 0.0, 0.0, 0.0]), "NaN in some entries"),
        (np.array([1, 2]), "target has shape"),
        (np.full((1, 4), 0.25), "target has shape"),
    ],
)
@pytest.mark.parametrize("kind", [KBT, WarmStart])
def test_a_wrong_label_changes_nothing(kind: Any, target: np.ndarray, message: str) -> None:
    model = learner(kind)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.update(Sample(observations(1), target))
    assert model.labels_used == 0
    assert all(torch.equal(value, before[name]) for name, value in model.policy.state_dict().items())


def test_missing_labels_are_left_out() -> None:
    one, other = learner(), learner()
    target = np.eye(5)[[0, 1, 4]]
    target[1] = np.nan
    info = one.update(Sample(observations(3), target))
    assert info.labels == 2
    other.update(Sample(observations(3)[[0, 2]], np.array([0, 4])))
    assert torch.equal(one.policy.head.mean, other.policy.head.mean)


def test_an_expert_may_answer_with_actions_or_distributions() -> None:
    env = gym.make(NOMINAL_ID)
    some = observations(6)
    by_action = as_labeller(lambda o: np.arange(len(o)) % 5, env.observation_space, env.action_space)
    np.testing.assert_array_equal(by_action(some), np.eye(5)[[0, 1, 2, 3, 4, 0]])
    expert = LQRExpert.for_env(env)
    np.testing.assert_array_equal(
        as_labeller(expert, env.observation_space, env.action_space)(some), expert.label(some)
    )
    too_few = as_labeller(lambda o: np.arange(3), env.observation_space, env.action_space)
    with pytest.raises(ValueError, match="answered 6 observations with shape"):
        too_few(some)


def test_format_of_a_space_that_does_not_start_at_0() -> None:
    form = DiscreteActions(spaces.Discrete(3, start=-1))
    np.testing.assert_array_equal(form.decide(np.eye(3)), [-1, 0, 1])
    np.testing.assert_array_equal(form.remember(np.array([1, -1])), np.eye(3)[[2, 0]])
    np.testing.assert_array_equal(form.targets(0), [[0.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match="-1 to 1"):
        form.targets(2)


def test_formats_are_chosen_by_the_space() -> None:
    assert isinstance(action_format(spaces.Box(-1, 1, (2,))), ContinuousActions)
    for space in (spaces.MultiDiscrete([2, 2]), spaces.Box(-1, 1, (2, 2))):
        with pytest.raises(ValueError, match="Box with one axis or a Discrete space"):
            action_format(space)
    with pytest.raises(ValueError, match="nothing to choose"):
        action_format(spaces.Discrete(1))


# --- policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, np.float16])
def test_distributions_of_short_dtypes_are_labels(dtype: Any) -> None:
    model, other = learner(), learner()
    exact = np.random.default_rng(0).dirichlet(np.ones(5), 20)
    short = torch.from_numpy(exact).to(dtype) if isinstance(dtype, torch.dtype) else exact.astype(dtype)
    model.update(Sample(observations(20), short))
    other.update(Sample(observations(20), exact))
    torch.testing.assert_close(model.policy.head.mean, other.policy.head.mean, rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="no distribution"):
        model.update(Sample(observations(20), 1.1 * short))


def test_moments_are_class_probabilities() -> None:
    model = learner()
    some = observations(7)
    mean, epistemic, aleatoric = model.policy.predict_moments(some)
    np.testing.assert_allclose(mean.sum(axis=1), 1.0)
    np.testing.assert_array_equal(model.predict(some, deterministic=True)[0], mean.argmax(axis=1))
    np.testing.assert_allclose(aleatoric, [np.diag(p) - np.outer(p, p) for p in mean], atol=1e-12)
    assert epistemic.shape == (7, 5, 5)
    assert np.linalg.eigvalsh(epistemic).min() > -1e-12


def test_predictive_samples_have_the_probabilities_of_the_policy() -> None:
    """With a narrow posterior the draws follow the class probabilities."""
    model = learner(policy_kwargs={"sampling": "predictive", "head": HeadConfig(rule="laplace", last_variance=1e-9)})
    torch.manual_seed(0)
    count = 20_000
    state = observations(1)
    probabilities = model.policy.predict_moments(state).mean[0]
    drawn = model.predict(np.repeat(state, count, axis=0))[0]
    error = np.sqrt(probabilities * (1 - probabilities) / count)
    assert (np.abs(np.bincount(drawn, minlength=5) / count - probabilities) < 6 * error).all()


def test_epistemic_samples_are_of_the_logits() -> None:
    """The most probable action at Gaussian logits, against draws from NumPy."""
    model = learner()
    model.update(Sample(observations(4, seed=1), np.array([0, 1, 4, 2])))
    torch.manual_seed(0)
    count = 20_000
    state = observations(1)
    logits = model.policy.head.predict_logits(model.policy.encode(model.policy.start(state)))
    rng = np.random.default_rng(0)
    theirs = rng.multivariate_normal(logits.mean[0].numpy(), logits.cov[0].numpy(), 200_000).argmax(axis=1)
    expected = np.bincount(theirs, minlength=5) / 200_000
    found = np.bincount(model.predict(np.repeat(state, count, axis=0))[0], minlength=5) / count
    error = np.sqrt(expected * (1 - expected) * (1 / count + 1 / 200_000)) + 1e-12
    assert (np.abs(found - expected) < 6 * error).all()
    assert (expected > 0.01).sum() > 1


def test_longer_contexts_remember_one_hot_actions() -> None:
    model = learner(policy_kwargs={"transformer": LONGER})
    first, window = model.predict(observations(2), deterministic=True)
    np.testing.assert_array_equal(window.actions[:, -1], np.eye(5)[first])
    second, window = model.predict(observations(2, seed=1), state=window, deterministic=True)
    np.testing.assert_array_equal(window.actions[:, -2:], np.eye(5)[np.stack([first, second], axis=1)])
    assert model.update(Sample(window, np.array([3, 3]))).labels == 2


@pytest.mark.parametrize("rule", ["measure", "replace"])
def test_identity_link_is_refused(rule: str) -> None:
    env = gym.make(NOMINAL_ID)
    with pytest.raises(ValueError, match="action space is discrete; use 'laplace'"):
        DecisionTransformerPolicy(env.observation_space, env.action_space, head=HeadConfig(rule=rule))  # type: ignore[arg-type]


def test_other_force_levels_are_refused() -> None:
    model = learner()
    with pytest.raises(ValueError, match=r"forces=\[-15.0, -2.0, 0.0, 2.0, 15.0\]"):
        model.set_env(gym.make(SHIFTED_ID, forces=(-15.0, -3.0, 0.0, 3.0, 15.0)))
    with pytest.raises(ValueError, match="Action spaces do not match"):
        model.set_env(gym.make(SHIFTED_ID, forces=TWO_FORCES))


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "adapter"), [(KBT, KalmanAdapter), (WarmStart, OnlineAdapter)])
@pytest.mark.parametrize("transformer", [None, LONGER])
@pytest.mark.parametrize("stream", ["iid", "visited"])
def test_learns_and_continues_after_load_bit_for_bit(
    kind: Any, adapter: Any, transformer: DecisionTransformerConfig | None, stream: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"policy_kwargs": {"transformer": transformer}}
    model = learner(kind, **settings, **({"memory": 5, "epochs": 3} if kind is WarmStart else {}))
    shifted = make_vec_env(SHIFTED_ID, n_envs=2, seed=0)
    expert = LQRExpert.for_env(shifted)
    model.set_env(shifted)
    model.learn(20, callback=adapter(expert, stream))
    assert model.labels_used == 20
    model.save(tmp_path / "model")
    loaded = kind.load(tmp_path / "model", env=make_vec_env(SHIFTED_ID, n_envs=2, seed=0))
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, loaded.policy.state_dict()[name])
    some = observations(10)
    np.testing.assert_array_equal(
        model.predict(some, deterministic=True)[0], loaded.predict(some, deterministic=True)[0]
    )
    assert loaded.forces == model.forces
    for each in (model, loaded):
        each.update(Sample(some, expert.label(some)))
    for name, value in model.policy.state_dict().items():
        assert torch.equal(value, loaded.policy.state_dict()[name])


def test_two_forces_from_pretraining_to_success() -> None:
    """The whole way on two forces: 0 before, 1 after 100 labels in an evaluation by the environment's own test."""
    nominal = gym.make(NOMINAL_ID, forces=TWO_FORCES)
    shifted = gym.make(SHIFTED_ID, forces=TWO_FORCES)
    model = KBT(env=nominal, seed=0)
    info = model.pretrain(LQRExpert.for_env(nominal), PretrainConfig(samples=4_000, steps=600), progress_bar=False)
    assert info.validation_accuracy is not None
    assert info.validation_accuracy > 0.9
    assert info.label_rms == 1.0
    before = success(model)
    model.set_env(shifted)
    telemetry = Telemetry()
    model.learn(100, callback=[KalmanAdapter(LQRExpert.for_env(shifted)), telemetry])
    assert before == 0.0
    assert success(model) >= 0.9
    assert model.labels_used == 100
    first, last = telemetry.rows[0], telemetry.rows[99]
    assert last["kalman/innovation"] < 0.5 * max(first["kalman/innovation"], 0.2)
    assert {"kalman/nis", "kalman/epistemic_variance"} <= last.keys()


def success(model: KBT) -> float:
    envs = InvertedPendulumSB3VecEnv(SHIFTED_ID, num_envs=20, forces=TWO_FORCES)
    envs.seed(5)
    found: list[bool] = []
    evaluate_policy(
        model,
        envs,
        n_eval_episodes=20,
        callback=lambda values, _: found.append(values["info"]["is_success"]) if values["done"] else None,
    )
    return float(np.mean(found))
