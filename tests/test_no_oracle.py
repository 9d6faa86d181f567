"""The study without an oracle: its loop, its intervals, its command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from learners import TINY, pretrained
from rich.console import Console
from scipy.stats import binomtest

from kbt_rl.commands import no_oracle as command
from kbt_rl.envs import SHIFTED
from kbt_rl.experiments import no_oracle
from kbt_rl.experiments.fleet import Fleet, HeadFleet
from kbt_rl.experiments.learners import batch_force, snapshot
from kbt_rl.experiments.no_oracle import EXPERT_ACTS, LearnerRow, NoOracleConfig, perform, run_study, study_plan
from kbt_rl.experiments.no_oracle_report import read_study, summarise, wilson_interval
from kbt_rl.experiments.simulation import expert_force, simulate, starts

SMALL = NoOracleConfig(learners=2, continued=1, tests=6, checkpoints=(1, 2), steps=80, pretraining=TINY)


@pytest.fixture(autouse=True)
def _shared_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(no_oracle, "pretrain", lambda seed, config, path: pretrained())


def test_labels_from_identification_teach_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    def error(learners: Fleet, initial: np.ndarray) -> np.ndarray:
        """Root mean square error of each learner's force at states of the start box, N."""
        missed = learners.force(initial) - expert_force(SHIFTED)(initial)
        return np.sqrt(np.mean(np.square(missed), axis=1))

    monkeypatch.setattr(no_oracle, "label_free_score", error)
    taught, untaught = run_study(SMALL), run_study(replace(SMALL, labels="none"))
    assert [(row.learner, row.episodes) for row in taught.learners] == [(0, 1), (1, 1), (0, 2)]
    assert all(row.no_fall for row in taught.learners)
    for one, other in zip(taught.learners, untaught.learners, strict=True):
        assert one.score is not None
        assert other.score is not None
        assert one.score < 0.25 * other.score
        assert one.gain_error < 0.25 * other.gain_error  # without labels nobody asks, and nothing is identified
    assert [point.time for point in taught.curve] == pytest.approx(np.arange(0.1, 1.61, 0.1))


def test_score_without_labels_is_that_of_the_pre_trained_policy() -> None:
    config = replace(SMALL, labels="none", checkpoints=(1,), steps=5)
    scores = {row.score for row in run_study(config).learners}
    model = pretrained()
    initial = starts(config.seed + 10_000 * config.pretrain_seed + 700_000, config.tests)
    outcome = simulate(batch_force(model, [snapshot(model)]), initial[None], SHIFTED)
    assert scores == {outcome.success.mean()}


def test_expert_that_acts_needs_no_policy_and_the_oracle_no_identification() -> None:
    acting = run_study(replace(SMALL, labels="none", expert_acts=True, steps=500, checkpoints=(1,)))
    assert all(row.no_fall and row.episode_success and row.score is None for row in acting.learners)
    oracle = run_study(replace(SMALL, oracle=True, steps=20, checkpoints=(1,)))
    assert [row.gain_error for row in oracle.learners] == [0.0, 0.0]
    assert oracle.curve == []


def test_a_label_reaches_the_policy_after_it_has_acted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first force is the pre-trained policy's; the second is not, for it has learned a label in between."""
    forces: list[np.ndarray] = []
    act = HeadFleet.force

    def noted(self: HeadFleet, states: np.ndarray) -> np.ndarray:
        forces.append(act(self, states))
        return forces[-1]

    monkeypatch.setattr(HeadFleet, "force", noted)
    run_study(replace(SMALL, steps=2, checkpoints=(1,)))
    taught = forces.copy()
    forces.clear()
    run_study(replace(SMALL, steps=2, checkpoints=(1,), labels="none"))
    np.testing.assert_array_equal(taught[0], forces[0])
    assert np.abs(taught[1] - forces[1]).min() > 1e-3


def test_a_result_is_kept_and_read_back(tmp_path: Path) -> None:
    config = replace(SMALL, steps=10, checkpoints=(1,))
    path = perform(config, tmp_path)
    written = path.stat().st_mtime_ns
    assert perform(config, tmp_path) == path
    assert path.stat().st_mtime_ns == written
    assert read_study([path]) == run_study(config)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (7, 10), (100, 100)])
def test_wilson_interval(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_summary_takes_each_method_and_checkpoint_apart() -> None:
    def row(seed: int, episodes: int, no_fall: bool, score: float | None, method: str = "a") -> LearnerRow:
        return LearnerRow(method, seed, 0, episodes, no_fall, True, score, 0.01, 1)

    rows = [row(1, 1, True, 0.4), row(1, 1, True, 0.6), row(2, 1, False, 0.2), row(2, 5, True, 1.0)]
    first, fifth, acting = summarise([*rows, row(1, 1, True, None, EXPERT_ACTS)])
    assert (first.method, first.episodes, first.learners, first.fallbacks) == ("a", 1, 3, 3)
    assert (first.no_fall, first.score, first.lowest_policy) == pytest.approx((2 / 3, 0.4, 0.2))
    assert (fifth.learners, fifth.score) == (1, 1.0)
    assert (acting.score, acting.lowest_policy) == (None, None)


def test_plan_has_enough_starts_and_policies() -> None:
    plan = study_plan()
    identified = [config for config in plan if config.name == no_oracle.IDENTIFIED_IID]
    assert sum(config.learners for config in identified) >= 100
    assert {config.pretrain_seed for config in plan} == {1000, 1001}
    assert all(config.tests == 100 for config in plan)


def test_command_writes_tables_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [replace(config, steps=10, learners=2, tests=2) for config in study_plan(quick=True)]
    monkeypatch.setattr(no_oracle, "study_plan", lambda **options: small)
    console = Console(record=True, width=200)
    command.NoOracle(out=tmp_path, quick=True).run(console)
    for name in ("no_oracle.csv", "no_oracle_gain.csv", "no_oracle_summary.csv", "no_oracle.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "no fall in the first" in console.export_text()
