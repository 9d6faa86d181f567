"""``adapt`` on real algorithms: the same actions before the first label, SB3's interface, the model left as it was."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from learners import curve, events
from sb3_contrib import ARS, QRDQN, TQC, TRPO, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize
from torch import nn

from kbt_rl import AdaptedPolicy, Fallback, HeadConfig, KalmanAdapter, Sample, Teacher, adapt
from kbt_rl.agents.adaptation import Adaptation
from kbt_rl.agents.bayesian import KBTInfo
from kbt_rl.callbacks import IidStream, ReopenOnDetection, VarianceGate, VisitedStream
from kbt_rl.networks.base import Call
from kbt_rl.networks.sb3 import SB3Network

PENDULUM, CARTPOLE = "Pendulum-v1", "CartPole-v1"
SQUASHED = {"use_sde": True, "policy_kwargs": {"squash_output": True}}


class Arms(gym.Env[Any, Any]):
    """Observations of one kind and actions of another; a step does nothing."""

    def __init__(self, observations: spaces.Space[Any], actions: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space, self.steps = observations, actions, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """A random observation."""
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Another one."""
        self.steps += 1
        return self.observation_space.sample(), 0.0, self.steps >= 20, False, {}

    def action_masks(self) -> np.ndarray:
        """The first action is never possible."""
        return np.arange(self.action_space.n) > 0  # type: ignore[attr-defined]


FLAT = spaces.Box(-1.0, 1.0, (3,))
DICT = spaces.Dict({"sensor": FLAT, "mode": spaces.Discrete(4)})
IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
TWO, THREE = spaces.Box(-1.0, 1.0, (2,)), spaces.Discrete(3)

ALGORITHMS: dict[str, Callable[[], Any]] = {
    "PPO": lambda: PPO("MlpPolicy", PENDULUM, seed=0),
    "PPO gSDE": lambda: PPO("MlpPolicy", PENDULUM, use_sde=True, seed=0),
    "PPO squashed": lambda: PPO("MlpPolicy", PENDULUM, seed=0, **SQUASHED),
    "PPO discrete": lambda: PPO("MlpPolicy", CARTPOLE, seed=0),
    "PPO dict": lambda: PPO("MultiInputPolicy", Arms(DICT, TWO), n_steps=64, seed=0),
    "PPO images": lambda: PPO("CnnPolicy", Arms(IMAGE, THREE), n_steps=64, seed=0),
    "PPO without hidden layers": lambda: PPO("MlpPolicy", PENDULUM, policy_kwargs={"net_arch": []}, seed=0),
    "PPO several actions": lambda: PPO("MlpPolicy", Arms(FLAT, spaces.MultiDiscrete([2, 3])), n_steps=64, seed=0),
    "PPO switches": lambda: PPO("MlpPolicy", Arms(FLAT, spaces.MultiBinary(3)), n_steps=64, seed=0),
    "A2C": lambda: A2C("MlpPolicy", CARTPOLE, seed=0),
    "SAC": lambda: SAC("MlpPolicy", PENDULUM, seed=0),
    "SAC gSDE": lambda: SAC("MlpPolicy", PENDULUM, use_sde=True, seed=0),
    "SAC gSDE, bounded hidden units": lambda: SAC(
        "MlpPolicy", PENDULUM, use_sde=True, seed=0, policy_kwargs={"activation_fn": nn.Hardtanh, "clip_mean": 0.0}
    ),
    "TD3": lambda: TD3("MlpPolicy", PENDULUM, seed=0),
    "DDPG": lambda: DDPG("MlpPolicy", PENDULUM, seed=0),
    "DQN": lambda: DQN("MlpPolicy", CARTPOLE, seed=0),
    "TQC": lambda: TQC("MlpPolicy", PENDULUM, seed=0),
    "TRPO": lambda: TRPO("MlpPolicy", PENDULUM, seed=0),
    "ARS": lambda: ARS("MlpPolicy", PENDULUM, seed=0),
    "ARS linear": lambda: ARS("LinearPolicy", CARTPOLE, seed=0),
    "QR-DQN": lambda: QRDQN("MlpPolicy", CARTPOLE, seed=0),
    "MaskablePPO": lambda: MaskablePPO("MlpPolicy", Arms(FLAT, THREE), n_steps=64, seed=0),
    "RecurrentPPO": lambda: RecurrentPPO("MlpLstmPolicy", PENDULUM, n_steps=64, seed=0),
}


def observations(model: Any, count: int = 5) -> Any:
    """Rows that the model's own environment could have shown."""
    space = model.env.observation_space
    space.seed(0)
    rows = [space.sample() for _ in range(count)]
    if isinstance(space, spaces.Dict):
        return {name: np.stack([row[name] for row in rows]) for name in space.spaces}
    rows = [np.clip(row, -3.0, 3.0).astype(row.dtype) if row.dtype.kind == "f" else row for row in rows]
    return np.stack(rows)


def unchanged(model: Any) -> bytes:
    return pickle.dumps({name: value.numpy() for name, value in model.policy.state_dict().items()})


def adapted(model: Any, **settings: Any) -> AdaptedPolicy:
    return adapt(model, states=observations(model, 40), **settings)


def other_than(actions: np.ndarray, space: spaces.Space[Any]) -> np.ndarray:
    """Labels that a policy does not follow yet."""
    if isinstance(space, spaces.Box):
        return np.where(actions > 0.0, -0.25, 0.25)
    sizes = {spaces.Discrete: "n", spaces.MultiDiscrete: "nvec"}.get(type(space))
    return (actions + 1) % (2 if sizes is None else getattr(space, sizes))  # type: ignore[no-any-return]


def stochastic(policy: Any, rows: Any) -> np.ndarray:
    torch.manual_seed(7)
    found: np.ndarray = policy.predict(rows, deterministic=False)[0]
    return found


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_acts_as_before_the_first_label_and_after_detach(name: str) -> None:
    model = ALGORITHMS[name]()
    rows, weights = observations(model), unchanged(model)
    expected, noisy = model.policy.predict(rows, deterministic=True)[0], stochastic(model.policy, rows)
    policy = adapted(model)
    np.testing.assert_allclose(policy.predict(rows, deterministic=True)[0], expected, rtol=0.0, atol=1e-6)
    context = policy.start(rows)
    np.testing.assert_allclose(policy.choose(context, context.features).actions, expected, rtol=0.0, atol=1e-6)
    np.testing.assert_allclose(stochastic(policy, rows), noisy, rtol=0.0, atol=1e-5)
    assert policy.detach() is model
    np.testing.assert_array_equal(model.policy.predict(rows, deterministic=True)[0], expected)
    assert unchanged(model) == weights
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.policy.modules())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_run_as_sb3_runs_it(name: str) -> None:
    model = ALGORITHMS[name]()
    network, rows = SB3Network(model.policy), observations(model)
    one = {name: value[0] for name, value in rows.items()} if isinstance(rows, dict) else rows[0]
    for given in (rows, one):
        expected = np.asarray(model.policy.predict(given, deterministic=True)[0])
        np.testing.assert_array_equal(network.run(Call(given))[0], expected, strict=True)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_learns_a_label_and_leaves_the_model_alone(name: str) -> None:
    model = ALGORITHMS[name]()
    rows, weights = observations(model, 1), unchanged(model)
    expected = model.policy.predict(rows, deterministic=True)[0]
    policy = adapted(model, history=100)
    before = policy.predict(rows, deterministic=True)[0]
    wanted = other_than(before, policy.action_space)
    deviation = policy.epistemic_std(None)
    for _ in range(20):
        policy.predict(rows, deterministic=True)
        policy.update(None, wanted)
    np.testing.assert_allclose(policy.predict(rows, deterministic=True)[0], wanted, rtol=0.0, atol=0.1)
    assert (policy.epistemic_std(None) < deviation).all()
    moments = policy.predict_moments(None)
    assert (np.diagonal(moments.epistemic, axis1=1, axis2=2) >= 0.0).all()
    np.testing.assert_array_equal(model.policy.predict(rows, deterministic=True)[0], expected)
    assert unchanged(model) == weights
    policy.rollback(policy.head.undoable)
    np.testing.assert_allclose(policy.predict(rows, deterministic=True)[0], before, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", ["PPO", "SAC", "DQN", "RecurrentPPO", "MaskablePPO"])
def test_a_policy_that_was_trained_again_acts_in_evaluation_mode(name: str) -> None:
    model = ALGORITHMS[name]()
    policy, rows = adapted(model), observations(model)
    for part in (model.policy, policy.network.module):
        part.train()
        policy.predict(rows, deterministic=True)
        assert not any(module.training for module in policy.network.module.modules())


def test_the_moments_of_an_action_are_its_mean_and_covariances() -> None:
    policy = adapted(ALGORITHMS["SAC"]())
    rows = observations(policy.model)
    moments = policy.predict_moments(rows)
    np.testing.assert_allclose(moments.mean, policy.predict(rows, deterministic=True)[0], atol=1e-5)
    assert moments.epistemic.shape == moments.aleatoric.shape == (5, 1, 1)


def test_one_observation_and_rows_of_them() -> None:
    policy = adapted(ALGORITHMS["PPO"]())
    rows = observations(policy.model)
    alone, state = policy.predict(rows[0], deterministic=True)
    assert alone.shape == (1,)
    assert state is None
    np.testing.assert_allclose(policy.predict(rows, deterministic=True)[0][0], alone, atol=1e-6)
    assert policy.update(rows[0], [0.5]).labels == 1
    assert policy.update(rows, [[0.5], [np.nan], [0.1], [0.2], [np.nan]]).labels == 3


@pytest.mark.parametrize("skip", ["hidden", "observation", "none"])
def test_skipped_layers_widen_what_the_head_sees(skip: Any) -> None:
    policy = adapted(ALGORITHMS["PPO"](), skip=skip)
    assert policy.head.in_features == {"hidden": 64 + 64 + 3, "observation": 64 + 3, "none": 64}[skip]


def test_a_head_of_ones_own_choice() -> None:
    policy = adapted(ALGORITHMS["PPO"](), head=HeadConfig(noise_variance=1e-2), history=1)
    rows = observations(policy.model)
    before = policy.predict(rows, deterministic=True)[0]
    policy.update(rows[:1], [0.7])
    assert abs(policy.predict(rows, deterministic=True)[0] - before).max() > 0.01
    assert policy.head.config.noise_variance == 1e-2  # type: ignore[union-attr]


def test_without_nominal_states_it_says_what_it_does() -> None:
    with pytest.warns(UserWarning, match="features keep the network's own units; pass states="):
        policy = adapt(ALGORITHMS["PPO"]())
    assert policy.update(observations(policy.model, 1), [[0.5]]).labels == 1


def test_nominal_states_are_collected_in_an_environment() -> None:
    policy = adapt(ALGORITHMS["PPO dict"](), states=Arms(DICT, TWO))
    assert float(policy.start_units.feature_scale.min()) > 0.0


def test_a_policy_of_stacked_frames_collects_its_states_in_the_vector_environment() -> None:
    envs = VecFrameStack(make_vec_env(PENDULUM, 2), 3)
    model = PPO("MlpPolicy", envs, n_steps=64, seed=0)
    policy = adapt(model, states=envs)
    rows = envs.reset()
    assert rows.shape == (2, 9)
    expected = model.predict(rows, deterministic=True)[0]
    np.testing.assert_allclose(policy.predict(rows, deterministic=True)[0], expected, atol=1e-6)
    policy.learn(envs, 40, KalmanAdapter(PPO("MlpPolicy", envs, n_steps=64, seed=1)))
    assert policy.head.labels_seen == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"states": np.zeros((5, 3), np.float32)}, "all states look the same"),
        ({"states": np.zeros((1, 3), np.float32)}, "at least 2 are needed"),
        ({"states": np.full((5, 3), np.nan, np.float32)}, "observation holds NaN or infinity"),
        ({"states": np.eye(3, dtype=np.float32), "skip": "all"}, "skip is 'all'"),
        ({"states": np.eye(3, dtype=np.float32), "head": HeadConfig(rule="laplace")}, "use rule='measure'"),
    ],
)
def test_what_cannot_be_adapted_is_said_before_anything_is_tapped(settings: dict[str, Any], message: str) -> None:
    model = ALGORITHMS["PPO"]()
    with pytest.raises(ValueError, match=message):
        adapt(model, **settings)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.policy.modules())


def test_update_without_a_prediction_and_after_detach() -> None:
    policy = adapted(ALGORITHMS["PPO"]())
    with pytest.raises(ValueError, match="there was no prediction yet"):
        policy.update(None, [0.0])
    policy.detach()
    with pytest.raises(RuntimeError, match="was detached"):
        policy.predict(observations(policy.model))


@pytest.mark.parametrize("name", ["PPO", "SAC", "DQN", "PPO dict"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_observations_that_are_not_finite_are_refused(name: str, value: float) -> None:
    policy = adapted(ALGORITHMS[name]())
    rows = observations(policy.model, 2)
    before = policy.predict(rows, deterministic=True)[0]
    bad = {**rows, "sensor": rows["sensor"] * value} if isinstance(rows, dict) else rows * value
    for call in (policy.predict, policy.predict_moments, lambda seen: policy.update(seen, before)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call(bad)
    np.testing.assert_array_equal(policy.predict(rows, deterministic=True)[0], before)


def test_a_recurrent_policy_is_taught_what_it_has_just_seen() -> None:
    policy = adapted(ALGORITHMS["RecurrentPPO"]())
    rows = observations(policy.model)
    _, state = policy.predict(rows, episode_start=np.ones(5, dtype=bool))
    assert state is not None
    actions, _ = policy.predict(rows, state, np.zeros(5, dtype=bool), deterministic=True)
    own, _ = policy.model.predict(rows, state, np.zeros(5, dtype=bool), deterministic=True)
    np.testing.assert_allclose(actions, own, atol=1e-6)
    with pytest.raises(ValueError, match="a recurrent policy sees more than an observation"):
        policy.update(rows, np.zeros((5, 1)))
    assert policy.update(rows, np.zeros((5, 1)), state=state, episode_start=np.zeros(5, dtype=bool)).labels == 5


def test_masks_are_of_maskable_policies_only() -> None:
    policy, plain = adapted(ALGORITHMS["MaskablePPO"]()), adapted(ALGORITHMS["PPO discrete"]())
    rows, masks = observations(policy.model), np.tile([False, True, False], (5, 1))
    assert (policy.predict(rows, deterministic=True, action_masks=masks)[0] == 1).all()
    with pytest.raises(TypeError, match="takes no action_masks; MaskablePPO does"):
        plain.predict(observations(plain.model), action_masks=masks)


def test_modules_are_adapted_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    rows = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    policy = adapt(net, states=rows)
    with torch.no_grad():
        expected = net(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(policy.predict(rows)[0], expected, atol=1e-6)
    policy.update(rows, expected + 0.5)
    np.testing.assert_allclose(policy.predict(rows)[0], expected + 0.5, atol=0.1)
    plain = adapt(net, states=rows, skip="none")
    plain.update(rows, expected - 0.5)
    with torch.no_grad():
        np.testing.assert_allclose(plain.bake()(torch.from_numpy(rows)).numpy(), plain.predict(rows)[0], atol=1e-5)
        np.testing.assert_array_equal(net(torch.from_numpy(rows)).numpy(), expected)
    with pytest.raises(
        TypeError, match=r"takes a model or policy of Stable-Baselines3 or a torch\.nn\.Module; got dict"
    ):
        adapt({})
    with pytest.raises(TypeError, match=r"got str; load it first, as in SAC\.load\('trained\.zip'\)"):
        adapt("trained.zip")


def test_a_module_behind_a_tanh_learns_from_actions_and_remembers_its_link(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2), nn.Tanh())
    rows = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    policy = adapt(net, states=rows, link="squashed")
    labels = np.full((50, 2), 0.8)
    policy.update(rows, labels)
    np.testing.assert_allclose(policy.predict(rows)[0], labels, atol=0.05)
    policy.save(tmp_path / "squashed")
    loaded = AdaptedPolicy.load(tmp_path / "squashed", net)
    assert loaded.network.link_name == "squashed"
    np.testing.assert_array_equal(loaded.predict(rows)[0], policy.predict(rows)[0])
    with pytest.raises(ValueError, match="an SB3 policy knows its own, so leave it at 'auto'"):
        adapt(ALGORITHMS["PPO"](), link="squashed")


# ---------------------------------------------------------------------- learn


TAGS = ("kalman/innovation", "kalman/predictive_variance", "kalman/nis", "kalman/coverage_95", "eval/mean_reward")


def teacher_of(model: Any) -> Any:
    return type(model)("MlpPolicy", PENDULUM, seed=5)


def test_learn_logs_what_the_posterior_knows(tmp_path: Path) -> None:
    policy = adapted(ALGORITHMS["PPO"]())
    watch = EvalCallback(make_vec_env(PENDULUM, 2), eval_freq=50, n_eval_episodes=2, verbose=0)
    found = policy.learn(PENDULUM, 200, [KalmanAdapter(teacher_of(policy.model)), watch], tensorboard_log=str(tmp_path))
    assert found is policy
    assert policy.head.labels_seen == 40  # every fifth step
    logged = {tag: list(curve(events(next(tmp_path.iterdir())), tag).values()) for tag in TAGS}
    assert all(logged.values())
    assert logged["kalman/innovation"][-1] < logged["kalman/innovation"][0]


def test_what_a_teacher_shows_is_the_output_of_its_last_layer() -> None:
    model = ALGORITHMS["SAC"]()
    policy, teacher = adapted(model), teacher_of(model)
    policy.learn(make_vec_env(PENDULUM, 4), 400, KalmanAdapter(teacher, "iid"), seed=3)
    assert policy.head.labels_seen == 400
    rows = observations(model, 50)
    start, end = model.predict(rows, deterministic=True)[0], policy.predict(rows, deterministic=True)[0]
    wanted = teacher.predict(rows, deterministic=True)[0]
    assert abs(end - wanted).mean() < 0.5 * abs(start - wanted).mean()


@pytest.mark.parametrize("name", ["DQN", "PPO discrete", "QR-DQN"])
def test_scores_of_a_teacher_teach_discrete_actions(name: str) -> None:
    model = ALGORITHMS[name]()
    teacher = type(model)("MlpPolicy", CARTPOLE, seed=5)
    policy = adapted(model)
    policy.learn(CARTPOLE, 500, KalmanAdapter(teacher, "visited"), seed=0)
    rows = 0.1 * observations(model, 200)
    wanted, start = (np.diff(Teacher(one).outputs(rows)) for one in (teacher, model))
    end = np.diff(policy.head.mean_outputs(policy.start(rows).features).numpy())
    assert abs(end - wanted).mean() < 0.1 * abs(start - wanted).mean()


def test_a_function_is_a_teacher_and_masks_come_from_the_environment() -> None:
    policy = adapted(ALGORITHMS["MaskablePPO"]())
    taken: list[int] = []

    class Watched(Arms):
        def step(self, action: Any) -> Any:
            taken.append(int(action))
            return super().step(action)

    policy.learn(Watched(FLAT, THREE), 300, KalmanAdapter(lambda rows: np.full(len(rows), 2)))
    assert set(taken) <= {1, 2}
    assert np.mean(np.array(taken[-50:]) == 2) > 0.9


def test_a_teacher_that_was_trained_in_vec_normalize_sees_what_it_knows() -> None:
    venv = VecNormalize(make_vec_env(PENDULUM, 2))
    model = PPO("MlpPolicy", venv, n_steps=64, seed=0).learn(128)
    rows = make_vec_env(PENDULUM, 5).reset()
    expected = model.predict(venv.normalize_obs(rows), deterministic=True)[0]
    np.testing.assert_allclose(Teacher(model)(rows), expected, atol=1e-6)
    policy = adapted(PPO("MlpPolicy", PENDULUM, seed=1))
    policy.learn(PENDULUM, 300, KalmanAdapter(model))
    assert abs(policy.predict(rows, deterministic=True)[0] - expected).mean() < 0.1


@pytest.mark.parametrize("learner", ["PPO", "SAC"])
def test_a_recurrent_teacher_follows_every_episode(learner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    teacher = ALGORITHMS["RecurrentPPO"]()
    seen: list[tuple[Any, Any]] = []
    asked: list[Any] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            seen.append((self.locals["new_obs"].copy(), self.locals["dones"].copy()))
            return True

    def update(self: Adaptation, sample: Any) -> Any:
        asked.append((len(seen), np.array(sample.target), sample.kind))
        return KBTInfo(labels=0, innovation=0.0)

    monkeypatch.setattr(Adaptation, "update", update)
    policy, envs = adapted(ALGORITHMS[learner]()), make_vec_env(PENDULUM, 2, wrapper_class=TimeLimit,
                                                                wrapper_kwargs={"max_episode_steps": 7})  # fmt: skip
    envs.seed(3)
    first = envs.reset()
    envs.seed(3)
    policy.learn(envs, 40, [Watch(), KalmanAdapter(teacher, VisitedStream(3))])
    state, begins, said = None, np.ones(2, dtype=bool), []
    for observations, ends in [(first, begins), *seen]:
        action, state = teacher.predict(observations, state, ends, deterministic=True)
        said.append(action)
    assert len(asked) == 6
    for step, target, kind in asked:
        assert kind == ("output" if learner == "PPO" else "action")
        np.testing.assert_allclose(target if kind == "action" else np.clip(target, -2.0, 2.0), said[step], atol=1e-5)
    assert any(ends.any() for _, ends in seen)
    with pytest.raises(TypeError, match=r"a recurrent teacher has to see every observation .*lets it"):
        Teacher(teacher)(first)
    with pytest.raises(ValueError, match="use the stream 'visited' with it"):
        policy.learn(envs, 4, KalmanAdapter(teacher, IidStream(spaces.Box(-1.0, 1.0, (3,)))))


def test_statistics_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    model = PPO("MlpPolicy", PENDULUM)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere\.pkl; VecNormalize\.save"):
        adapt(model, vec_normalize=tmp_path / "nowhere.pkl")
    (tmp_path / "text.pkl").write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"text\.pkl is not what VecNormalize\.save writes \(UnpicklingError"):
        adapt(model, vec_normalize=tmp_path / "text.pkl")


def test_a_policy_from_vec_normalize_takes_raw_observations(tmp_path: Path) -> None:
    venv = VecNormalize(make_vec_env(PENDULUM, 2))
    model = PPO("MlpPolicy", venv, n_steps=64, seed=0).learn(128)
    rows = make_vec_env(PENDULUM, 40).reset()
    expected = model.predict(venv.normalize_obs(rows), deterministic=True)[0]
    venv.save(str(tmp_path / "statistics.pkl"))
    alone = PPO.load(_saved(model, tmp_path))
    for policy in (adapt(model, states=rows), adapt(alone, states=rows, vec_normalize=tmp_path / "statistics.pkl")):
        np.testing.assert_allclose(policy.predict(rows, deterministic=True)[0], expected, atol=1e-6)
        with pytest.raises(ValueError, match="the environment normalises its observations"):
            policy.learn(venv, 10)
        policy.update(rows, np.ones((40, 1)))
        again = AdaptedPolicy.load(policy.save(tmp_path / "policy"), policy.model)
        np.testing.assert_array_equal(
            again.predict(rows, deterministic=True)[0], policy.predict(rows, deterministic=True)[0]
        )


@pytest.mark.filterwarnings("ignore:nothing was learned")
def test_queries_strategies_and_fallbacks_work_for_any_policy() -> None:
    policy, teacher = adapted(ALGORITHMS["SAC"]()), teacher_of(ALGORITHMS["SAC"]())
    adapter = KalmanAdapter(teacher, query=VarianceGate(0.05), budget=30, strategy=ReopenOnDetection())
    policy.learn(PENDULUM, 400, adapter)
    assert 0 < adapter.asked <= 30
    assert adapter.saved > 0
    rows = observations(policy.model)
    policy.set_fallback(Fallback(lambda seen: np.full((len(seen), 1), 0.125), limit=0.0))
    assert (policy.predict(rows)[0] == 0.125).all()
    assert (policy.predict(rows[0])[0] == 0.125).all()
    policy.learn(PENDULUM, 10)
    policy.set_fallback(None)
    assert (policy.predict(rows)[0] != 0.125).all()


def test_a_teacher_of_another_environment_is_refused() -> None:
    policy = adapted(ALGORITHMS["PPO"]())
    with pytest.raises(ValueError, match="it is an expert of another env"):
        policy.learn(PENDULUM, 10, KalmanAdapter(ALGORITHMS["A2C"]()))
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        policy.learn(CARTPOLE, 10)


def test_what_an_update_tells_is_in_action_units_also_of_a_label_in_part() -> None:
    box = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 0.5], np.float32))
    model = PPO("MlpPolicy", Arms(FLAT, box), n_steps=64, seed=0)
    policy, twin = adapted(model), adapted(model)
    rows = observations(model, 1)
    for label in ([0.3, 0.1], [0.3, np.nan], [np.nan, 0.2]):
        info = Adaptation(policy, Arms(FLAT, box)).update(Sample(policy.start(rows), np.array([label])))
        plain, known = twin.update(rows, [label]), ~np.isnan(label)
        assert info.degrees == plain.labels == known.sum()
        assert info.log_density == pytest.approx(plain.log_density - np.log([2.0, 0.25])[known].sum(), rel=1e-9)
        assert info.predictive_variance == pytest.approx(plain.predictive_variance * (4.0 + 0.0625) / 2.0, rel=1e-9)


def test_a_model_that_is_not_adapted_is_told_how() -> None:
    with pytest.raises(TypeError, match=r"adapt\(model\)\.learn\(env, steps, callback=\.\.\.\)"):
        ALGORITHMS["PPO"]().learn(10, callback=KalmanAdapter(lambda rows: rows))


# ---------------------------------------------------------------------- files


def _saved(model: Any, folder: Path) -> Path:
    model.save(folder / "model.zip")
    return folder / "model.zip"


@pytest.mark.parametrize("name", ["PPO", "PPO discrete", "TD3", "QR-DQN", "PPO dict", "RecurrentPPO"])
def test_a_saved_policy_goes_on_in_another_process(name: str, tmp_path: Path) -> None:
    policy = adapted(ALGORITHMS[name](), history=2)
    rows = observations(policy.model)
    starts = {"episode_start": np.ones(5, dtype=bool)} if policy.network.recurrent else {}
    discrete = isinstance(policy.action_space, spaces.Discrete)
    labels = np.arange(5) % 2 if discrete else np.full((5, *policy.action_space.shape), 0.3)  # type: ignore[misc]
    policy.update(rows, labels, **starts)
    path = policy.save(tmp_path / "adapted")
    model = type(policy.model).load(_saved(policy.model, tmp_path))
    again = AdaptedPolicy.load(path, model)
    expected = policy.predict(rows, deterministic=True, **starts)[0]
    np.testing.assert_array_equal(again.predict(rows, deterministic=True, **starts)[0], expected)
    np.testing.assert_array_equal(again.epistemic_std(None), policy.epistemic_std(None))
    for one in (policy, again):
        one.update(rows, labels, **starts)
    np.testing.assert_allclose(
        again.predict(rows, **starts, deterministic=True)[0],
        policy.predict(rows, **starts, deterministic=True)[0],
        atol=1e-6,
    )
    again.reset()
    np.testing.assert_allclose(
        again.predict(rows, deterministic=True, **starts)[0],
        model.policy.predict(rows, deterministic=True)[0],
        atol=1e-6,
    )


def test_a_head_of_ones_own_choice_is_saved(tmp_path: Path) -> None:
    policy = adapted(ALGORITHMS["PPO"](), head=HeadConfig(noise="learned"))
    rows = observations(policy.model)
    policy.update(rows, np.ones((5, 1)))
    again = AdaptedPolicy.load(policy.save(tmp_path / "adapted"), policy.model)
    np.testing.assert_array_equal(
        again.predict(rows, deterministic=True)[0], policy.predict(rows, deterministic=True)[0]
    )


def test_a_posterior_that_load_would_refuse_is_not_saved(tmp_path: Path) -> None:
    policy = adapted(ALGORITHMS["PPO"]())
    path = policy.save(tmp_path / "adapted")
    content = path.read_bytes()
    policy.head.misfit.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="misfit is not finite"):
        policy.save(path)
    assert path.read_bytes() == content


def test_another_model_a_damaged_file_and_a_missing_one_are_named(tmp_path: Path) -> None:
    policy = adapted(ALGORITHMS["PPO"]())
    path = policy.save(tmp_path / "adapted")
    other = PPO("MlpPolicy", PENDULUM, seed=8)
    with pytest.raises(ValueError, match="it was saved of another model than this PPO"):
        AdaptedPolicy.load(path, other)
    assert not any(part._forward_hooks for part in other.policy.modules())
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        AdaptedPolicy.load(path, policy.model)
    with pytest.raises(FileNotFoundError, match=r"AdaptedPolicy\.save writes one"):
        AdaptedPolicy.load(tmp_path / "nothing", policy.model)


@pytest.mark.parametrize("name", ["PPO", "SAC", "TD3", "DQN", "QR-DQN", "ARS linear"])
def test_a_baked_model_is_an_ordinary_one(name: str, tmp_path: Path) -> None:
    model = ALGORITHMS[name]()
    policy = adapted(model, skip="none")
    rows = observations(model)
    before = model.policy.predict(rows, deterministic=True)[0]
    discrete = isinstance(policy.action_space, spaces.Discrete)
    labels = 1 - before if discrete else np.full((5, 1), 0.3)
    if name == "ARS linear":  # no bias to put the posterior's into
        policy.update(rows, labels)
        with pytest.raises(ValueError, match="the last layer has no bias"):
            policy.bake()
        return
    for _ in range(5):
        policy.update(rows, labels)
    baked = type(model).load(_saved(policy.bake(), tmp_path))
    expected = policy.predict(rows, deterministic=True)[0]
    np.testing.assert_allclose(baked.policy.predict(rows, deterministic=True)[0], expected, atol=1e-5)
    assert not np.array_equal(before, expected)
    np.testing.assert_array_equal(model.policy.predict(rows, deterministic=True)[0], before)
    assert not any(part._forward_hooks for part in baked.policy.modules())


def test_a_head_that_sees_more_cannot_be_baked() -> None:
    with pytest.raises(ValueError, match="adapt with skip='none'"):
        adapted(ALGORITHMS["PPO"]()).bake()


def test_sb3_evaluates_and_checkpoints_it(tmp_path: Path) -> None:
    policy = adapted(ALGORITHMS["PPO"]())
    mean, _ = evaluate_policy(policy, make_vec_env(PENDULUM, 2, seed=1), 4)
    expected, _ = evaluate_policy(policy.model, make_vec_env(PENDULUM, 2, seed=1), 4)
    assert mean == pytest.approx(expected, rel=1e-3)
    teacher = teacher_of(policy.model)
    policy.learn(PENDULUM, 100, [KalmanAdapter(teacher), CheckpointCallback(50, str(tmp_path))])
    assert len(list(tmp_path.iterdir())) == 2
    again = AdaptedPolicy.load(tmp_path / "rl_model_100_steps.zip", policy.model)
    assert again.head.labels_seen == 20


def test_nothing_warns_on_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = adapted(ALGORITHMS["PPO"]())
        policy.learn(PENDULUM, 20, KalmanAdapter(teacher_of(policy.model)))
