"""Intervals against what they should cover, and the smaller statistics by hand."""

from __future__ import annotations

import numpy as np
import pytest

from studies.statistics import estimate, largest_drop, wilson


def test_an_estimate_is_the_mean_with_its_extremes_and_the_same_every_time() -> None:
    values = [0.0, 1.0, 0.5, 0.5]
    found = estimate(values)
    assert found.mean == 0.5
    assert (found.minimum, found.maximum, found.trials) == (0.0, 1.0, 4)
    assert found.lower < 0.5 < found.upper
    assert estimate(values) == found


def test_equal_values_have_an_interval_without_width() -> None:
    found = estimate([0.3] * 5)
    assert found.lower == found.mean == found.upper == pytest.approx(0.3)
    assert estimate([2.0])[:3] == (2.0, 2.0, 2.0)


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [estimate(rng.standard_normal(30).tolist()) for _ in range(300)]
    covered = np.mean([each.lower <= 0.0 <= each.upper for each in found])
    assert 0.90 <= covered <= 0.97


def test_wilsons_interval_keeps_its_width_at_the_ends() -> None:
    lower, upper = wilson(1.0, 200)
    assert upper == pytest.approx(1.0)
    assert lower == pytest.approx(0.981, abs=1e-3)
    assert wilson(0.0, 200) == pytest.approx((0.0, 1.0 - lower))
    assert wilson(0.95, 200) == pytest.approx((0.910, 0.973), abs=1e-3)


def test_a_drop_is_measured_from_the_best_value_so_far_and_only_late() -> None:
    assert largest_drop([(10, 1.0), (20, 0.1), (60, 0.9), (100, 0.7)]) == pytest.approx(0.3)
    assert largest_drop([(10, 0.1), (60, 0.5), (100, 0.6)]) == 0.0
    assert largest_drop([]) == 0.0
