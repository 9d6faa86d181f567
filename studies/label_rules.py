"""What a label is worth: rules that choose when to ask, scored by the policy alone afterwards.

Learners run closed-loop episodes on the shifted plant; a label reaches each one step after it has acted. A rule decides
at every step whether to ask, and where. A fall begins a new start within the episode's time. Then labels stop, and the
score is the success rate from fresh starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from studies import plots
from studies.cloned import ClonedTrial, Setting
from studies.episodes import FloatArray, Observations, evaluate
from studies.fleet import Fleet
from studies.pendulum import uniform_states
from studies.rescue import NOISE_FREE, POOL
from studies.table import Row, Table, Text
from studies.trial import Size

STEPS = 500
Rule = Literal["every", "random", "gate", "pool"]
RULES: tuple[tuple[Rule, float], ...] = (
    ("every", 1), ("every", 5), ("every", 10), ("every", 25), ("every", 50), ("random", 0.1), ("random", 0.02),
    ("gate", 3.0), ("gate", 10.0), ("gate", 100.0), ("pool", 25), ("pool", 50), ("pool", 100),
)  # fmt: skip
_WORDS = {
    "every": "every {:g} steps",
    "random": "at random, probability {:g}",
    "gate": "epistemic variance above {:g} times the noise's",
    "pool": "most uncertain of 32 i.i.d. states, every {:g} steps",
}


@dataclass(frozen=True, kw_only=True)
class RuleTrial(ClonedTrial):
    """One rule on a few learners.

    Attributes:
        rule: ``every`` (each ``value``-th step), ``random`` (with probability ``value``), ``gate`` (where the epistemic
            variance exceeds ``value`` times the noise's), all at the visited state; ``pool`` (at each ``value``-th
            step, at the most uncertain of 32 i.i.d. states).
        value: Its parameter.
        episodes: Labelled episodes of 10 s.
        learners: Learners side by side, each with labels of its own.
        starts: Fresh starts for each learner.
    """

    study: str = "label_rules"
    rule: Rule
    value: float
    episodes: int = 1
    learners: int = 5
    starts: int = 20

    @property
    def label(self) -> str:
        """The rule."""
        words = _WORDS[self.rule].format(self.value)
        return words if self.episodes == 1 else f"{words}, {self.episodes} episodes"


def plan(size: Size) -> list[RuleTrial]:
    """Every rule for one episode, and a label at every step for five, on 2 policies."""
    rules = [(rule, value, 1) for rule, value in (RULES[::4] if size.quick else RULES)]
    return [
        replace(trial, stream_seed=trial.policy_seed + (0 if episodes == 1 else 50))
        for rule, value, episodes in (*([] if size.quick else [("every", 1, 5)]), *rules)
        for trial in size.trials(
            RuleTrial, [NOISE_FREE], streams=1, rule=rule, value=value, episodes=episodes,
            learners=2 if size.quick else 5,
        )
    ]  # fmt: skip


def run(trial: RuleTrial, setting: Setting) -> Iterator[Row]:
    """Labels used by a learner, its score without labels, and the falls of all learners, after each episode."""
    task, count, seed = setting.task, trial.learners, trial.stream_seed
    fleet, expert = Fleet(trial.method, setting, count), task.expert()
    rng, envs = np.random.default_rng([seed, 13]), task.envs(count, same_step=True)
    fresh = task.starts(seed + 250_000, count * trial.starts).reshape(count, trial.starts, 4)
    falls, used = 0, 0
    for episode in range(trial.episodes):
        observations = envs.reset(seed=seed + 125_000 + 1_000 * episode)[0]
        begins, state = np.ones(count, dtype=bool), None
        for step in range(STEPS):
            actions, state = fleet.predict(observations, state, begins, deterministic=True)
            asked = _asked(trial, fleet, observations, step, rng)
            observations, _, terminated, truncated, _ = envs.step(actions)
            begins, falls = terminated | truncated, falls + int(terminated.sum())
            present = ~np.isnan(asked[:, :1])
            if present.any():
                fleet.update(asked, np.where(present, expert.label(np.nan_to_num(asked)), np.nan))
            used += int(present.sum())
        policies = [fleet.alone(index) for index in range(count)]
        success = evaluate(policies, task.envs(count * trial.starts), fresh).success.mean()
        labels = round(used / count)
        for metric, value in (("success", success), ("falls", falls), ("labels used", used / count)):
            yield trial.row(labels, metric, value)


def _asked(
    trial: RuleTrial, fleet: Fleet, observations: Observations, step: int, rng: np.random.Generator
) -> FloatArray:
    """States that the rule asks for, ``(n, 4)``, NaN where it does not ask."""
    count, seen = len(observations), observations
    if trial.rule == "random":
        wanted = rng.random(count) < trial.value
    elif trial.rule == "gate":
        wanted = fleet.variances(observations[:, None])[:, 0] > trial.value
    else:
        wanted = np.full(count, step % int(trial.value) == 0)
        if trial.rule == "pool" and wanted.any():
            pool = uniform_states(rng, (count, POOL))
            seen = pool[np.arange(count), fleet.variances(pool).argmax(axis=1)]
    return np.where(wanted[:, None], seen, np.nan)


def report(table: Table) -> Iterator[Text | plots.Picture]:
    """Labels, score and falls of each rule after the last episode, and a figure of those with one episode."""
    ends = Table(
        row for rows in table.by("task", "policy_seed").values()
        for row in rows.where(labels=max(rows.distinct("labels")))
    )  # fmt: skip
    yield Text.of("What labels are worth", ends, {"task": "rule"}, {
        "labels of a learner": lambda rows: rows.mean("labels used", 0, plain=True),
        "success without labels, mean [range of policies]": lambda rows: rows.mean("success"),
        "falls while learning": lambda rows: f"{sum(rows.where(metric='falls').values()):.0f}",
    })  # fmt: skip
    axes = {"xscale": "log", "xlabel": "labels of one episode of 10 s", "ylabel": "success without labels",
            "ylim": (-0.03, 1.05)}  # fmt: skip
    title = "What a label is worth: the policy alone from fresh starts, after one labelled episode"
    yield plots.Picture("label_rules", [plots.Panel(title, Table(_by_kind(ends)), axes)], 4.6, legend=2)


def _by_kind(ends: Table) -> Iterator[Row]:
    """Success of each rule by the labels that it used on average; the kind of the rule stands for the method."""
    kinds = {_WORDS[rule].format(value): _WORDS[rule].replace("{:g}", "k") for rule, value in RULES}
    for rule, rows in ends.by("task").items():
        labels = max(round(rows.where(metric="labels used").estimate().mean), 1)
        for row in rows.where(metric="success") if rule in kinds else ():
            yield row._replace(method=kinds[rule], labels=labels)
