"""What an experiment consists of: trials as plain values, and the plan that lists them.

A trial is picklable and holds everything that its result depends on, so that it can run in any process or on any
machine; its id names its result file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from kbt_rl.agents.behaviour_cloning import PretrainConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = Literal["adapt", "uncertainty", "correlated", "timing", "initialisation", "softmax"]

#: Samples after which Figure 3 evaluates; dense below 50, where the methods differ.
CHECKPOINTS = (0, 5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 75, 100, 125, 150, 200, 250, 300, 350, 400)
CORRELATED_CHECKPOINTS = (0, 10, 20, 30, 50, 75, 100, 150, 200)
MEMORIES = (10, 20, 25, 50, 75, 100)
QUICK_MEMORIES = (10, 50, 100)
#: Variances of the label noise in Figure 5, N^2.
NOISE_VARIANCES = (0.0, 10.0, 20.0, 50.0)
#: Stream and pre-training seeds from here on are reported; those below it are for tuning.
FIRST_REPORTED_SEED = 1000

PRETRAINING = PretrainConfig()


def digest(config: DataclassInstance) -> str:
    """Ten hexadecimal digits that are equal for equal configurations."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Method:
    """A learner and its settings.

    Attributes:
        name: What tables and legends call it.
        kind: ``kbt``, ``printed``, ``warm_start``, ``linear_floor``, ``pretrained`` or ``expert``.
        settings: Options of the kind: ``HeadConfig`` fields, ``memory`` and ``learning_rate``, or ``epsilon``.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One run of one method on one stream; ``run_trial`` maps it to its record.

    Attributes:
        kind: What is measured.
        method: Which learner, with its settings.
        pretrain_seed: Seed of the pre-trained policy.
        stream_seed: Seed of the labels, and of the evaluation starts.
        samples: Labels to learn from.
        starts: Episodes evaluated at each checkpoint.
        checkpoints: Samples after which to evaluate.
        noise_variance: Variance of the label noise, N^2.
        stream: ``iid`` or ``visited``.
        pretraining: How the policy was pre-trained.
        methods: Learners that take turns in a ``timing`` trial.
    """

    kind: Kind
    method: Method
    pretrain_seed: int
    stream_seed: int
    samples: int = 400
    starts: int = 50
    checkpoints: tuple[int, ...] = CHECKPOINTS
    noise_variance: float = 0.0
    stream: str = "iid"
    pretraining: PretrainConfig = PRETRAINING
    methods: tuple[Method, ...] = ()

    @property
    def id(self) -> str:
        """Readable, and equal only for equal trials."""
        slug = self.method.name.lower().replace(" ", "-").replace("(", "").replace(")", "")
        return f"{self.kind}-{slug}-p{self.pretrain_seed}-s{self.stream_seed}-{digest(self)}"


def tuned() -> dict[str, Any]:
    """What ``kbt-rl tune`` found on the tuning seeds: learning rates by memory, and epsilon of the printed method."""
    text = resources.files("kbt_rl.experiments").joinpath("tuned.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


KBT_METHOD = Method("KBT", "kbt")
LINEAR_METHOD = Method("linear layer (L = 1)", "kbt", {"layers": 1})


def printed_method(epsilon: float) -> Method:
    """The paper's algorithm with only its misprints corrected."""
    return Method("KBT as printed", "printed", {"epsilon": epsilon})


def warm_start_method(memory: int, learning_rate: float) -> Method:
    """The paper's baseline."""
    return Method(f"warm start {memory}", "warm_start", {"memory": memory, "learning_rate": learning_rate})


def figure3_methods(memories: Sequence[int] = MEMORIES) -> list[Method]:
    """All methods of Figure 3, the baselines at their best settings."""
    best = tuned()
    warm = [warm_start_method(memory, best["learning_rate"][str(memory)]) for memory in memories]
    return [
        KBT_METHOD,
        LINEAR_METHOD,
        printed_method(best["epsilon"]),
        *warm,
        Method("linear floor", "linear_floor"),
        Method("pre-trained", "pretrained"),
        Method("expert", "expert"),
    ]


def reproduction_plan(*, full: bool = False, quick: bool = False, seed: int = FIRST_REPORTED_SEED) -> list[Trial]:
    """Every trial of ``kbt-rl reproduce``.

    Args:
        full: 30 streams times 3 pre-trained policies rather than 5 times 2.
        quick: One stream, one policy, few samples; for a look.
        seed: First stream and pre-training seed; at least 1000 for reported figures.
    """
    streams, policies = (30, 3) if full else (1, 1) if quick else (5, 2)
    pretraining = replace(PRETRAINING, steps=1_500) if quick else PRETRAINING
    pairs = [(seed + p, seed + s) for s in range(streams) for p in range(policies)]
    checkpoints = (0, 10, 20, 30, 50, 100) if quick else CHECKPOINTS
    base = Trial("adapt", KBT_METHOD, seed, seed, pretraining=pretraining)
    adapt = [
        replace(
            base,
            method=method,
            pretrain_seed=p,
            stream_seed=s,
            samples=checkpoints[-1],
            checkpoints=checkpoints,
            starts=25 if quick else 50,
        )
        for method in figure3_methods(QUICK_MEMORIES if quick else MEMORIES)
        for p, s in pairs
    ]
    iterations = 1_000 if quick else 70_000
    uncertainty = [
        replace(
            base,
            kind="uncertainty",
            method=Method(f"KBT {rule}", "kbt", {"rule": rule}),
            noise_variance=variance,
            samples=iterations,
            checkpoints=(),
            starts=0,
        )
        for variance in NOISE_VARIANCES
        for rule in ("measure", "replace")
    ]
    one_policy = [pair for pair in pairs if pair[0] == seed]
    # The longest trials first, so that no process is left alone with one at the end.
    return [*uncertainty, *adapt, *_correlated(base, one_policy, quick), *_single(base, quick)]


def _correlated(base: Trial, pairs: list[tuple[int, int]], quick: bool) -> list[Trial]:
    """Four methods, labels at visited states against i.i.d. ones."""
    best = tuned()
    methods = [
        KBT_METHOD,
        LINEAR_METHOD,
        printed_method(best["epsilon"]),
        warm_start_method(50, best["learning_rate"]["50"]),
    ]
    checkpoints = (0, 20, 50) if quick else CORRELATED_CHECKPOINTS
    return [
        replace(
            base,
            kind="correlated",
            method=method,
            stream=stream,
            pretrain_seed=p,
            stream_seed=s,
            samples=checkpoints[-1],
            checkpoints=checkpoints,
            starts=25 if quick else 50,
        )
        for method in methods
        for stream in ("iid", "visited")
        for p, s in pairs
    ]


def _single(base: Trial, quick: bool) -> list[Trial]:
    """Measurements that need one trial: the initialisation and the softmax moments."""
    return [
        replace(base, kind="initialisation", checkpoints=(), samples=0, starts=0),
        replace(base, kind="softmax", checkpoints=(), samples=2**12 if quick else 2**15, starts=0),
    ]


def batches(trials: Sequence[Trial]) -> list[tuple[Trial, ...]]:
    """The trials in their order, those together that are run in one go: warm starts but for their seeds and streams."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        shared = trial.kind in ("adapt", "correlated") and trial.method.kind == "warm_start"
        key = replace(trial, pretrain_seed=0, stream_seed=0, stream="iid") if shared else trial
        found.setdefault(digest(key), []).append(trial)
    return [tuple(batch) for batch in found.values()]


def timing_plan(plan: list[Trial], quick: bool) -> list[Trial]:
    """Figure 4: every learner in turn, in one trial to be run with nothing beside it."""
    first = next(trial for trial in plan if trial.kind == "adapt")
    memories = QUICK_MEMORIES if quick else MEMORIES
    methods = tuple(method for method in figure3_methods(memories) if method.kind in ("kbt", "printed", "warm_start"))
    samples = 200 if quick else 300  # at least two blocks of the largest memory
    return [replace(first, kind="timing", methods=methods, samples=samples, checkpoints=(), starts=0)]
