"""What learners tell and log of the predictive density of their labels."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from learners import SHIFTED, Updates, curve, events, expert, kbt, states
from scipy import stats

from kbt_rl import KBT, KalmanAdapter, Sample


def test_the_learner_tells_it_in_action_units() -> None:
    model = kbt()
    assert abs(model.policy.head.log_scale) > 0.1
    for rows in (1, 3):
        observations, target = states(rows, seed=rows), np.linspace(-0.5, 0.8, rows)[:, None]
        before, expected = copy.deepcopy(model.policy.head), 0.0
        info: Any = model.update(Sample(observations, target))
        features = model.policy.encode(model.policy.start(observations))
        for row, label in zip(features.split(1), torch.from_numpy(target).split(1), strict=True):
            mean, epistemic, aleatoric = (part.squeeze() for part in before.predict(row))
            expected += float(torch.distributions.Normal(mean, (epistemic + aleatoric).sqrt()).log_prob(label))
            before.update(row, label)  # one layer: rows one after another are the joint update
        assert info.log_density == pytest.approx(expected, rel=1e-6)
    mean, epistemic, aleatoric = model.policy.predict_moments(states(1, seed=9))
    predicted = stats.norm(mean[0, 0], math.sqrt((epistemic + aleatoric)[0, 0, 0]))
    info = model.update(Sample(states(1, seed=9), np.array([[0.1]])))
    assert info.log_density == pytest.approx(float(predicted.logpdf(0.1)), rel=1e-6)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_tensorboard_shows_density_and_coverage(n_envs: int, tmp_path: Path) -> None:
    rng, teacher = np.random.default_rng(0), expert()

    def noisy(observations: Any) -> Any:
        # Twice the standard deviation that the head assumes, so that labels fall inside and outside.
        return teacher.predict(observations)[0] + 2.0 * noise_sd * rng.standard_normal((len(observations), 1))

    model = kbt(n_envs=n_envs, tensorboard_log=str(tmp_path), n_steps=20)
    noise_sd = math.sqrt(float(model.policy.head.noise_cov[0, 0]) * model.policy.head.mean_square_scale)
    seen = Updates(model)
    model.learn(60 * n_envs, callback=KalmanAdapter(noisy))
    log = events(tmp_path)
    density = np.array(seen.means("log_density", 20))
    np.testing.assert_allclose(list(curve(log, "kalman/nlpd").values()), -density / n_envs, rtol=1e-5)
    inside = [info.nis <= stats.chi2.ppf(0.95, n_envs) for info in seen.infos]
    expected = [float(np.mean(inside[i : i + 20])) for i in range(0, 60, 20)]
    shown = curve(log, "kalman/coverage_95")
    np.testing.assert_allclose(list(shown.values()), expected, rtol=1e-6)
    assert list(shown) == [20 * n_envs, 40 * n_envs, 60 * n_envs]
    assert 0 < sum(inside) < len(inside)


def test_discrete_actions_have_a_density_and_no_region(tmp_path: Path) -> None:
    model = KBT(env=gym.make("kbt_rl/ShiftedDiscreteInvertedPendulum-v0"), seed=0, tensorboard_log=str(tmp_path))
    seen = Updates(model)
    model.learn(10, callback=KalmanAdapter(lambda observations: np.zeros(len(observations), dtype=np.int64)))
    log = events(tmp_path)
    shown = list(curve(log, "kalman/nlpd").values())
    np.testing.assert_allclose(shown, -np.array(seen.means("log_density", 10)), rtol=1e-5)
    assert shown[0] > 0.0
    assert "kalman/coverage_95" not in log.Tags()["scalars"]


def test_without_labels_there_is_nothing_to_tell() -> None:
    info: Any = kbt(SHIFTED).update(Sample(states(1), np.array([[np.nan]])))
    assert info.labels == 0
    assert math.isnan(info.log_density)
