"""The study of unknown noise: its streams, its figures of merit, and the whole in a small version."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from learners import SHIFTED as SHIFTED_ID
from learners import TINY, expert, kbt
from PIL import Image
from rich.console import Console
from scipy import stats
from stable_baselines3.common.logger import Logger, make_output_format

from kbt_rl import KalmanAdapter
from kbt_rl.commands.noise import Noise
from kbt_rl.experiments import noise as study
from kbt_rl.experiments.noise import NoiseRow, NoiseTrial, draw_noise, judge, noise_plan, ratios, summarise
from kbt_rl.experiments.tables import read_rows
from kbt_rl.inference.config import HeadConfig


@pytest.mark.parametrize(("kind", "variance"), [("gaussian", 20.0), ("student_t", 20.0), ("outliers", 10.0)])
def test_noise_has_its_distribution(kind: study.Kind, variance: float) -> None:
    drawn = draw_noise(kind, variance, 20_000, np.random.default_rng(0))
    if kind == "student_t":
        scale = math.sqrt(variance / 3.0)  # variance of t with 3 degrees of freedom is 3
        assert stats.kstest(drawn / scale, "t", args=(3.0,)).pvalue > 1e-6
        return
    wild = np.abs(drawn) > 50.0
    assert stats.kstest(drawn[~wild] / math.sqrt(variance), "norm").pvalue > 1e-6
    expected = 0.05 * 20_000 if kind == "outliers" else 0.0
    assert abs(wild.sum() - expected) <= 6 * math.sqrt(0.05 * 0.95 * 20_000) * (expected > 0)


def test_a_stream_with_wild_labels_has_the_ordinary_noise_of_the_one_without() -> None:
    clean, wild = (draw_noise(kind, 10.0, 500, np.random.default_rng(3)) for kind in ("gaussian", "outliers"))
    offsets = np.abs(wild - clean)
    np.testing.assert_allclose(offsets[offsets > 0], 100.0, rtol=1e-12)
    assert 0 < (offsets > 0).sum() < 60


def test_judging_is_the_gaussian_density_of_the_labels() -> None:
    model = kbt()
    states = np.random.default_rng(0).uniform(-0.5, 0.5, (50, 4)).astype(np.float32)
    mean, epistemic, aleatoric = model.policy.predict_moments(states)
    newton = 50.0 if math.isnan(model.max_force) else model.max_force
    noise = np.linspace(-3.0, 3.0, 50)
    clean = np.zeros(50)
    variance, error, coverage, nlpd = judge(model, states, clean, noise)
    predicted = stats.norm(newton * mean[:, 0], newton * np.sqrt((epistemic + aleatoric)[:, 0, 0]))
    assert nlpd == pytest.approx(-predicted.logpdf(noise).mean(), rel=1e-6)
    low, high = predicted.interval(0.95)
    assert coverage == pytest.approx(((low <= noise) & (noise <= high)).mean())
    assert error == pytest.approx(newton * math.sqrt((mean**2).mean()), rel=1e-6)
    assert variance == pytest.approx(newton**2 * aleatoric[0, 0, 0])


def test_the_plan_reports_ten_streams_and_is_paired() -> None:
    plan = noise_plan()
    keys: dict[tuple[str, str, float], set[tuple[int, int]]] = {}
    for trial in plan:
        keys.setdefault((trial.method.name, trial.kind, trial.variance), set()).add(
            (trial.pretrain_seed, trial.stream_seed)
        )
        assert min(trial.pretrain_seed, trial.stream_seed) >= 1000
    assert {len(pairs) for pairs in keys.values()} == {10}
    assert all(("pre-trained", kind, variance) in keys for _, kind, variance in keys)


def test_summary_and_ratios_pair_the_streams() -> None:
    def row(method: str, kind: str, seed: int, error: float) -> NoiseRow:
        return NoiseRow(method, kind, 10.0, seed, seed, 9.0, error, 0.95, 2.0)

    rows = [row("known", "gaussian", seed, float(seed)) for seed in (1, 2, 4)]
    rows += [row("learned, robust", "outliers", seed, 1.5 * seed) for seed in (1, 2, 4)]
    (known, wild) = summarise(rows)
    assert (known.trials, known.mean_error) == (3, pytest.approx(7 / 3))
    assert wild.error_lower < wild.mean_error < wild.error_upper
    found = {(each.method, each.kind): each for each in ratios(rows)}
    assert found["learned, robust", "outliers"][4:] == pytest.approx((1.5, 1.5, 1.5))
    assert found["known", "gaussian"].ratio == 1.0


def test_the_command_writes_tables_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [(name, "gaussian") for name in ("pre-trained", "known", "learned")] + [("learned, robust", "outliers")]
    small = [
        replace(trial, samples=60, pretraining=TINY)
        for trial in noise_plan(quick=True, seed=3)
        if (trial.method.name, trial.kind) in wanted and trial.variance == 10.0
    ]
    monkeypatch.setattr(study, "noise_plan", lambda **_: small)
    console = Console(width=200, record=True)
    Noise(out=tmp_path, quick=True, seed=3).run(console)
    rows = read_rows(tmp_path / "noise.csv", NoiseRow)
    assert len(rows) == len(small)
    before, known = (
        next(row for row in rows if row[:3] == (name, "gaussian", 10.0)) for name in ("pre-trained", "known")
    )
    assert known.mean_error < 0.5 * before.mean_error
    assert known.learned_variance == pytest.approx(10.0)
    assert json.loads((tmp_path / "noise.json").read_text())["trials"][0]["samples"] == 60
    with Image.open(tmp_path / "noise.png") as image:
        assert image.size[0] == 1300
    assert "learned, robust" in console.export_text()


def test_trials_are_repeatable(tmp_path: Path) -> None:
    trial = NoiseTrial(study.ROBUST, "outliers", 10.0, 0, 5, samples=30, pretraining=TINY)
    first, second = (study.run_noise_trial(trial, tmp_path) for _ in range(2))
    assert first == second


def test_the_callback_logs_the_learned_noise(tmp_path: Path) -> None:
    head = HeadConfig(noise="learned", robust_dof=4.0)
    model = kbt(policy_kwargs={"head": head}, n_steps=5)
    model.set_logger(Logger(str(tmp_path), [make_output_format("json", str(tmp_path))]))
    model.learn(10, callback=KalmanAdapter(expert(SHIFTED_ID)))
    model.logger.close()
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    logged = [line for line in lines if "kalman/noise_variance" in line]
    assert logged
    assert all(line["kalman/noise_variance"] > 0.0 and line["kalman/label_weight"] >= 0.0 for line in logged)
    assert float(model.policy.head.noise_labels) != head.noise_labels
