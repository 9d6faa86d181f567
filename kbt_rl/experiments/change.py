"""The world moves again and again: ten plants in sequence, a slow drift, and a long time in which nothing happens.

Every strategy meets the same plants, the same states and the same noisy labels, and starts from the same pre-trained
policy. Results are rows of plain numbers; :mod:`kbt_rl.experiments.change_report` writes and draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kbt_rl.agents.kbt import KBT, KBTInfo
from kbt_rl.agents.lqr import lqr_gain
from kbt_rl.agents.policies import TransformerPolicy
from kbt_rl.agents.sample import Sample
from kbt_rl.callbacks.adaptation import (
    AdaptationStrategy,
    Forgetting,
    ProcessNoise,
    ReopenOnDetection,
    TowardsPrior,
)
from kbt_rl.envs.inverted_pendulum import LABEL_BOX, NOMINAL, SHIFTED, InvertedPendulumParams
from kbt_rl.envs.schedule import PLANT_RANGES, reflected
from kbt_rl.experiments.config import KBT_METHOD, Method
from kbt_rl.experiments.learners import batch_force, build, features_of, snapshot
from kbt_rl.experiments.simulation import Force, PlantBatch, expert_force, simulate, starts
from kbt_rl.inference.monitor import Cusum, Monitor, NoiseReference, WindowedChiSquare

FloatArray = npt.NDArray[np.float64]
Params = InvertedPendulumParams

NONE, PRETRAINED, EXPERT = "none", "pre-trained", "expert"
CUSUM = "re-open on CUSUM"
LEARNED = "re-open on CUSUM, learned noise"
TRAP = "the same without a lag"
#: Samples that the reference noise level lies back where the noise is learned.
NOISE_LAG = 50
#: Of the monitors in the experiments, per sample.
FALSE_ALARM_RATE = 1e-5


def strategies() -> dict[str, Callable[[], AdaptationStrategy | None]]:
    """What is compared, by name."""
    return {
        NONE: lambda: None,
        "forgetting 0.98": lambda: Forgetting(0.98),
        "process noise": lambda: ProcessNoise(PROCESS_NOISE),
        "towards the prior": lambda: TowardsPrior(TOWARDS_PRIOR),
        "re-open on window": lambda: ReopenOnDetection(WindowedChiSquare(FALSE_ALARM_RATE)),
        CUSUM: lambda: ReopenOnDetection(Cusum(FALSE_ALARM_RATE)),
        LEARNED: lambda: ReopenOnDetection(Cusum(FALSE_ALARM_RATE), noise_lag=NOISE_LAG),
        TRAP: lambda: ReopenOnDetection(Cusum(FALSE_ALARM_RATE)),
    }


#: In units of the prior's covariance, per sample.
PROCESS_NOISE, TOWARDS_PRIOR = 3e-3, 3e-3
#: The strategies whose learner is not told the noise variance.
UNTOLD = (LEARNED, TRAP)


@dataclass(frozen=True)
class ChangeConfig:
    """One stream and one pre-trained policy.

    Attributes:
        pretrain_seed: Of the policy.
        stream_seed: Of plants, states, noise and starts.
        plants: Shifts in sequence.
        samples: Labels on each plant.
        checkpoints: Labels since the shift at which the policy is evaluated.
        starts: Episodes of an evaluation.
        noise_variance: Of the labels, N^2; the default is what a head assumes if it is told nothing.
        drift_samples: Labels under the drift.
        drift_rate: Standard deviation of the step that each logarithm takes with every label.
        drift_every: Labels between two evaluations under the drift.
    """

    pretrain_seed: int
    stream_seed: int
    plants: int = 10
    samples: int = 150
    checkpoints: tuple[int, ...] = (0, 10, 25)
    starts: int = 20
    noise_variance: float = 0.1
    drift_samples: int = 1_500
    drift_rate: float = 0.02
    drift_every: int = 100


class SuccessRow(NamedTuple):
    """Success of a policy ``samples`` labels after shift number ``shift`` (or into the drift, shift 0)."""

    strategy: str
    pretrain_seed: int
    stream_seed: int
    shift: int
    samples: int
    success: float


class DelayRow(NamedTuple):
    """Labels from a shift to the first alarm, the first label of the new plant being 1; None without an alarm.

    ``repeats`` are further alarms on the same plant. Shift 0 is the nominal plant, where every alarm is false.
    """

    strategy: str
    pretrain_seed: int
    stream_seed: int
    shift: int
    delay: int | None
    repeats: int


class FalseAlarmRow(NamedTuple):
    """Alarms of one test while nothing changes."""

    test: str
    noise_variance: float
    noise: str
    misfit: float
    samples: int
    alarms: int


# ---------------------------------------------------------------------- plants


class PlantDraw(NamedTuple):
    """Plants in sequence, and how many draws were rejected because the shift was small, or the expert too weak."""

    plants: list[Params]
    too_similar: int
    too_hard: int


#: A plant on which the previous expert succeeds as often is no shift; one where its own does not, no task.
_MOST_BEFORE, _LEAST_EXPERT = 0.5, 0.95
_AT_ONCE = 32


def draw_plants(config: ChangeConfig) -> PlantDraw:
    """Plants uniform in ``PLANT_RANGES``; on each, the previous plant's expert succeeds from under half of the starts.

    The first follows the nominal plant. Draws on which the plant's own expert does not reach 0.95 within the 10 s of
    an episode are rejected as well.
    """
    rng = np.random.default_rng([config.stream_seed, 21])
    low, high = np.array(list(PLANT_RANGES.values())).T
    initial = starts(config.stream_seed, config.starts)
    plants, similar, hard = [NOMINAL], 0, 0
    while len(plants) <= config.plants:
        drawn = rng.uniform(low, high, (_AT_ONCE, 3))  # simulated together, taken in turn
        cart_mass, pole_mass, half_length = drawn.T[..., None]
        batch = PlantBatch(cart_mass, pole_mass, half_length, np.array(NOMINAL.gravity))
        force = expert_force(plants[-1])
        before = simulate(force, np.broadcast_to(initial, (_AT_ONCE, *initial.shape)), batch).success.mean(axis=-1)
        shifts = np.flatnonzero(before < _MOST_BEFORE)
        similar += int(shifts[0]) if len(shifts) else _AT_ONCE
        if len(shifts):
            plant = Params(*drawn[shifts[0]].tolist())
            if simulate(expert_force(plant), initial, plant).success.mean() < _LEAST_EXPERT:
                hard += 1
            else:
                plants.append(plant)
    return PlantDraw(plants[1:], similar, hard)


def drifting_plants(config: ChangeConfig) -> Iterator[Params]:
    """The plant at each label: a random walk from the shifted plant, reflected at ``PLANT_RANGES``."""
    rng = np.random.default_rng([config.stream_seed, 23])
    low, high = np.log(np.array(list(PLANT_RANGES.values()))).T
    place = np.log(list(SHIFTED.dynamics.values()))
    while True:
        yield Params(*np.exp(place).tolist())
        place = reflected(place + config.drift_rate * rng.standard_normal(3), low, high)


# ---------------------------------------------------------------------- learning


class NoiseEstimate:
    """Label noise from the innovations, exponentially forgotten; it sets the variance that the head assumes.

    A sample counts as the second moment of its noise given its innovation, ``(r / s)^2 e^2 + r (1 - r / s)`` for
    assumed noise ``r`` and predictive variance ``s`` (the EM step): what the weights may explain says little about it.
    A stand-in for a noise model of the head's own, for one output.

    Args:
        forgetting: Memory of ``1 / (1 - forgetting)`` samples.
        trust: How many samples the first value counts as.
    """

    def __init__(self, forgetting: float = 0.995, trust: float = 10.0) -> None:
        self.forgetting, self._weight = forgetting, trust

    def after_update(self, model: KBT, info: KBTInfo) -> None:
        """Follow the innovation that the update saw."""
        noise = info.predictive_variance - info.epistemic_variance
        share = noise / info.predictive_variance
        seen = (share * info.innovation) ** 2 + noise * (1.0 - share)
        self._weight = self.forgetting * self._weight + 1.0
        model.policy.head.set_noise(noise + (seen - noise) / self._weight)


class Learner:
    """A KBT model with its strategy and, where it is not told the noise, its estimate of it."""

    def __init__(self, name: str, pretrained: KBT, noise_variance: float) -> None:
        told = name not in UNTOLD
        model = build(KBT_METHOD, pretrained, noise_variance if told else 0.0)
        assert isinstance(model, KBT)
        self.model, self.strategy = model, strategies()[name]()
        self._estimate = None if told else NoiseEstimate()

    def learn(self, sample: Sample) -> bool:
        """Learn a sample; whether a change was noticed."""
        info = self.model.update(sample)
        assert isinstance(info, KBTInfo)
        if self._estimate is not None:
            self._estimate.after_update(self.model, info)
        return self.strategy is not None and self.strategy.after_update(self.model, info)


def labelled(config: ChangeConfig, policy: TransformerPolicy, plants: Sequence[Params], purpose: int) -> list[Sample]:
    """One sample for each plant: a state uniform in the label box and the noisy force of the plant's expert.

    The encoder is frozen and the same for all strategies, so all states are encoded at once.
    """
    rng = np.random.default_rng([config.stream_seed, purpose])
    box = np.asarray(LABEL_BOX)
    states = rng.uniform(-box, box, (len(plants), 4)).astype(np.float32)
    gains = {plant: lqr_gain(plant)[0] for plant in dict.fromkeys(plants)}
    forces = np.array([-gains[plant] @ state for plant, state in zip(plants, states.astype(np.float64), strict=True)])
    actions = (forces + config.noise_variance**0.5 * rng.standard_normal(len(plants))) / SHIFTED.max_force
    features = torch.cat([features_of(policy, part) for part in np.array_split(states, -(-len(states) // 1_000))])
    context = policy.start(states)
    return [
        Sample(context.rows(slice(index, index + 1)), actions[index], features=features[index : index + 1])
        for index in range(len(plants))
    ]


def run_shifts(
    config: ChangeConfig, pretrained: KBT, plants: Sequence[Params], names: Sequence[str]
) -> tuple[list[SuccessRow], list[DelayRow]]:
    """All strategies through all plants, after as many labels of the nominal one, so that the posterior is settled."""
    visited = [NOMINAL, *plants]
    samples = labelled(config, pretrained.policy, [plant for plant in visited for _ in range(config.samples)], 22)
    learners = {name: Learner(name, pretrained, config.noise_variance) for name in names}
    views: dict[str, list[Any]] = {name: [] for name in names}
    seeds = (config.pretrain_seed, config.stream_seed)
    delays: list[DelayRow] = []
    for name, learner in learners.items():
        alarms: list[list[int]] = [[] for _ in visited]
        for index, sample in enumerate(samples):
            shift, before = divmod(index, config.samples)
            if shift and before in config.checkpoints:
                views[name].append(snapshot(learner.model))
            if learner.learn(sample):
                alarms[shift].append(before + 1)
        if isinstance(learner.strategy, ReopenOnDetection):
            delays += [
                DelayRow(name, *seeds, shift, seen[0] if seen else None, max(len(seen) - 1, 0))
                for shift, seen in enumerate(alarms)
            ]
    rows: list[SuccessRow] = []
    per_plant = len(config.checkpoints)
    for shift, plant in enumerate(plants):
        chosen = [view for name in names for view in views[name][shift * per_plant : (shift + 1) * per_plant]]
        points = [(name, samples) for name in names for samples in config.checkpoints]
        rows += _evaluated(config, pretrained, plant, chosen, points, shift + 1)
    return rows, delays


def run_drift(config: ChangeConfig, pretrained: KBT, names: Sequence[str]) -> list[SuccessRow]:
    """All strategies under the drift, each evaluated on the plant of the moment."""
    walk = drifting_plants(config)
    plants = [next(walk) for _ in range(config.drift_samples + 1)]
    stream = labelled(config, pretrained.policy, plants[:-1], 24)
    points = range(0, config.drift_samples + 1, config.drift_every)
    views: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        learner = Learner(name, pretrained, config.noise_variance)
        for index in range(config.drift_samples + 1):
            if index in points:
                views[name].append(snapshot(learner.model))
            if index < config.drift_samples:
                learner.learn(stream[index])
    rows: list[SuccessRow] = []
    for place, index in enumerate(points):
        chosen = [views[name][place] for name in names]
        rows += _evaluated(config, pretrained, plants[index], chosen, [(name, index) for name in names], 0)
    return rows


def _evaluated(
    config: ChangeConfig,
    pretrained: KBT,
    plant: Params,
    views: Sequence[Any],
    points: Sequence[tuple[str, int]],
    shift: int,
) -> list[SuccessRow]:
    """Success of all views on one plant in one batch, with the expert and the pre-trained policy beside them."""
    initial = starts(config.stream_seed, config.starts)
    still = build(Method(PRETRAINED, "pretrained"), pretrained)
    policies = [*views, snapshot(still)]
    force: Force = batch_force(still, policies)
    success = simulate(force, np.broadcast_to(initial, (len(policies), *initial.shape)), plant).success.mean(axis=-1)
    expert = float(simulate(expert_force(plant), initial, plant).success.mean())
    seeds = (config.pretrain_seed, config.stream_seed, shift)
    rows = [SuccessRow(name, *seeds, samples, float(s)) for (name, samples), s in zip(points, success, strict=False)]
    for samples in sorted({samples for _, samples in points}):
        rows.append(SuccessRow(PRETRAINED, *seeds, samples, float(success[-1])))
        rows.append(SuccessRow(EXPERT, *seeds, samples, expert))
    return rows


# ---------------------------------------------------------------------- nothing happens


def run_stationary(
    pretrained: KBT, stream_seed: int, samples: int, noise_variance: float, *, told: bool
) -> list[FalseAlarmRow]:
    """False alarms of several tests on the same innovations of one plant, from the first label on.

    The tests look on; nothing re-opens the posterior. Without label noise the head assumes its default, 1e-3 of the
    squared label scale (0.1 N^2).
    """
    config = ChangeConfig(pretrained.seed or 0, stream_seed, noise_variance=noise_variance)
    learner = Learner(NONE, pretrained, noise_variance if told else 0.0)
    estimate = None if told else NoiseEstimate()
    head = learner.model.policy.head
    tests: list[tuple[str, float, NoiseReference, Monitor]] = [
        (name, misfit, NoiseReference(misfit, lag), make())
        for misfit in (0.0, 0.01)
        for name, lag, make in (
            ("window", 0 if told else NOISE_LAG, lambda: WindowedChiSquare(FALSE_ALARM_RATE)),
            ("CUSUM", 0 if told else NOISE_LAG, lambda: Cusum(FALSE_ALARM_RATE)),
        )
    ]
    for sample in labelled(config, pretrained.policy, [SHIFTED] * samples, 25):
        info = learner.model.update(sample)
        assert isinstance(info, KBTInfo)
        if estimate is not None:
            estimate.after_update(learner.model, info)
        unit = head.mean_square_scale
        for _, _, reference, monitor in tests:
            nis = reference.restate(info.nis, info.epistemic_variance / unit, info.predictive_variance / unit)
            monitor.observe(nis)
    noise = "known" if told else "learned"
    return [
        FalseAlarmRow(name, noise_variance, noise, misfit, samples, monitor.alarms)
        for name, misfit, _, monitor in tests
    ]
