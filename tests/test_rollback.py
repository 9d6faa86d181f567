"""Taking updates back: a head that forgot its last labels is the head that never saw them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import STRUCTURES, randn, random_cov, random_state
from learners import NOMINAL, SHIFTED, changed, expert, kbt, states, weights
from torch import Tensor, nn

from kbt_rl import KBT, HeadConfig, KalmanAdapter, Sample
from kbt_rl.callbacks import Forgetting
from kbt_rl.inference.config import HeadConfig as Config
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.history import reverted
from kbt_rl.inference.update import increment

FEATURES = 3


def make_head(outputs: int = 1, history: int = 10, **config: Any) -> BayesianHead:
    layer = nn.Linear(FEATURES, outputs, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(outputs, FEATURES, seed=1))
        layer.bias.copy_(randn(outputs, seed=2))
    settings = {"hidden_variance": 1e-2, "noise_variance": 0.1, "history": history, **config}
    return BayesianHead.from_linear(layer, HeadConfig(**settings))


def labelled(head: BayesianHead, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    target = randn(rows, head.out_features, seed=seed + 1000)
    return randn(rows, FEATURES, seed=seed), torch.softmax(target, -1) if head.rule.link == "softmax" else target


def teach(head: BayesianHead, rows: list[int], first: int = 0) -> None:
    """One update for each number of rows, always the same ones."""
    for index, count in enumerate(rows, start=first):
        head.update(*labelled(head, count, seed=index))


def assert_same(head: BayesianHead, other: BayesianHead, tolerance: float = 1e-10) -> None:
    """Equal to ``tolerance``, covariances in units of the standard deviations that they belong to."""
    ours, theirs = head.state, other.state
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=tolerance, atol=tolerance)
    root = theirs.variances().sqrt()
    difference = (ours.dense_cov() - theirs.dense_cov()) / (root.unsqueeze(-1) * root)
    assert float(difference.abs().max()) < tolerance
    for name, buffer in head.named_buffers():
        if name != "mean" and not name.startswith("cov_"):
            torch.testing.assert_close(buffer, other.get_buffer(name), rtol=tolerance, atol=0.0)


LONG = [1, 2, 1, 1, 5, 40, 1]  # 40 rows are two increments of one update
CONFIGS: list[Any] = [
    *(pytest.param(1, {"structure": structure}, id=f"{structure}, one output") for structure in STRUCTURES),
    *(pytest.param(2, {"structure": structure}, id=f"{structure}, two outputs") for structure in STRUCTURES),
    pytest.param(2, {"layers": 1, "structure": "joint"}, id="one layer"),
    pytest.param(2, {"layers": 3, "width": 6, "structure": "neuron"}, id="three layers"),
    pytest.param(1, {"rule": "replace", "layers": 1, "structure": "neuron"}, id="replace"),
    *(pytest.param(3, {"rule": rule}, id=rule) for rule in ("fisher", "laplace", "taylor", "replace_softmax")),
    pytest.param(1, {"noise": "learned"}, id="learned noise"),
    pytest.param(2, {"noise": "learned", "noise_statistic": "variational"}, id="learned noise, two outputs"),
    pytest.param(1, {"robust_dof": 4.0}, id="robust"),
    pytest.param(2, {"robust_dof": 4.0, "noise": "learned"}, id="robust, learned noise, two outputs"),
    pytest.param(1, {"feature_variance": 0.01}, id="uncertain features"),
]


@pytest.mark.parametrize(("outputs", "config"), CONFIGS)
@pytest.mark.parametrize("undone", [1, 3, 7])
def test_a_rollback_is_the_head_that_never_saw_the_labels(outputs: int, config: dict[str, Any], undone: int) -> None:
    rows = [1] * 7 if config.get("rule") == "replace" else LONG  # joint rows make the printed rule's S singular
    head, never = make_head(outputs, **config), make_head(outputs, **config)
    teach(head, rows)
    teach(never, rows[: len(rows) - undone])
    assert head.rollback(undone) == sum(rows[len(rows) - undone :])
    assert int(head.labels_seen) == sum(rows[: len(rows) - undone])
    assert head.undoable == len(rows) - undone
    assert_same(head, never)
    features = labelled(head, 4, seed=50)[0]
    torch.testing.assert_close(head(features), never(features), rtol=1e-9, atol=1e-9)  # what acting caches follows
    teach(head, [1, 3], first=20)
    teach(never, [1, 3], first=20)
    assert_same(head, never, 1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_recorded_head_learns_what_a_plain_one_learns(structure: str) -> None:
    recorded, plain = make_head(history=2, structure=structure), make_head(history=0, structure=structure)
    for head in (recorded, plain):
        teach(head, [1] * 12)
    assert_same(recorded, plain, 1e-12)


def test_without_a_history_nothing_is_kept() -> None:
    head = make_head(history=0)
    teach(head, [1, 1])
    before = head.state_dict()["mean"].clone()
    assert head.undoable == 0
    with pytest.raises(ValueError, match=r"keeps no updates; make it with HeadConfig\(history="):
        head.rollback(1)
    assert torch.equal(head.mean, before)


def test_updates_can_be_taken_back_in_several_steps() -> None:
    head, never = make_head(history=4), make_head(history=4)
    teach(head, [1] * 9)
    teach(never, [1] * 6)
    assert head.undoable == 4
    assert head.rollback() == 1
    assert head.rollback(2) == 2
    assert_same(head, never)
    teach(head, [2], first=30)
    teach(never, [2], first=30)
    assert head.undoable == 2
    head.rollback(1)
    never.rollback(1)
    assert_same(head, never)


def test_an_applied_increment_can_be_taken_back() -> None:
    head, never = make_head(2, noise="learned"), make_head(2, noise="learned")
    teach(head, [1, 2])
    teach(never, [1, 2])
    head.apply_increment(head.increment(*labelled(head, 3, seed=40)))
    assert int(head.labels_seen) == 6
    assert head.rollback(1) == 3
    assert_same(head, never)


@pytest.mark.parametrize("n", [0, -1, 4])
def test_more_than_is_kept_is_refused_and_nothing_changes(n: int) -> None:
    head = make_head(history=3)
    teach(head, [1] * 5)
    before = copy.deepcopy(head.state_dict())
    with pytest.raises(ValueError, match=r"while 3 updates are kept.*holds the last 3"):
        head.rollback(n)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert head.rollback(3) == 3


@pytest.mark.parametrize("n", [1.0, True, "1", None])
def test_only_whole_numbers_are_undone(n: Any) -> None:
    head = make_head()
    teach(head, [1, 1])
    with pytest.raises(TypeError, match="a number of updates"):
        head.rollback(n)
    assert head.undoable == 2


@pytest.mark.parametrize("history", [-1, 1.5, True])
def test_a_history_has_a_length(history: Any) -> None:
    with pytest.raises(ValueError, match=r"history is .*; a number of updates to keep"):
        Config(history=history)


def by_hand(head: BayesianHead) -> None:
    with torch.no_grad():
        head.mean.add_(1.0)


def reset(head: BayesianHead) -> None:
    head.reset(torch.zeros(1, FEATURES), torch.zeros(1))


CHANGES: dict[str, Callable[[BayesianHead], object]] = {
    "reset": reset,
    "reopen": lambda head: head.reopen(0.5),
    "forget": lambda head: head.forget(0.9),
    "process noise": lambda head: head.add_process_noise(0.1),
    "noise": lambda head: head.set_noise(0.3),
    "loading": lambda head: head.load_state_dict(copy.deepcopy(head.state_dict())),
    "loading by assignment": lambda head: head.load_state_dict(copy.deepcopy(head.state_dict()), assign=True),
    "a hand on the mean": by_hand,
    "a hand on the covariance": lambda head: head.get_buffer("cov_0").mul_(0.5),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("again", [0, 2])
def test_the_history_starts_again_when_something_else_changes_the_posterior(kind: str, again: int) -> None:
    head = make_head()
    teach(head, [1, 1, 2])
    CHANGES[kind](head)
    teach(head, [1] * again, first=5)
    assert head.undoable == again
    before = head.mean.clone()
    with pytest.raises(ValueError, match=f"while {again} updates are kept"):
        head.rollback(again + 1)
    assert torch.equal(head.mean, before)


def test_reading_and_casting_do_not_touch_the_history() -> None:
    head = make_head()
    teach(head, [1, 1])
    head.predict(labelled(head, 3, seed=9)[0])
    head.view()
    head.float()
    head.to("cpu")
    head.state_dict()
    with pytest.raises(ValueError, match="NaN"):
        head.update(torch.full((1, FEATURES), torch.nan), torch.zeros(1, 1))
    assert head.undoable == 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))], ids=["copy", "pickle"]
)
def test_a_copy_starts_without_a_history(copied: Callable[[BayesianHead], BayesianHead]) -> None:
    head = make_head()
    teach(head, [1, 1])
    other = copied(head)
    assert (head.undoable, other.undoable) == (2, 0)
    before = head.mean.clone()
    teach(other, [1], first=7)
    assert other.rollback(1) == 1
    assert torch.equal(head.mean, before)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_increments_of_another_posterior_are_refused(structure: str) -> None:
    """Taken back from a posterior that is surer than the one they made, some variances would be negative."""
    head = make_head(structure=structure, rule="replace", noise_variance=50.0)
    rows, target = labelled(head, 1, seed=3)
    noise = torch.full((1, 1), 50.0, dtype=torch.float64)
    step = increment(head.state, rows, target, head.rule, noise)  # this rule grows the variance
    before = head.state.clone()
    with pytest.raises(UpdateError, match="no proper posterior"):
        reverted(head.state, [step])
    assert torch.equal(head.state.mean, before.mean)
    assert all(torch.equal(mine, other) for mine, other in zip(head.state.cov, before.cov, strict=True))


def test_a_posterior_that_is_not_finite_is_refused() -> None:
    state = random_state(2, outputs=1)
    step = increment(state, randn(1, 3, seed=5), randn(1, 1, seed=6), make_head().rule, random_cov(1, seed=7))
    with pytest.raises(UpdateError, match="no proper posterior"):
        reverted(state, [step._replace(mean_step=step.mean_step * torch.inf)])


# ---------------------------------------------------------------------- the learner


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
    assert_same(model.policy.head, never.policy.head)


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


def test_a_step_that_forgot_all_correlations_cannot_be_taken_back() -> None:
    head = make_head()
    step = increment(head.state, *labelled(head, 1, seed=7), head.rule, head.noise_cov)
    before = head.state.clone()
    reverted(head.state, [step])
    with pytest.raises(UpdateError, match=r"forgetting all correlations.*the posterior is unchanged"):
        reverted(head.state, [step._replace(correlation=0.0)])
    assert torch.equal(head.state.mean, before.mean)
    assert all(torch.equal(now, was) for now, was in zip(head.state.cov, before.cov, strict=True))
