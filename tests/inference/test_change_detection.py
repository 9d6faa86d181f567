"""Monitors: false-alarm rates on simulated chi-square samples, run lengths against a second derivation, the trap."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2, t

from kbt_rl.inference.change_detection import (
    Cusum,
    LogLossCusum,
    Monitor,
    NoiseReference,
    WindowedChiSquare,
    upper_quantile,
)
from kbt_rl.inference.run_length import cusum_run_length, cusum_threshold

SAMPLES = 100_000


def alarms(monitor: Monitor, nis: Any, labels: int = 1) -> int:
    return sum(monitor.observe(float(value), labels) for value in nis)


def simulated(labels: int, seed: int, scale: float = 1.0) -> Any:
    return scale * np.random.default_rng(seed).chisquare(labels, SAMPLES)


# ---------------------------------------------------------------------- false alarms, 100,000 simulated samples


@pytest.mark.parametrize(("rate", "inflation", "labels"), [(1e-2, 4.0, 1), (1e-3, 2.0, 1), (1e-2, 3.0, 2)])
def test_cusum_has_its_false_alarm_rate(rate: float, inflation: float, labels: int) -> None:
    """Run lengths are nearly geometric, so the count is nearly Poisson."""
    expected = rate * SAMPLES
    found = alarms(Cusum(rate, inflation, labels), simulated(labels, seed=0), labels)
    assert abs(found - expected) < 6 * math.sqrt(expected)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_window_of_one_has_exactly_its_rate(labels: int) -> None:
    rate = 1e-2
    found = alarms(WindowedChiSquare(rate, window=1), simulated(labels, seed=1), labels)
    assert abs(found - rate * SAMPLES) < 6 * math.sqrt(rate * (1 - rate) * SAMPLES)


@pytest.mark.parametrize("rate", [1e-2, 1e-3])
def test_a_longer_window_stays_below_its_rate(rate: float) -> None:
    found = alarms(WindowedChiSquare(rate, window=5), simulated(1, seed=2))
    expected = rate * SAMPLES
    assert 0.2 * expected < found < expected


def test_the_default_rates_give_few_alarms() -> None:
    """At most one in 10,000."""
    nis = simulated(1, seed=3)
    assert alarms(WindowedChiSquare(), nis) <= 10
    assert alarms(Cusum(1e-5), nis) <= 4  # one expected


# ---------------------------------------------------------------------- the statistics


def test_the_window_is_a_chi_square_test_of_the_sum() -> None:
    rate = 0.01
    monitor = WindowedChiSquare(rate, window=3)
    below, above = chi2.isf(rate, [1, 3, 4]) - 1e-9, chi2.isf(rate, [1, 3, 4]) + 1e-9
    assert not monitor.observe(below[0], 1)
    assert not monitor.observe(below[1] - below[0], 2)
    assert monitor.observe(above[2] - below[1], 1)
    assert not monitor.observe(below[0], 1)  # empty again
    monitor.restart()
    for _ in range(10):  # old samples leave
        assert not monitor.observe(chi2.isf(rate, 3) / 3 - 1e-9, 1)


def test_the_increment_is_the_log_likelihood_ratio() -> None:
    """Of Gaussian innovations with nine times the variance, by the densities themselves."""
    from scipy.stats import multivariate_normal

    innovation, cov = np.array([1.0, -2.0]), np.array([[1.0, 0.3], [0.3, 0.5]])
    monitor = Cusum(1e-6, inflation=9.0, labels=2)
    assert not monitor.observe(float(innovation @ np.linalg.solve(cov, innovation)), 2)
    ratio = multivariate_normal(cov=9.0 * cov).logpdf(innovation) - multivariate_normal(cov=cov).logpdf(innovation)
    assert monitor.statistic == pytest.approx(ratio, rel=1e-12)
    assert not monitor.observe(0.0, 2)
    assert monitor.statistic == pytest.approx(ratio - math.log(9.0), rel=1e-12)
    assert not monitor.observe(0.0, 2)
    for _ in range(5):
        monitor.observe(0.0, 2)
    assert monitor.statistic == 0.0


@pytest.mark.parametrize("monitor", [WindowedChiSquare(1e-5), Cusum(1e-5)])
@pytest.mark.parametrize("inflation", [64.0, 400.0])
def test_a_large_change_is_noticed_at_once(monitor: Monitor, inflation: float) -> None:
    """Innovations of 8 and 20 times their predicted standard deviation: nearly always within 5 samples."""
    rng = np.random.default_rng(4)
    delays = []
    for _ in range(300):
        monitor.restart()
        for value in rng.chisquare(1, 150):
            monitor.observe(float(value))
        monitor.restart()
        delays.append(next(n for n in range(1, 1000) if monitor.observe(inflation * float(rng.chisquare(1)))))
    assert np.mean(np.array(delays) <= 5) > 0.95


def test_a_smaller_change_is_noticed_sooner_by_the_cusum_than_by_one_sample() -> None:
    """Three times the variance, at the same false-alarm rate."""

    def mean_delay(monitor: Monitor) -> float:
        return SAMPLES / alarms(monitor, simulated(1, seed=5, scale=3.0))

    assert 2 * mean_delay(Cusum(1e-4)) < mean_delay(WindowedChiSquare(1e-4, window=1))


def test_the_quantile_of_students_predictions() -> None:
    """The NIS of one label is the square of a t variable; with many degrees of freedom it is chi-square again."""
    for rate in (0.05, 1e-4):
        assert upper_quantile(rate, 1, 5.0) == pytest.approx(t.isf(rate / 2.0, 5.0) ** 2, rel=1e-9)
        assert upper_quantile(rate, 3, 1e9) == pytest.approx(upper_quantile(rate, 3), rel=1e-6)
        assert upper_quantile(rate, 3) == pytest.approx(chi2.isf(rate, 3), rel=1e-12)


# ---------------------------------------------------------------------- run length


def test_run_length_at_threshold_zero_is_geometric() -> None:
    inflation = 4.0
    over = chi2.sf(math.log(inflation) / (1 - 1 / inflation), 1)
    assert cusum_run_length(0.0, inflation) == pytest.approx(1 / over, rel=1e-12)


@pytest.mark.parametrize(("threshold", "inflation", "labels"), [(2.0, 4.0, 1), (3.0, 2.0, 3), (1.0, 9.0, 2)])
def test_run_length_against_simulation(threshold: float, inflation: float, labels: int) -> None:
    """Many sums side by side, each until its alarm."""
    rng, runs = np.random.default_rng(6), 20_000
    total, lengths, alive = np.zeros(runs), np.zeros(runs), np.ones(runs, dtype=bool)
    while alive.any():
        nis = rng.chisquare(labels, int(alive.sum()))
        gain = 0.5 * (nis * (1 - 1 / inflation) - labels * math.log(inflation))
        total[alive] = np.maximum(0.0, total[alive] + gain)
        lengths[alive] += 1
        alive &= total <= threshold
    standard_error = lengths.std() / math.sqrt(runs)
    assert abs(lengths.mean() - cusum_run_length(threshold, inflation, labels)) < 6 * standard_error


@pytest.mark.parametrize("rate", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("labels", [1, 4])
def test_threshold_inverts_the_run_length_and_obeys_lordens_bound(rate: float, labels: int) -> None:
    threshold = cusum_threshold(rate, 4.0, labels)
    assert cusum_run_length(threshold, 4.0, labels) * rate == pytest.approx(1.0, rel=1e-6)
    assert 0.0 < threshold < -math.log(rate)


# ---------------------------------------------------------------------- classes


def class_ratios(classes: int, steps: int, wrong: bool) -> np.ndarray:
    """Log ratios of ``sqrt(p) / sum sqrt(p)`` to the predicted ``p``, with labels drawn from ``p`` or uniformly."""
    rng = np.random.default_rng(9)
    logits = 2.0 * rng.standard_normal((steps, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.integers(classes) if wrong else rng.choice(classes, p=row) for row in p])
    flat = np.sqrt(p) / np.sqrt(p).sum(1, keepdims=True)
    found: np.ndarray = np.log((flat / p)[np.arange(steps), labels])
    return found


@pytest.mark.parametrize("classes", [2, 30])
def test_labels_from_the_predicted_classes_raise_no_more_alarms_than_promised(classes: int) -> None:
    ratios, rate = class_ratios(classes, 20_000, wrong=False), 1e-2
    assert abs(np.exp(ratios).mean() - 1.0) < 6.0 * np.exp(ratios).std() / math.sqrt(len(ratios))
    monitor = LogLossCusum(rate)
    assert sum(monitor.observe_ratio(float(value)) for value in ratios) <= rate * len(ratios)
    assert monitor.alarms > 0


def test_labels_that_were_held_for_improbable_are_noticed() -> None:
    monitor = LogLossCusum(1e-4)
    for value in class_ratios(10, 200, wrong=False):
        monitor.observe_ratio(float(value))
    monitor.restart()
    delays = [monitor.observe_ratio(float(value)) for value in class_ratios(10, 60, wrong=True)]
    assert any(delays[:30])
    with pytest.raises(ValueError, match="only updates with the softmax link have one"):
        monitor.observe_ratio(math.nan)


# ---------------------------------------------------------------------- promises


@pytest.mark.parametrize("monitor", [WindowedChiSquare(1e-3), Cusum(1e-3)], ids=["window", "cusum"])
def test_a_pickled_monitor_goes_on(monitor: Monitor) -> None:
    nis = simulated(1, seed=7, scale=2.0)
    alarms(monitor, nis[:1003])
    copy = pickle.loads(pickle.dumps(monitor))
    assert len(pickle.dumps(monitor)) < 1000
    assert [monitor.observe(float(v)) for v in nis[1003:3000]] == [copy.observe(float(v)) for v in nis[1003:3000]]
    assert monitor.alarms == copy.alarms > 0
    assert monitor.samples == copy.samples == 3000
    again = type(monitor)(**monitor.settings())
    assert again.settings() == monitor.settings()
    assert again.alarms == again.samples == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cusum(0.0), "false_alarm_rate is 0.0"),
        (lambda: WindowedChiSquare(1.0), "false_alarm_rate is 1.0"),
        (lambda: WindowedChiSquare(float("nan")), "false_alarm_rate is nan"),
        (lambda: WindowedChiSquare(window=0), "window is 0"),
        (lambda: Cusum(inflation=1.0), "inflation is 1.0"),
        (lambda: Cusum(labels=0), "labels is 0"),
        (lambda: Cusum(0.5), "alarms less often than 0.5 a sample at every threshold; pass a smaller"),
        (lambda: NoiseReference(floor=-1.0), "floor is -1.0"),
        (lambda: NoiseReference(lag=-1), "lag is -1"),
        (lambda: NoiseReference().restate(1.0, 2.0, 1.0), "epistemic variance 2.0, predictive 1.0"),
        (lambda: NoiseReference().restate(0.0, 0.0, 0.0), "all zero"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("monitor", [WindowedChiSquare(), Cusum()], ids=["window", "cusum"])
@pytest.mark.parametrize(("nis", "labels"), [(-1.0, 1), (float("nan"), 1), (float("inf"), 1), (1.0, 0)])
def test_a_bad_sample_changes_nothing(monitor: Monitor, nis: float, labels: int) -> None:
    before = pickle.dumps(monitor)
    with pytest.raises(ValueError, match=r"the NIS is|the sample has 0 labels"):
        monitor.observe(nis, labels)
    assert pickle.dumps(monitor) == before


# ---------------------------------------------------------------------- the reference level


def test_known_noise_is_restated_with_the_floor() -> None:
    innovation, epistemic, noise, floor = 3.0, 0.5, 1.0, 0.25
    nis = NoiseReference(floor).restate(innovation**2 / (epistemic + noise), epistemic, epistemic + noise)
    assert nis == pytest.approx(innovation**2 / (epistemic + noise + floor), rel=1e-12)


def test_the_level_is_that_of_so_many_samples_ago() -> None:
    """At the start of half the samples so far."""
    reference, innovation_squared, epistemic = NoiseReference(lag=3), 2.0, 0.5
    noises = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
    ages = [0, 1, 1, 2, 2, 3, 3, 3, 3]
    for index, (noise, age) in enumerate(zip(noises, ages, strict=True)):
        found = reference.restate(innovation_squared / (epistemic + noise), epistemic, epistemic + noise)
        assert found == pytest.approx(innovation_squared / (epistemic + noises[index - age]), rel=1e-12)


def delay(lag: int, forgetting: float, inflation: float) -> int:
    """Samples until a shift is noticed, with a noise estimate that follows the squared innovations."""
    rng = np.random.default_rng(8)
    noise, reference, monitor = 1.0, NoiseReference(lag=lag), Cusum(1e-5)
    for index in range(3_000):
        square = (inflation if index >= 1_000 else 1.0) * float(rng.chisquare(1))
        alarm = monitor.observe(reference.restate(square / noise, 0.0, noise))
        noise = forgetting * noise + (1 - forgetting) * square
        if alarm and index >= 1_000:
            return index - 999
        if alarm:
            monitor.alarms = 0
    return 2_000


def test_a_lagged_level_does_not_chase_the_change() -> None:
    """The trap: an estimate that follows within some samples hides a moderate change from a test against itself."""
    assert delay(lag=0, forgetting=0.9, inflation=4.0) > 200
    assert delay(lag=50, forgetting=0.9, inflation=4.0) < 30
