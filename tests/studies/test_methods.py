"""Every method: starts as the pre-trained policy, learns or says why not, and is frozen as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.sample import Sample
from kbt_rl.inference.errors import UpdateError
from studies import printed
from studies.fleet import Fleet
from studies.frozen import SideBySide, frozen, go_side_by_side
from studies.methods import (
    DEFAULT,
    EKF,
    EVERY_LAYER,
    EXPERT,
    FLOOR,
    KINDS,
    ONE_LAYER,
    PRETRAINED,
    PRINTED,
    TUNED,
    TWO_LAYERS,
    build,
    kbt,
    two_layers,
    warm_start,
)
from studies.pendulum import LabelStream
from studies.printed import PrintedKBT
from studies.trial import Method

HOLD = Method("hold", "hold")
STREAM = LabelStream(tiny.setting().task, 1)
STATES = STREAM.states(12)
LABELS = STREAM.label(STATES)
LEARNERS = (DEFAULT, TWO_LAYERS, ONE_LAYER, EKF, EVERY_LAYER, PRINTED, warm_start(10))


def samples(count: int) -> list[Sample]:
    return [Sample(STATES[i : i + 1], LABELS[i : i + 1]) for i in range(count)]


def actions(policy: object) -> np.ndarray:
    return policy.predict(STATES, deterministic=True)[0]  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("method", [*LEARNERS, PRETRAINED, HOLD], ids=lambda method: method.name)
def test_every_learner_starts_as_the_pretrained_policy(method: Method) -> None:
    wanted = actions(tiny.setting().pretrained.policy)
    np.testing.assert_allclose(actions(build(method, tiny.setting()).policy), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", LEARNERS, ids=lambda method: method.name)
def test_every_learner_comes_closer_to_its_labels(method: Method) -> None:
    learner = build(method, tiny.setting())
    before = np.abs(actions(learner.policy) - LABELS).mean()
    for sample in samples(12):
        learner.update(sample)
    assert np.abs(actions(learner.policy) - LABELS).mean() < before


@pytest.mark.parametrize("method", [*LEARNERS, two_layers("neuron", structure="neuron")],
                         ids=lambda method: method.name)  # fmt: skip
def test_a_frozen_policy_acts_as_the_learner_did(method: Method) -> None:
    learner = build(method, tiny.setting())
    for sample in samples(9):
        learner.update(sample)
    wanted, kept = actions(learner.policy), frozen(learner.policy)
    for sample in samples(12):
        learner.update(sample)
    np.testing.assert_allclose(actions(kept), wanted, rtol=1e-6, atol=1e-7)
    assert np.abs(actions(learner.policy) - wanted).max() > 1e-4


def test_an_unknown_kind_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=f"'nothing'; there are {', '.join(KINDS)}"):
        build(Method("mine", "nothing"), tiny.setting())


def test_the_baselines_come_with_tuned_settings() -> None:
    assert warm_start(25).settings == {"memory": 25, "learning_rate": TUNED["learning_rate"]["25"]}
    assert PRINTED.settings == {"epsilon": TUNED["epsilon"]}
    assert max(TUNED["seeds"]["policies"] + TUNED["seeds"]["streams"]) < 100


def test_kbt_takes_any_head_any_policy_argument_and_is_told_the_noise() -> None:
    model = kbt(tiny.setting(), {"layers": 2, "structure": "neuron"}, told=10.0, sampling="predictive", skip="none")
    assert model.policy.head.config.structure == "neuron"
    assert model.policy.sampling == "predictive"
    assert model.policy.predict_moments(STATES).aleatoric[0, 0, 0] == pytest.approx(10.0 / 120.0**2)


def test_the_best_linear_head_is_at_least_as_good_as_one_that_learns() -> None:
    states = STREAM.states(2_000)
    labels = STREAM.label(states)
    learner = build(ONE_LAYER, tiny.setting())
    for index in range(100):
        learner.update(Sample(states[index : index + 1], labels[index : index + 1]))

    def error(policy: object) -> float:
        found = policy.predict(states, deterministic=True)[0]  # type: ignore[attr-defined]
        return float(np.sqrt(np.mean((found - labels) ** 2)))

    floor = build(FLOOR, tiny.setting()).policy
    assert error(floor) < 1.05 * error(learner.policy)
    assert error(build(EXPERT, tiny.setting()).policy) < error(floor)


def test_the_printed_update_says_when_it_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = build(PRINTED, tiny.setting())
    assert isinstance(learner, PrintedKBT)
    learner.update(samples(1)[0])
    before = learner.policy.weights
    broken = [torch.full_like(weight, torch.nan) for weight in before]
    monkeypatch.setattr(printed, "rts_update", lambda *_, **__: (broken, learner.policy.cov))
    with pytest.raises(UpdateError, match="broke after 1 labels"):
        learner.update(samples(1)[0])
    assert learner.policy.weights is before


def test_a_held_label_is_clipped_to_what_can_be_done() -> None:
    learner = build(HOLD, tiny.setting())
    learner.update(Sample(STATES[:1], np.array([[7.0]])))
    np.testing.assert_array_equal(actions(learner.policy), np.ones((12, 1)))


# ---------------------------------------------------------------------- fleets


@pytest.mark.parametrize(
    "method", [DEFAULT, ONE_LAYER, TWO_LAYERS, warm_start(2, 1e-2), HOLD], ids=lambda method: method.name
)
def test_each_learner_of_a_fleet_learns_from_its_own_labels_only(method: Method) -> None:
    fleet, alone = Fleet(method, tiny.setting(), 3), build(method, tiny.setting())
    for index in range(4):
        labels = np.full((3, 1), np.nan)
        labels[1] = LABELS[index]
        fleet.update(np.repeat(STATES[index : index + 1], 3, axis=0), labels)
        alone.update(samples(4)[index])
    found = fleet.predict(STATES[:3], None, np.ones(3, dtype=bool))[0]
    untouched = actions(tiny.setting().pretrained.policy)[:3]
    np.testing.assert_allclose(found[[0, 2]], untouched[[0, 2]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], actions(alone.policy)[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actions(fleet.alone(1)), actions(alone.policy), rtol=1e-4, atol=1e-5)


def test_a_policy_that_does_not_learn_is_asked_once_for_all() -> None:
    fleet = Fleet(EXPERT, tiny.setting(), 12)
    assert len(fleet.learners) == 1
    np.testing.assert_array_equal(fleet.predict(STATES)[0], actions(tiny.setting().task.expert()))
    fleet.update(STATES, LABELS)
    assert not fleet.is_uncertain


def test_the_uncertainty_of_a_fleet_is_that_of_its_learners() -> None:
    fleet, alone = Fleet(ONE_LAYER, tiny.setting(), 2), build(ONE_LAYER, tiny.setting())
    labels = np.array([LABELS[0], [np.nan]])
    fleet.update(STATES[:2], labels)
    alone.update(samples(1)[0])
    assert isinstance(alone, KBT)
    found = fleet.variances(np.stack([STATES[:5], STATES[:5]]))
    moments = alone.policy.predict_moments(STATES[:5])
    np.testing.assert_allclose(found[0], moments.epistemic[:, 0, 0] / moments.aleatoric[:, 0, 0], rtol=1e-6)
    assert (found[1] > found[0]).all()


@pytest.mark.parametrize(
    "method", [DEFAULT, TWO_LAYERS, ONE_LAYER, EVERY_LAYER, PRINTED, warm_start(10)], ids=lambda m: m.name
)
def test_snapshots_act_side_by_side_as_each_alone(method: Method) -> None:
    learner, snapshots = build(method, tiny.setting()), []
    for sample in samples(12):
        learner.update(sample)
        snapshots.append(frozen(learner.policy))
    snapshots = snapshots[1::5]
    assert len(snapshots) == 3
    assert go_side_by_side(snapshots)
    together = SideBySide(snapshots)
    states: list[Any] = [None, None, None]
    state, begins = None, np.zeros(12, dtype=bool)
    for observations in (STATES, STATES[::-1]):
        found, state = together.predict(observations, state, begins, deterministic=True)
        for index, rows in enumerate(np.split(np.arange(12), 3)):
            policy = snapshots[index]
            wanted, states[index] = policy.predict(observations[rows], states[index], begins[rows], deterministic=True)
            np.testing.assert_allclose(found[rows], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", LEARNERS, ids=lambda method: method.name)
def test_a_context_is_learned_from_as_the_state_is(method: Method) -> None:
    by_state, by_context = (build(method, tiny.setting()) for _ in range(2))
    for state, label, *_ in samples(12):
        by_state.update(Sample(state, label))
        by_context.update(Sample(by_context.policy.start(state), label))  # type: ignore[attr-defined]
    np.testing.assert_allclose(actions(by_context.policy), actions(by_state.policy), rtol=1e-6, atol=1e-7)


def test_policies_of_other_kinds_do_not_act_side_by_side() -> None:
    kinds = [build(method, tiny.setting()).policy for method in (DEFAULT, warm_start(10))]
    assert not go_side_by_side(kinds)
    assert not go_side_by_side([tiny.setting().task.expert()])
