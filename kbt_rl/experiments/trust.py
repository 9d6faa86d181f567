"""Can the predictive distribution be trusted? Coverage and density of held-out labels, i.i.d. and in closed loop.

A learner of each covariance structure takes noisy labels at i.i.d. states of the label box, or at the states that it
visits itself on the shifted plant. Then learning stops, and it is judged on labels of the same distribution that it has
never seen: other states of the box, or the states of fresh episodes in which the adapted policy acts alone. Beside it
stand the pre-trained policy with its prior's variance (no learning), and the density of the labels under the noise
that they were drawn with (nobody can do better on average).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.kbt import KBT
from kbt_rl.envs.plant import SHIFTED, is_upright
from kbt_rl.experiments import learners
from kbt_rl.experiments.aggregate import estimate
from kbt_rl.experiments.config import FIRST_REPORTED_SEED, KBT_METHOD, PRETRAINING, Method, Trial
from kbt_rl.experiments.learners import LabelStream, batch_force, build, features_of, snapshot
from kbt_rl.experiments.noise import errors_and_variances, noise_unit
from kbt_rl.experiments.simulation import expert_force, simulate, starts
from kbt_rl.experiments.trials import VisitedStates
from kbt_rl.inference.density import LOG_TWO_PI
from kbt_rl.inference.record import UpdateInfo

FloatArray = npt.NDArray[np.float64]
Stream = Literal["iid", "closed loop"]
Noise = Literal["known", "learned"]

STRUCTURES = ("joint", "layer", "neuron", "diagonal")
NO_LEARNING = "pre-trained"
STREAMS: tuple[Stream, ...] = ("iid", "closed loop")
NOISES: tuple[Noise, ...] = ("known", "learned")
#: Nominal levels of the predictive intervals.
LEVELS = (0.50, 0.80, 0.90, 0.95, 0.99)
NOISE_VARIANCES = (10.0, 50.0)
_QUANTILES = chi2.ppf(LEVELS, 1)
_Q95 = float(chi2.ppf(0.95, 1))


@dataclass(frozen=True)
class TrustTrial:
    """One learner on one stream of noisy labels.

    Attributes:
        structure: How the covariance is stored; ``pre-trained`` does not learn.
        noise: Whether the head is told the variance of the labels, or learns it.
        stream: States of the labels: i.i.d. in the label box, or every 5th of the learner's own path.
        variance: Of the label noise, N^2.
        pretrain_seed: Seed of the pre-trained policy.
        stream_seed: Seed of states, starts and noise.
        samples: Labels to learn from.
        held_out: Labels at i.i.d. states to be judged on.
        episodes: Fresh episodes to be judged on in closed loop; of each, every 5th state.
        pretraining: How the policy was pre-trained.
    """

    structure: str
    noise: Noise
    stream: Stream
    variance: float
    pretrain_seed: int
    stream_seed: int
    samples: int = 500
    held_out: int = 2_000
    episodes: int = 20
    pretraining: PretrainConfig = field(default=PRETRAINING)


class TrustRow(NamedTuple):
    """A trial at its end, on held-out labels.

    ``coverage_*`` is the share of labels inside the central interval of that level, ``nlpd`` the mean negative log
    predictive density of a label in newtons (nats), ``oracle_nlpd`` the same under the true mean and noise, and
    ``mean_error`` the rms difference between the predicted mean and the expert's force (N). ``online_*`` are those of
    the labels one step ahead while learning, ``late_coverage_95`` of the second half of them; NaN without learning.
    """

    structure: str
    noise: str
    stream: str
    noise_variance: float
    pretrain_seed: int
    stream_seed: int
    held_out: int
    coverage_50: float
    coverage_80: float
    coverage_90: float
    coverage_95: float
    coverage_99: float
    nlpd: float
    oracle_nlpd: float
    mean_error: float
    assumed_variance: float
    online_coverage_95: float
    late_coverage_95: float
    online_nlpd: float


class SummaryRow(NamedTuple):
    """Mean of one quantity over trials, with a 95 % bootstrap interval of the mean and the extremes of trials.

    Learners of one stream seed are judged on the same draw of the held-out noise, so that they can be compared; what
    that draw adds (half a point of coverage at 95 %, one at 50 %) they have in common, also across policies.
    """

    structure: str
    noise: str
    stream: str
    noise_variance: float
    quantity: str
    mean: float
    lower: float
    upper: float
    minimum: float
    maximum: float
    trials: int


def trust_plan(*, quick: bool = False, seed: int = FIRST_REPORTED_SEED) -> list[TrustTrial]:
    """Every trial of ``kbt-rl trust``: 3 streams (2 at the second variance) times 2 policies, or one of each."""
    kinds: list[tuple[str, Noise]] = [(NO_LEARNING, "known")]
    kinds += [(structure, noise) for structure in STRUCTURES for noise in NOISES]
    streams = {NOISE_VARIANCES[0]: 1} if quick else dict(zip(NOISE_VARIANCES, (3, 2), strict=True))
    plan = [
        TrustTrial(structure, noise, stream, variance, seed + p, seed + s)
        for variance, count in streams.items()
        for stream in STREAMS
        for structure, noise in kinds
        for s in range(count)
        for p in range(1 if quick else 2)
    ]
    return [replace(trial, samples=200, held_out=500, episodes=5) for trial in plan] if quick else plan


def run_trust_trial(trial: TrustTrial, models: Path | None = None) -> TrustRow:
    """Learn from the stream and judge the head on held-out labels.

    Args:
        trial: What to do.
        models: Folder in which pre-trained policies are kept; each is trained anew if None.
    """
    plain = Trial(
        "uncertainty",
        KBT_METHOD,
        trial.pretrain_seed,
        trial.stream_seed,
        noise_variance=trial.variance,
        pretraining=trial.pretraining,
    )
    path = learners.pretrained_path(trial.pretrain_seed, trial.pretraining, models)
    pretrained = learners.pretrain(trial.pretrain_seed, trial.pretraining, path)
    learner, stream = _learner(trial, pretrained), LabelStream(plain)
    records = [] if trial.structure == NO_LEARNING else _learn(trial, learner, stream)
    states = held_out_states(trial, learner)
    clean = expert_force(SHIFTED)(states)
    noise = math.sqrt(trial.variance) * np.random.default_rng([trial.stream_seed, 12]).standard_normal(len(states))
    key = (trial.structure, trial.noise, trial.stream, trial.variance, trial.pretrain_seed, trial.stream_seed)
    judged = judge(learner, states, clean, noise, trial.variance)
    assumed = noise_unit(learner) * float(learner.policy.head.noise_cov[0, 0])
    values: list[float] = [*judged, assumed, *_online(records, learner)]
    return TrustRow(*key, len(states), *values)


def _learner(trial: TrustTrial, pretrained: KBT) -> KBT:
    settings: dict[str, Any] = {} if trial.structure == NO_LEARNING else {"structure": trial.structure}
    learns_noise = trial.noise == "learned"
    if learns_noise:
        settings["noise"] = "learned"
    learner = build(Method(trial.structure, "kbt", settings), pretrained, 0.0 if learns_noise else trial.variance)
    assert isinstance(learner, KBT)
    return learner


def _learn(trial: TrustTrial, learner: KBT, stream: LabelStream) -> list[UpdateInfo]:
    """Update label by label; what each update saw."""
    head = learner.policy.head
    if trial.stream == "iid":
        states = stream.states(trial.samples)
        features, labels = features_of(learner.policy, states).numpy(), stream.label(states)
        return [head.update(features[i : i + 1], labels[i : i + 1]) for i in range(trial.samples)]
    path = VisitedStates(learner, trial.stream_seed)
    records = []
    for _ in range(trial.samples):
        state = path.next_state()
        records.append(head.update(features_of(learner.policy, state), stream.label(state)))
    return records


def held_out_states(trial: TrustTrial, learner: KBT) -> npt.NDArray[np.float32]:
    """States of the trial's distribution from which nothing was learned, ``(n, 4)``.

    In closed loop those of the policy as it is now, from starts that it has never seen, every 5th until it falls.
    """
    if trial.stream == "iid":
        other = Trial("uncertainty", KBT_METHOD, trial.pretrain_seed, trial.stream_seed + 300_000)
        return LabelStream(other).states(trial.held_out)
    force = batch_force(learner, [snapshot(learner)])
    visited: list[npt.NDArray[np.float32]] = []

    def acting(states: npt.NDArray[Any]) -> FloatArray:
        visited.append(states[0])
        return force(states)

    simulate(acting, starts(trial.stream_seed + 900_000, trial.episodes)[None], SHIFTED)
    states = np.concatenate(visited[:: VisitedStates.every])
    upright: npt.NDArray[np.float32] = states[
        is_upright(states.astype(np.float64))
    ]  # a fallen one is left where it fell
    return upright


def judge(
    learner: KBT, states: npt.NDArray[Any], clean: FloatArray, noise: FloatArray, variance: float
) -> tuple[float, ...]:
    """Coverage at each level, density of the labels and of the oracle (nats a label), error of the mean (N).

    Args:
        learner: Whose predictive distribution.
        states: Held-out states, ``(n, 4)``.
        clean: The expert's forces there, N.
        noise: Of the labels, N.
        variance: What the noise was drawn with, N^2.
    """
    error, predictive = errors_and_variances(learner, states, clean)
    square = (noise - error) ** 2 / predictive
    covered = [float(np.mean(square <= quantile)) for quantile in _QUANTILES]
    nlpd = 0.5 * float(np.mean(square + np.log(predictive)) + LOG_TWO_PI)
    oracle = 0.5 * (float(np.mean(noise**2)) / variance + math.log(variance) + LOG_TWO_PI)
    return (*covered, nlpd, oracle, float(np.sqrt(np.mean(error**2))))


def _online(records: Sequence[UpdateInfo], learner: KBT) -> tuple[float, float, float]:
    """Coverage of 95 % intervals one step ahead, of all labels and of the second half, and their mean density."""
    if not records:
        return math.nan, math.nan, math.nan
    inside = np.array([record.nis <= _Q95 for record in records])
    to_newtons = 0.5 * math.log(noise_unit(learner))
    nlpd = to_newtons - float(np.mean([record.log_density for record in records]))
    return float(inside.mean()), float(inside[len(inside) // 2 :].mean()), nlpd


_QUANTITIES = TrustRow._fields[TrustRow._fields.index("coverage_50") :]


def summarise(rows: Sequence[TrustRow]) -> list[SummaryRow]:
    """Each learner on each stream, over streams and pre-trained policies; one row a quantity."""
    groups: dict[tuple[str, str, str, float], list[TrustRow]] = {}
    for row in rows:
        groups.setdefault((row.structure, row.noise, row.stream, row.noise_variance), []).append(row)
    summary = []
    for key, members in groups.items():
        for name in _QUANTITIES:
            values = [float(getattr(row, name)) for row in members]
            if not any(map(math.isnan, values)):
                found = estimate(values)
                summary.append(SummaryRow(*key, name, *found[:5], found.trials))
    return summary
