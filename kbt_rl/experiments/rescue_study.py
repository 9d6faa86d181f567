"""``kbt-rl rescue``: what is run, in which order, and what is drawn of it.

Each trial has a result file of its own, so that an interrupted study continues; tables are on disk before figures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from kbt_rl.agents.kbt import KBT
from kbt_rl.experiments.aggregate import estimate
from kbt_rl.experiments.config import PRETRAINING, Method, digest, tuned, warm_start_method
from kbt_rl.experiments.label_rules import RuleTrial, run_rule
from kbt_rl.experiments.learners import pretrain, pretrained_path
from kbt_rl.experiments.plot_style import BLUE, INK, ORANGE, VERMILION, legend_below, new_figure, save, style
from kbt_rl.experiments.report import text_table
from kbt_rl.experiments.rescue import Labelling, RescueTrial, run_rescue
from kbt_rl.experiments.runner import versions, write_json
from kbt_rl.experiments.tables import write_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The labels are free of noise: the smallest noise that the prior's scale resolves, and a stiff hidden layer (both
#: found on pre-training seeds 0 and 1, start seeds 20 and 21).
NOISE_FREE = Method("KBT", "kbt", {"noise_variance": 1e-5, "hidden_variance": 1e-6})
DEFAULTS = Method("KBT, default noise", "kbt")
LINEAR = Method("linear layer (L = 1)", "kbt", {"layers": 1, "noise_variance": 1e-5})
EKF = Method("EKF", "ekf", {"noise_variance": 1e-5, "hidden_variance": 1e-6})
HOLD = Method("hold the last label", "hold")
EXPERT = Method("expert", "expert")
PRETRAINED = Method("pre-trained", "pretrained")

LABELLINGS = (
    Labelling("iid", 8),
    Labelling("iid", 20),
    Labelling("uncertain", 8),
    Labelling("visited", 50, every=4),
)
RULES: tuple[tuple[Any, float], ...] = (
    ("every", 1), ("every", 5), ("every", 10), ("every", 25), ("every", 50),
    ("random", 0.1), ("random", 0.02),
    ("gate", 3.0), ("gate", 10.0), ("gate", 100.0),
    ("pool", 25), ("pool", 50), ("pool", 100),
)  # fmt: skip


class RescueRow(NamedTuple):
    """One method with one labelling: shares of the starts that never fell and that succeeded."""

    method: str
    source: str
    labels: int
    every: int
    pretrain_seed: int
    starts: int
    no_fall: float
    success: float


class RuleRow(NamedTuple):
    """One rule on one pre-trained policy: labels used by a learner, and its score without labels afterwards."""

    rule: str
    value: float
    pretrain_seed: int
    episodes: int
    labels: float
    score: float
    falls: int


def rescue_methods(labels: int, quick: bool) -> list[Method]:
    """The learners and those that need no learning; warm start trains at least once on what it gets."""
    memory = min(20, labels)
    rate = tuned()["learning_rate"]["20" if memory == 20 else "10"]
    warm = [] if quick else [replace(warm_start_method(memory, rate), name="warm start")]
    return [NOISE_FREE, DEFAULTS, LINEAR, EKF, *warm, HOLD, PRETRAINED, EXPERT]


def rescue_plan(seed: int, quick: bool) -> list[RescueTrial]:
    """Every method with every labelling, on two pre-trained policies."""
    seeds, count = ((seed,), 10) if quick else ((seed, seed + 1), 100)
    return [
        RescueTrial(method, labelling, s, s, count)
        for s in seeds
        for labelling in LABELLINGS
        for method in rescue_methods(labelling.budget, quick)
    ]


def rules_plan(seed: int, quick: bool) -> list[RuleTrial]:
    """Every rule for one episode, and the score after one and five episodes with a label at every step."""
    seeds, learners = ((seed,), 2) if quick else ((seed, seed + 1), 5)
    rules = RULES[::4] if quick else RULES
    base = RuleTrial("every", 1, NOISE_FREE, seed, seed, learners=learners)
    single = [replace(base, rule=rule, value=value, pretrain_seed=s, seed=s) for s in seeds for rule, value in rules]
    long = [] if quick else [replace(base, pretrain_seed=s, seed=s + 50, episodes=5) for s in seeds]
    return [*single, *long]


def run_study(seed: int, quick: bool, out: Path, console: Console) -> None:
    """Run what is missing, write the tables, draw the figures and print the report."""
    trials: list[RescueTrial | RuleTrial] = [*rescue_plan(seed, quick), *rules_plan(seed, quick)]
    models: dict[int, KBT] = {}
    with Progress(console=console) as progress:
        for trial in progress.track(trials, description="rescue"):
            path = result_path(trial, out)
            if path.exists():
                continue
            if trial.pretrain_seed not in models:
                kept = pretrained_path(trial.pretrain_seed, PRETRAINING, out / "models")
                models[trial.pretrain_seed] = pretrain(trial.pretrain_seed, PRETRAINING, kept)
            model = models[trial.pretrain_seed]
            record = run_rescue(trial, model) if isinstance(trial, RescueTrial) else run_rule(trial, model)
            write_json({"trial": asdict(trial), "record": record, "versions": versions()}, path)
    rescues = [_rescue_row(trial, out) for trial in trials if isinstance(trial, RescueTrial)]
    rules = [row for trial in trials if isinstance(trial, RuleTrial) for row in _rule_rows(trial, out)]
    write_rows(out / "rescue.csv", rescues)
    write_rows(out / "label_rules.csv", rules)
    with style():
        save(draw_rules(rules), out / "label_rules.png")
    print_rescue(rescues, console)
    console.print(f"tables and figures in {out}")


def result_path(trial: RescueTrial | RuleTrial, out: Path) -> Path:
    """Where a trial's result is kept."""
    kind = "rescue" if isinstance(trial, RescueTrial) else "rule"
    return out / "trials" / f"{kind}-p{trial.pretrain_seed}-{digest(trial)}.json"


def _record(trial: RescueTrial | RuleTrial, out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(result_path(trial, out).read_text(encoding="utf-8"))["record"]
    return record


def _rescue_row(trial: RescueTrial, out: Path) -> RescueRow:
    found, asked = _record(trial, out), trial.labelling
    return RescueRow(
        trial.method.name, asked.source, asked.budget, asked.every, trial.pretrain_seed, trial.starts,
        found["no_fall"], found["success"],
    )  # fmt: skip


def _rule_rows(trial: RuleTrial, out: Path) -> list[RuleRow]:
    found = _record(trial, out)
    episodes = zip(found["labels"], found["score"], found["falls"], strict=True)
    return [
        RuleRow(trial.rule, trial.value, trial.pretrain_seed, count, labels, score, falls)
        for count, (labels, score, falls) in enumerate(episodes, start=1)
    ]


def print_rescue(rows: Sequence[RescueRow], console: Console) -> None:
    """A table a labelling: share without a fall, and success, over all policies and starts."""
    for asked in dict.fromkeys((row.source, row.labels, row.every) for row in rows):
        source, labels, every = asked
        body = []
        own = [row for row in rows if (row.source, row.labels, row.every) == asked]
        for method in dict.fromkeys(row.method for row in own):
            found = [row for row in own if row.method == method]
            shares = (estimate([getattr(row, name) for row in found]).mean for name in ("no_fall", "success"))
            body.append([method, *(f"{share:.2f}" for share in shares), str(sum(row.starts for row in found))])
        title = f"{labels} labels, {source}, one every {every} steps, then none"
        console.print(text_table(title, ("method", "no fall", "success", "starts"), body))


def draw_rules(rows: Sequence[RuleRow]) -> Figure:
    """Label-free score after one episode against the labels that it took."""
    figure, axes = new_figure(4.4)
    panel = axes[0, 0]
    looks = {"every": (INK, "o", "every k-th step"), "random": (ORANGE, "s", "random steps"),
             "gate": (VERMILION, "D", "epistemic variance above a multiple of the noise's"),
             "pool": (BLUE, "^", "most uncertain of 32 i.i.d. states")}  # fmt: skip
    for rule, (color, marker, label) in looks.items():
        own = [row for row in rows if row.rule == rule and row.episodes == 1]
        points = []
        for value in sorted({row.value for row in own}):
            same = [row for row in own if row.value == value]
            points.append((estimate([row.labels for row in same]).mean, estimate([row.score for row in same]).mean))
        if points:
            panel.plot(*zip(*sorted(points), strict=True), color=color, marker=marker, markersize=6, label=label)
    panel.set(xscale="log", xlabel="labels of one episode of 10 s", ylabel="success without labels", ylim=(-0.03, 1.03))
    panel.set(title="What a label is worth: the policy alone from fresh starts, after one labelled episode")
    legend_below(figure, panel, columns=2)
    return figure
