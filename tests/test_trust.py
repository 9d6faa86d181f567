"""The study of trust: what it judges by, that its distributions are the ones it claims, and the whole in small."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learners import TINY, kbt, pretrained, states
from PIL import Image
from rich.console import Console
from scipy import stats

from kbt_rl import Sample
from kbt_rl.commands.trust import Trust
from kbt_rl.envs.plant import LABEL_BOX, SHIFTED, is_upright, rk4_step
from kbt_rl.experiments import learners as shared
from kbt_rl.experiments import trust as study
from kbt_rl.experiments.figures_trust import calibration_figure
from kbt_rl.experiments.learners import batch_force, snapshot
from kbt_rl.experiments.tables import read_rows
from kbt_rl.experiments.trials import VisitedStates
from kbt_rl.experiments.trust import (
    LEVELS,
    TrustRow,
    TrustTrial,
    held_out_states,
    judge,
    run_trust_trial,
    summarise,
    trust_plan,
)

NEWTON = SHIFTED.max_force
SMALL = TrustTrial("joint", "known", "iid", 10.0, 0, 5, samples=80, held_out=400, episodes=3, pretraining=TINY)


@pytest.fixture(autouse=True)
def _one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pre-trained policy that all tests share."""
    monkeypatch.setattr(shared, "pretrain", lambda *_: pretrained())


def test_judging_is_by_the_gaussian_that_the_head_predicts() -> None:
    model = kbt()
    some = states(60, seed=3)
    mean, epistemic, aleatoric = model.policy.predict_moments(some)
    noise = np.linspace(-40.0, 40.0, 60)
    predicted = stats.norm(NEWTON * mean[:, 0], NEWTON * np.sqrt((epistemic + aleatoric)[:, 0, 0]))
    *coverage, nlpd, oracle, error = judge(model, some, np.zeros(60), noise, 20.0)
    expected = []
    for level in LEVELS:
        low, high = predicted.interval(level)
        expected.append(((low <= noise) & (noise <= high)).mean())
    assert coverage == pytest.approx(expected)
    assert coverage == sorted(coverage)
    assert 0.0 < coverage[0] < coverage[-1]
    assert nlpd == pytest.approx(-predicted.logpdf(noise).mean(), rel=1e-5)
    assert oracle == pytest.approx(-stats.norm(scale=math.sqrt(20.0)).logpdf(noise).mean())
    assert error == pytest.approx(NEWTON * math.sqrt((mean**2).mean()), rel=1e-5)


def test_held_out_states_in_closed_loop_are_those_of_the_policy_alone() -> None:
    """By an episode stepped with the policy's own ``act``, from a start that the learner has never seen."""
    model = kbt()
    trial = replace(SMALL, stream="closed loop", episodes=1)
    found = held_out_states(trial, model)
    state = study.starts(trial.stream_seed + 900_000, 1)[0]
    expected = []
    for step in range(500):
        seen = state.astype(np.float32)
        if step % VisitedStates.every == 0 and is_upright(seen):
            expected.append(seen)
        force = batch_force(model, [snapshot(model)])(seen[None, None])[0, 0]
        state = rk4_step(state, np.clip(force, -SHIFTED.max_force, SHIFTED.max_force), SHIFTED)
        if not is_upright(state):
            break
    np.testing.assert_allclose(found, expected, atol=1e-5)
    learned_from = {tuple(start) for start in study.starts(trial.stream_seed + 500_000, 1_000)}
    assert tuple(study.starts(trial.stream_seed + 900_000, 1)[0]) not in learned_from


def test_held_out_states_of_the_box_are_new_and_fill_it() -> None:
    model = kbt()
    found = held_out_states(SMALL, model)
    assert found.shape == (400, 4)
    assert (np.abs(found) <= LABEL_BOX).all()
    assert (np.abs(found).max(axis=0) > 0.95 * np.asarray(LABEL_BOX)).all()
    other = held_out_states(replace(SMALL, stream_seed=6), model)
    assert not np.isin(found[:, 0], other[:, 0]).any()


@pytest.mark.parametrize("stream", ["iid", "closed loop"])
@pytest.mark.parametrize("noise", ["known", "learned"])
def test_learning_makes_intervals_and_density_better(stream: study.Stream, noise: study.Noise) -> None:
    learned = run_trust_trial(replace(SMALL, stream=stream, noise=noise))
    before = run_trust_trial(replace(SMALL, stream=stream, structure="pre-trained"))
    assert learned.nlpd < before.nlpd
    assert learned.mean_error < before.mean_error
    assert learned.nlpd > learned.oracle_nlpd - 0.1
    assert 0.3 < learned.coverage_50 < 0.7
    assert 0.85 < learned.coverage_95 < 1.0
    assert 0.5 <= learned.online_coverage_95 <= 1.0
    assert math.isfinite(learned.online_nlpd)
    assert math.isnan(before.online_nlpd)
    assert (learned.assumed_variance == pytest.approx(10.0)) is (noise == "known")


def test_online_figures_are_those_of_labels_one_step_ahead() -> None:
    """By predicting each label before it is learned."""
    trial = replace(SMALL, samples=30)
    row = run_trust_trial(trial)
    model = study._learner(trial, pretrained())
    stream = study.LabelStream(
        study.Trial("uncertainty", study.KBT_METHOD, 0, trial.stream_seed, noise_variance=10.0, pretraining=TINY)
    )
    some = stream.states(30)
    labels, densities, inside = stream.label(some), [], []
    for state, label in zip(some, labels, strict=True):
        mean, epistemic, aleatoric = model.policy.predict_moments(state)
        predicted = stats.norm(NEWTON * mean[0, 0], NEWTON * math.sqrt((epistemic + aleatoric)[0, 0, 0]))
        densities.append(predicted.logpdf(NEWTON * label[0]))
        low, high = predicted.interval(0.95)
        inside.append(low <= NEWTON * label[0] <= high)
        model.update(Sample(state[None], label[None]))
    assert row.online_nlpd == pytest.approx(-np.mean(densities), rel=1e-4)
    assert row.online_coverage_95 == pytest.approx(np.mean(inside))
    assert row.late_coverage_95 == pytest.approx(np.mean(inside[15:]))


def test_trials_are_repeatable() -> None:
    trial = replace(SMALL, stream="closed loop", noise="learned", samples=20)
    assert run_trust_trial(trial) == run_trust_trial(trial)


def test_the_plan_is_paired_and_reported_seeds_are_unused_ones() -> None:
    plan = trust_plan()
    groups: dict[Any, set[tuple[int, int]]] = {}
    for trial in plan:
        key = (trial.structure, trial.noise, trial.stream, trial.variance)
        groups.setdefault(key, set()).add((trial.pretrain_seed, trial.stream_seed))
        assert min(trial.pretrain_seed, trial.stream_seed) >= 1000
    assert all(groups[key] == groups["pre-trained", "known", key[2], key[3]] for key in groups)
    assert {len(pairs) for pairs in groups.values()} == {6, 4}
    assert {trial.pretrain_seed for trial in plan} == {1000, 1001}
    assert len(groups) == (4 * 2 + 1) * 2 * 2


def test_the_summary_has_a_row_for_each_quantity_that_there_is() -> None:
    def row(seed: int, coverage: float, online: float) -> TrustRow:
        values = (0.5, 0.8, 0.9, coverage, 0.99, 3.0, 2.5, 0.4, 10.0, online, online, 2.6)
        return TrustRow("joint", "known", "iid", 10.0, seed, seed, 100, *values)

    summary = {each.quantity: each for each in summarise([row(1, 0.94, math.nan), row(2, 0.98, math.nan)])}
    assert summary["coverage_95"].mean == pytest.approx(0.96)
    assert (summary["coverage_95"].minimum, summary["coverage_95"].trials) == (0.94, 2)
    assert "online_coverage_95" not in summary
    assert "mean_error" in summary


def test_the_figure_draws_what_is_in_the_table() -> None:
    values = (0.40, 0.70, 0.85, 0.93, 0.98, 3.0, 2.5, 0.4, 10.0, 0.9, 0.9, 2.6)
    rows = [TrustRow("joint", "learned", "iid", 10.0, 1, 1, 100, *values)]
    reliability, difference = (calibration_figure(rows).axes[i] for i in (0, 2))
    drawn = next(line for line in reliability.lines if len(line.get_xdata()) == len(LEVELS))
    np.testing.assert_allclose(drawn.get_ydata(), [40, 70, 85, 93, 98])
    np.testing.assert_allclose(drawn.get_xdata(), [50, 80, 90, 95, 99])
    apart = next(line for line in difference.lines if len(line.get_xdata()) == len(LEVELS))
    (edge,) = (line for line in difference.lines if line.get_marker() == "v")
    np.testing.assert_allclose(edge.get_ydata(), [-8, -8])  # further off than the panel shows
    np.testing.assert_allclose(apart.get_ydata(orig=False), [np.nan, np.nan, -5, -2, -1], atol=1e-9)


def test_the_command_writes_tables_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = trust_plan(quick=True, seed=3)
    assert {trial.structure for trial in plan} == {"pre-trained", "joint", "layer", "neuron", "diagonal"}
    small = [replace(trial, samples=20, held_out=100, episodes=1, pretraining=TINY) for trial in plan]
    monkeypatch.setattr(study, "trust_plan", lambda **_: small)
    console = Console(width=300, record=True)
    Trust(out=tmp_path, quick=True, seed=3).run(console)
    rows = read_rows(tmp_path / "trust.csv", TrustRow)
    assert [row[:4] for row in rows] == [(t.structure, t.noise, t.stream, t.variance) for t in small]
    assert json.loads((tmp_path / "trust.json").read_text())["trials"][0]["samples"] == 20
    summary = read_rows(tmp_path / "trust_summary.csv", study.SummaryRow)
    assert {row.quantity for row in summary} >= {"coverage_95", "nlpd", "oracle_nlpd", "mean_error"}
    with Image.open(tmp_path / "calibration.png") as image:
        assert image.size[0] == 1300
    assert "pre-trained" in console.export_text()
