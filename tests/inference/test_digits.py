"""No posterior predicts a negative variance, and nothing is refused that exact arithmetic could learn: 60 digits."""

from __future__ import annotations

from typing import Any, NamedTuple

import mpmath as mp
import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import MACHINE_CODE
from wholeness.attacks import bits

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead

Array = npt.NDArray[np.float64]

KINDS = ("plain", "duplicate", "constant", "offset", "scales", "repeat")
# Prior variance of an output over its noise: below the first every digit asked for is there, below the second
# nothing is refused.
ACCURATE, LEARNED = 1e15, 1e20


class Case(NamedTuple):
    """A stream for one layer and one output."""

    features: Array
    labels: Array
    prior: float
    noise: float
    probes: Array

    @property
    def ratio(self) -> float:
        return self.prior * (float(np.square(self.features).sum(axis=1).max()) + 1.0) / self.noise


def case(seed: int) -> Case:
    """Features 1e-6 to 1e7, duplicate, constant or around 1e6; priors 1e-12 to 1e12, noise 1e-14 to 1e6."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    count, size = int(rng.integers(1, 13)), int(rng.integers(1, 5))
    scale = 10.0 ** rng.uniform(-6, 7)
    features = rng.normal(size=(count, size)) * scale
    if kind == "duplicate":
        features[:, -1] = features[:, 0]
    elif kind == "constant":
        features[:, 0] = scale
    elif kind == "offset":
        features = rng.normal(size=(count, size)) + 1e6
    elif kind == "scales":
        features = rng.normal(size=(count, size)) * 10.0 ** rng.uniform(-6, 7, size=size)
    elif kind == "repeat":
        features = np.repeat(features[:1], 10, axis=0)
    prior, noise = 10.0 ** rng.uniform(-12, 12), 10.0 ** rng.uniform(-14, 6)
    weights = rng.normal(size=size + 1) * np.sqrt(prior)
    labels = features @ weights[:-1] + weights[-1] + rng.normal(size=len(features)) * np.sqrt(noise)
    if kind == "repeat":
        labels[:] = labels[0]
    others = rng.normal(size=(2, size)) * np.abs(features).max()
    return Case(features, labels, prior, noise, np.concatenate([features[:2], features[-1:], others]))


def exactly(given: Case) -> list[tuple[Any, Any]]:
    """Mean and variance at the probes, by the Kalman filter in 60 digits."""
    with mp.workdps(60):
        size = given.features.shape[1] + 1
        cov, mean = mp.eye(size) * mp.mpf(given.prior), mp.matrix(size, 1)
        for row, label in zip(given.features.tolist(), given.labels.tolist(), strict=True):
            inputs = mp.matrix([*row, 1])
            gain = cov * inputs
            total = (inputs.T * gain)[0] + mp.mpf(given.noise)
            mean = mean + gain * ((mp.mpf(label) - (inputs.T * mean)[0]) / total)
            cov = cov - gain * gain.T / total
        probes = [mp.matrix([*row, 1]) for row in given.probes.tolist()]
        return [((probe.T * mean)[0], (probe.T * cov * probe)[0]) for probe in probes]


def learned(given: Case, structure: Any, fast: bool) -> tuple[Array, Array]:
    """Mean and variance at the probes, by a head."""
    config = HeadConfig(structure=structure, rho=0.0, last_variance=given.prior, noise_variance=given.noise)
    head = BayesianHead(given.features.shape[1], 1, config)
    if not fast:
        head._engine = None  # there is no public way to leave machine code out for one head
    for row, label in zip(given.features, given.labels, strict=True):
        head.update(row[None], [[label]])
    mean, variance, _ = head.predict(given.probes)
    return mean[:, 0].numpy(), variance[:, 0, 0].numpy()


def errors(given: Case, mean: Array, variance: Array) -> tuple[float, float]:
    """Largest error of the means, in units of the exact mean and deviation, and of the variances, relative."""
    pairs = list(zip(mean.tolist(), variance.tolist(), exactly(given), strict=True))
    off_mean = max(abs(mp.mpf(m) - em) / (abs(em) + mp.sqrt(ev)) for m, _, (em, ev) in pairs)
    off_variance = max(abs(mp.mpf(v) - ev) / ev for _, v, (_, ev) in pairs)
    return float(off_mean), float(off_variance)


@pytest.mark.parametrize("structure", ["shared", "neuron", "joint", "layer"])
@pytest.mark.parametrize("fast", [pytest.param(True, marks=MACHINE_CODE), False], ids=["machine code", "definition"])
def test_a_thousand_streams_agree_with_sixty_digits(structure: str, fast: bool) -> None:
    # A thousand in all over the structures and ways; each way gets its own.
    first = 125 * (["shared", "neuron", "joint", "layer"].index(structure) * 2 + fast)
    worst_mean = worst_variance = 0.0
    for seed in range(first, first + 125):
        given = case(seed)
        try:
            mean, variance = learned(given, structure, fast)
        except UpdateError:
            assert given.ratio > LEARNED, f"seed {seed} is refused at a ratio of {given.ratio:.1e}"
            continue
        assert (variance >= 0.0).all(), f"seed {seed}"
        assert np.isfinite(mean).all(), f"seed {seed}"
        if given.ratio < ACCURATE:
            off_mean, off_variance = errors(given, mean, variance)
            worst_mean, worst_variance = max(worst_mean, off_mean), max(worst_variance, off_variance)
    assert worst_mean < 1e-6
    assert worst_variance < 1e-6


def test_independent_weights_keep_positive_variances() -> None:
    for seed in range(300):
        given = case(seed)
        _, variance = learned(given, "diagonal", fast=True)
        assert (variance >= 0.0).all()


@pytest.mark.parametrize("structure", ["joint", "layer", "neuron", "diagonal"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_deeper_heads_predict_no_negative_variance(structure: Any, layers: int) -> None:
    for seed in range(30):
        given = case(seed)
        config = HeadConfig(
            layers=layers,
            structure=structure,
            rho=0.0,
            last_variance=given.prior,
            hidden_variance=min(1e-5, given.prior),
            noise_variance=given.noise,
        )
        head = BayesianHead(given.features.shape[1], 1, config)
        for row, label in zip(given.features, given.labels, strict=True):
            before = head.covariance()
            try:
                head.update(row[None], [[label]])
            except UpdateError:
                assert torch.equal(head.covariance(), before)
        variance = head.predict(given.probes).epistemic
        assert bool((variance >= 0.0).all())


def test_the_first_report_of_lost_digits() -> None:
    """A label at x = 1e7 left the variance -8.0e-4 there; it is 1.0e-3."""
    head = BayesianHead(1, 1, HeadConfig(rho=0.0))
    for _ in range(10):
        head.update([[1e7]], [[1.0]])
    assert float(head.predict([[1e7]]).epistemic) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("structure", ["shared", "neuron", "joint", "layer"])
def test_what_is_below_rounding_is_refused_and_changes_nothing(structure: Any) -> None:
    head = BayesianHead(2, 1, HeadConfig(structure=structure, noise_variance=1e-30, rho=0.0))
    head.update([[1e5, 1.0]], [[1.0]])
    before = bits(head)
    with pytest.raises(UpdateError, match="float64 resolves"):
        head.update([[1e5, 1.0]], [[1.0]])
    assert bits(head) == before
