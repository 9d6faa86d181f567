"""A controller that acts where the posterior knows too little."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from gymnasium import spaces
from learners import LONGER, SHIFTED, Recorder, changed, expert, kbt, longer_kbt, policy, states, weights
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger

from kbt_rl import KBT, Fallback, KalmanAdapter, LQRExpert, Sample

Array = npt.NDArray[Any]
DISCRETE = "kbt_rl/ShiftedDiscreteInvertedPendulum-v0"


def act(model: KBT, observations: Array) -> Array:
    actions: Array = model.predict(observations, deterministic=True)[0]
    return actions


def deviation(model: KBT, observations: Array) -> Array:
    return model.policy.epistemic_std(model.policy.encode(model.policy.start(observations)))


def labelled_kbt(labels: int) -> KBT:
    model = kbt()
    if labels:
        model.update(Sample(states(labels), expert().label(states(labels))))
    return model


# ---------------------------------------------------------------------- who acts


def test_the_deviation_is_that_of_the_moments_in_action_units() -> None:
    subject = policy()
    subject.head.update(np.ones((1, subject.feature_size)), [[0.0, np.nan]])
    epistemic = subject.predict_moments(states(6)).epistemic
    features = subject.encode(subject.start(states(6)))
    np.testing.assert_allclose(
        subject.epistemic_std(features) ** 2, np.maximum(epistemic[:, 0, 0], epistemic[:, 1, 1]), rtol=1e-12
    )
    assert (epistemic[:, 0, 0] != epistemic[:, 1, 1]).any()  # the largest of two is more than the first


def test_at_limit_0_the_controller_acts_and_at_infinity_the_policy() -> None:
    model, alone = kbt(), kbt()
    model.set_fallback(Fallback(expert(), 0.0))
    np.testing.assert_array_equal(act(model, states(50)), expert().predict(states(50))[0])
    assert not np.array_equal(act(model, states(50)), act(alone, states(50)))
    model.set_fallback(Fallback(expert(), np.inf))
    np.testing.assert_array_equal(act(model, states(50)), act(alone, states(50)))
    model.set_fallback(Fallback(expert(), 0.0))
    model.set_fallback(None)
    np.testing.assert_array_equal(act(model, states(50)), act(alone, states(50)))


@pytest.mark.parametrize("deterministic", [True, False])
def test_each_row_is_decided_on_its_own(deterministic: bool) -> None:
    model, alone = kbt(), kbt()
    found = deviation(model, states(50))
    limit = float(np.median(found))
    model.set_fallback(Fallback(expert(), limit))
    actions = model.predict(states(50), deterministic=deterministic)[0]
    theirs = expert().predict(states(50))[0]
    over = found > limit
    assert over.sum() == 25
    np.testing.assert_array_equal(actions[over], theirs[over])
    assert (actions[~over] != theirs[~over]).any()
    if deterministic:
        np.testing.assert_array_equal(actions[~over], act(alone, states(50))[~over])
    for row in (int(np.argmax(found)), int(np.argmin(found))):  # one observation, as a robot's loop passes it
        single = model.predict(states(50)[row], deterministic=True)[0]
        wanted = theirs[row] if found[row] > limit else act(alone, states(50))[row]
        np.testing.assert_allclose(single, wanted, rtol=1e-5)


def test_a_deviation_that_is_no_number_is_over_any_limit() -> None:
    over = Fallback(expert(), np.inf).exceeded(np.array([1.0, np.nan, np.inf]))
    assert over.tolist() == [False, True, False]
    assert Fallback(expert(), 1.0).exceeded(np.array([1.0, 1.1])).tolist() == [False, True]
    assert Fallback(expert(), 0.0).exceeded(np.array([0.0])).tolist() == [True]


def test_the_controller_is_clipped_as_the_policy_is() -> None:
    model = kbt()
    model.set_fallback(Fallback(lambda observations: np.full((len(observations), 1), 7.0), 0.0))
    actions = act(model, states(3))
    np.testing.assert_array_equal(actions, np.ones((3, 1)))
    assert actions.dtype == np.float32


def test_the_context_remembers_the_action_that_was_taken() -> None:
    model = longer_kbt(gym.make(SHIFTED))
    model.set_fallback(Fallback(expert(), 0.0))
    actions, state = model.predict(states(4), deterministic=True)
    assert state is not None
    np.testing.assert_array_equal(state[1][:, -1], actions)
    _, state = model.predict(states(4, seed=1), state, np.zeros(4, dtype=bool), deterministic=True)
    assert state is not None
    np.testing.assert_array_equal(state[1][:, LONGER.context_length - 2], actions)


def test_discrete_actions() -> None:
    model = KBT(env=gym.make(DISCRETE), seed=0)
    discrete = LQRExpert.for_env(gym.make(DISCRETE))
    alone = act(model, states(50))
    model.set_fallback(Fallback(discrete, 0.0))
    np.testing.assert_array_equal(act(model, states(50)), discrete.predict(states(50))[0])
    assert (act(model, states(50)) != alone).any()
    by_number = Fallback(lambda observations: np.zeros(len(observations), dtype=np.int64), 0.0)
    model.set_fallback(by_number)
    assert not act(model, states(50)).any()
    features = model.policy.encode(model.policy.start(states(5)))
    logits = model.policy.head.predict_logits(features)
    np.testing.assert_allclose(
        model.policy.epistemic_std(features) ** 2, logits.cov.diagonal(dim1=-2, dim2=-1).amax(-1).numpy(), rtol=1e-12
    )


# ---------------------------------------------------------------------- rollouts


@pytest.mark.filterwarnings("ignore:nothing was learned")
def test_a_rollout_at_limit_0_is_the_controllers() -> None:
    model = kbt(n_envs=2)
    model.set_fallback(Fallback(expert(), 0.0))
    seen = Recorder("actions", "taken_over", "new_obs")
    model.learn(40, callback=seen)
    env = make_vec_env(SHIFTED, n_envs=2)
    env.seed(0)
    observations = env.reset()
    assert len(seen.steps) == 20
    for step in seen.steps:
        actions = expert().predict(observations)[0]  # type: ignore[arg-type]
        np.testing.assert_array_equal(step["actions"], actions)
        assert step["taken_over"].all()
        observations = env.step(actions)[0]
        np.testing.assert_array_equal(step["new_obs"], observations)


def test_the_share_is_logged_and_falls_as_labels_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model, written = kbt(n_envs=2, n_steps=5), []
    seen = Recorder("taken_over")
    model.set_fallback(Fallback(expert(), 0.06))
    before = Logger.dump

    def dump(logger: Logger, step: int = 0) -> None:
        written.append(logger.name_to_value["kalman/fallback_share"])
        before(logger, step)

    monkeypatch.setattr(Logger, "dump", dump)
    model.learn(60, callback=[seen, KalmanAdapter(expert())])
    shares = np.array([step["taken_over"].mean() for step in seen.steps]).reshape(-1, 5).mean(axis=1)
    np.testing.assert_allclose(written, shares)
    assert written[0] > 0.2
    assert written[-1] == 0.0


def test_without_a_fallback_nothing_is_logged() -> None:
    model = kbt()
    model.learn(6, callback=KalmanAdapter(expert()), log_interval=0)
    assert "kalman/innovation" in model.logger.name_to_value
    assert "kalman/fallback_share" not in model.logger.name_to_value


def falls_and_share(model: KBT, episodes: int = 6, steps: int = 250) -> tuple[float, float]:
    """Share of episodes that ended within ``steps``, and of actions that were the controller's, until then."""
    env = make_vec_env(SHIFTED, n_envs=episodes)
    env.seed(5)
    observations: Any = env.reset()
    fallen, taken, count, state = np.zeros(episodes, dtype=bool), 0, 0, None
    for _ in range(steps):
        actions, state = model.predict(observations, state, fallen, deterministic=True)
        controlled = (actions == expert().predict(observations)[0]).all(axis=1)
        taken, count = taken + int(controlled[~fallen].sum()), count + int((~fallen).sum())
        observations, _, dones, _ = env.step(actions)
        fallen |= dones
    return float(fallen.mean()), taken / count


def test_it_saves_a_policy_far_from_its_data_and_steps_back_as_labels_come() -> None:
    alone = falls_and_share(labelled_kbt(0))
    shares = []
    for labels in (0, 5, 20):
        model = labelled_kbt(labels)
        model.set_fallback(Fallback(expert(), 0.08))
        fell, share = falls_and_share(model)
        assert fell == 0.0
        shares.append(share)
    assert alone[0] > 0.5
    assert shares[0] > 0.9
    assert 0.0 < shares[1] < shares[0]
    assert shares[2] == 0.0


def test_evaluate_policy_acts_with_it() -> None:
    model = kbt()
    env = make_vec_env(SHIFTED, n_envs=2)
    env.seed(3)
    alone = evaluate_policy(model, env, n_eval_episodes=2)[0]
    model.set_fallback(Fallback(expert(), 0.0))
    env.seed(3)
    guarded = evaluate_policy(model, env, n_eval_episodes=2)[0]
    env.seed(3)
    assert guarded == evaluate_policy(expert(), env, n_eval_episodes=2)[0] != alone


# ---------------------------------------------------------------------- files, errors


@pytest.mark.parametrize("through", ["model", "policy"])
def test_a_file_has_no_controller_and_loading_says_so(through: str, tmp_path: Path) -> None:
    model = kbt()
    owner = model if through == "model" else model.policy
    owner.set_fallback(Fallback(lambda observations: np.zeros((len(observations), 1)), 0.1))  # cannot be pickled
    model.save(tmp_path / "guarded")
    with pytest.warns(UserWarning, match=r"fallback controller \(limit 0.1\).*acts alone until set_fallback"):
        loaded = KBT.load(tmp_path / "guarded")
    assert loaded.policy.fallback is None
    assert not changed(weights(model), weights(loaded))
    np.testing.assert_array_equal(act(loaded, states(9)), act(kbt(), states(9)))
    loaded.set_fallback(None)
    loaded.save(tmp_path / "alone")
    KBT.load(tmp_path / "alone")  # a warning would be an error here


def test_the_controller_is_no_part_of_the_policys_weights() -> None:
    model = kbt()
    names = set(weights(model))
    model.set_fallback(Fallback(expert(), 0.1))  # this controller is a torch module
    assert set(weights(model)) == names
    assert copy.deepcopy(model.policy).fallback is not None


@pytest.mark.parametrize("limit", [-0.1, float("nan"), -np.inf])
def test_a_limit_is_not_negative(limit: float) -> None:
    with pytest.raises(ValueError, match="a standard deviation is not negative"):
        Fallback(expert(), limit)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (expert(), TypeError, r"a fallback is a Fallback\(controller, limit\)"),
        (Fallback(3, 0.1), TypeError, "an expert is an SB3 policy or a function"),  # type: ignore[arg-type]
        (Fallback(policy(), 0.1), ValueError, "expert of another env"),
    ],
)
def test_a_wrong_controller_is_refused_and_the_old_one_stays(given: Any, error: type[Exception], message: str) -> None:
    model, old = kbt(), Fallback(expert(), 0.3)
    model.set_fallback(old)
    with pytest.raises(error, match=message):
        model.set_fallback(given)
    assert model.policy.fallback is old
    assert model.policy.fallback.limit == 0.3


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_controller_without_an_action_is_an_error(wrong: float) -> None:
    model = kbt()
    model.set_fallback(Fallback(lambda observations: np.full((len(observations), 1), wrong), 0.0))
    with pytest.raises(ValueError, match="one that acts must always have an action"):
        act(model, states(3))
    model.set_fallback(Fallback(lambda observations: np.full((len(observations), 1), wrong), np.inf))
    act(model, states(3))  # nobody asks it


def test_a_controller_that_answers_another_shape_is_an_error() -> None:
    model = kbt()
    assert isinstance(model.action_space, spaces.Box)
    model.set_fallback(Fallback(lambda observations: np.zeros((len(observations), 2)), 0.0))
    with pytest.raises(ValueError, match=r"answered 3 observations with shape \(3, 2\)"):
        act(model, states(3))
