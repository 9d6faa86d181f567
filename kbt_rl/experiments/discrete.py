"""Discrete actions: success on the shifted plant against the number of labels, for all rules of the softmax link.

A label is the expert's distribution over the force levels or, in the rows named so, the action that it takes. The score
is the policy's most probable action, alone, by the environment's own end test.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np

import kbt_rl  # noqa: F401  registers the environments
from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.lqr import LQRExpert
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.policies import DISCRETE_HEAD
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.agents.warm_start import WarmStart
from kbt_rl.envs.discrete import FIVE_FORCES, TWO_FORCES
from kbt_rl.envs.plant import LABEL_BOX, SHIFTED
from kbt_rl.experiments.aggregate import curve, methods_of
from kbt_rl.experiments.config import digest
from kbt_rl.experiments.simulation import Force, simulate, starts
from kbt_rl.experiments.tables import read_rows, write_rows
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOMINAL_ID, SHIFTED_ID = "kbt_rl/DiscreteInvertedPendulum-v0", "kbt_rl/ShiftedDiscreteInvertedPendulum-v0"
LEVELS = {"two": TWO_FORCES, "five": FIVE_FORCES}
CHECKPOINTS = (0, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200)
PRETRAINING = PretrainConfig(steps=2_500)


@dataclass(frozen=True)
class DiscreteMethod:
    """A learner by name: ``kind`` is ``kbt``, ``warm_start``, ``pretrained`` or ``expert``.

    Attributes:
        name: In tables and figures.
        kind: What it is.
        settings: Of the ``HeadConfig``, or of ``WarmStart``.
        hard: Whether labels are the expert's actions rather than its distributions.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    hard: bool = False


def _rule(rule: str, hard: bool = False, **settings: Any) -> DiscreteMethod:
    head = {"rule": rule, "last_variance": DISCRETE_HEAD.last_variance, **settings}
    return DiscreteMethod(f"KBT {rule}" + (", action labels" if hard else ""), "kbt", head, hard)


#: Learning rates and noise variances were chosen on seed 0 from ``tuning_methods``; the rates from 3e-3 on tie.
METHODS = (
    _rule("laplace"),
    _rule("fisher"),
    _rule("taylor", noise_variance=1e-1),
    _rule("replace_softmax", noise_variance=1e-2),
    _rule("laplace", hard=True),
    DiscreteMethod("warm start 25", "warm_start", {"memory": 25, "learning_rate": 1e-2}),
    DiscreteMethod("warm start 50", "warm_start", {"memory": 50, "learning_rate": 1e-2}),
    DiscreteMethod("pre-trained", "pretrained"),
    DiscreteMethod("expert", "expert"),
)


def tuning_methods() -> tuple[DiscreteMethod, ...]:
    """What the settings of ``METHODS`` were chosen from."""
    rates = [
        DiscreteMethod(f"rate {rate:g} warm start {memory}", "warm_start", {"memory": memory, "learning_rate": rate})
        for memory in (25, 50)
        for rate in (1e-3, 3e-3, 1e-2, 3e-2)
    ]
    noises = [
        DiscreteMethod(
            f"{rule} noise {noise:g}", "kbt", {"rule": rule, "last_variance": 100.0, "noise_variance": noise}
        )
        for rule in ("taylor", "replace_softmax")
        for noise in (1e-3, 1e-2, 1e-1)
    ]
    return (*rates, *noises)


@dataclass(frozen=True)
class DiscreteStudy:
    """One run of the study.

    Attributes:
        levels: ``two`` or ``five`` force levels.
        seed: First stream and pre-training seed.
        streams: Label streams for each pre-trained policy.
        policies: Pre-trained policies.
        starts: Episodes behind each score.
        checkpoints: Labels after which to score.
        methods: What to compare.
        pretraining: How the policies are pre-trained.
    """

    levels: str = "two"
    seed: int = 1000
    streams: int = 3
    policies: int = 2
    starts: int = 50
    checkpoints: tuple[int, ...] = CHECKPOINTS
    methods: tuple[DiscreteMethod, ...] = METHODS
    pretraining: PretrainConfig = PRETRAINING

    @property
    def forces(self) -> tuple[float, ...]:
        """The levels, N."""
        return LEVELS[self.levels]


class DiscreteRow(NamedTuple):
    """Score of a method after so many labels; ``upright`` is the share of episodes without a fall.

    ``failed`` is 1 from the first label on that the method could not learn from, and its score stays as it was.
    """

    method: str
    pretrain_seed: int
    stream_seed: int
    samples: int
    success: float
    upright: float
    failed: int


def pretrained(study: DiscreteStudy, seed: int, models: Path) -> KBT:
    """The policy cloned from the nominal expert's distributions; kept in ``models``."""
    path = models / f"discrete-{study.levels}-{seed}-{digest(study.pretraining)}.zip"
    if path.exists():
        return KBT.load(path)
    env = gym.make(NOMINAL_ID, forces=study.forces)
    model = KBT(env=env, seed=seed)
    model.pretrain(LQRExpert.for_env(env), study.pretraining, progress_bar=False)
    models.mkdir(parents=True, exist_ok=True)
    model.save(path)
    return model


def run_study(study: DiscreteStudy, out: Path, done: Callable[[str], None]) -> list[DiscreteRow]:
    """All methods on all pairs of pre-training and stream seeds; ``done`` is called with the name of each.

    Policies are kept in ``out/models`` and the rows of each run in ``out/runs``, so that the same call continues where
    an interrupted one stopped.
    """
    rows: list[DiscreteRow] = []
    for p in range(study.seed, study.seed + study.policies):
        model = pretrained(study, p, out / "models")
        for s in range(study.seed, study.seed + study.streams):
            for method in study.methods:
                what = (method, study.levels, study.starts, study.checkpoints, study.pretraining)
                path = out / "runs" / f"{study.levels}-p{p}-s{s}-{_digest(what)}.csv"
                if not path.exists():
                    write_rows(path, run_method(study, method, model, s))
                rows += read_rows(path, DiscreteRow)
                done(f"{method.name}, policy {p}, stream {s}")
    return rows


def _digest(what: tuple[Any, ...]) -> str:
    """Equal only for equal settings, whose representation is complete."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:10]


def run_method(study: DiscreteStudy, method: DiscreteMethod, model: KBT, stream_seed: int) -> list[DiscreteRow]:
    """Labels at i.i.d. states of the label box; a copy of the policy is scored at each checkpoint."""
    shifted = gym.make(SHIFTED_ID, forces=study.forces)
    expert = LQRExpert.for_env(shifted, temperature=0.0 if method.hard else None)
    initial = starts(stream_seed, study.starts)

    def rows(scores: Iterable[tuple[int, float, float, int]]) -> list[DiscreteRow]:
        return [DiscreteRow(method.name, int(model.seed or 0), stream_seed, *score) for score in scores]

    if method.kind in ("expert", "pretrained"):
        act: Force = lambda states: np.array(study.forces)[expert.predict(states)[0]]  # noqa: E731
        score = _score(act if method.kind == "expert" else _policy_force(model.policy, study.forces), initial)
        return rows((count, *score, 0) for count in study.checkpoints)
    learner = _learner(method, model, study)
    box = np.asarray(LABEL_BOX)
    states = np.random.default_rng([stream_seed, 3]).uniform(-box, box, (study.checkpoints[-1], 4)).astype(np.float32)
    labels = expert.label(states)
    kept: list[tuple[int, TransformerPolicy, int]] = []
    failed = 0
    for count in range(study.checkpoints[-1] + 1):
        if count in study.checkpoints:
            kept.append((count, copy.deepcopy(learner.policy), failed))
        if count < len(states) and not failed:
            try:
                learner.update(Sample(states[count], labels[count]))
            except UpdateError:
                failed = 1
    return rows((n, *_score(_policy_force(policy, study.forces), initial), lost) for n, policy, lost in kept)


def _learner(method: DiscreteMethod, model: KBT, study: DiscreteStudy) -> OnlineAlgorithm:
    env = gym.make(NOMINAL_ID, forces=study.forces)
    if method.kind == "warm_start":
        learner: OnlineAlgorithm = WarmStart(env=env, seed=model.seed, **method.settings)
    elif method.kind == "kbt":
        learner = KBT(env=env, seed=model.seed, policy_kwargs={"head": HeadConfig(**method.settings)})
    else:
        raise ValueError(f"method kind {method.kind!r} does not learn")
    learner.start_from(model)
    return learner


def _policy_force(policy: TransformerPolicy, forces: Sequence[float]) -> Force:
    levels = np.array(forces)
    return lambda states: levels[policy.clip(policy.act(policy.encode(policy.start(states))))]


def _score(force: Force, initial: np.ndarray) -> tuple[float, float]:
    """Success rate and share of episodes without a fall."""
    outcome = simulate(force, initial, SHIFTED)
    return float(outcome.success.mean()), float(np.isfinite(outcome.cost).mean())


def summary(rows: Sequence[DiscreteRow]) -> dict[str, dict[str, list[float]]]:
    """Mean success and its 95 % interval of each method at each checkpoint, with the trials lost to errors."""
    table: dict[str, dict[str, list[float]]] = {}
    for method in methods_of(rows):  # type: ignore[arg-type]
        samples, estimates = curve(rows, method)  # type: ignore[arg-type]
        lost = [sum(row.failed for row in rows if row.method == method and row.samples == n) for n in samples]
        table[method] = {
            "samples": list(samples),
            "success": [e.mean for e in estimates],
            "lower": [e.lower for e in estimates],
            "upper": [e.upper for e in estimates],
            "failed": [float(count) for count in lost],
        }
    return table


def configuration(study: DiscreteStudy) -> dict[str, Any]:
    """The study as plain values, for the file beside the rows."""
    return {**asdict(study), "forces": list(study.forces)}


def draw_discrete(rows: Sequence[DiscreteRow], levels: str) -> Figure:
    """Success against labels, one line a method with its interval; the legend counts the trials that stopped."""
    from kbt_rl.experiments.plot_style import FAINT, legend_below, new_figure

    figure, axes = new_figure(5.0)
    panel = axes[0, 0]
    for method, look in zip(summary(rows).items(), _looks(), strict=False):
        name, values = method
        label = f"{name} ({int(max(values['failed']))} trials stopped)" if any(values["failed"]) else name
        panel.plot(values["samples"], values["success"], label=label, clip_on=False, **look)
        panel.fill_between(values["samples"], values["lower"], values["upper"], color=look["color"], alpha=0.12, lw=0)
    panel.set(ylim=(-0.03, 1.03), xlabel="labelled samples", ylabel="share of starts that succeed")
    panel.set_title(f"Success on the shifted plant with {levels} force levels")
    trials = len({(row.pretrain_seed, row.stream_seed) for row in rows})
    shown = f"mean of {trials} trials, 95 % interval" if trials > 1 else "one trial"
    figure.suptitle(shown, x=0.995, ha="right", fontsize=9.5, color=FAINT)
    legend_below(figure, panel, columns=3)
    return figure


def _looks() -> list[dict[str, Any]]:
    from kbt_rl.experiments.plot_style import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, VERMILION

    colours = (VERMILION, BLUE, PURPLE, GREEN, VERMILION, ORANGE, ORANGE, FAINT, INK)
    lines = ("-", "-", "-", "-", "--", "-", "--", ":", ":")
    return [{"color": colour, "linestyle": line} for colour, line in zip(colours, lines, strict=True)]
