"""Does a prior that was chosen by evidence on a few plants hold on plants it was not chosen on?

The prior variances and the tie ``rho`` are chosen by one-step-ahead log predictive density on short labelled streams of
changed plants, drawn from stated ranges with tuning seeds. Then success and regret are measured on other plants: the
paper's shifted one and some drawn with seeds that were not used. Beside the chosen prior stand the default one, the
paper's single epsilon, the candidate with the worst score, and the pre-trained policy, which does not learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.kbt import KBT, KBTInfo
from kbt_rl.agents.prior_choice import (
    HIDDEN_VARIANCES,
    LAST_VARIANCES,
    RHOS,
    PriorChoice,
    choose_prior,
    prior_grid,
)
from kbt_rl.agents.sample import Sample
from kbt_rl.envs.plant import SHIFTED, InvertedPendulumParams
from kbt_rl.experiments import learners
from kbt_rl.experiments.aggregate import estimate
from kbt_rl.experiments.change_setup import ChangeConfig, draw_plants, labelled
from kbt_rl.experiments.config import FIRST_REPORTED_SEED, PRETRAINING, Method, tuned
from kbt_rl.experiments.learners import batch_force, build, snapshot
from kbt_rl.experiments.simulation import expert_force, regret, simulate, starts
from kbt_rl.inference.acting import ActingView
from kbt_rl.inference.config import HeadConfig

FloatArray = npt.NDArray[np.float64]

CHOSEN, DEFAULT, PAPER, WORST, NO_LEARNING = "chosen", "default", "paper's prior", "worst candidate", "pre-trained"
METHODS = (CHOSEN, DEFAULT, PAPER, WORST, NO_LEARNING)
_CHOICE, _JUDGEMENT = 31, 32  # what the label streams are for


@dataclass(frozen=True)
class StudyConfig:
    """The choice for one pre-trained policy, and where it is judged.

    Attributes:
        pretrain_seed: Of the policy.
        tuning_seeds: Of the plants and labels on which the prior is chosen, one plant each.
        labels: Of each of these plants.
        plant_seeds: Of the plants on which it is judged, beside the paper's shifted one.
        stream_seeds: Of the labels and starts there; each plant meets each of them.
        checkpoints: Labels after which the policy is judged.
        starts: Episodes of a judgement.
        hidden: Candidates for the variance of the hidden layers' weights.
        last: Candidates for the variance of the last layer's weights.
        rhos: Candidates for the tie.
        pretraining: How the policy was pre-trained.
    """

    pretrain_seed: int
    tuning_seeds: tuple[int, ...] = (0, 1, 2, 3)
    labels: int = 50
    plant_seeds: tuple[int, ...] = tuple(range(1000, 1006))
    stream_seeds: tuple[int, ...] = (1000, 1001)
    checkpoints: tuple[int, ...] = (5, 10, 20, 50)
    starts: int = 20
    hidden: tuple[float, ...] = HIDDEN_VARIANCES
    last: tuple[float, ...] = LAST_VARIANCES
    rhos: tuple[float, ...] = RHOS
    pretraining: PretrainConfig = field(default=PRETRAINING)


class ScoreRow(NamedTuple):
    """One candidate on the streams of the choice; densities in nats, with labels in action units."""

    pretrain_seed: int
    hidden_variance: float
    last_variance: float
    rho: float
    noise_variance: float
    log_density: float
    per_label: float


class PriorRow(NamedTuple):
    """One prior on one stream of a plant at one checkpoint.

    ``nlpd`` is the negative log predictive density of the labels so far, each before it was learned, in nats a label
    with labels in newtons; NaN without learning.
    """

    method: str
    plant: str
    pretrain_seed: int
    stream_seed: int
    hidden_variance: float
    last_variance: float
    rho: float
    noise_variance: float
    labels: int
    success: float
    regret: float
    nlpd: float


class SummaryRow(NamedTuple):
    """A prior at a checkpoint: means over plants, streams and policies, with 95 % bootstrap intervals."""

    method: str
    labels: int
    trials: int
    success: float
    success_lower: float
    success_upper: float
    success_minimum: float
    regret: float
    regret_lower: float
    regret_upper: float
    nlpd: float


class DifferenceRow(NamedTuple):
    """A prior minus the default on the same plants, streams and policies, with 95 % bootstrap intervals."""

    method: str
    labels: int
    trials: int
    success: float
    success_lower: float
    success_upper: float
    regret: float
    regret_lower: float
    regret_upper: float


def study_plan(*, quick: bool = False, seed: int = FIRST_REPORTED_SEED) -> list[StudyConfig]:
    """What ``kbt-rl prior`` runs: two pre-trained policies, six plants and the shifted one, two streams of each."""
    if quick:
        small = StudyConfig(seed, tuning_seeds=(0, 1), plant_seeds=(seed,), stream_seeds=(seed,), starts=10)
        return [replace(small, hidden=(1e-5, 1e-4, 1e-3), last=(1.0, 10.0), rhos=(0.0, 0.99))]
    plants, streams = tuple(seed + i for i in range(6)), (seed, seed + 1)
    return [StudyConfig(seed + p, plant_seeds=plants, stream_seeds=streams) for p in range(2)]


@lru_cache(maxsize=32)
def drawn_plant(seed: int) -> InvertedPendulumParams:
    """A plant from ``PLANT_RANGES`` on which the nominal expert fails more often than not, see ``draw_plants``."""
    return draw_plants(ChangeConfig(seed, seed, plants=1)).plants[0]


def judged_plants(config: StudyConfig) -> dict[str, InvertedPendulumParams]:
    """By name; the paper's first."""
    return {"shifted": SHIFTED, **{f"drawn {seed}": drawn_plant(seed) for seed in config.plant_seeds}}


def run_study(config: StudyConfig, models: Path | None = None) -> tuple[list[PriorRow], list[ScoreRow]]:
    """Choose the prior, and judge it and its rivals on the other plants.

    Args:
        config: What to do.
        models: Folder in which pre-trained policies are kept; each is trained anew if None.
    """
    path = learners.pretrained_path(config.pretrain_seed, config.pretraining, models)
    pretrained = learners.pretrain(config.pretrain_seed, config.pretraining, path)
    grid = prior_grid(hidden=config.hidden, last=config.last, rhos=config.rhos)
    streams = [_labels(pretrained, drawn_plant(seed), seed, config.labels, _CHOICE) for seed in config.tuning_seeds]
    choice = choose_prior(pretrained, *streams, candidates=grid)
    priors = _priors(choice, grid)
    rows: list[PriorRow] = []
    for name, plant in judged_plants(config).items():
        for seed in config.stream_seeds:
            rows += _judge(config, pretrained, priors, (name, plant), seed)
    return rows, [ScoreRow(config.pretrain_seed, *score) for score in choice.scores]


def _labels(pretrained: KBT, plant: InvertedPendulumParams, seed: int, count: int, purpose: int) -> list[Sample]:
    """Labels without noise at i.i.d. states of the label box."""
    stream = ChangeConfig(pretrained.seed or 0, seed, noise_variance=0.0)
    return labelled(stream, pretrained.policy, [plant] * count, purpose)


def _priors(choice: PriorChoice, grid: Sequence[HeadConfig]) -> dict[str, HeadConfig]:
    scored = [index for index, score in enumerate(choice.scores) if score.log_density > -math.inf]
    worst = min(scored, key=lambda index: choice.scores[index].log_density)
    paper = HeadConfig.paper(tuned()["epsilon"])
    return {CHOSEN: choice.config, DEFAULT: HeadConfig(), PAPER: paper, WORST: grid[worst], NO_LEARNING: HeadConfig()}


def _judge(
    config: StudyConfig,
    pretrained: KBT,
    priors: dict[str, HeadConfig],
    plant: tuple[str, InvertedPendulumParams],
    seed: int,
) -> list[PriorRow]:
    """Every prior on the same labels and the same starts of one plant."""
    name, params = plant
    # A seed of its own for each plant, so that two plants share neither states nor starts.
    own = seed if name == "shifted" else seed + 1_000 * int(name.split()[-1])
    samples = _labels(pretrained, params, own, max(config.checkpoints), _JUDGEMENT)
    initial = starts(own, config.starts)
    learned: dict[str, _Learned] = {}
    for method, prior in priors.items():
        learner = build(Method(method, "kbt", asdict(prior)), pretrained)
        assert isinstance(learner, KBT)
        labels = () if method == NO_LEARNING else config.checkpoints
        learned[method] = _learn(learner, samples if labels else [], labels)
    scores = _evaluate(learned, initial, params)
    rows: list[PriorRow] = []
    for method, prior in priors.items():
        head, learns = learned[method].learner.policy.head, method != NO_LEARNING
        rho = prior.resolve(head.in_features, head.out_features)[1]
        key = (method, name, config.pretrain_seed, seed, prior.hidden_variance, prior.last_variance, rho)
        for index, count in enumerate(config.checkpoints):
            success, worse = scores[method][index if learns else 0]
            densities = learned[method].densities[:count]
            nlpd = math.log(params.max_force) - float(np.mean(densities)) if learns else math.nan
            rows.append(PriorRow(*key, prior.noise_variance, count, success, worse, nlpd))
    return rows


class _Learned(NamedTuple):
    """A learner after its stream, its snapshots, and the log density of each label before it was learned."""

    learner: KBT
    snapshots: list[ActingView]
    densities: list[float]


def _learn(learner: KBT, samples: Sequence[Sample], checkpoints: Sequence[int]) -> _Learned:
    """Learn a stream; without one the only snapshot is the pre-trained policy."""
    snapshots: list[ActingView] = []
    densities: list[float] = []
    for count, sample in enumerate(samples, 1):
        info = learner.update(sample)
        assert isinstance(info, KBTInfo)
        densities.append(info.log_density)
        if count in checkpoints:
            snapshots.append(snapshot(learner))
    return _Learned(learner, snapshots or [snapshot(learner)], densities)


def _evaluate(
    learned: dict[str, _Learned], initial: FloatArray, params: InvertedPendulumParams
) -> dict[str, list[tuple[float, float]]]:
    """Success and regret of every snapshot; heads that are stored alike act as one batch."""
    expert = simulate(expert_force(params), initial, params)
    alike: dict[tuple[str, float], list[str]] = {}
    for method, each in learned.items():
        spec = each.learner.policy.head.spec
        alike.setdefault((spec.structure, spec.feature_variance), []).append(method)
    scores: dict[str, list[tuple[float, float]]] = {}
    for methods in alike.values():
        snapshots = [view for method in methods for view in learned[method].snapshots]
        force = batch_force(learned[methods[0]].learner, snapshots)
        outcome = simulate(force, np.broadcast_to(initial, (len(snapshots), *initial.shape)), params)
        pairs = zip(outcome.success.mean(axis=-1).tolist(), regret(outcome.cost, expert.cost).tolist(), strict=True)
        for method in methods:
            scores[method] = [next(pairs) for _ in learned[method].snapshots]
    return scores


def summarise(rows: Sequence[PriorRow]) -> list[SummaryRow]:
    """Each prior at each checkpoint."""
    groups: dict[tuple[str, int], list[PriorRow]] = {}
    for row in rows:
        groups.setdefault((row.method, row.labels), []).append(row)
    summary = []
    for (method, labels), members in groups.items():
        success, worse = estimate([row.success for row in members]), estimate([row.regret for row in members])
        of_success = (success.mean, success.lower, success.upper, success.minimum)
        nlpd = float(np.mean([row.nlpd for row in members]))
        summary.append(
            SummaryRow(method, labels, len(members), *of_success, worse.mean, worse.lower, worse.upper, nlpd)
        )
    return summary


def differences(rows: Sequence[PriorRow]) -> list[DifferenceRow]:
    """Each prior against the default, paired by plant, stream, policy and checkpoint."""
    reference = {(row.plant, row.pretrain_seed, row.stream_seed, row.labels): row for row in rows
                 if row.method == DEFAULT}  # fmt: skip
    groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        beside = reference.get((row.plant, row.pretrain_seed, row.stream_seed, row.labels))
        if beside is not None and row.method != DEFAULT:
            pair = (row.success - beside.success, row.regret - beside.regret)
            groups.setdefault((row.method, row.labels), []).append(pair)
    found = []
    for (method, labels), pairs in groups.items():
        success, worse = (estimate([pair[column] for pair in pairs]) for column in (0, 1))
        found.append(DifferenceRow(method, labels, len(pairs), *success[:3], *worse[:3]))
    return found
