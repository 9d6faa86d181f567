"""Bad input gets an error that says what is wrong, before anything changes."""

from __future__ import annotations

import functools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from learners import NOMINAL, SHIFTED, changed, expert, kbt, longer_kbt, pretrained, states, warm_start, weights
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from kbt_rl import KBT, DecisionTransformerPolicy, KalmanAdapter, LQRExpert, OnlineAdapter, Sample, WarmStart
from kbt_rl.agents.behaviour_cloning import PretrainConfig

LEARNERS = pytest.mark.parametrize("make", [kbt, warm_start], ids=["kbt", "warm start"])
ONES = np.ones((2, 1))
NAN = np.array([0.0, np.nan, 0.0, 0.0])


def memory(model: Any) -> int:
    # How many samples wait for a training is told by an update only, and here none is made.
    return len(model._stored) if isinstance(model, WarmStart) else 0


# ---------------------------------------------------------------------- samples


@LEARNERS
@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(states(2), np.ones((3, 1))), r"target has shape \(3, 1\); expected \(2, 1\)"),
        (Sample(states(2), np.ones((2, 2))), r"target has shape \(2, 2\); expected \(2, 1\)"),
        (Sample(states(2), np.ones(2)), r"target has shape \(1, 2\); expected \(2, 1\)"),
        (Sample(states(2), np.array([[1.0], [np.inf]])), "infinite label; use NaN"),
        (Sample(states(2), ONES, np.array([True])), r"mask has shape \(1,\); expected \(2,\)"),
        (Sample(np.stack([states(1)[0], NAN]), ONES), r"row 1\) is not finite"),
        (Sample(np.full((2, 4), 1e9), ONES), "outside the observation space"),
        (Sample(np.zeros((2, 3)), ONES), r"shape \(2, 3\); expected \(n, 4\)"),
        (Sample(np.zeros((1, 2, 4)), ONES), r"shape \(1, 2, 4\); expected \(n, 4\)"),
    ],
)
def test_a_bad_sample_changes_nothing(make: Any, sample: Sample, message: str) -> None:
    model = make()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        model.update(sample)
    assert (model.labels_used, memory(model)) == (0, 0)
    assert not changed(before, weights(model))


@LEARNERS
@pytest.mark.parametrize("left_out", ["by the mask", "without a label"])
@pytest.mark.parametrize("encoded", [False, True])
def test_rows_that_are_left_out_may_hold_anything(make: Any, left_out: str, encoded: bool) -> None:
    """A sensor or an expert that is off, whose numbers nobody uses."""
    model, other, labels = make(), make(), expert().label(states(3))
    observations, target, mask = states(3), labels.copy(), None
    observations[1] = [np.nan, np.inf, 1e30, 0.0]
    target[1] = np.nan
    if left_out == "by the mask":
        target[1], mask = np.inf, np.array([True, False, True])
    context = observations
    if encoded:
        context = model.policy.start(states(3))
        context.observations[1] = observations[1]
    info = model.update(Sample(context, target, mask))
    expected = other.update(Sample(states(3)[[0, 2]], labels[[0, 2]]))
    assert (info.labels, info.innovation, model.labels_used) == (2, expected.innovation, 2)
    assert not changed(weights(model), weights(other))


@LEARNERS
@pytest.mark.parametrize("which", ["context", "target"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values + 1j, r"hold complex\d+; expected real numbers"),
        (lambda values: values.astype(object), "hold object; expected real numbers"),
        (lambda values: np.ma.masked_array(values, mask=True), r"masked array.*use NaN for no label"),
    ],
    ids=["complex", "objects", "masked"],
)
def test_what_is_no_array_of_real_numbers_changes_nothing(make: Any, which: str, spoil: Any, message: str) -> None:
    model, sample = make(), Sample(states(2), ONES)
    before = weights(model)
    with pytest.raises(TypeError, match=message):
        model.update(sample._replace(**{which: spoil(getattr(sample, which))}))
    assert (model.labels_used, memory(model)) == (0, 0)
    assert not changed(before, weights(model))


@LEARNERS
def test_a_label_is_complete_or_missing(make: Any) -> None:
    space = spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)

    class Arm(gym.Env):  # type: ignore[type-arg]
        observation_space, action_space = space, space

    model = {kbt: KBT, warm_start: WarmStart}[make](env=Arm())
    before = weights(model)
    with pytest.raises(ValueError, match="NaN in some entries only"):
        model.update(Sample(np.zeros((2, 2)), np.array([[0.0, 0.0], [1.0, np.nan]])))
    assert not changed(before, weights(model))


@LEARNERS
@pytest.mark.parametrize("bad", ["size", "value"])
def test_a_bad_context_changes_nothing(make: Any, bad: str) -> None:
    model = make()
    before = weights(model)
    if bad == "size":
        context, message = longer_kbt().policy.start(states(2)), "context's observations have shape"
    else:
        context, message = model.policy.start(states(2)), "not finite"
        context.observations[1, 0, 2] = np.nan
    with pytest.raises(ValueError, match=message):
        model.update(Sample(context, ONES))
    with pytest.raises(ValueError, match=message):
        model.policy.predict_moments(context) if isinstance(model, KBT) else model.update(Sample(context, ONES))
    assert not changed(before, weights(model))


@LEARNERS
@pytest.mark.parametrize(
    ("features", "message"), [(torch.zeros(3, 16), r"shape \(3, 16\)"), (torch.zeros(2, 5), r"shape \(2, 5\)")]
)
def test_features_of_something_else_change_nothing(make: Any, features: torch.Tensor, message: str) -> None:
    model = make()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        model.update(Sample(states(2), ONES, None, features))
    assert (model.labels_used, memory(model)) == (0, 0)
    assert not changed(before, weights(model))


# ---------------------------------------------------------------------- experts


def nowhere(observations: np.ndarray) -> np.ndarray:
    return np.full((len(observations), 1), np.nan)


PENDULUM_PPO = PPO("MlpPolicy", "Pendulum-v1", n_steps=2, batch_size=2)


@LEARNERS
@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (lambda s: np.zeros(len(s)), ValueError, r"with shape \(1,\); expected \(1, 1\)"),
        (lambda s: np.zeros((len(s), 2)), ValueError, r"with shape \(1, 2\); expected \(1, 1\)"),
        (lambda s: np.full((len(s), 1), np.inf), ValueError, "infinite label"),
        ("lqr", TypeError, "an SB3 policy or a function of observations; got str"),
        (LQRExpert.for_env(gym.make(NOMINAL)), ValueError, "expert was made for params="),
        (LQRExpert.for_env(gym.make(SHIFTED, max_force=60.0)), ValueError, r"expert was made for max_force=60\.0"),
        (PENDULUM_PPO, ValueError, "expert of another env"),
        (PENDULUM_PPO.policy, ValueError, "expert of another env"),
    ],
)
def test_an_expert_that_does_not_fit_changes_nothing(
    make: Any, teacher: Any, error: type[Exception], message: str
) -> None:
    model = make()
    before = weights(model)
    with pytest.raises(error, match=message):
        model.learn(3, callback=(KalmanAdapter if make is kbt else OnlineAdapter)(teacher))
    assert (model.labels_used, memory(model)) == (0, 0)
    assert not changed(before, weights(model))


def test_an_expert_of_another_plant_can_be_meant() -> None:
    model = kbt()
    model.learn(2, callback=KalmanAdapter(expert(NOMINAL), check_expert=False))
    assert model.labels_used == 2


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        (lambda s: np.zeros(len(s)), ValueError, r"with shape \(40,\); expected \(40, 1\)"),
        (lambda s: np.zeros((len(s), 1)), ValueError, "finite and not all zero"),
        (nowhere, ValueError, "finite and not all zero"),
        (3.0, TypeError, "got float"),
        (PENDULUM_PPO, ValueError, "expert of another env"),
    ],
)
def test_an_expert_that_cannot_be_cloned_changes_nothing(teacher: Any, error: type[Exception], message: str) -> None:
    model = kbt()
    before = weights(model)
    with pytest.raises(error, match=message):
        model.pretrain(teacher, PretrainConfig(samples=40, steps=2), progress_bar=False)
    assert not changed(before, weights(model))
    assert model.pretrain_info == pretrained().pretrain_info


@pytest.mark.parametrize("name", ["samples", "steps", "batch_size"])
def test_bad_pretraining_sizes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        PretrainConfig(**{name: 0})


# ---------------------------------------------------------------------- construction


class Camera(gym.Env):  # type: ignore[type-arg]
    observation_space = spaces.Dict({"position": spaces.Box(-1, 1, (4,)), "speed": spaces.Box(-1, 1, (4,))})
    action_space = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)


class Switches(gym.Env):  # type: ignore[type-arg]
    observation_space = spaces.Box(-1.0, 1.0, (4,), dtype=np.float32)
    action_space = spaces.MultiDiscrete([2, 2])


class Unbounded(gym.Env):  # type: ignore[type-arg]
    observation_space = spaces.Box(-np.inf, np.inf, (4,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)


@LEARNERS
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"policy": "MlpPolicy"}, ValueError, "no policy 'MlpPolicy'; choose one of DecisionTransformerPolicy"),
        ({"policy": PENDULUM_PPO.policy_class}, TypeError, "needs a TransformerPolicy"),
        ({"env": None}, ValueError, "takes its spaces from an environment"),
        ({"env": Switches()}, AssertionError, r"MultiDiscrete\(\[2 2\]\) was provided"),
        ({"env": Camera()}, ValueError, "needs a Box with one axis"),
        ({"n_steps": 0}, ValueError, "n_steps is 0"),
        ({"policy_kwargs": {"net_arch": [8]}}, TypeError, "takes no argument 'net_arch'"),
    ],
)
def test_bad_settings_are_refused(make: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        {kbt: KBT, warm_start: WarmStart}[make](**{"env": NOMINAL, **settings})


def test_kbt_needs_a_bayesian_head() -> None:
    with pytest.raises(TypeError, match="needs a DecisionTransformerPolicy"):
        KBT("TransformerPolicy", NOMINAL)


def test_policies_of_ones_own_are_accepted() -> None:
    class Careful(DecisionTransformerPolicy):
        pass

    assert isinstance(KBT(Careful, NOMINAL).policy, Careful)


def test_an_unbounded_space_needs_a_label_box() -> None:
    model = KBT(env=Unbounded())
    with pytest.raises(ValueError, match="knows no label space"):
        model.pretrain(lambda s: s[:, :1], progress_bar=False)
    model.label_space = spaces.Box(-1.0, 1.0, (4,), dtype=np.float32)
    model.pretrain(lambda s: s[:, :1], PretrainConfig(samples=20, steps=1), progress_bar=False)


# ---------------------------------------------------------------------- callbacks


def test_adapters_teach_the_learners_of_this_library() -> None:
    with pytest.raises(TypeError, match="PPO learns by itself: adapt"):
        PPO("MlpPolicy", NOMINAL, n_steps=2, batch_size=2).learn(2, callback=OnlineAdapter(expert()))
    with pytest.raises(TypeError, match="which WarmStart has not; use OnlineAdapter"):
        warm_start().learn(1, callback=KalmanAdapter(expert()))


def test_unbounded_spaces_have_no_iid_stream() -> None:
    class Idle(Unbounded):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            return np.zeros(4, dtype=np.float32), {}

        def step(self, action: Any) -> Any:
            return np.zeros(4, dtype=np.float32), 0.0, False, False, {}

    model = KBT(env=make_vec_env(Idle))
    with pytest.raises(ValueError, match="use the stream 'visited'"):
        model.learn(1, callback=KalmanAdapter(nowhere))
    model.learn(1, callback=KalmanAdapter(nowhere, "visited"))
    assert model.labels_used == 0


# ---------------------------------------------------------------------- environments of others


class Foreign(gym.Env):  # type: ignore[type-arg]
    """An environment whose attributes have names that ours have, and other meanings."""

    def __init__(self, discrete: bool, **attributes: Any) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), dtype=np.float32)
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)
        self.__dict__.update(attributes)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(3, dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(3, dtype=np.float32), 0.0, False, False, {}

    def set_dynamics(self, wind: float) -> None: ...


class Robot:
    """Parameters of somebody else's robot."""

    max_force = np.array([10.0, 20.0])


ATTRIBUTES: dict[str, tuple[Any, ...]] = {
    "forces": (np.zeros((2, 6)), (-1.0, 2.0), [0.5, np.nan], "contact", {"foot": 1.0}, 3.0, lambda: 0.0, None),
    "max_force": (np.ones(2), 5.0, -1.0, "strong", None, lambda: 1.0, [1.0]),
    "params": (np.ones(3), Robot(), {"mass": np.ones(2)}, (1.0, 2.0), 7, lambda: 0.0),
    "label_space": (
        3, spaces.Discrete(4), spaces.Box(0.0, 1.0, (5,)), spaces.Box(-np.inf, np.inf, (3,)), lambda: None
    ),
}  # fmt: skip


@LEARNERS
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_of_another_environment_are_not_taken_for_ours(make: Any, discrete: bool, name: str) -> None:
    def teacher(observations: Any) -> Any:
        return np.ones(len(observations), dtype=int) if discrete else np.zeros((len(observations), 2))

    for value in ATTRIBUTES[name]:
        teacher.__dict__[name] = value  # nor those of an expert
        env = Foreign(discrete, **{name: value})
        model = {kbt: KBT, warm_start: WarmStart}[make](env=env, seed=0)
        assert np.isnan(model.max_force)
        assert model.forces is None
        assert model.label_space == env.observation_space
        model.set_env(Foreign(discrete, **{name: 2.0}))
        model.set_env(DummyVecEnv([lambda: Foreign(discrete), lambda: env]))  # noqa: B023
        model.learn(4, callback=(KalmanAdapter if make is kbt else OnlineAdapter)(teacher))
        assert model.labels_used == 4


def test_an_attribute_that_a_worker_cannot_send_is_left_alone() -> None:
    env = SubprocVecEnv([functools.partial(unsendable)], start_method="spawn")
    try:
        model = KBT(env=env, seed=0)
        model.learn(2, callback=KalmanAdapter(lambda rows: np.zeros((len(rows), 2))))
        assert model.labels_used == 2
    finally:
        env.close()


def unsendable() -> Foreign:
    return Foreign(False, forces=lambda: 0.0, max_force=open(__file__), params=(row for row in ()))


def test_a_stated_label_box_is_that_of_any_environment() -> None:
    box = spaces.Box(-0.5, 0.25, (3,), dtype=np.float32)
    model = KBT(env=Foreign(False, label_space=box), seed=0)
    assert model.label_space == box
    np.testing.assert_allclose(model.policy.transformer.observation_scale, 0.5)


def test_an_observation_that_is_always_0_can_be_scaled() -> None:
    env = Foreign(False)
    env.observation_space = spaces.Box(np.float32([-2, 0, -1]), np.float32([2, 0, 3]))
    model = KBT(env=env, seed=0)
    assert model.policy.transformer.observation_scale.tolist() == [2.0, 1.0, 3.0]
    assert np.isfinite(model.predict(np.zeros(3, dtype=np.float32))[0]).all()
