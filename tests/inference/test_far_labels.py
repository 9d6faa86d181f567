"""Labels far from their prediction: refused where the noise is Gaussian, harmless where wild ones are expected."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STRUCTURES
from torch import Tensor, nn
from wholeness.attacks import bits

from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.network import FARTHEST
from kbt_rl.inference.noise.learned import NoiseModel
from kbt_rl.inference.types import NoiseEstimate

FEATURES, NOISE = 6, 1e-3
GAUSSIAN: list[dict[str, Any]] = [{}, {"noise": "learned"}, {"noise": "learned", "noise_statistic": "variational"}]
ROBUST: list[dict[str, Any]] = [{"robust_dof": 4.0}, {"robust_dof": 4.0, "noise": "learned"}]


class Teacher:
    """A linear function with a little noise, and a head that has seen thirty labels of it."""

    def __init__(self, outputs: int = 1, **config: Any) -> None:
        self.generator = np.random.default_rng(5)
        self.weights = self.generator.standard_normal((outputs, FEATURES))
        settings: dict[str, Any] = {"layers": 2, "width": 12, "noise_variance": NOISE, **config}
        self.head = BayesianHead.from_linear(nn.Linear(FEATURES, outputs), HeadConfig(**settings))
        for _ in range(30):
            self.head.update(*self.sample())

    def sample(self, rows: int = 1) -> tuple[Tensor, Tensor]:
        features = self.generator.standard_normal((rows, FEATURES))
        target = features @ self.weights.T
        noise = math.sqrt(NOISE) * self.generator.standard_normal(target.shape)
        return torch.from_numpy(features), torch.from_numpy(target + noise)

    def far(self, deviations: float, rows: int = 1) -> tuple[Tensor, Tensor]:
        """Rows whose first label is so many standard deviations from its prediction; the others are as predicted."""
        features, _ = self.sample(rows)
        mean, epistemic, aleatoric = self.head.predict(features)
        mean[0] += deviations * (epistemic + aleatoric)[0].diagonal().sqrt()
        return features, mean

    def error(self) -> float:
        """Of the predicted mean, root mean square over new features."""
        features, _ = self.sample(200)
        return float((self.head(features) - features @ torch.from_numpy(self.weights.T)).square().mean().sqrt())


CASES = [(config, name, layers) for config in GAUSSIAN for name in STRUCTURES for layers in (1, 2, 3)]
CASES.append(({}, "shared", 1))  # whose learned noise is Student's t


@pytest.mark.parametrize(("config", "structure", "layers"), CASES)
@pytest.mark.parametrize(("outputs", "rows"), [(1, 1), (1, 3), (2, 1), (2, 3), (1, 40)])
def test_a_label_that_gaussian_noise_cannot_account_for_is_refused(
    config: dict[str, Any], structure: str, layers: int, outputs: int, rows: int
) -> None:
    teacher = Teacher(outputs, structure=structure, layers=layers, **config)
    before, labels = bits(teacher.head), outputs * min(rows, 32)
    # Correlated outputs share an error, so that their distance is not the one of each; it is at least the largest.
    with pytest.raises(UpdateError, match="standard deviations from its prediction"):
        teacher.head.update(*teacher.far(2.0 * FARTHEST * math.sqrt(labels), rows))
    assert bits(teacher.head) == before
    # The least that NIS can be is that of one output, and the most that of all outputs if each were on its own. Rows
    # that are learned one after another are each told as predicted before the first: its wild label is theirs too.
    info = teacher.head.update(*teacher.far(FARTHEST / 100.0 if layers > 1 or config else 1e3, rows))
    assert info.labels == rows * outputs


RULES = [(rule, name, layers) for rule in ("measure", "replace") for name in STRUCTURES for layers in (1, 2)]


@pytest.mark.parametrize(("rule", "structure", "layers"), [*RULES, ("measure", "shared", 1)])
def test_the_bound_is_the_same_in_machine_code_and_in_the_general_form(rule: str, structure: str, layers: int) -> None:
    teacher = Teacher(structure=structure, layers=layers, rule=rule)
    before = bits(teacher.head)
    features, above = teacher.far(1.0001 * FARTHEST)
    batch = HeadBatch([teacher.head])
    for update in (teacher.head.update, teacher.head.increment, partial(batch.update, together=True)):
        with pytest.raises(UpdateError, match="standard deviations from its prediction"):
            update(features, above)
        assert bits(teacher.head) == before
    refused = batch.update(features, above).refused
    assert "standard deviations from its prediction" in str(refused[0])
    assert bits(teacher.head) == before
    features, below = teacher.far(0.9999 * FARTHEST)
    teacher.head.increment(features, below)
    assert teacher.head.update(features, below).nis == pytest.approx((0.9999 * FARTHEST) ** 2, rel=1e-6)


def test_probabilities_have_no_far_labels() -> None:
    head = BayesianHead.from_linear(nn.Linear(FEATURES, 3), HeadConfig(rule="laplace", last_variance=1.0))
    features = torch.ones(1, FEATURES, dtype=torch.float64)
    for _ in range(200):
        head.update(features, torch.tensor([[1.0, 0.0, 0.0]]))
    assert math.isfinite(head.update(features, torch.tensor([[0.0, 0.0, 1.0]])).nis)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("config", GAUSSIAN)
def test_the_farthest_label_that_is_learned_does_not_stop_what_follows(
    config: dict[str, Any], outputs: int, structure: str
) -> None:
    teacher = Teacher(outputs, structure=structure, **config)
    features, target = teacher.far(0.0)
    _, epistemic, aleatoric = teacher.head.predict(features)
    target[0, 0] += 0.5 * FARTHEST * float((epistemic + aleatoric)[0, 0, 0].sqrt())
    teacher.head.update(features, target)
    for _ in range(60):
        teacher.head.update(*teacher.sample())  # an error here is the failure
    assert torch.isfinite(teacher.head.state.mean).all()


def test_a_learned_noise_stays_within_what_float64_holds_and_says_so() -> None:
    model = NoiseModel.of(HeadConfig(noise="learned", noise_floor=1e-9), 2)
    assert model is not None
    before = NoiseEstimate(np.diag([1.0, 1e-3]), 10.0)
    for wild, repairs in [(1e3, 0), (1e9, 1)]:
        judged = model.judge(np.array([[wild, 0.01]]), 1e-2 * np.eye(2), before)
        values = np.linalg.eigvalsh(judged.estimate.cov)
        assert judged.repairs == repairs
        assert values[-1] == pytest.approx(wild**2 / 11.0, rel=0.1)
        assert values[0] >= 0.9e-13 * values[-1]
        np.linalg.cholesky(judged.estimate.cov)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_repair_of_a_learned_noise_is_in_the_record(structure: str) -> None:
    teacher = Teacher(2, structure=structure, noise="learned", noise_floor=1e-9)
    teacher.head.set_noise(torch.diag(torch.tensor([1e6, 1e-6], dtype=torch.float64)))
    features, target = teacher.far(0.0)
    target[0, 0] += 1e8
    assert teacher.head.update(features, target).repairs == 1
    assert teacher.head.update(*teacher.sample()).repairs == 0


@pytest.mark.parametrize("config", ROBUST)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("outputs", "rows"), [(1, 1), (2, 1), (2, 3)])
def test_where_wild_labels_are_expected_none_is_too_far(
    config: dict[str, Any], structure: str, outputs: int, rows: int
) -> None:
    teacher = Teacher(outputs, structure=structure, **config)
    error = teacher.error()
    for deviations in (1e3, 1e8, 1e12, 1e16, 1e20):
        features, target = teacher.far(deviations, rows)
        before = teacher.head(features)
        info = teacher.head.update(features, target)
        assert info.label_weight < 1e-3 if rows == 1 else info.label_weight < 1.0
        moved = (teacher.head(features) - before).abs().max()
        # Ordinary rows beside it make the hidden units surer, which moves the mean a little.
        assert float(moved) < (100.0 * math.sqrt(NOISE / deviations) if rows == 1 else 1e-2)
    assert teacher.error() < 1.5 * error


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_rollback_of_a_far_label_brings_the_means_back_bit_for_bit(structure: str) -> None:
    teacher = Teacher(structure=structure, history=5)
    before = bits(teacher.head)
    prediction = teacher.head(torch.ones(4, FEATURES))
    teacher.head.update(*teacher.far(0.5 * FARTHEST))
    teacher.head.update(*teacher.sample())
    assert teacher.head.rollback(2) == 2
    assert bits(teacher.head)["mean"] == before["mean"]
    torch.testing.assert_close(teacher.head(torch.ones(4, FEATURES)), prediction, rtol=1e-5, atol=1e-5)


def test_students_predictions_have_no_bound() -> None:
    """Noise that is learned exactly expects labels of any size: a far one widens it."""
    teacher = Teacher(2, layers=1, noise="learned")
    assert teacher.head.spec.structure == "shared"
    for deviations in (1e3, 1e8, 1e12):
        info = teacher.head.update(*teacher.far(deviations))
        assert math.isfinite(info.log_density)
        assert info.dof < math.inf
    for _ in range(40):
        teacher.head.update(*teacher.sample())
    assert torch.isfinite(teacher.head.mean).all()
