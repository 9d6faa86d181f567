"""The world moves again and again: ten plants in sequence, a slow drift, and a long time in which nothing happens.

Results are rows of plain numbers; :mod:`kbt_rl.experiments.change_report` writes and draws them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.sample import Sample
from kbt_rl.callbacks.adaptation import ReopenOnDetection
from kbt_rl.envs.plant import NOMINAL, SHIFTED
from kbt_rl.experiments.aggregate import Estimate, estimate
from kbt_rl.experiments.change_setup import (
    CUSUM,
    EXPERT,
    FALSE_ALARM_RATE,
    LEARNED,
    NOISE_LAG,
    NONE,
    PRETRAINED,
    UNTOLD_NONE,
    ChangeConfig,
    Learner,
    Params,
    drifting_plants,
    labelled,
)
from kbt_rl.experiments.config import Method
from kbt_rl.experiments.learners import batch_force, build, snapshot
from kbt_rl.experiments.simulation import expert_force, simulate, starts
from kbt_rl.inference.monitor import Cusum, Monitor, NoiseReference, WindowedChiSquare


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
    lag: int
    misfit: float
    samples: int
    alarms: int


def run_shifts(
    config: ChangeConfig, pretrained: KBT, plants: Sequence[Params], names: Sequence[str]
) -> tuple[list[SuccessRow], list[DelayRow]]:
    """All strategies through all plants, after as many labels of the nominal one, so that the posterior is settled."""
    visited = [NOMINAL, *plants]
    samples = labelled(config, pretrained.policy, [plant for plant in visited for _ in range(config.samples)], 22)
    learners = {name: Learner(name, pretrained, config) for name in names}
    views: dict[str, list[Any]] = {name: [] for name in names}
    seeds = (config.pretrain_seed, config.stream_seed)
    delays: list[DelayRow] = []
    for name, learner in learners.items():
        alarms: list[list[int]] = [[] for _ in visited]
        for index, sample in enumerate(samples):
            shift, before = divmod(index, config.samples)
            if shift and before in config.checkpoints:
                views[name].append(snapshot(learner.model))
            learner.learn(sample)
            if learner.noticed:
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
        learner = Learner(name, pretrained, config)
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
    force = batch_force(still, policies)
    success = simulate(force, np.broadcast_to(initial, (len(policies), *initial.shape)), plant).success.mean(axis=-1)
    expert = float(simulate(expert_force(plant), initial, plant).success.mean())
    seeds = (config.pretrain_seed, config.stream_seed, shift)
    rows = [SuccessRow(name, *seeds, samples, float(s)) for (name, samples), s in zip(points, success, strict=False)]
    for samples in sorted({samples for _, samples in points}):
        rows.append(SuccessRow(PRETRAINED, *seeds, samples, float(success[-1])))
        rows.append(SuccessRow(EXPERT, *seeds, samples, expert))
    return rows


# ---------------------------------------------------------------------- nothing happens


def run_stationary(pretrained: KBT, stream_seed: int, samples: int, noise_variance: float) -> list[FalseAlarmRow]:
    """False alarms of several tests on one plant on which nothing changes, from the first label on.

    One learner is told the label noise, one learns it, and neither is told of the misfit, which is the harder case. The
    tests look on: nothing re-opens the posterior, so that all see the same innovations. Beside them stand strategies as
    they meet the shifts, each with a learner of its own that a false alarm re-opens.
    """
    config = ChangeConfig(pretrained.seed or 0, stream_seed, noise_variance=noise_variance)
    stream = labelled(config, pretrained.policy, [SHIFTED] * samples, 25)
    untold = replace(config, misfit_variance=0.0)
    watched = [_watched(Learner(name, pretrained, untold), stream, noise_variance) for name in (NONE, UNTOLD_NONE)]
    acting = [_acting(name, Learner(name, pretrained, config), stream, noise_variance) for name in (CUSUM, LEARNED)]
    return [*(row for rows in watched for row in rows), *acting]


def _watched(learner: Learner, stream: Sequence[Sample], noise_variance: float) -> list[FalseAlarmRow]:
    """Alarms of the tests on a learner's innovations."""
    lags = (0,) if learner.told else (0, NOISE_LAG)
    kinds: dict[str, Callable[[], Monitor]] = {
        "window": lambda: WindowedChiSquare(FALSE_ALARM_RATE),
        "CUSUM": lambda: Cusum(FALSE_ALARM_RATE),
    }
    tests = [
        (name, misfit, NoiseReference(misfit, lag), make())
        for misfit in (0.0, 0.01)
        for lag in lags
        for name, make in kinds.items()
    ]
    unit = learner.model.policy.head.mean_square_scale
    for sample in stream:
        info = learner.learn(sample)
        for _, _, reference, monitor in tests:
            monitor.observe(
                reference.restate(info.nis, info.epistemic_variance / unit, info.predictive_variance / unit)
            )
    return [
        FalseAlarmRow(name, noise_variance, _noise(learner), reference.lag, misfit, len(stream), monitor.alarms)
        for name, misfit, reference, monitor in tests
    ]


def _acting(name: str, learner: Learner, stream: Sequence[Sample], noise_variance: float) -> FalseAlarmRow:
    """Alarms of a strategy that re-opens the posterior at each of them."""
    for sample in stream:
        learner.learn(sample)
    strategy = learner.strategy
    assert isinstance(strategy, ReopenOnDetection)
    lag, misfit = strategy.reference.lag, strategy.reference.floor
    return FalseAlarmRow(name, noise_variance, _noise(learner), lag, misfit, len(stream), strategy.alarms)


def _noise(learner: Learner) -> str:
    return "known" if learner.told else "learned"


# ---------------------------------------------------------------------- in short


def success_after(rows: Sequence[SuccessRow], strategy: str, samples: int) -> Estimate:
    """Success so many labels after a shift, with an interval over shifts; under the drift over trials."""
    moves: defaultdict[tuple[int, int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.strategy == strategy and row.samples == samples:
            moves[row.pretrain_seed, row.stream_seed, row.shift].append(row.success)
    return estimate([float(np.mean(values)) for values in moves.values()])
