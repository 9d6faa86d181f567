"""Does a prior that was chosen by evidence on a few plants hold on plants it was not chosen on?

Prior variances and the tie ``rho`` are chosen by one-step-ahead log predictive density on 50 labels of each of four
changed plants, drawn with tuning seeds. Then success and regret are measured on seven others: the shifted one and six
drawn with seeds that were not used. Beside the chosen prior stand the default one, the paper's single epsilon, the
candidate with the worst score, and the pre-trained policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from kbt_rl.agents.bayesian import KBTInfo
from kbt_rl.agents.prior_choice import HIDDEN_VARIANCES, LAST_VARIANCES, RHOS, PriorChoice, choose_prior, prior_grid
from kbt_rl.envs.plant import SHIFTED, InvertedPendulumParams
from kbt_rl.inference.config import HeadConfig
from studies import plots
from studies.changing import draw_plants, labelled
from studies.cloned import ClonedTrial, Setting
from studies.frozen import frozen
from studies.methods import TUNED, kbt
from studies.pendulum import Pendulum
from studies.table import Row, Table, Text
from studies.trial import Method, Size

CHOSEN, DEFAULT, PAPER = "chosen by evidence", "default", "the paper's prior"
WORST, NO_LEARNING = "worst candidate", "pre-trained policy"
CHECKPOINTS = (5, 10, 20, 50)
SCORE = "log density a label, nats"
_CHOICE, _JUDGEMENT = 31, 32  # what the label streams are for


@dataclass(frozen=True, kw_only=True)
class PriorTrial(ClonedTrial):
    """The choice for one pre-trained policy, judged on one stream of each of several plants.

    Attributes:
        tuning_seeds: Of the plants and labels on which the prior is chosen.
        labels: Of each of these plants.
        plant_seeds: Of the plants on which it is judged, beside the shifted one.
        starts: Episodes of a score.
        hidden: Candidates for the variance of the hidden layers' weights.
        last: Candidates for the variance of the last layer's weights.
        rhos: Candidates for the tie.
    """

    study: str = "prior"
    plant_seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...] = (0, 1, 2, 3)
    labels: int = 50
    starts: int = 20
    hidden: tuple[float, ...] = HIDDEN_VARIANCES
    last: tuple[float, ...] = LAST_VARIANCES
    rhos: tuple[float, ...] = RHOS


def plan(size: Size) -> list[PriorTrial]:
    """2 streams of each of 2 policies, seven plants each."""
    small: dict[str, Any] = {}
    if size.quick:
        small = {"tuning_seeds": (0, 1), "starts": 10, "hidden": (1e-5, 1e-4, 1e-3), "last": (1.0, 10.0),
                 "rhos": (0.0, 0.99)}  # fmt: skip
    plants = tuple(size.seed + i for i in range(1 if size.quick else 6))
    return size.trials(PriorTrial, [Method("choice of the prior", "prior")], streams=2, plant_seeds=plants, **small)


@lru_cache(maxsize=64)
def drawn_plant(seed: int) -> InvertedPendulumParams:
    """A plant on which the nominal expert fails more often than not, see ``draw_plants``."""
    return draw_plants(seed, 1)[0]


def run(trial: PriorTrial, setting: Setting) -> Iterator[Row]:
    """Choose the prior; then every prior on the same labels and starts of each plant."""
    base = HeadConfig(layers=2)
    grid = prior_grid(base, hidden=trial.hidden, last=trial.last, rhos=trial.rhos)
    model = kbt(setting, asdict(base), skip="none")
    streams = [
        labelled(model.policy, [drawn_plant(seed)] * trial.labels, (seed, _CHOICE), 0.0) for seed in trial.tuning_seeds
    ]
    choice = choose_prior(model, *streams, candidates=grid)
    for score in choice.scores:
        name = f"hidden {score.hidden_variance:g}, last {score.last_variance:g}, rho {score.rho:g}"
        yield trial.row(trial.labels, SCORE, score.per_label, task=name)
    plants = {"shifted": SHIFTED, **{f"drawn {seed}": drawn_plant(seed) for seed in trial.plant_seeds}}
    for name, plant in plants.items():
        # A seed of its own for each plant, so that two plants share neither states nor starts.
        seed = trial.stream_seed + (0 if name == "shifted" else 1_000 * int(name.split()[-1]))
        for method, prior in priors(choice, grid, base).items():
            for row in _judge(trial, setting, method, prior, Pendulum(plant), seed):
                yield row._replace(method=method, task=name)


def priors(choice: PriorChoice, grid: list[HeadConfig], base: HeadConfig) -> dict[str, HeadConfig]:
    """What is compared."""
    scored = [index for index, score in enumerate(choice.scores) if score.log_density > -math.inf]
    worst = min(scored, key=lambda index: choice.scores[index].log_density)
    paper = HeadConfig.paper(TUNED["epsilon"])
    return {CHOSEN: choice.config, DEFAULT: base, PAPER: paper, WORST: grid[worst], NO_LEARNING: base}


def _judge(
    trial: PriorTrial, setting: Setting, method: str, prior: HeadConfig, task: Pendulum, seed: int
) -> Iterator[Row]:
    """One prior on one stream of a plant."""
    learner = kbt(setting, asdict(prior), skip="none")
    if method == NO_LEARNING:
        (score,) = task.score([learner.policy], seed, trial.starts)
        for labels in CHECKPOINTS:
            yield from (trial.row(labels, "success", score.success), trial.row(labels, "regret", score.regret))
        return
    densities, policies = [], []
    stream = labelled(learner.policy, [task.plant] * CHECKPOINTS[-1], (seed, _JUDGEMENT), 0.0)
    for labels, sample in enumerate(stream, 1):
        info = learner.update(sample)
        assert isinstance(info, KBTInfo)
        densities.append(info.log_density)
        if labels in CHECKPOINTS:
            policies.append(frozen(learner.policy))
    for labels, score in zip(CHECKPOINTS, task.score(policies, seed, trial.starts), strict=True):
        yield trial.row(labels, "success", score.success)
        yield trial.row(labels, "regret", score.regret)
        yield trial.row(labels, "nlpd, nats", math.log(task.max_force) - float(np.mean(densities[:labels])))


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """The best candidates, the judgement of all priors, each against the default, and a figure."""
    best = Table(max(rows, key=lambda row: row.value) for rows in table.where(metric=SCORE).by("policy_seed").values())
    yield Text.of("Chosen priors", best, {"policy_seed": "policy", "task": "prior"}, {
        SCORE: lambda rows: rows.mean(SCORE, 3, plain=True),
    })  # fmt: skip
    judged = table.where(metric=("success", "regret"))
    default = judged.where(method=DEFAULT)
    title = "On plants that the choice has not seen, intervals over plants, streams and policies"
    yield Text.of(title, judged, {"method": "prior", "labels": "labels"}, {
        "success": lambda rows: rows.mean("success"), "regret": lambda rows: rows.mean("regret", 3),
        "success minus the default's": lambda rows: rows.minus(default).mean("success"),
    })  # fmt: skip
    success, regret = ({"xlabel": "labels", "ylabel": "share of starts", "ylim": (-0.03, 1.03)},
                       {"xlabel": "labels", "ylabel": "cost over the expert's, minus 1", "yscale": "log"})  # fmt: skip
    yield plots.Picture("prior", [
        plots.Panel(f"{metric.capitalize()} on other plants", judged.where(metric=metric), axes, "points",
                    along="labels")
        for metric, axes in (("success", success), ("regret", regret))
    ], 4.0, legend=5)  # fmt: skip
