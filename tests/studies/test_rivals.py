"""The rivals on real SB3 policies, and each closed form and each step against a second derivation."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO, SAC, TD3

from kbt_rl.agents.sample import Sample
from kbt_rl.agents.tapped_policy import Glimpse
from kbt_rl.networks.normaliser import Normaliser
from kbt_rl.networks.sb3 import SB3Network
from studies.rivals.base import Rival, Start, body
from studies.rivals.last_layer import LastLayer
from studies.rivals.registry import CANDIDATES, RIVALS

TWO, THREE = spaces.Box(-2.0, 2.0, (2,)), spaces.Discrete(3)
SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [16, 16]}, "seed": 0, "device": "cpu"}
STATES = np.random.default_rng(0).normal(1.0, 2.0, (200, 3)).astype(np.float32)
NORMALISER = Normaliser({"": np.ones(3)}, {"": np.full(3, 4.0)}, 10.0, 1e-8)
POLICIES = ("PPO", "PPO discrete", "SAC")
#: A setting of each rival that suits so small a policy.
SENSIBLE: dict[str, dict[str, Any]] = {
    "warm start": {"memory": 10, "learning_rate": 1e-3},
    "Adam": {"learning_rate": 3e-3},
    "replay": {"learning_rate": 3e-3, "replayed": 4},
    "RLS": {"forgetting": 0.999, "delta": 1.0},
    "soft reset": {"learning_rate": 0.05, "drift_rate": 0.1},
    "BGD": {"deviation": 0.02, "mean_rate": 100.0},
    "ADF": {"prior_variance": 1e-2, "noise_variance": 1e-2},
    "SWAG": {"learning_rate": 0.05},
    "dropout": {"learning_rate": 3e-3, "probability": 0.1},
    "Laplace": {"prior_variance": 1e-2, "noise_variance": 1e-2},
    "SGLD": {"learning_rate": 0.1, "temperature": 1e-6},
    "input tuning": {"learning_rate": 1e-2},
    "low-rank EKF": {"rank": 4, "noise_variance": 1e-2, "hidden_variance": 1e-3, "last_variance": 0.1},
}


class Nothing(gym.Env[Any, Any]):
    """Spaces alone."""

    observation_space: spaces.Space[Any] = spaces.Box(-np.inf, np.inf, (3,))

    def __init__(self, actions: spaces.Space[Any]) -> None:
        self.action_space = actions

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(3, np.float32), {}


@lru_cache
def trained(name: str) -> Any:
    small = copy.deepcopy(SMALL)  # SB3 writes into it
    if name == "SAC":
        return SAC("MlpPolicy", Nothing(TWO), buffer_size=10, **small).policy
    if name == "TD3":
        return TD3("MlpPolicy", Nothing(TWO), buffer_size=10, **small).policy
    policy = PPO("MlpPolicy", Nothing(THREE if name == "PPO discrete" else TWO), n_steps=64, **small).policy
    with torch.no_grad():
        policy.action_net.weight.mul_(
            200.0 if name == "PPO discrete" else 50.0
        )  # as large as that of a policy that was trained
    return policy


def start(name: str = "PPO") -> Start:
    return Start(copy.deepcopy(trained(name)), NORMALISER, STATES)


def make(rival: str, name: str = "PPO", **changes: Any) -> Any:
    return RIVALS[rival](start(name), **{**SENSIBLE[rival], **changes})


def samples(rival: Rival, count: int = 30) -> list[Sample]:
    """Outputs of a linear teacher, one state at a time."""
    size = rival.units.shape[1]
    weights = np.random.default_rng(1).normal(0.0, 0.7, (3, size))
    labels = NORMALISER(STATES[:count]) @ weights + 0.2
    return [Sample(STATES[i : i + 1], labels[i : i + 1], kind="output") for i in range(count)]


def error(rival: Rival, rows: list[Sample]) -> float:
    """Root mean square of what a label says is wrong, of all labels."""
    states, labels = (np.concatenate(parts) for parts in zip(*((row.context, row.target) for row in rows), strict=True))
    outputs = rival.outputs(rival.inputs(states))
    wanted = SB3Network(rival.policy.policy).link.label(labels, "output", outputs, rival.units.numpy()[0])
    return float(np.sqrt(np.mean((wanted - outputs) ** 2)))


def actions(rival: Rival) -> Any:
    return rival.policy.predict(STATES, deterministic=True)[0]


def known(rival: LastLayer, rows: list[Sample]) -> tuple[Any, Any, Any]:
    """Features with a one ``(n, d + 1)``, labels in units ``(n, o)`` and the layer in units ``(o, d + 1)``."""
    inputs = rival.inputs(np.concatenate([row.context for row in rows]))
    features = rival.hidden(inputs).double().numpy()
    labels = np.concatenate([row.target for row in rows]) / rival.units.numpy()
    return np.c_[features, np.ones(len(features))], labels, rival.mean.copy()


# ---------------------------------------------------------------------- what all promise


@pytest.mark.parametrize("name", [*POLICIES, "TD3"])
def test_the_body_ends_with_the_outputs_that_the_policy_acts_by(name: str) -> None:
    policy = start(name).policy
    rows = NORMALISER(STATES)
    outputs = body(policy)(torch.as_tensor(rows)).detach().double().numpy()
    wanted = policy.predict(rows, deterministic=True)[0]
    np.testing.assert_allclose(SB3Network(policy).link.decide(outputs), wanted, atol=1e-6)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rival", RIVALS)
def test_before_the_first_label_a_rival_acts_as_the_plain_policy(rival: str, name: str) -> None:
    wanted = trained(name).predict(NORMALISER(STATES), deterministic=True)[0]
    np.testing.assert_array_equal(actions(make(rival, name)), wanted)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rival", RIVALS)
def test_thirty_labels_of_a_linear_teacher_bring_the_error_down(rival: str, name: str) -> None:
    learner = make(rival, name)
    rows = samples(learner)
    before = error(learner, rows)
    for row in rows:
        learner.update(row)
    assert error(learner, rows) < 0.95 * before
    assert learner.failed == 0


@pytest.mark.parametrize("rival", RIVALS)
def test_a_label_of_nan_changes_nothing(rival: str) -> None:
    learner, other = make(rival), make(rival)
    for row in samples(learner, 12):
        learner.update(row)
        learner.update(row._replace(target=np.full((1, 2), np.nan)))
        other.update(row)
    np.testing.assert_array_equal(learner.vector(), other.vector())
    np.testing.assert_array_equal(actions(learner), actions(other))


@pytest.mark.parametrize("rival", RIVALS)
def test_an_output_without_a_label_is_no_error(rival: str) -> None:
    learner = make(rival)
    for row in samples(learner, 20):
        learner.update(row._replace(target=np.array([[row.target[0, 0], np.nan]])))
    assert learner.failed == 0
    assert np.isfinite(actions(learner)).all()


@pytest.mark.parametrize("rival", RIVALS)
def test_the_same_seed_gives_the_same_bits(rival: str) -> None:
    one, two = make(rival), make(rival)
    torch.manual_seed(1)
    for row in samples(one):
        one.update(row)
    torch.manual_seed(2)
    for row in samples(two):
        two.update(row)
    np.testing.assert_array_equal(one.vector(), two.vector())
    np.testing.assert_array_equal(actions(one), actions(two))


@pytest.mark.parametrize("rival", RIVALS)
def test_a_copy_of_the_policy_stays_as_it_was(rival: str) -> None:
    learner = make(rival)
    rows = samples(learner)
    for row in rows[:20]:
        learner.update(row)
    kept, wanted = copy.deepcopy(learner.policy), actions(learner)
    for row in rows:
        learner.update(row)
    np.testing.assert_array_equal(kept.predict(STATES, deterministic=True)[0], wanted)
    assert np.abs(actions(learner) - wanted).max() > 1e-5


@pytest.mark.parametrize("rival", RIVALS)
def test_a_rival_learns_from_a_glimpse_as_from_the_observation(rival: str) -> None:
    by_glimpse, by_state = make(rival), make(rival)
    for row in samples(by_state, 12):
        by_state.update(row)
        by_glimpse.update(row._replace(context=Glimpse(row.context, torch.zeros(1, 16), None)))
    np.testing.assert_array_equal(actions(by_glimpse), actions(by_state))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("rival", RIVALS)
def test_a_rival_learns_from_actions(rival: str, name: str) -> None:
    learner = make(rival, name)
    label = np.array([2]) if name == "PPO discrete" else np.array([[0.5, -2.0]])
    for row in STATES[:25]:
        learner.update(Sample(row[None], label))
    assert learner.failed == 0
    assert (actions(learner) != make(rival, name).policy.predict(STATES, deterministic=True)[0]).any()


def test_a_sample_of_two_observations_is_refused() -> None:
    with pytest.raises(ValueError, match="has 2 observations"):
        make("Adam").update(Sample(STATES[:2], np.zeros((2, 2))))


@pytest.mark.parametrize(
    ("rival", "changes"),
    [
        ("warm start", {"learning_rate": 1e12, "memory": 2}),
        *((rival, {"learning_rate": 1e12}) for rival in ("Adam", "replay", "soft reset", "SWAG", "dropout", "SGLD")),
        ("BGD", {"mean_rate": 1e30}),
        ("input tuning", {"learning_rate": 1e12}),
    ],
)
def test_an_update_that_diverges_is_taken_back_and_counted(rival: str, changes: dict[str, Any]) -> None:
    learner = make(rival, **changes)
    before = actions(learner)
    for row in samples(learner, 4):
        learner.update(row)
    assert learner.failed == 4 // changes.get("memory", 1)
    np.testing.assert_array_equal(actions(learner), before)


@pytest.mark.parametrize("rival", RIVALS)
def test_after_an_absurd_label_a_rival_learns_on(rival: str) -> None:
    learner = make(rival, **({"memory": 1} if rival == "warm start" else {}))
    before = actions(learner)
    rows = samples(learner, 12)
    learner.update(rows[0]._replace(target=np.full((1, 2), 1e30)))
    assert learner.failed == 1
    np.testing.assert_array_equal(actions(learner), before)
    for row in rows:
        learner.update(row)
    assert learner.failed == 1
    assert error(learner, rows) < error(make(rival), rows)


def test_each_rival_has_five_settings_to_tune_over() -> None:
    assert {methods[0].kind for methods in CANDIDATES.values()} == set(RIVALS)
    assert {len(methods) for methods in CANDIDATES.values()} == {5}
    names = [method.name for methods in CANDIDATES.values() for method in methods]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("method", [m for ms in CANDIDATES.values() for m in ms], ids=lambda method: method.name)
def test_each_setting_runs(method: Any) -> None:
    learner: Any = RIVALS[method.kind](start(), **method.settings)
    for row in samples(learner, 3):
        learner.update(row)
    assert np.isfinite(actions(learner)).all()


# ---------------------------------------------------------------------- each against a second derivation


@pytest.mark.parametrize(("name", "settings", "noise", "forgetting"), [
    ("RLS", {"forgetting": 1.0, "delta": 0.7}, 1.0, 1.0),
    ("RLS", {"forgetting": 0.9, "delta": 0.7}, 1.0, 0.9),
    ("Laplace", {"prior_variance": 0.7 * 0.05, "noise_variance": 0.05}, 0.05, 1.0),
])  # fmt: skip
def test_a_closed_form_is_ridge_regression_on_labels_weighed_by_their_age(
    name: str, settings: dict[str, float], noise: float, forgetting: float
) -> None:
    learner = make(name, **settings)
    rows = samples(learner)
    features, labels, layer = known(learner, rows)
    for row in rows:
        learner.update(row)
    weights = forgetting ** np.arange(29, -1, -1.0) / noise
    precision = (features.T * weights) @ features + forgetting**30 * np.eye(17) / (0.7 * noise)
    wanted = layer + np.linalg.solve(precision, (features.T * weights) @ (labels - features @ layer.T)).T
    np.testing.assert_allclose(learner.mean, wanted, atol=1e-4 if forgetting < 1.0 else 1e-5)
    np.testing.assert_allclose(np.linalg.inv(learner.spread[1]), precision, rtol=1e-6, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_laplace_has_the_posterior_of_laplace_torch() -> None:
    laplace = pytest.importorskip("laplace")
    learner = make("Laplace", prior_variance=0.3, noise_variance=0.05)
    rows = samples(learner)
    features, labels, _ = known(learner, rows)
    for row in rows:
        learner.update(row)
    layer = torch.nn.Linear(16, 1, dtype=torch.float64)  # its Hessian does not depend on the weights
    found = laplace.Laplace(
        layer, "regression", subset_of_weights="all", hessian_structure="full", sigma_noise=0.05**0.5,
        prior_precision=1 / 0.3,
    )  # fmt: skip
    batch = torch.utils.data.TensorDataset(torch.from_numpy(features[:, :-1]), torch.from_numpy(labels[:, :1]))
    found.fit(torch.utils.data.DataLoader(batch, batch_size=30))
    wanted = found.posterior_precision.detach().numpy()
    np.testing.assert_allclose(np.linalg.inv(learner.spread[0]), wanted, rtol=1e-4, atol=1e-4)


def test_assumed_density_filtering_is_the_kalman_filter_without_covariances() -> None:
    learner = make("ADF", prior_variance=0.3, noise_variance=0.05)
    rows = samples(learner)
    features, labels, mean = known(learner, rows)
    variance = np.full_like(mean, 0.3)
    for x, y, row in zip(features, labels, rows, strict=True):
        learner.update(row)
        for j in range(2):
            cov = np.diag(variance[j])
            gain = cov @ x / (x @ cov @ x + 0.05)
            mean[j] += gain * (y[j] - mean[j] @ x)
            variance[j] = np.diagonal(cov - np.outer(gain, x) @ cov)
    np.testing.assert_allclose(learner.mean, mean, atol=1e-5)
    np.testing.assert_allclose(learner.spread, variance, rtol=1e-5)


def test_warm_start_trains_by_adam_when_its_memory_is_full() -> None:
    learner, network = make("warm start", memory=3, learning_rate=1e-2, steps=4), body(start().policy)
    rows = samples(learner, 3)
    before = actions(learner)
    for row in rows[:2]:
        learner.update(row)
    np.testing.assert_array_equal(actions(learner), before)
    learner.update(rows[2])
    inputs = learner.inputs(np.concatenate([row.context for row in rows]))
    targets = torch.from_numpy(np.concatenate([row.target for row in rows])).float()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(4):
        optimiser.zero_grad()
        (0.5 * torch.nn.functional.mse_loss(network(inputs) / 2.0, targets / 2.0)).backward()
        optimiser.step()
    wanted = torch.nn.utils.parameters_to_vector(network.parameters())
    torch.testing.assert_close(learner.vector(), wanted.detach(), rtol=1e-4, atol=1e-6)


def at(learner: Rival, vector: torch.Tensor, row: Sample) -> torch.Tensor:
    """The loss of a label at weights that may need a gradient."""
    sizes = [weight.numel() for weight in learner.weights]
    names = [name for name, _ in learner.body.named_parameters()]
    parts = [part.view_as(weight) for part, weight in zip(vector.split(sizes), learner.weights, strict=True)]
    outputs = torch.func.functional_call(
        learner.body, dict(zip(names, parts, strict=True)), (learner.inputs(row.context),)
    )
    return learner.loss(outputs, torch.from_numpy(row.target).float())


def gradient_at(learner: Rival, vector: torch.Tensor, row: Sample) -> torch.Tensor:
    weights = vector.clone().requires_grad_()
    return torch.autograd.grad(at(learner, weights, row), weights)[0]


def test_the_loss_is_half_the_mean_squared_error_in_units() -> None:
    learner = make("Adam")
    targets = torch.tensor([[1.0, np.nan], [0.0, 4.0]])
    assert learner.units.tolist() == [[2.0, 2.0]]
    loss = learner.loss(torch.tensor([[0.0, 9.0], [1.0, 1.0]]), targets)
    assert float(loss) == pytest.approx(0.5 * (0.25 + 0.25 + 2.25) / 3)


def test_langevin_dynamics_is_half_a_gradient_step_and_noise() -> None:
    learner = make("SGLD", learning_rate=0.1, temperature=1e-3, seed=5)
    row, before = samples(learner)[0], learner.vector()
    noise = torch.randn(len(before), generator=torch.Generator().manual_seed(5))
    wanted = before - 0.05 * gradient_at(learner, before, row) + (0.1 * 1e-3) ** 0.5 * noise
    learner.update(row)
    torch.testing.assert_close(learner.vector(), wanted)


def test_bayesian_gradient_descent_is_the_printed_step() -> None:
    learner = make("BGD", deviation=0.05, mean_rate=2.0, samples=3, seed=5)
    row, mean = samples(learner)[0], learner.vector()
    generator = torch.Generator().manual_seed(5)
    noises = [torch.randn(len(mean), generator=generator) for _ in range(3)]
    gradients = [gradient_at(learner, mean + 0.05 * noise, row) for noise in noises]
    product = sum(g * noise for g, noise in zip(gradients, noises, strict=True)) / 3
    deviation = 0.05 * torch.sqrt(1 + (0.05 * product / 2) ** 2) - 0.05**2 * product / 2
    learner.update(row)
    torch.testing.assert_close(learner.vector(), mean - 2.0 * 0.05**2 * sum(gradients) / 3)
    torch.testing.assert_close(learner.deviation, deviation)


def test_the_drift_of_a_soft_reset_follows_the_predictive_likelihood() -> None:
    learner = make("soft reset", deviation=0.1, ratio=0.7, samples=3, seed=5, drift_rate=1e-2)
    first, second = samples(learner, 2)
    learner.update(first)
    weights, initial = learner.vector(), learner.initial
    generator = torch.Generator().set_state(learner._generator.get_state())
    drift = torch.ones(6, requires_grad=True)
    gamma = drift.repeat_interleave(torch.tensor([weight.numel() for weight in learner.weights]))
    mean = gamma * weights + (1 - gamma) * initial
    deviation = (gamma**2 * (0.7 * 0.1) ** 2 + (1 - gamma**2) * 0.1**2).sqrt()
    likelihoods = [
        torch.exp(-at(learner, mean + deviation * torch.randn(len(mean), generator=generator), second))
        for _ in range(3)
    ]
    (slopes,) = torch.autograd.grad(torch.log(sum(likelihoods) / 3), drift)  # type: ignore[arg-type]
    assert float(slopes.min()) < 0.0
    gamma = (1 + 1e-2 * slopes).clamp(0, 1).repeat_interleave(torch.tensor([w.numel() for w in learner.weights]))
    mean = gamma * weights + (1 - gamma) * initial
    rate = 0.05 * (gamma**2 * 0.7**2 + 1 - gamma**2) / 0.7**2
    wanted = mean - rate * gradient_at(learner, mean, second)
    learner.update(second)
    torch.testing.assert_close(learner.vector(), wanted)


def test_swag_acts_by_the_mean_of_the_iterates_of_sgd() -> None:
    learner = make("SWAG", learning_rate=0.1)
    iterates = [learner.vector()]
    for row in samples(learner, 5):
        iterates.append(iterates[-1] - 0.1 * gradient_at(learner, iterates[-1], row))
        learner.update(row)
        torch.testing.assert_close(learner.vector(), torch.stack(iterates).mean(0))


def test_dropout_leaves_the_weights_of_dropped_units_alone() -> None:
    learner, adam = make("dropout", probability=0.5, seed=5), make("Adam")
    row = samples(learner)[0]
    before = learner.last.weight.detach().clone()
    learner.update(row)
    kept = torch.rand(1, 16, generator=torch.Generator().manual_seed(5)) >= 0.5
    assert (learner.last.weight != before).any(0).tolist() == kept[0].tolist()
    none = make("dropout", probability=0.0)
    for each in (none, adam):
        each.update(row)
    np.testing.assert_array_equal(none.vector(), adam.vector())


@pytest.mark.parametrize("head", ["bias", "layer"])
def test_input_tuning_leaves_the_hidden_layers_alone(head: str) -> None:
    learner = make("input tuning", head=head)
    before = {name: value.clone() for name, value in learner.policy.policy.state_dict().items()}
    for row in samples(learner, 3):
        learner.update(row)
    after = learner.policy.policy.state_dict()
    changed = {name for name, value in after.items() if (value != before[name]).any()}
    assert changed == {"action_net.bias", *(["action_net.weight"] if head == "layer" else [])}
    rows = torch.from_numpy(NORMALISER(STATES)) @ learner.transform.weight.mT + learner.transform.bias
    wanted = learner.policy.policy.predict(rows.detach().numpy(), deterministic=True)[0]
    np.testing.assert_allclose(actions(learner), wanted, atol=1e-5)


def test_the_low_rank_filter_acts_by_the_mean_of_its_head() -> None:
    learner = make("low-rank EKF")
    for row in samples(learner, 5):
        learner.update(row)
    inputs = learner.inputs(STATES)
    np.testing.assert_allclose(learner.outputs(inputs), learner.head.mean_outputs(inputs).numpy(), atol=1e-6)


def test_the_last_layer_may_learn_alone() -> None:
    learner = make("Adam", layers="last")
    before = [part.clone() for part in learner.hidden.parameters()]
    for row in samples(learner, 3):
        learner.update(row)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.hidden.parameters(), strict=True))
    assert len(learner.vector()) == 34


def test_replay_draws_earlier_labels() -> None:
    learner, alone = make("replay"), make("Adam")
    first, second = samples(learner, 2)
    for each in (learner, alone):
        each.update(first)
    np.testing.assert_array_equal(learner.vector(), alone.vector())
    batch = torch.cat([learner.inputs(row.context) for row in (second, *[first] * 4)])
    targets = torch.from_numpy(np.concatenate([second.target, *[first.target] * 4])).float()
    alone.descend(alone.loss(alone.body(batch), targets))
    learner.update(second)
    np.testing.assert_array_equal(learner.vector(), alone.vector())
