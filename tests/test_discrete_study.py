"""The study of discrete actions: what it runs, keeps and draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.commands.discrete import Discrete
from kbt_rl.experiments import discrete
from kbt_rl.experiments.discrete import (
    METHODS,
    DiscreteMethod,
    DiscreteRow,
    DiscreteStudy,
    configuration,
    draw_discrete,
    pretrained,
    run_method,
    run_study,
    summary,
    tuning_methods,
)
from kbt_rl.experiments.tables import read_rows, write_rows

SMALL = DiscreteStudy(
    seed=3, streams=1, policies=1, starts=3, checkpoints=(0, 5), pretraining=PretrainConfig(samples=300, steps=30)
)


def test_every_method_has_a_row_at_every_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rows = run_study(SMALL, tmp_path, done.append)
    assert [(row.method, row.samples) for row in rows] == [(m.name, n) for m in METHODS for n in (0, 5)]
    assert len(done) == len(METHODS)
    assert {row.success for row in rows if row.method == "expert"} == {1.0}
    with monkeypatch.context() as patched:
        patched.setattr(discrete, "run_method", None)  # whatever is kept is not run again
        assert run_study(SMALL, tmp_path, done.append) == rows
    first = sorted((tmp_path / "runs").iterdir())[0]
    first.unlink()
    assert run_study(SMALL, tmp_path, done.append) == rows
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv", DiscreteRow) == rows
    json.dumps(configuration(SMALL))


def test_a_learner_that_fails_stops_and_says_so(tmp_path: Path) -> None:
    """Without noise the rule ``taylor`` inverts a singular matrix at the first label."""
    failing = DiscreteMethod("fails", "kbt", {"rule": "taylor", "noise_variance": 0.0})
    rows = run_method(SMALL, failing, pretrained(SMALL, 3, tmp_path), 3)
    assert [row.failed for row in rows] == [0, 1]
    assert rows[1].success == rows[0].success


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not learn"):
        run_method(SMALL, DiscreteMethod("x", "x"), pretrained(SMALL, 3, tmp_path), 3)


def test_summary_averages_over_trials() -> None:
    rows = [DiscreteRow("a", 0, s, n, 0.5 * s + 0.1 * n, 1.0, s) for s in (0, 1) for n in (0, 1)]
    table = summary(rows)["a"]
    np.testing.assert_allclose(table["success"], [0.25, 0.35])
    assert table["samples"] == [0, 1]
    assert table["failed"] == [1.0, 1.0]


def test_figure_shows_every_method_and_who_stopped() -> None:
    rows = [DiscreteRow(m.name, 0, 0, n, 0.1 * n, 1.0, int(m.kind == "expert")) for m in METHODS for n in (0, 1)]
    figure = draw_discrete(rows, "two")
    labels = [line.get_label() for line in figure.axes[0].get_lines()]
    assert labels == [*(m.name for m in METHODS[:-1]), "expert (1 trials stopped)"]
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_ydata(), [0.0, 0.1])


def test_command_refuses_to_tune_on_reported_seeds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds 0 to 99"):
        Discrete(out=tmp_path, tune=True).run(Console())
    assert {method.kind for method in tuning_methods()} == {"kbt", "warm_start"}
