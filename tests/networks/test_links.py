"""What outputs stand for: a label of an action is the output that decides for it, or nothing where bounds hide it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from kbt_rl.networks.links import SCORE_MARGIN, ActionLink, Clipped, LabelKind, Scores, Squashed, Switches, link_for

BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
TWO = spaces.Discrete(2)


def label(link: ActionLink, value: Any, outputs: Any, kind: LabelKind = "action", units: Any = None) -> np.ndarray:
    return link.label(
        value, kind, np.atleast_2d(outputs).astype(float), np.ones(link.outputs) if units is None else units
    )


def test_clipped_outputs_are_the_action() -> None:
    link = Clipped(BOX)
    np.testing.assert_array_equal(link.decide(np.array([[0.5, 0.25], [9.0, -9.0]])), [[0.5, 0.25], [2.0, 0.0]])
    np.testing.assert_array_equal(label(link, [0.5, 0.25], [[9.0, 9.0]]), [[0.5, 0.25]])


def test_a_label_at_a_bound_says_nothing_where_the_output_is_beyond_it() -> None:
    link = Clipped(BOX)
    np.testing.assert_array_equal(label(link, [2.0, 0.0], [[2.5, 0.5]]), [[np.nan, 0.0]])
    np.testing.assert_array_equal(label(link, [2.0, 0.0], [[1.5, -0.5]]), [[2.0, np.nan]])
    np.testing.assert_array_equal(label(link, [3.0, 0.5], [[2.5, 0.5]]), [[3.0, 0.5]])  # a teacher without bounds


def test_units_of_clipped_outputs_come_from_the_range_or_from_nominal_outputs() -> None:
    half_open = spaces.Box(np.array([-2.0, -np.inf], np.float32), np.array([2.0, np.inf], np.float32))
    np.testing.assert_allclose(Clipped(half_open).units(np.array([[0.0, 0.0], [0.0, 6.0]])), [2.0, 3.0])
    np.testing.assert_allclose(Clipped(half_open).units(None), [2.0, 1.0])
    np.testing.assert_allclose(Clipped(half_open).units(np.zeros((5, 2))), [2.0, 1.0])  # a constant output has no scale


@given(st.lists(st.floats(-2.6, 2.6), min_size=2, max_size=2))
def test_a_squashed_action_is_the_label_of_the_output_that_decides_it(outputs: list[float]) -> None:
    link = Squashed(BOX)
    action = link.decide(np.array([outputs]))
    np.testing.assert_allclose(label(link, action, [[0.0, 0.0]]), [outputs], atol=2e-4, rtol=1e-4)


def test_a_squashed_label_near_its_bound_says_only_that_the_output_is_large() -> None:
    link = Squashed(BOX)
    edge = np.arctanh(0.99)
    np.testing.assert_allclose(label(link, [2.0, 0.0], [[0.0, 0.0]]), [[edge, -edge]])
    np.testing.assert_array_equal(label(link, [2.0, 0.0], [[3.0, -3.0]]), [[np.nan, np.nan]])
    np.testing.assert_allclose(label(link, [2.0, 0.0], [[-3.0, 3.0]]), [[edge, -edge]])


def test_a_limit_before_the_tanh_is_kept() -> None:
    np.testing.assert_allclose(
        Squashed(BOX, limit=2.0).decide(np.array([[5.0, -5.0]])), Squashed(BOX).decide(np.array([[2.0, -2.0]]))
    )


def test_moments_of_squashed_actions_are_those_of_samples() -> None:
    link, mean, cov = Squashed(BOX), np.array([[0.4, -0.8]]), 1e-4 * np.array([[[2.0, 0.5], [0.5, 1.0]]])
    drawn = np.random.default_rng(0).multivariate_normal(mean[0], cov[0], size=200_000)
    actions = link.decide(drawn).astype(float)
    found_mean, found_cov, _ = link.moments(mean, cov, cov)
    sampled = np.cov(actions.T)
    np.testing.assert_allclose(found_mean[0], actions.mean(0), atol=2e-4)
    np.testing.assert_allclose(found_cov[0], sampled, atol=6.0 * sampled.max() * np.sqrt(2.0 / len(drawn)))


def test_the_largest_score_decides_and_masks_forbid() -> None:
    link = Scores(spaces.Discrete(3, start=5))
    np.testing.assert_array_equal(link.decide(np.array([[0.0, 2.0, 1.0]])), [6])
    np.testing.assert_array_equal(link.decide(np.array([[0.0, 2.0, 1.0]]), np.array([[True, False, True]])), [7])


def test_a_label_of_an_action_lets_its_score_pass_the_largest_by_the_margin() -> None:
    link, units = Scores(spaces.Discrete(3)), np.full(3, 2.0)
    found = label(link, [2], [[0.0, 4.0, 1.0]], units=units)
    assert np.isnan(found[0, 0])
    assert found[0, 2] - found[0, 1] == pytest.approx(SCORE_MARGIN * 2.0)
    assert found[0, 2] + found[0, 1] == pytest.approx(5.0)  # both move as far
    np.testing.assert_array_equal(label(link, [1], [[0.0, 4.0, 1.0]], units=units), np.full((1, 3), np.nan))
    np.testing.assert_array_equal(label(link, [np.nan], [[0.0, 4.0, 1.0]], units=units), np.full((1, 3), np.nan))


def test_what_all_scores_have_in_common_is_not_learned() -> None:
    link, outputs = Scores(spaces.Discrete(2)), np.array([[1.0, 3.0]])
    np.testing.assert_allclose(label(link, [[100.0, 104.0]], outputs, "output"), [[0.0, 4.0]])
    found = label(link, [[0.25, 0.75]], outputs, "probabilities")
    assert found[0, 1] - found[0, 0] == pytest.approx(np.log(3.0))
    assert found.mean() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("link", "value", "kind", "message"),
    [
        (Clipped(BOX), [[1.0, 2.0, 3.0]], "action", r"shape \(1, 3\); expected \(1, 2\) or \(2,\)"),
        (Clipped(BOX), [[1.0, np.inf]], "action", "infinite"),
        (Squashed(BOX), [[1.0, np.inf]], "action", "infinite"),
        (Scores(spaces.Discrete(2)), [[0.5, -np.inf]], "output", "infinite"),
        (Clipped(BOX), [[1.0, 1j]], "action", "expected real numbers"),
        (Clipped(BOX), [[0.5, 0.5]], "probabilities", "labels of this policy are 'action' or 'output'"),
        (Scores(spaces.Discrete(2)), [2], "action", "whole numbers 0 to 1"),
        (Scores(spaces.Discrete(2)), [0.5], "action", "whole numbers 0 to 1"),
        (Scores(spaces.Discrete(2)), [[0.5, 0.6]], "probabilities", "no distribution over 2 actions"),
    ],
)
def test_what_is_no_label_is_refused(link: ActionLink, value: Any, kind: LabelKind, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        link.label(value, kind, np.zeros((1, link.outputs)), np.ones(link.outputs))


def test_actions_without_a_link_are_refused() -> None:
    with pytest.raises(ValueError, match="serves all that SB3 does"):
        link_for(spaces.Dict({"a": TWO}), squashed=False)


def test_entries_of_multi_discrete_actions_have_scores_of_their_own() -> None:
    link = Scores(spaces.MultiDiscrete([2, 3], start=[0, 5]))
    outputs = np.array([[0.0, 1.0, 3.0, 2.0, 1.0]])
    np.testing.assert_array_equal(link.decide(outputs), [[1, 5]])
    np.testing.assert_array_equal(link.decide(outputs, np.array([[1, 0, 0, 1, 1]])), [[0, 6]])
    found = label(link, [[1, 6]], outputs)
    np.testing.assert_array_equal(np.isnan(found), [[True, True, False, False, True]])
    assert found[0, 3] - found[0, 2] == pytest.approx(SCORE_MARGIN)
    found = label(link, [[0.5, 0.5, 0.2, 0.2, 0.6]], outputs, "probabilities")
    assert found[0, 0] == pytest.approx(found[0, 1]) == pytest.approx(0.5)
    assert found[0, 4] - found[0, 2] == pytest.approx(np.log(3.0))
    assert found[0, 2:].mean() == pytest.approx(2.0)


def test_switches_are_on_where_their_output_is_positive() -> None:
    link = Switches(spaces.MultiBinary(3))
    outputs = np.array([[0.5, -2.0, 0.5]])
    np.testing.assert_array_equal(link.decide(outputs), [[1, 0, 1]])
    np.testing.assert_array_equal(label(link, [1, 0, 0], outputs), [[1.0, np.nan, -1.0]])
    np.testing.assert_array_equal(label(link, [[np.nan, 1, 1]], outputs), [[np.nan, 1.0, 1.0]])
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        label(link, [2, 0, 0], outputs)
