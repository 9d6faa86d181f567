"""Every study, tiny: its trials run, its report has words and figures, and its plan is sound."""

from __future__ import annotations

import importlib
import io
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console

from kbt_rl.envs import SHIFTED
from studies import changing, label_rules, noise, prior, uncertainty
from studies.__main__ import STUDIES, description, show
from studies.curve import FAILED, CurveTrial, grid
from studies.methods import ONE_LAYER, PRINTED, TWO_LAYERS, warm_start
from studies.printed import PrintedKBT
from studies.success import claims, figure
from studies.table import Row, Table
from studies.trial import FIRST_REPORTED_SEED, Size, Trial

ROOT = Path(__file__).resolve().parents[2] / "studies"
#: Smaller than --quick; a study takes what its trials have.
SMALL: dict[str, Any] = {
    "pretraining": tiny.PRETRAINING, "starts": 2, "checkpoints": (0, 4, 8), "samples": 40, "learners": 2, "tests": 2,
    "budget": 3, "held_out": 50, "episodes": 2, "labels": 4, "plants": 1, "every": 20, "tuning_seeds": (0,),
    "hidden": (1e-5, 1e-4), "last": (1.0,), "rhos": (0.99,),
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "no_oracle": {"labels": None, "episodes": (1,)}, "rescue": {"every": 1}, "label_rules": {"episodes": 1},
    "film": {"every": 1, "starts": 1, "budget": 8}, "timing": {"methods": (ONE_LAYER, warm_start(10))},
}  # fmt: skip


#: What ``reproduce`` runs and reports as they would alone.
IN_REPRODUCE = ("success", "visited", "timing", "uncertainty", "start")


def small(trial: Trial) -> Trial:
    """The trial in a fraction of a second."""
    wanted = {**SMALL, **OWN.get(trial.study, {})}
    names = {field.name for field in fields(trial)}
    return replace(trial, **{name: value for name, value in wanted.items() if name in names and value is not None})


@pytest.fixture(autouse=True)
def _small_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_rules, "STEPS", 20)
    monkeypatch.setattr(noise, "HELD_OUT", 50)
    monkeypatch.setattr(uncertainty, "_WINDOW", 20)
    monkeypatch.setattr(changing, "draw_plants", lambda seed, count: (SHIFTED,))
    monkeypatch.setattr("studies.change.draw_plants", changing.draw_plants)
    monkeypatch.setattr(prior, "drawn_plant", lambda seed: SHIFTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STUDIES if name not in IN_REPRODUCE])
def test_a_study_runs_and_reports(name: str, tmp_path: Path) -> None:
    if name == "film":
        pytest.importorskip("pygame")
    study = importlib.import_module(f"studies.{name}")
    trials = [small(trial) for trial in study.plan(Size(quick=True))]
    if name in ("noise", "trust", "discrete", "rescue"):  # all methods of the first task
        trials = [trial for trial in trials if trial.label == trials[0].label]
    elif name in ("change", "drift", "no_oracle", "tune"):
        trials = [trials[0], *trials[3::3]]
    table = tiny.run(trials, tmp_path)
    assert {row.study for row in table} == {trial.study for trial in trials}
    said = io.StringIO()
    show(study, table, tmp_path, Console(width=200, file=said))
    written = {path.name for path in tmp_path.iterdir()} - {"trials", "models"}
    assert "results.csv" in written
    assert len(written) >= 2
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + len(table)
    assert "written: " in said.getvalue()


@pytest.mark.parametrize("name", STUDIES)
def test_every_trial_of_a_full_plan_is_one_of_its_own(name: str) -> None:
    pytest.importorskip("pygame", reason="the film needs it") if name == "film" else None
    trials = importlib.import_module(f"studies.{name}").plan(Size())
    assert len({trial.id for trial in trials}) == len(trials)
    seeds = {seed for trial in trials for seed in (trial.policy_seed, trial.stream_seed)}
    assert max(seeds) < 100 if name in ("tune", "tune_rivals", "default_head") else min(seeds) >= FIRST_REPORTED_SEED


@pytest.mark.parametrize("name", ["tune", "default_head"])
def test_tuning_refuses_reported_seeds(name: str) -> None:
    with pytest.raises(ValueError, match="seeds 0 to 99"):
        importlib.import_module(f"studies.{name}").plan(Size(seed=99, policies=2))


def test_tuning_prefers_success_and_settles_ties_by_regret() -> None:
    best = importlib.import_module("studies.tune").best
    assert best({"0.001": [0.5, -2.0], "0.01": [0.9, -0.5], "0.03": [0.898, -2.0]}) == 0.03
    assert best({"0.001": [0.5, -2.0], "0.01": [0.9, -0.5]}) == 0.01


def test_a_study_is_one_file_of_at_most_250_lines_that_says_what_it_asks() -> None:
    for name in STUDIES:
        assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 250
        assert len(description(name).splitlines()[0]) > 30


# ---------------------------------------------------------------------- curves


def test_a_learner_that_breaks_counts_as_failed_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kbt_rl.inference.errors import UpdateError

    def update(self: PrintedKBT, *_: Any) -> Any:
        if self.labels_used >= 3:
            raise UpdateError("broke")
        self.policy.labels += 1
        return type("Info", (), {"labels": 1})()

    monkeypatch.setattr(PrintedKBT, "_update", update)
    table = tiny.run([tiny.trial(method=PRINTED, checkpoints=(0, 3, 4, 6))], tmp_path)
    assert table.where(metric="failed").values() == [0.0, 0.0, 1.0, 1.0]
    assert table.where(metric="success", labels=(4, 6)).values() == [FAILED.success] * 2
    assert table.where(metric="regret", labels=6).values() == [FAILED.regret]
    assert "(1 failed)" in grid(table, "", "success", (6,)).rows[0][1]


def test_labels_at_visited_states_follow_the_learners_own_path(tmp_path: Path) -> None:
    table = tiny.run([tiny.trial(states="visited"), tiny.trial()], tmp_path)
    assert table.distinct("task") == ["shifted, labels at visited states", "shifted"]
    assert len(table.where(metric="falls while learning")) == 1
    assert len(table.where(metric="success")) == 6


def test_a_warm_start_is_scored_anew_only_after_a_training(tmp_path: Path) -> None:
    table = tiny.run([tiny.trial(method=warm_start(5, 1e-2), checkpoints=(0, 2, 4, 6))], tmp_path)
    regrets = table.where(metric="regret").values()
    assert regrets[0] == regrets[1] == regrets[2]


def made_up(success: dict[str, tuple[float, float, float]]) -> Table:
    """A result table of two trials."""
    return Table(
        Row("success", "shifted", method, 1000, stream, labels, metric, value if metric == "success" else 1.0 - value)
        for method, values in success.items()
        for stream in (1000, 1001)
        for labels, value in zip((0, 50, 100), values, strict=True)
        for metric in ("success", "regret")
    )


def test_the_claims_find_the_worst_comparison_and_the_largest_drop() -> None:
    table = made_up({
        TWO_LAYERS.name: (0.0, 1.0, 0.9), ONE_LAYER.name: (0.0, 1.0, 1.0), warm_start(10).name: (0.0, 0.5, 0.95),
    })  # fmt: skip
    rows = claims(table).rows
    assert rows[0][2] == "-0.050 (warm start, memory 10, 100 labels)"
    assert rows[1][2] == "0.100, worst trial 0.100"
    assert rows[3][2] == "+5.0e-02 (warm start, memory 10, 100 labels)"
    assert rows[4][2] == "NO"
    assert rows[5][2] == "+0.050 (warm start, memory 10, 100 labels)"
    assert rows[9][2] == "yes"


def test_figure_3_shows_every_method_once_and_marks_its_panels() -> None:
    names = [TWO_LAYERS.name, ONE_LAYER.name, *(warm_start(memory).name for memory in (10, 20, 25, 50, 75, 100))]
    drawn = figure(made_up(dict.fromkeys(names, (0.0, 0.5, 1.0)))).draw()
    legend = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert sorted(legend) == sorted(names)
    assert [panel.texts[0].get_text() for panel in drawn.axes] == ["a", "b"]
    lines = {
        line.get_label(): (line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn.axes[0].lines
    }
    assert len(set(map(str, lines.values()))) == len(names)


def test_a_trial_has_a_place_for_its_settings_in_its_id() -> None:
    assert isinstance(tiny.trial(), CurveTrial)
    assert tiny.trial().id.startswith("success-kbt-one-layer-without-the-observation-shifted-p0-s0-")
