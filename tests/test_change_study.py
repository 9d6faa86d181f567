"""The experiments with a changing world: plants, labels, what the learners are told, rows and their summary."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from learners import pretrained
from rich.console import Console

from kbt_rl.envs.plant import NOMINAL, SHIFTED
from kbt_rl.envs.schedule import PLANT_RANGES
from kbt_rl.experiments import change_report
from kbt_rl.experiments.change import DelayRow, FalseAlarmRow, SuccessRow, run_drift, run_shifts, run_stationary
from kbt_rl.experiments.change_setup import (
    CUSUM,
    EXPERT,
    LEARNED,
    NONE,
    PRETRAINED,
    ChangeConfig,
    Learner,
    draw_plants,
    drifting_plants,
    labelled,
)
from kbt_rl.experiments.simulation import PlantBatch, expert_force, simulate, starts

SMALL = ChangeConfig(0, 0, plants=2, samples=30, starts=4, drift_samples=40, drift_every=20)


def test_many_plants_at_once_are_those_one_by_one() -> None:
    initial, force = starts(0, 5), expert_force(NOMINAL)
    columns = [np.array([[getattr(plant, name)] for plant in (NOMINAL, SHIFTED)]) for name in PLANT_RANGES]
    batch = PlantBatch(*columns, np.array(NOMINAL.gravity))
    found = simulate(force, np.broadcast_to(initial, (2, *initial.shape)), batch)
    for index, plant in enumerate((NOMINAL, SHIFTED)):
        alone = simulate(force, initial, plant)
        assert np.array_equal(found.success[index], alone.success)
        np.testing.assert_allclose(found.cost[index], alone.cost, rtol=1e-10)


def test_each_plant_defeats_the_expert_of_the_one_before() -> None:
    """Judged on the starts of the evaluation, which are not those of the draw; one in five may be close to a half."""
    config = ChangeConfig(0, 3, plants=2, starts=20)
    draw = draw_plants(config)
    assert draw == draw_plants(config)
    initial = starts(config.stream_seed, 20)
    for before, plant in zip([NOMINAL, *draw.plants], draw.plants, strict=False):
        assert simulate(expert_force(before), initial, plant).success.mean() < 0.7
        assert simulate(expert_force(plant), initial, plant).success.mean() > 0.8
        assert all(low <= plant.dynamics[name] <= high for name, (low, high) in PLANT_RANGES.items())


def test_the_drift_starts_at_the_shifted_plant_and_moves_by_its_rate() -> None:
    plants = list(islice(drifting_plants(SMALL), 400))
    np.testing.assert_allclose(list(plants[0].dynamics.values()), list(SHIFTED.dynamics.values()), rtol=1e-12)
    moves = np.diff(np.log([list(plant.dynamics.values()) for plant in plants]), axis=0)
    inside = np.sqrt(np.mean(np.square(moves)))
    assert inside == pytest.approx(SMALL.drift_rate, rel=0.1)  # a step at a mirror is shorter, but rare


def test_labels_are_the_experts_forces_with_noise() -> None:
    config = ChangeConfig(0, 1, noise_variance=4.0)
    stream = labelled(config, pretrained().policy, [NOMINAL] * 500 + [SHIFTED] * 500, 1)
    states = np.concatenate([sample.context.newest for sample in stream])
    forces = np.array([float(sample.target[0]) for sample in stream]) * SHIFTED.max_force
    clean = np.concatenate([expert_force(NOMINAL)(states[:500]), expert_force(SHIFTED)(states[500:])])
    error = forces - clean
    assert abs(error.mean()) < 6 * 2.0 / np.sqrt(1000)
    assert abs(error.var() / 4.0 - 1) < 6 * np.sqrt(2 / 1000)
    one = stream[700]
    np.testing.assert_allclose(one.features.numpy(), pretrained().policy.encode(one.context).numpy(), atol=1e-5)


def test_the_misfit_is_noise_on_top_or_the_least_that_is_learned() -> None:
    config, unit = ChangeConfig(0, 0, noise_variance=0.5, misfit_variance=2.0), 120.0**2
    told, untold = (Learner(name, pretrained(), config).model.policy.head for name in (CUSUM, LEARNED))
    scale = told.mean_square_scale * unit
    assert float(told.noise_cov) * scale == pytest.approx(2.5)
    assert not told.learns_noise
    assert untold.learns_noise
    assert untold.config.noise_floor * scale == pytest.approx(2.0)


def test_rows_of_shifts_and_drift() -> None:
    plants = [SHIFTED, NOMINAL]
    rows, delays = run_shifts(SMALL, pretrained(), plants, [NONE, CUSUM])
    points = {(row.strategy, row.shift, row.samples) for row in rows}
    names = (NONE, CUSUM, PRETRAINED, EXPERT)
    assert points == {(n, shift, c) for n in names for shift in (1, 2) for c in (0, 10, 25)}
    assert len(rows) == len(points)
    assert [row.shift for row in delays] == [0, 1, 2]
    assert {row.strategy for row in delays} == {CUSUM}
    before = {row.success for row in rows if row.strategy == PRETRAINED and row.shift == 1}
    assert before == {0.0}  # the nominal policy fails on the shifted plant
    drift = run_drift(SMALL, pretrained(), [NONE])
    assert [row.samples for row in drift if row.strategy == NONE] == [0, 20, 40]


def test_stationary_rows_cover_known_and_learned_noise() -> None:
    rows = run_stationary(pretrained(), 0, 50, 1.0)
    assert [(row.noise, row.lag) for row in rows] == [("known", 0)] * 4 + [
        ("learned", lag) for _ in range(2) for lag in (0, 0, 50, 50)
    ] + [("known", 0), ("learned", 50)]
    assert [row.test for row in rows[-2:]] == [CUSUM, LEARNED]
    assert all(row.samples == 50 for row in rows)


def test_the_summary_of_rows_made_by_hand() -> None:
    shifts = [SuccessRow("a", 0, s, shift, 25, value) for s, shift, value in [(0, 1, 1.0), (0, 2, 0.5), (1, 1, 0.25)]]
    delays = [
        DelayRow("a", 0, 0, 0, 7, 1),
        DelayRow("a", 0, 0, 1, 1, 0),
        DelayRow("a", 0, 0, 2, 6, 2),
        DelayRow("a", 0, 1, 1, None, 0),
    ]
    alarms = [FalseAlarmRow("CUSUM", 1.0, "known", 0, 0.0, 10, 0)]
    drift = [
        SuccessRow("a", 0, s, 0, at, value) for s, at, value in [(0, 0, 0.0), (0, 9, 1.0), (0, 18, 0.5), (1, 9, 0.25)]
    ]
    summary = change_report.summarise(shifts, delays, drift, alarms)
    assert summary["success_after_shift"]["a"]["25"]["mean"] == pytest.approx((1.0 + 0.5 + 0.25) / 3)
    assert summary["success_after_shift"]["a"]["25"]["trials"] == 3  # of the shifts; under the drift of the streams
    assert summary["success_under_drift"]["a"]["mean"] == pytest.approx((0.75 + 0.25) / 2)
    assert summary["success_under_drift"]["a"]["trials"] == 2
    assert summary["detection"]["a"] == {
        "shifts": 3, "noticed_within_5": 1, "missed": 1, "largest_delay": 6, "further_alarms": 2,
        "false_before_the_first_shift": 2,
    }  # fmt: skip
    assert summary["false_alarms"][0]["alarms"] == 0
    console = Console(record=True, width=120)
    change_report.print_change(summary, console)
    printed = console.export_text()
    assert "{" not in printed
    for cells in (("a", "0.58"), ("a", "3", "1", "1", "6", "2", "2"), ("CUSUM", "1 N²", "known", "0", "0", "10", "0")):
        assert any([cell.strip() for cell in line.split("│")[1:-1]][: len(cells)] == list(cells) for line in
                   printed.splitlines()), cells  # fmt: skip


def test_files_and_figure_and_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_report, "pretrain", lambda *arguments: pretrained())
    monkeypatch.setattr(change_report, "SHIFT_STRATEGIES", (NONE, CUSUM))
    monkeypatch.setattr(change_report, "DRIFT_STRATEGIES", (NONE,))
    config, console = ChangeConfig(0, 3, plants=1, samples=26, starts=2, drift_samples=20, drift_every=20), Console()
    change_report.run([config], (20, (1.0,)), tmp_path, console)
    written = {path.name for path in tmp_path.iterdir()}
    tables = {f"change_{name}.csv" for name in ("shifts", "delays", "drift", "false_alarms")}
    assert written >= {*tables, "change_summary.json", "change.png"}
    before = (tmp_path / "change_shifts.csv").read_bytes()
    monkeypatch.setattr(change_report, "run_shifts", None)  # would fail if it were called again
    change_report.run([config], (20, (1.0,)), tmp_path, console)
    assert (tmp_path / "change_shifts.csv").read_bytes() == before
