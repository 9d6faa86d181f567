"""KBT: pre-training, single updates, rollouts and moving between environments."""

from __future__ import annotations

import functools
import signal
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from learners import (
    LABEL_HIGH,
    LONGER,
    NOMINAL,
    SHIFTED,
    TINY,
    Recorder,
    changed,
    expert,
    kbt,
    longer_kbt,
    pretrained,
    states,
    weights,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from wholeness.attacks import Stop, handled

from kbt_rl import KBT, DecisionTransformerConfig, KalmanAdapter, Sample
from kbt_rl.agents import behaviour_cloning as cloning
from kbt_rl.agents.behaviour_cloning import PretrainConfig, rollout_demonstrations
from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv


class Count:
    """Counts the encoder's forward passes."""

    def __init__(self, model: KBT) -> None:
        self.calls = 0
        model.policy.transformer.embed_state.register_forward_hook(self._note)

    def _note(self, *_: object) -> None:
        self.calls += 1


class Reach(gym.Env):  # type: ignore[type-arg]
    """A plant of two actions that states neither a force limit nor a label box."""

    observation_space = spaces.Box(-2.0, 2.0, (3,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        self.steps += 1
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 0.0, self.steps >= 7, False, {}


def reach_expert(observations: np.ndarray) -> np.ndarray:
    return observations @ np.array([[3.0, 0.0], [0.0, -2.0], [1.0, 1.0]])


# ---------------------------------------------------------------------- pre-training


def rms_error(model: KBT) -> float:
    """In newtons, against the nominal expert."""
    actions = model.policy.predict_moments(states(500, seed=9)).mean
    return 120.0 * float(np.sqrt(np.mean(np.square(actions - expert(NOMINAL).label(states(500, seed=9))))))


def test_pretraining_clones_the_expert_and_reports_newtons() -> None:
    info = pretrained().pretrain_info
    assert info is not None
    untrained = rms_error(KBT(env=gym.make(NOMINAL), seed=0))
    assert rms_error(pretrained()) < 0.3 * untrained
    assert info.validation_rmse_newton == pytest.approx(120.0 * info.validation_rmse)
    assert info.validation_rmse_newton == pytest.approx(rms_error(pretrained()), rel=0.3)
    assert info.samples == 900  # a tenth is held out
    labels = expert(NOMINAL).label(states(20_000, seed=3))
    assert info.label_rms == pytest.approx(float(np.sqrt(np.mean(labels**2))), rel=0.1)


def test_observations_are_scaled_by_the_label_box() -> None:
    np.testing.assert_allclose(pretrained().policy.transformer.observation_scale, LABEL_HIGH)


def test_pretraining_again_forgets_what_was_learned_online() -> None:
    model = kbt()
    model.update(Sample(states(4), expert().label(states(4))))
    assert model.labels_used == 4
    model.pretrain(expert(NOMINAL), PretrainConfig(samples=20, steps=1), progress_bar=False)
    head = weights(model)
    model.policy.reset_head()
    assert not changed(head, weights(model))
    assert model.labels_used == 0


def test_an_interrupted_pretraining_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learned online is about the features of the transformer that was there."""
    model = kbt()
    model.update(Sample(states(4), expert().label(states(4))))
    before = weights(model)
    trained = cloning.clone_behaviour

    def interrupted(*arguments: Any) -> Any:
        trained(*arguments)
        assert not torch.equal(arguments[0].linear.weight, model.policy.transformer.linear.weight)  # there was training
        raise KeyboardInterrupt

    monkeypatch.setattr(cloning, "clone_behaviour", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.pretrain(expert(NOMINAL), PretrainConfig(samples=20, steps=1), progress_bar=False)
    assert not changed(before, weights(model))
    assert model.labels_used == 4
    assert not model.policy.training


@pytest.mark.parametrize("way", ["pretrain", "start_from"])
def test_an_interrupt_at_its_end_finds_the_new_network_with_its_own_posterior(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = kbt(), kbt()
    model.update(Sample(states(4), expert().label(states(4))))
    other.pretrain(expert(NOMINAL), PretrainConfig(samples=20, steps=1), progress_bar=False)
    load = model.policy.load_state_dict

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return load(*arguments)

    monkeypatch.setattr(model.policy, "load_state_dict", interrupted)
    config = PretrainConfig(samples=20, steps=1)
    calls = {
        "pretrain": lambda: model.pretrain(expert(NOMINAL), config, progress_bar=False),
        "start_from": lambda: model.start_from(other),
    }
    with handled(signal.SIGINT), pytest.raises(Stop):
        calls[way]()
    monkeypatch.undo()
    after = weights(model)
    assert model.labels_used == 0
    model.policy.reset_head()
    assert not changed(after, weights(model))
    if way == "start_from":
        assert not changed(weights(other), after)


def test_normalised_observations_are_refused() -> None:
    """An expert knows states in their own units."""
    model, envs = kbt(), DummyVecEnv([lambda: gym.make(SHIFTED)])
    with pytest.raises(ValueError, match="norm_obs=False"):
        model.set_env(VecNormalize(envs))
    model.set_env(VecNormalize(envs, norm_obs=False))


def test_an_environment_without_units_has_no_error_in_newtons() -> None:
    model = KBT(env=Reach(), seed=0)
    info = model.pretrain(reach_expert, PretrainConfig(samples=400, steps=200), progress_bar=False)
    assert np.isnan(info.validation_rmse_newton)
    assert info.validation_rmse < 0.5 * info.label_rms
    info = model.update(Sample(np.zeros((2, 3)), np.ones((2, 2))))
    assert info.labels == 2


@pytest.mark.filterwarnings("ignore:nothing was learned")
@pytest.mark.parametrize("n_envs", [1, 2])
def test_longer_contexts_are_cloned_from_episodes(n_envs: int) -> None:
    model = longer_kbt(make_vec_env(NOMINAL, n_envs=n_envs))
    model.learn(5 * n_envs)
    info = model.pretrain(expert(NOMINAL), PretrainConfig(samples=600, steps=250, batch_size=64), progress_bar=False)
    assert info.validation_rmse < 0.7 * info.label_rms
    assert info.samples == 540
    model.learn(3 * n_envs, reset_num_timesteps=False)  # from a reset: the expert has moved the environment on
    # Between two calls of ``learn`` the context of a rollout stands beside SB3's ``_last_obs``.
    assert model._context is not None
    assert model._context.timesteps.tolist() == [3] * n_envs


def test_demonstrations_are_the_windows_of_the_experts_episodes() -> None:
    """Episodes of seven steps: windows, labels and returns-to-go against plain lists."""
    env, length = make_vec_env(Reach, n_envs=2, seed=0), 3
    seen: list[np.ndarray] = []

    def noted(observations: np.ndarray) -> np.ndarray:
        seen.append(observations.copy())
        return reach_expert(observations)

    data = rollout_demonstrations(noted, env, 40, length, lambda n: None)
    assert len(data) == 40
    path = np.stack(seen)
    for index in range(40):
        t, row = divmod(index, 2)
        age = t % 7
        assert data.context.timesteps[index] == age
        np.testing.assert_array_equal(data.target[index], reach_expert(path[t])[row])
        for back in range(length):
            past = path[t - back, row] if back <= age else np.zeros(3)
            np.testing.assert_array_equal(data.context.observations[index, -1 - back], past)
            action = np.clip(reach_expert(path[t - back])[row], -1, 1) if back <= age else np.zeros(2)
            np.testing.assert_allclose(data.context.actions[index, -1 - back], action, rtol=1e-6)


def test_returns_to_go_sum_the_rewards_to_the_end_of_the_episode() -> None:
    class Countdown(Reach):
        def step(self, action):  # type: ignore[no-untyped-def]
            observation, _, done, truncated, info = super().step(action)
            return observation, float(self.steps), done, truncated, info

    data = rollout_demonstrations(reach_expert, make_vec_env(Countdown, n_envs=1), 14, 2, lambda n: None)
    to_go = [sum(range(step, 8)) for step in range(1, 8)]
    expected = [[0.0 if i == 0 else to_go[i - 1], to_go[i]] for i in range(7)] * 2
    np.testing.assert_array_equal(data.returns, expected)


def test_target_return_is_cloned_on_episodes_and_conditions_the_action() -> None:
    config = DecisionTransformerConfig(target_return=10.0)
    model = KBT(env=make_vec_env(Reach, n_envs=1), policy_kwargs={"transformer": config}, seed=0)
    model.pretrain(reach_expert, PretrainConfig(samples=50, steps=5), progress_bar=False)
    assert model.policy.predict_moments(np.zeros(3)).mean.shape == (1, 2)


class Endless(Reach):
    """Episodes never end; in some rows of a vector env they do, if it is given a length."""

    def __init__(self, length: int | None = None) -> None:
        super().__init__()
        self.length = length

    def step(self, action):  # type: ignore[no-untyped-def]
        observation, reward, *_, info = super().step(action)
        ended = self.length is not None and self.steps >= self.length
        return observation, reward, ended, False, info


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloning, "_PATIENCE_AT_LEAST", 100)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("lengths", [[None], [None, None], [2_000, None, None]])
def test_an_environment_without_a_time_limit_is_cloned_from_what_there_is(lengths: list[int | None]) -> None:
    env = DummyVecEnv([functools.partial(Endless, length) for length in lengths])
    model = KBT(env=env, policy_kwargs={"transformer": LONGER}, seed=0)
    with pytest.warns(UserWarning, match=r"of the \d+ steps .* did not end are used as well.*TimeLimit"):
        info = model.pretrain(reach_expert, PretrainConfig(samples=400, steps=200), progress_bar=False)
    assert info.samples == 360
    assert np.isfinite(info.validation_rmse)
    steps = 0

    def counted(observations: np.ndarray) -> np.ndarray:
        nonlocal steps
        steps += len(observations)
        return reach_expert(observations)

    with pytest.warns(UserWarning, match="did not end"):
        data = rollout_demonstrations(counted, env, 30, 2, lambda n: None, needs_returns=False)
    assert len(data) == 30
    assert np.isfinite(data.returns).all()
    assert steps <= max(300, 100 * len(lengths))


@pytest.mark.usefixtures("impatient")
def test_returns_of_episodes_that_do_not_end_are_not_made_up() -> None:
    config = DecisionTransformerConfig(target_return=10.0)
    model = KBT(env=DummyVecEnv([Endless]), policy_kwargs={"transformer": config}, seed=0)
    before = weights(model)
    with pytest.raises(ValueError, match=r"0 are of episodes that ended.*TimeLimit"):
        model.pretrain(reach_expert, PretrainConfig(samples=20, steps=5), progress_bar=False)
    assert not changed(before, weights(model))


@pytest.mark.parametrize("bound", [1.0, 40.0, 1e30])
@pytest.mark.parametrize("rest", [0.0, 1e-12, 1e-42])
def test_an_action_that_the_expert_does_not_use_has_the_unit_of_its_range(bound: float, rest: float) -> None:
    """Or that of the others where it has no range; it is learned like any other when it is used one day."""

    class Second(Reach):
        action_space = spaces.Box(np.float32([-1, -bound]), np.float32([1, bound]), dtype=np.float32)

    def one_handed(observations: np.ndarray) -> np.ndarray:
        labels = reach_expert(observations)
        labels[:, 1] = rest
        return labels

    model = KBT(env=make_vec_env(Second, n_envs=1), seed=0)
    info = model.pretrain(one_handed, PretrainConfig(samples=400, steps=200), progress_bar=False)
    first, second = model.policy.transformer.action_scale.tolist()
    rms = reach_expert(np.random.default_rng(0).uniform(-2, 2, (4_000, 3)))[:, 0]
    assert first == pytest.approx(float(np.sqrt(np.mean(rms**2))), rel=0.1)
    unbounded = rest if rest == 1e-12 else first  # small labels may be meant where nothing says what is large
    assert second == pytest.approx(unbounded if bound == 1e30 else bound)
    assert info.validation_rmse < 0.2 * max(first, second)
    rows = np.random.default_rng(1).uniform(-1, 1, (60, 3)).astype(np.float32)
    model.update(Sample(rows, np.full((60, 2), 0.5 * second)))
    np.testing.assert_allclose(model.policy.predict_moments(rows).mean[:, 1], 0.5 * second, rtol=0.1)


# ---------------------------------------------------------------------- updates


@pytest.mark.parametrize("rows", [1, 3])
def test_update_is_the_heads_update_on_the_features(rows: int) -> None:
    model, other = kbt(), kbt()
    observations, labels = states(rows), expert().label(states(rows))
    info = model.update(Sample(observations, labels))
    features = other.policy.encode(other.policy.start(observations))
    expected = other.policy.head.update(features, torch.from_numpy(labels))
    assert not changed(weights(model), weights(other))
    unit = pretrained().pretrain_info.label_rms ** 2  # type: ignore[union-attr]
    assert info.labels == rows
    assert info.nis == expected.nis
    assert info.innovation == pytest.approx(expected.innovation * unit**0.5)
    assert info.predictive_variance == pytest.approx(expected.predictive_variance * unit)
    assert info.epistemic_variance == pytest.approx(expected.epistemic_variance * unit)


def test_the_contexts_of_predict_are_taken_as_they_are() -> None:
    model, plain = longer_kbt(), longer_kbt()
    state = None
    for step in states(5).reshape(5, 1, 4):
        _, state = model.predict(step, state, deterministic=True)
    model.update(Sample(state, np.ones((1, 1))))
    plain.policy.head.update(plain.policy.encode(state), torch.ones(1, 1))
    assert not changed(weights(model), weights(plain))
    plain.update(Sample(states(5)[-1], np.ones(1)))  # the same observation at an episode's start is something else
    assert changed(weights(model), weights(plain))


@pytest.mark.parametrize("features", [True, False])
def test_only_rows_with_a_label_that_are_not_masked_count(features: bool) -> None:
    model, other = kbt(), kbt()
    labels = expert().label(states(4))
    missing = labels.copy()
    missing[1] = np.nan
    context = model.policy.start(states(4))
    given = model.policy.encode(context) if features else None
    info = model.update(Sample(context, missing, np.array([True, True, False, True]), given))
    other.update(Sample(states(4)[[0, 3]], labels[[0, 3]]))
    assert info.labels == model.labels_used == 2
    # Encoding four rows instead of two rounds differently.
    torch.testing.assert_close(weights(model)["head.mean"], weights(other)["head.mean"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask", [None, np.array([True, True])])
@pytest.mark.parametrize("hidden", [False, True])
def test_no_label_changes_nothing(mask: np.ndarray | None, hidden: bool) -> None:
    model = kbt()
    before = weights(model)
    target = expert().label(states(2)) if hidden else np.full((2, 1), np.nan)
    info = model.update(Sample(states(2), target, np.zeros(2, dtype=bool) if hidden else mask))
    assert info.labels == model.labels_used == 0
    assert np.isnan(info.innovation)
    assert not changed(before, weights(model))


# ---------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("stream", ["iid", "visited"])
def test_every_environment_gives_a_label_a_step(n_envs: int, stream: str) -> None:
    model = kbt(n_envs=n_envs)
    model.learn(6 * n_envs, callback=KalmanAdapter(expert(), stream))
    assert model.num_timesteps == model.labels_used == int(model.policy.head.labels_seen) == 6 * n_envs


@pytest.mark.filterwarnings("ignore:nothing was learned")
@pytest.mark.parametrize("n_envs", [1, 3])
def test_rollouts_act_on_the_mean(n_envs: int) -> None:
    model = longer_kbt(make_vec_env(SHIFTED, n_envs=n_envs))
    recorder = Recorder("actions", "new_obs", "dones")
    model.env.seed(5)  # type: ignore[union-attr]
    model.learn(40 * n_envs, callback=recorder)
    env = make_vec_env(SHIFTED, n_envs=n_envs)
    env.seed(5)
    observation, state, starts = env.reset(), None, np.ones(n_envs, dtype=bool)
    for step in recorder.steps:
        actions, state = model.predict(observation, state, starts, deterministic=True)
        np.testing.assert_array_equal(step["actions"], actions)
        observation, _, starts, _ = env.step(actions)
        np.testing.assert_array_equal(step["new_obs"], observation)
    assert any(step["dones"].any() for step in recorder.steps) == (len(recorder.steps) > 400)


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(("stream", "per_label"), [("visited", 0), ("iid", 1)])
def test_the_encoder_runs_once_per_observation(n_envs: int, stream: str, per_label: int) -> None:
    model, steps = kbt(n_envs=n_envs, n_steps=4), 11
    count = Count(model)
    model.learn(steps * n_envs, callback=KalmanAdapter(expert(), stream))
    assert count.calls == steps + 1 + per_label * steps


@pytest.mark.filterwarnings("ignore:nothing was learned")
@pytest.mark.parametrize("transformer", [DecisionTransformerConfig(), LONGER])
def test_locals_hold_the_context_and_its_features(transformer: DecisionTransformerConfig) -> None:
    model = KBT(env=make_vec_env(Reach, n_envs=2), policy_kwargs={"transformer": transformer}, seed=0)
    recorder = Recorder("context", "features", "new_obs", "dones", "actions")
    model.learn(40, callback=recorder)
    ages = np.zeros(2, dtype=int)
    for step in recorder.steps:
        ages = np.where(step["dones"], 0, ages + 1)
        np.testing.assert_array_equal(step["context"].timesteps, ages)
        np.testing.assert_array_equal(step["context"].newest, step["new_obs"])
        np.testing.assert_array_equal(step["features"], model.policy.encode(step["context"]))
        if transformer.context_length > 1:
            last = np.where(step["dones"][:, None], 0.0, step["actions"])
            np.testing.assert_array_equal(step["context"].actions[:, -2], last)
    assert any(step["dones"].any() for step in recorder.steps)


@pytest.mark.filterwarnings("ignore:nothing was learned")
def test_learn_stops_at_the_number_of_steps_and_continues() -> None:
    model = kbt(n_steps=4)
    assert model.learn(6) is model
    assert model.num_timesteps == 6
    model.learn(5, reset_num_timesteps=False)
    assert model.num_timesteps == 11
    assert model._context is not None
    assert model._context.timesteps.tolist() == [11]  # the same episode goes on
    model.learn(2)
    assert model.num_timesteps == 2
    assert model._context.timesteps.tolist() == [2]


@pytest.mark.filterwarnings("ignore:nothing was learned")
def test_new_weights_between_two_calls_of_learn_are_used() -> None:
    model = kbt()
    model.learn(3)
    model.pretrain(expert(NOMINAL), PretrainConfig(samples=50, steps=20), progress_bar=False)
    recorder, context = Recorder("actions"), model._context
    model.learn(1, callback=recorder, reset_num_timesteps=False)
    assert context is not None
    expected = model.policy.clip(model.policy.act(model.policy.encode(context)))
    np.testing.assert_array_equal(recorder.steps[0]["actions"], expected)


@pytest.mark.parametrize("stream", ["iid", "visited"])
def test_equal_seeds_give_equal_bits(stream: str) -> None:
    results = []
    for seed in (3, 3, 4):
        model = KBT(env=gym.make(NOMINAL), seed=seed)
        model.pretrain(expert(NOMINAL), PretrainConfig(samples=50, steps=5), progress_bar=False)
        model.set_env(gym.make(SHIFTED))
        model.learn(15, callback=KalmanAdapter(expert(), stream))
        results.append((weights(model), model._last_obs))
    assert not changed(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])
    assert changed(results[0][0], results[2][0])


# ---------------------------------------------------------------------- environments


@pytest.mark.filterwarnings("ignore:nothing was learned")
@pytest.mark.parametrize("n_envs", [1, 2, 5])
def test_set_env_takes_any_number_of_environments_and_drops_the_context(n_envs: int) -> None:
    model = longer_kbt(make_vec_env(NOMINAL, n_envs=2))
    model.learn(8)
    before = weights(model)
    model.set_env(make_vec_env(SHIFTED, n_envs=n_envs))
    assert model.n_envs == n_envs
    assert not changed(before, weights(model))
    recorder = Recorder("context")
    model.learn(3 * n_envs, callback=[recorder, KalmanAdapter(expert())], reset_num_timesteps=False)
    assert recorder.steps[0]["context"].timesteps.tolist() == [1] * n_envs
    assert model.labels_used == 3 * n_envs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_vec_env(NOMINAL, n_envs=3, env_kwargs={"max_force": 60.0}), r"60\.0 N .* max_force=120\.0"),
        (lambda: InvertedPendulumSB3VecEnv(SHIFTED, 3, max_force=10.0), r"10\.0 N .* max_force=120\.0"),
        (lambda: make_vec_env(Reach, n_envs=3), "Observation spaces do not match"),
    ],
)
def test_an_environment_that_does_not_fit_changes_nothing(make, message: str) -> None:  # type: ignore[no-untyped-def]
    model = kbt()
    env, before = model.env, weights(model)
    with pytest.raises(ValueError, match=message):
        model.set_env(make())
    assert (model.env, model.n_envs, model.max_force) == (env, 1, 120.0)
    assert not changed(before, weights(model))
    model.learn(2, callback=KalmanAdapter(expert()))


def test_start_from_takes_the_network_and_forgets_the_rest() -> None:
    model, source = kbt(), KBT(env=gym.make(NOMINAL), seed=7)
    source.pretrain(expert(NOMINAL), TINY, progress_bar=False)
    model.update(Sample(states(3), expert().label(states(3))))
    model.start_from(source)
    assert not changed(weights(model), weights(source))
    assert model.labels_used == 0
    assert model.pretrain_info == source.pretrain_info


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (longer_kbt, "transformers differ"),
        (lambda: KBT(env=Reach()), "observation_space"),
        (lambda: KBT(env=gym.make(NOMINAL, max_force=60.0)), r"max_force=60\.0"),
    ],
)
def test_start_from_a_learner_that_does_not_fit_changes_nothing(make, message: str) -> None:  # type: ignore[no-untyped-def]
    model = kbt()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        model.start_from(make())
    assert not changed(before, weights(model))
    assert model.max_force == 120.0
