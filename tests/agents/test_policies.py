"""Policies as SB3 uses them, and the distribution that a Bayesian head adds."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from learners import LONGER, NOMINAL, changed, kbt, policy, states, weights
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from kbt_rl import DecisionTransformerPolicy, HeadConfig
from kbt_rl.agents.transformer_policy import TransformerPolicy

BOTH = pytest.mark.parametrize("kind", [TransformerPolicy, DecisionTransformerPolicy])
FLAT = spaces.Box(-1.0, 1.0, (4,), dtype=np.float32)


# ---------------------------------------------------------------------- predict


@BOTH
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shapes_and_dtypes(kind: type[TransformerPolicy], dtype: Any) -> None:
    subject = kind(FLAT, spaces.Box(-1.0, 1.0, (2,), dtype=dtype))
    for observation, shape in ((np.zeros(4), (2,)), (np.zeros((1, 4)), (1, 2)), (np.zeros((5, 4)), (5, 2))):
        for deterministic in (True, False):
            action, _ = subject.predict(observation, deterministic=deterministic)
            assert action.shape == shape
            assert action.dtype == dtype


@BOTH
def test_actions_are_clipped_into_the_action_space(kind: type[TransformerPolicy]) -> None:
    narrow = spaces.Box(np.array([-1e-3, 0.0]), np.array([2e-3, 1e-4]), dtype=np.float64)
    subject = kind(FLAT, narrow)
    observations = np.random.default_rng(0).uniform(-1, 1, (200, 4))
    for deterministic in (True, False):
        actions, _ = subject.predict(observations, deterministic=deterministic)
        assert ((actions >= narrow.low) & (actions <= narrow.high)).all()
        assert (actions.min(0) == narrow.low).any()
        assert (actions.max(0) == narrow.high).any()


def test_deterministic_action_is_the_posterior_mean() -> None:
    subject = policy()
    actions, state = subject.predict(states(7), deterministic=True)
    np.testing.assert_allclose(actions, subject.predict_moments(states(7)).mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(actions, subject.predict_moments(state).mean, rtol=1e-6, atol=1e-7)
    again, _ = subject.predict(states(7), deterministic=True)
    np.testing.assert_array_equal(again, actions)


def test_plain_policy_has_no_distribution_to_sample() -> None:
    subject = policy(TransformerPolicy)
    np.testing.assert_array_equal(
        subject.predict(states(3), deterministic=False)[0], subject.predict(states(3), deterministic=True)[0]
    )


@pytest.mark.parametrize("sampling", ["epistemic", "predictive"])
def test_samples_have_the_covariance_they_are_named_after(sampling: Any) -> None:
    subject = policy(head=HeadConfig(structure="joint", last_variance=0.1), sampling=sampling)
    subject.head.set_noise(torch.tensor([[1.0, -0.8], [-0.8, 1.0]]))
    features = subject.encode(subject.start(states(1)))
    subject.head.update(features, subject.head(features))  # correlated noise correlates the two outputs
    mean, epistemic, aleatoric = (part[0] for part in subject.predict_moments(states(1)))
    cov = epistemic + aleatoric if sampling == "predictive" else epistemic
    count = 20_000
    torch.manual_seed(0)
    chunks = [subject.predict(states(1).repeat(2_000, axis=0))[0] for _ in range(count // 2_000)]
    samples = np.concatenate(chunks).astype(np.float64)
    variance = np.diag(cov)
    assert (np.abs(samples.mean(0) - mean) < 6 * np.sqrt(variance / count)).all()
    standard_error = np.sqrt((np.outer(variance, variance) + cov**2) / count)
    assert (np.abs(np.cov(samples.T) - cov) < 6 * standard_error).all()
    # Neither a missing correlation nor the other covariance would pass.
    assert abs(cov[0, 1]) > 12 * standard_error[0, 1]
    assert (np.abs(aleatoric) > 12 * standard_error).all()


def test_sampling_follows_the_seed() -> None:
    subject, drawn = policy(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(subject.predict(states(3))[0])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


# ---------------------------------------------------------------------- moments


@pytest.mark.parametrize("rows", [1, 5])
def test_moments_have_a_row_axis(rows: int) -> None:
    moments = policy().predict_moments(states(rows))
    assert [part.shape for part in moments] == [(rows, 2), (rows, 2, 2), (rows, 2, 2)]
    assert {part.dtype for part in moments} == {np.dtype(np.float64)}
    single = policy().predict_moments(states(rows)[0])
    for part, other in zip(single, moments, strict=True):
        np.testing.assert_allclose(part[0], other[0], rtol=1e-5, atol=1e-8)


def test_aleatoric_variance_is_the_noise_in_action_units() -> None:
    subject = policy(head=HeadConfig(noise_variance=0.01))
    subject.transformer.action_scale.copy_(torch.tensor([2.0, 5.0]))
    subject.reset_head()
    np.testing.assert_allclose(subject.predict_moments(states(1)).aleatoric[0], np.diag([0.04, 0.25]), rtol=1e-6)


# ---------------------------------------------------------------------- SB3


@BOTH
@pytest.mark.parametrize("n_envs", [1, 3])
def test_evaluate_policy_accepts_the_policy_itself(kind: type[TransformerPolicy], n_envs: int) -> None:
    env = make_vec_env(NOMINAL, n_envs=n_envs)
    subject = kind(env.observation_space, env.action_space, transformer=LONGER)
    rewards, lengths = evaluate_policy(subject, env, n_eval_episodes=4, return_episode_rewards=True)
    assert len(rewards) == len(lengths) == 4


@pytest.mark.parametrize("settings", [{}, {"transformer": LONGER, "sampling": "predictive"}])
def test_save_and_load(settings: dict[str, Any], tmp_path: Any) -> None:
    subject = policy(head=HeadConfig(structure="neuron"), observation_scale=[1, 2, 3, 4], **settings)
    subject.head.update(subject.encode(subject.start(states(2))), torch.ones(2, 2))
    subject.save(tmp_path / "policy.pth")
    loaded = DecisionTransformerPolicy.load(tmp_path / "policy.pth")
    assert not changed(weights(subject), weights(loaded))
    assert loaded.state_dict()["head.mean"].dtype == torch.float64
    for name in ("transformer_config", "head_config", "sampling", "observation_space", "action_space"):
        assert getattr(loaded, name) == getattr(subject, name)
    for part, other in zip(loaded.predict_moments(states(5)), subject.predict_moments(states(5)), strict=True):
        np.testing.assert_array_equal(part, other)


@pytest.mark.parametrize("cast", ["float", "half", "double", "bfloat16"])
def test_casting_the_policy_leaves_the_posterior_in_float64(cast: str) -> None:
    subject = policy(transformer=LONGER)
    before = {name: value for name, value in weights(subject).items() if name.startswith("head.")}
    action, state = subject.predict(states(2), deterministic=True)
    getattr(subject, cast)()
    after = {name: value for name, value in weights(subject).items() if name.startswith("head.")}
    assert not changed(before, after)
    assert after["head.mean"].dtype == torch.float64
    assert subject.transformer.linear.weight.dtype == getattr(torch, cast)
    cast_action, _ = subject.predict(states(2), state, deterministic=True)  # works, with the encoder's precision
    assert cast_action.dtype == action.dtype
    assert np.isfinite(cast_action).all()


@BOTH
@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_policy_gradients_say_what_is_supported(kind: type[TransformerPolicy], algorithm: Any) -> None:
    with pytest.raises(TypeError, match="use it with KBT or WarmStart"):
        algorithm(kind, gym.make(NOMINAL))


def test_head_reproduces_the_pretrained_layer() -> None:
    model = kbt()
    plain = TransformerPolicy(model.observation_space, model.action_space)
    plain.transformer.load_state_dict(model.policy.transformer.state_dict())
    expected = plain.act(plain.encode(plain.start(states(50))))
    found = model.policy.act(model.policy.encode(model.policy.start(states(50))))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


# ---------------------------------------------------------------------- bad input

NAN = np.array([0.0, np.nan, 0.0, 0.0])


@BOTH
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e38, 1e16])
def test_what_no_sensor_shows_is_refused_also_where_the_space_has_no_bounds(
    kind: type[TransformerPolicy], value: float
) -> None:
    subject = kind(spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(-1.0, 1.0, (1,)))
    assert np.isfinite(subject.predict(np.array([1e14, -1e14]))[0]).all()
    with pytest.raises(ValueError, match="not finite, absurdly large"):
        subject.predict(np.array([value, 0.0]))


@BOTH
def test_an_observation_at_a_bound_of_a_float64_space_is_inside(kind: type[TransformerPolicy]) -> None:
    """In float32 0.1 is a little more."""
    subject = kind(spaces.Box(-0.1, 0.1, (2,), np.float64), spaces.Box(-1.0, 1.0, (1,)))
    assert subject.predict(np.array([0.1, -0.1]))[0].shape == (1,)


@BOTH
@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.full(4, 10.1), "outside the observation space"),
        (NAN, "not finite"),
        (np.full(4, np.inf), "not finite"),
        (np.stack([np.zeros(4), NAN]), r"row 1\) is not finite"),
        (np.zeros(3), r"shape \(1, 3\); expected \(n, 4\)"),
        (np.zeros(8), r"shape \(1, 8\); expected \(n, 4\)"),
        (np.zeros((2, 5)), r"shape \(2, 5\); expected \(n, 4\)"),
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\); expected \(n, 4\)"),
        (np.float32(0.0), r"shape \(\); expected \(n, 4\)"),
        ({"position": np.zeros(4)}, "FlattenObservation"),
    ],
)
def test_bad_observations_are_refused(kind: type[TransformerPolicy], observation: Any, message: str) -> None:
    subject = policy(kind)
    with pytest.raises(ValueError, match=message):
        subject.predict(observation)
    if kind is DecisionTransformerPolicy and not isinstance(observation, dict):
        with pytest.raises(ValueError, match=message.replace(r"shape \(\)", r"shape \(1, 1\)")):
            subject.predict_moments(observation)


@BOTH
@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3),
        spaces.MultiBinary(4),
        spaces.Dict({"position": FLAT}),
        spaces.Box(-1, 1, (2, 2), dtype=np.float32),
    ],
    ids=lambda space: type(space).__name__,
)
def test_other_spaces_are_refused(kind: type[TransformerPolicy], space: Any) -> None:
    with pytest.raises(ValueError, match=r"the observation space is .* needs a Box with one axis"):
        kind(space, FLAT)
    if isinstance(space, spaces.Discrete):
        space = spaces.MultiDiscrete([3, 3])
    with pytest.raises(ValueError, match=r"the action space is .* needs a Box with one axis"):
        kind(FLAT, space)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sampling": "thompson"}, ValueError, "choose 'epistemic' or 'predictive'"),
        ({"head": HeadConfig(rule="fisher")}, ValueError, "softmax link"),
        ({"observation_scale": [1.0, 2.0]}, ValueError, "expected 4 positive numbers"),
        ({"observation_scale": [1.0, 2.0, 0.0, 1.0]}, ValueError, "expected 4 positive numbers"),
        ({"net_arch": [64, 64]}, TypeError, "takes no argument 'net_arch'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        policy(**settings)
