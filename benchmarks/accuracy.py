"""Error, coverage, log predictive density and time of the head and its rivals, one sample at a time.

Two toys, of which the features of one span the answer and those of the other do not, and the paper's pendulum: features
of a pre-trained encoder, labels of the shifted plant's expert. The noise is known to all. The head's prior is chosen on
the very samples it learns from, by the sum of one-step-ahead log predictive densities; no test row is looked at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.peers import Head, Peer, peers
from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.lqr_gain import lqr_gain
from kbt_rl.agents.prior_choice import prior_grid
from kbt_rl.envs.plant import LABEL_BOX, SHIFTED
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.evidence import sequential_log_density
from studies.pendulum import Pendulum
from studies.statistics import Z95

Array = npt.NDArray[np.float64]

# Samples that a learner takes in a row before the next one's turn, so that all see the machine as fast.
_TURN = 10
CANDIDATES = prior_grid(
    HeadConfig(layers=2), hidden=(1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2), last=(0.1, 1.0), rhos=(0.0, 0.9)
)


class Task(NamedTuple):
    """Samples to learn from and rows to be tested on, with noisy labels of variance ``noise``."""

    name: str
    features: Array
    labels: Array
    test_features: Array
    test_labels: Array
    noise: float


class Score(NamedTuple):
    """What a learner reached on held-out noisy labels, and its choice of the prior.

    Attributes:
        task: Name of the task.
        method: Name of the learner.
        seed: Of the task.
        error: Root mean square of prediction minus noisy label.
        coverage: Share of the labels inside 95 % intervals.
        density: Mean log predictive density of a label.
        update_us: Microseconds of an update, median over the samples.
        prior: ``hidden_variance``, ``last_variance`` and ``rho`` of the head, empty for others.
    """

    task: str
    method: str
    seed: int
    error: float
    coverage: float
    density: float
    update_us: float
    prior: str


def toy(seed: int, in_span: bool, samples: int = 400, held_out: int = 1_000) -> Task:
    """Linear labels of standard normal states, seen through 16 ReLU features, centred on the mean of the stream's."""
    gain = lqr_gain(SHIFTED)[0].ravel()
    rng = np.random.default_rng(seed)
    if in_span:
        half = rng.standard_normal((8, 4)) / 2
        slopes, offsets = np.vstack([half, -half]), np.zeros(16)
    else:
        slopes, offsets = rng.standard_normal((16, 4)) / 2, rng.standard_normal(16) / 2
    states = rng.standard_normal((samples + held_out, 4))
    labels = -states @ gain / np.linalg.norm(gain) + 0.1 * rng.standard_normal(len(states))
    features = np.maximum(states @ slopes.T + offsets, 0.0)
    features -= features[:samples].mean(axis=0)  # as a policy's head centres its own, at pre-training; for all alike
    name = "toy, in span" if in_span else "toy, out of span"
    return Task(name, features[:samples], labels[:samples], features[samples:], labels[samples:], 0.01)


def pendulum(model: KBT, seed: int, samples: int = 400, held_out: int = 1_000, noise_sd: float = 1.0) -> Task:
    """Features of a pre-trained encoder, standardised; labels of the shifted plant's expert in units of 10 N."""
    rng, box = np.random.default_rng([seed, 17]), np.asarray(LABEL_BOX)
    states = rng.uniform(-box, box, (samples + held_out, 4)).astype(np.float32)
    features = model.policy.encode(model.policy.start(states)).double()
    head = model.policy.head
    rows = ((features - head.feature_mean) / head.feature_scale).numpy()
    labels = (
        SHIFTED.max_force * Pendulum().expert().label(states)[:, 0] + noise_sd * rng.standard_normal(len(states))
    ) / 10.0
    return Task(
        "pendulum", rows[:samples], labels[:samples], rows[samples:], labels[samples:], (noise_sd / 10.0) ** 2
    )  # fmt: skip


def one_step_density(task: Task, config: HeadConfig) -> float:
    """Sum of the log predictive densities of each label before it was learned."""
    head = Head(task.features.shape[1], task.noise, config).head
    rows = (len(task.labels), 1, -1)
    return sequential_log_density(head, zip(task.features.reshape(rows), task.labels.reshape(rows), strict=True))


def choose(task: Task, candidates: Sequence[HeadConfig] = CANDIDATES) -> HeadConfig:
    """The candidate under which the samples were least surprising."""
    return max(candidates, key=lambda config: one_step_density(task, config))


def score(task: Task, seed: int, chosen: HeadConfig) -> tuple[list[Score], dict[str, str]]:
    """Scores of all learners, and the reasons of those that could not run."""
    learners: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, make in peers(task.features.shape[1], task.noise, chosen).items():
        try:
            learners[name] = make()
        except (ImportError, OSError) as error:  # a shared library that is not there is either
            missing[name] = str(error)
    priors = {
        name: _prior(learner.head.config)
        for name, learner in learners.items()
        if name.startswith("KBT") and isinstance(learner, Head)
    }
    return _scores(task, seed, learners, priors), missing


def ablation(task: Task, seed: int, chosen: HeadConfig) -> list[Score]:
    """The head with one part at a time taken away or changed."""
    variants = {
        "chosen prior": chosen,
        "default prior": HeadConfig(layers=2),
        "independent prior (rho 0)": replace(chosen, rho=0.0),
        "layers independent": replace(chosen, structure="layer"),
        "one term of the ReLU series": replace(chosen, relu_order=1),
        "four terms of the ReLU series": replace(chosen, relu_order=4),
    }
    learners = {name: Head(task.features.shape[1], task.noise, config) for name, config in variants.items()}
    return _scores(task, seed, learners, {name: _prior(config) for name, config in variants.items()})


def _prior(config: HeadConfig) -> str:
    """Variances and rho; those of ``HeadConfig`` where they are left to it."""
    rho = 0.99 if config.rho is None else config.rho
    last = 1.0 if config.last_variance is None else config.last_variance
    return f"{config.hidden_variance:g}, {last:g}, {rho:g}"


def _scores(task: Task, seed: int, learners: Mapping[str, Peer], priors: Mapping[str, str]) -> list[Score]:
    taken = learn(task, learners)
    return [_score(task, name, seed, learner, taken[name], priors.get(name, "")) for name, learner in learners.items()]


def learn(task: Task, learners: Mapping[str, Peer]) -> dict[str, float]:
    """Let each learn the task's samples in their order; microseconds of an update, median."""
    taken: dict[str, list[int]] = {name: [] for name in learners}
    for start in range(0, len(task.labels), _TURN):
        turn = slice(start, start + _TURN)
        for name, learner in learners.items():
            for row, label in zip(task.features[turn], task.labels[turn], strict=True):
                before = time.perf_counter_ns()
                learner.update(row, float(label))
                taken[name].append(time.perf_counter_ns() - before)
    return {name: float(np.median(each)) / 1e3 for name, each in taken.items()}


def _score(task: Task, name: str, seed: int, learner: Peer, update_us: float, prior: str) -> Score:
    """What one that has learned the task's samples says of its held-out rows."""
    mean, variance = learner.predict(task.test_features)
    error = task.test_labels - mean
    density = -0.5 * float(np.mean(np.log(2.0 * np.pi * variance) + error**2 / variance))
    covered = float(np.mean(np.abs(error) <= Z95 * np.sqrt(variance))) if math.isfinite(density) else math.nan
    return Score(task.name, name, seed, float(np.sqrt(np.mean(error**2))), covered, density, update_us, prior)
