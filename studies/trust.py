"""Can the predictive distribution be trusted? Coverage and density of held-out labels, i.i.d. and in closed loop.

A learner of each covariance structure takes 500 noisy labels at i.i.d. states, or at the states that it visits itself.
Then learning stops, and it is judged on labels of the same distribution that it has never seen: other states of the
box, or the states of fresh episodes in which the adapted policy acts alone. Beside it stand the pre-trained policy with
its prior's variance, and the density under the noise that the labels were drawn with, which nobody beats on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from kbt_rl.agents.bayesian import KBTInfo
from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.sample import Sample
from studies import plots
from studies.calibration import LEVELS, best_nlpd, judge, noise_unit
from studies.cloned import ClonedTrial, Setting
from studies.curve import VISITED_EVERY
from studies.episodes import Episodes, walk
from studies.frozen import frozen
from studies.methods import kbt, two_layers
from studies.pendulum import LabelStream, Pendulum
from studies.table import Row, Table, Text
from studies.trial import Size

STRUCTURES = ("joint", "layer", "neuron", "diagonal")
NO_LEARNING = two_layers("pre-trained policy")
IID, CLOSED_LOOP = "i.i.d.", "closed loop"
NLPD, BEST_NLPD, ERROR = "nlpd, nats", "best nlpd, nats", "error of the mean, N"
ONLINE = "one step ahead, coverage 95 %"
_Q95 = float(chi2.ppf(0.95, 1))


@dataclass(frozen=True, kw_only=True)
class TrustTrial(ClonedTrial):
    """One learner on one stream of noisy labels.

    Attributes:
        closed_loop: Whether it learns and is judged at visited states: every 5th of the learner's own path, or of fresh
            episodes.
        variance: Of the label noise, N^2.
        samples: Labels to learn from.
        held_out: Labels at i.i.d. states to be judged on.
        episodes: Fresh episodes to be judged on in closed loop.
    """

    study: str = "trust"
    closed_loop: bool
    variance: float
    samples: int = 500
    held_out: int = 2_000
    episodes: int = 20

    @property
    def label(self) -> str:
        """States and noise of the labels."""
        return f"{CLOSED_LOOP if self.closed_loop else IID}, {self.variance:g} N²"


def coverage(level: float) -> str:
    """The metric of a level."""
    return f"coverage {100 * level:.0f} %"


def plan(size: Size) -> list[TrustTrial]:
    """Every structure, noise known or learned, on 3 streams (2 at the second variance) of each of 2 policies."""
    learners = [NO_LEARNING]
    for structure in STRUCTURES:
        learners.append(two_layers(f"{structure}, known noise", structure=structure))
        learners.append(two_layers(f"{structure}, learned noise", structure=structure, noise="learned"))
    small = {"samples": 200, "held_out": 500, "episodes": 5} if size.quick else {}
    return [
        trial
        for variance, streams in (((10.0, 1),) if size.quick else ((10.0, 3), (50.0, 2)))
        for closed_loop in (False, True)
        for trial in size.trials(
            TrustTrial, learners, streams=streams, variance=variance, closed_loop=closed_loop, **small
        )
    ]


def run(trial: TrustTrial, setting: Setting) -> Iterator[Row]:
    """Learn from the stream, and judge the head on held-out labels."""
    task = setting.task
    settings, learned = trial.method.settings, "noise" in trial.method.settings["head"]
    learner = kbt(setting, **settings, told=None if learned else trial.variance)
    infos = [] if trial.method == NO_LEARNING else list(_learn(trial, task, learner))
    states = _held_out(trial, task, learner)
    noise = math.sqrt(trial.variance) * np.random.default_rng([trial.stream_seed, 12]).standard_normal(len(states))
    found = judge(learner, states, task.max_force * task.expert().label(states)[:, 0], noise, task.max_force)
    values = {coverage(level): share for level, share in found.coverage.items()}
    values |= {NLPD: found.nlpd, BEST_NLPD: best_nlpd(noise, trial.variance), ERROR: found.error}
    values["noise believed in, N²"] = found.assumed_noise
    if infos:
        values[ONLINE] = float(np.mean([info.nis <= _Q95 for info in infos]))
        density = np.mean([info.log_density for info in infos])
        values["one step ahead, nlpd, nats"] = math.log(task.max_force) - float(density)
    values["scale of the head, N²"] = noise_unit(learner, task.max_force)
    for metric, value in values.items():
        yield trial.row(len(infos), metric, value)


def _learn(trial: TrustTrial, task: Pendulum, learner: KBT) -> Iterator[KBTInfo]:
    """Update label by label; what each update saw."""
    stream = LabelStream(task, trial.stream_seed, trial.variance)
    if trial.closed_loop:
        path = walk(learner.policy, task.envs(1, same_step=True), trial.stream_seed + 500_000, VISITED_EVERY)
        samples: Iterator[Sample] = (Sample(state, stream.label(state)) for state, _ in path)
    else:
        states = stream.states(trial.samples)
        labels = stream.label(states)
        samples = (Sample(states[i : i + 1], labels[i : i + 1]) for i in range(trial.samples))
    for _, sample in zip(range(trial.samples), samples, strict=False):
        info = learner.update(sample)
        assert isinstance(info, KBTInfo)
        yield info


def _held_out(trial: TrustTrial, task: Pendulum, learner: KBT) -> npt.NDArray[np.float32]:
    """States from which nothing was learned, ``(n, 4)``; in closed loop those of the policy as it is now."""
    if not trial.closed_loop:
        return LabelStream(task, trial.stream_seed + 300_000).states(trial.held_out)
    episodes = Episodes(task.envs(trial.episodes), task.starts(trial.stream_seed + 900_000, trial.episodes))
    policy, visited, state = frozen(learner.policy), [], None
    while episodes.running.any():
        if int(episodes.steps.max()) % VISITED_EVERY == 0:
            visited.append(episodes.observations[episodes.running])
        actions, state = policy.predict(episodes.observations, state, episodes.begins, deterministic=True)
        episodes.step(actions)
    return np.concatenate(visited)


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """Coverage, density and error of each learner, and a figure."""
    yield Text.of("Held-out labels", table, {"task": "labels", "method": "learner"}, {
        "coverage of 95 %, %": lambda rows: rows.mean(coverage(0.95), 1, 100.0),
        "one step ahead, %": lambda rows: rows.mean(ONLINE, 1, 100.0),
        "density below the best, nats": lambda rows: f"{_of(rows, NLPD) - _of(rows, BEST_NLPD):.2f}",
        ERROR: lambda rows: rows.mean(ERROR, plain=True),
    })  # fmt: skip
    axes = {"xlabel": "nominal level", "ylabel": "labels inside minus nominal, points"}
    yield plots.Picture("calibration", [
        plots.Panel(f"{states} labels", Table(_differences(table, states)), axes, "points", scale=100.0, band=(-2, 2))
        for states in (IID, CLOSED_LOOP)
    ], 5.4, legend=4)  # fmt: skip


def _of(rows: Table, metric: str) -> float:
    return rows.where(metric=metric).estimate().mean


def _differences(table: Table, states: str) -> Iterator[Row]:
    """Coverage minus the nominal level, which stands in the place of the task."""
    for level in LEVELS:
        for row in table.where(metric=coverage(level)):
            if row.task.startswith(states) and row.method != NO_LEARNING.name:
                yield row._replace(task=f"{100 * level:.0f} %", value=row.value - level)
