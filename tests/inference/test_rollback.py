"""Taking updates back: a head that forgot its last labels is the head that never saw them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import STRUCTURES, linear, randn
from torch import Tensor
from wholeness.attacks import bits

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead

FEATURES = 3


def make_head(outputs: int = 1, history: int = 10, **config: Any) -> BayesianHead:
    layer = linear(FEATURES, outputs, seed=1)
    settings = {"layers": 2, "hidden_variance": 1e-2, "last_variance": 1.0, "noise_variance": 0.1, **config}
    basis = torch.linalg.qr(randn(FEATURES, FEATURES, seed=3)).Q if config.get("structure") == "rotated" else None
    return BayesianHead.from_linear(layer, HeadConfig(history=history, **settings), feature_basis=basis)


def labelled(head: BayesianHead, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    target = randn(rows, head.out_features, seed=seed + 1000)
    return randn(rows, FEATURES, seed=seed), torch.softmax(target, -1) if head.rule.link == "softmax" else target


def teach(head: BayesianHead, rows: list[int], first: int = 0) -> None:
    """One update for each number of rows, always the same ones."""
    for index, count in enumerate(rows, start=first):
        head.update(*labelled(head, count, seed=index))


def assert_same(head: BayesianHead, other: BayesianHead, tolerance: float = 1e-10) -> None:
    """Equal to ``tolerance``, covariances in units of the standard deviations that they belong to."""
    torch.testing.assert_close(head.mean, other.mean, rtol=tolerance, atol=tolerance)
    root = other.variances().sqrt()
    difference = (head.covariance() - other.covariance()) / (root.unsqueeze(-1) * root)
    assert float(difference.abs().max()) < tolerance
    for name, buffer in head.named_buffers():
        if name != "mean" and not name.startswith("cov_"):
            torch.testing.assert_close(buffer, other.get_buffer(name), rtol=tolerance, atol=0.0)


LONG = [1, 2, 1, 1, 5, 40, 1]  # 40 rows are two increments of one update
CONFIGS: list[Any] = [
    *(pytest.param(1, {"structure": structure}, id=f"{structure}, one output") for structure in STRUCTURES),
    *(pytest.param(2, {"structure": structure}, id=f"{structure}, two outputs") for structure in STRUCTURES),
    pytest.param(2, {"layers": 1, "structure": "joint"}, id="one layer"),
    pytest.param(2, {"layers": 1}, id="shared"),
    pytest.param(2, {"layers": 1, "noise": "learned"}, id="shared, learned noise"),
    pytest.param(2, {"layers": 1, "structure": "rotated"}, id="rotated"),
    pytest.param(3, {"layers": 1, "rule": "laplace"}, id="classes"),
    pytest.param(3, {"layers": 1, "rule": "laplace", "structure": "diagonal"}, id="classes, diagonal"),
    pytest.param(2, {"forgetting": "process_noise", "forgetting_rate": 1e-2}, id="process noise"),
    pytest.param(1, {"layers": 1, "forgetting": "towards_prior", "forgetting_rate": 1e-2}, id="towards the prior"),
    pytest.param(2, {"layers": 3, "width": 6, "structure": "neuron"}, id="three layers"),
    pytest.param(1, {"rule": "replace", "layers": 1, "structure": "neuron"}, id="replace"),
    *(pytest.param(3, {"rule": rule}, id=rule) for rule in ("fisher", "laplace", "taylor", "replace_softmax")),
    pytest.param(1, {"noise": "learned"}, id="learned noise"),
    pytest.param(2, {"noise": "learned", "noise_statistic": "variational"}, id="learned noise, two outputs"),
    pytest.param(1, {"robust_dof": 4.0}, id="robust"),
    pytest.param(2, {"robust_dof": 4.0, "noise": "learned"}, id="robust, learned noise, two outputs"),
    pytest.param(1, {"feature_variance": 0.01}, id="uncertain features"),
]


@pytest.mark.filterwarnings("ignore:the posterior runs away")  # the printed softmax rule does
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
    before = bits(head)
    with pytest.raises(ValueError, match=r"while 3 updates are kept.*holds the last 3"):
        head.rollback(n)
    assert bits(head) == before
    assert head.rollback(3) == 3


@pytest.mark.parametrize("n", [1.0, True, "1", None])
def test_only_whole_numbers_are_undone(n: Any) -> None:
    head = make_head()
    teach(head, [1, 1])
    with pytest.raises(TypeError, match="a number of updates"):
        head.rollback(n)
    assert head.undoable == 2


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
    head(labelled(head, 3, seed=9)[0])
    head.float()
    head.to("cpu")
    head.state_dict()
    with pytest.raises(ValueError, match="NaN"):
        head.update(torch.full((1, FEATURES), torch.nan), torch.zeros(1, 1))
    head.update(torch.zeros(1, FEATURES), torch.full((1, 1), torch.nan))  # without a label nothing happens
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


@pytest.mark.parametrize("noise", ["fixed", "learned"])
@pytest.mark.parametrize("undone", [1, 2, 3, 4])
def test_outputs_that_labels_told_apart_are_one_group_again(noise: str, undone: int) -> None:
    head, never = (make_head(4, layers=1, noise=noise) for _ in range(2))
    features, target = randn(5, FEATURES, seed=1), randn(5, 4, seed=2)
    target[1, 2], target[2, 0], target[3, :2] = torch.nan, torch.nan, torch.nan
    groups = []
    for row in range(5):
        head.update(features[row : row + 1], target[row : row + 1])
        groups.append(len(head.state.cov[0]))
        if row < 5 - undone:
            never.update(features[row : row + 1], target[row : row + 1])
    assert groups == [1, 2, 3, 4, 4]
    head.rollback(undone)
    assert len(head.state.cov[0]) == groups[4 - undone]
    assert_same(head, never)
    for subject in (head, never):
        subject.update(features[:1], target[:1] + 1.0)
    assert_same(head, never)


@pytest.mark.parametrize("structure", ["joint", "shared", "diagonal"])
def test_a_label_without_noise_is_taken_back(structure: str) -> None:
    """Nothing is left along what it has measured, so what was stored before is kept."""
    head = make_head(layers=1, structure=structure, noise_variance=0.0)
    teach(head, [1])
    before = {name: value.clone() for name, value in head.state_dict().items()}
    teach(head, [1], first=1)
    head.rollback()
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-15 if structure == "diagonal" else 0.0, atol=0.0)


@pytest.mark.parametrize("structure", ["joint", "neuron", "shared"])
@pytest.mark.parametrize("noise", [1e-8, 1e-14, 1e-18])
def test_all_but_exact_labels_are_taken_back(structure: str, noise: float) -> None:
    head, never = (make_head(2, layers=1, structure=structure, noise_variance=noise) for _ in range(2))
    features, weight = randn(6, FEATURES, seed=1), randn(FEATURES, 2, seed=2)
    head.update(features[:2], features[:2] @ weight)
    never.update(features[:2], features[:2] @ weight)
    for row in range(2, 5):
        head.update(features[row : row + 1], features[row : row + 1] @ weight)
    head.rollback(3)
    assert_same(head, never, 1e-12)


def test_a_loosening_that_the_configuration_asks_for_is_taken_back_too() -> None:
    """To the bit, as the covariance before it is kept."""
    head = make_head(2, layers=1, forgetting="towards_prior", forgetting_rate=0.1)
    teach(head, [1, 3])
    before = bits(head)
    teach(head, [2, 1], first=2)
    assert head.rollback(2) == 3
    assert bits(head) == before
