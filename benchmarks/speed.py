"""Time of the encoder, of acting, of an update and of retraining: the paper's head, and sweeps of its size."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

import kbt_rl  # noqa: F401  registers the environments
from benchmarks.clock import Timing, in_turns
from benchmarks.machine import limits
from benchmarks.peers import STRUCTURES, JaxEKF
from benchmarks.work import Roofline, Work, network_work, prediction_work, training_work, update_work
from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.warm_start import WarmStart
from kbt_rl.experiments.learners import NOMINAL_ID
from kbt_rl.experiments.timing import encode_by_pytorch
from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.models.decision_transformer import DecisionTransformer

_MEMORY = 20
_WIDEST_JOINT = 222  # 3,997 weights
# A head is there in the loop, in the batch, and once more while the batch stacks it.
_COPIES, _MOST_BYTES = 3, 2 * 10**9
_PAPER, _RETRAINING = "paper's head", f"warm start {_MEMORY}, per sample"
INDEPENDENT = "independent heads"
# See ``_fastest``.
_ROUNDS = 5
# Inputs and width of the heads, how they are stored and how many: the paper's, and one so small that its memory does
# not count.
_FLEETS = (
    (16, 32, "float64", (1, 4, 16, 64, 256, 1024, 4096)),
    (16, 32, "float32", (1024,)),
    (4, 8, "float64", (64, 1024)),
)


class Row(NamedTuple):
    """One timed call.

    Attributes:
        group: What is varied.
        name: What was called.
        structure: Of the head's covariance, or empty.
        features: Inputs of the head.
        width: Hidden units.
        layers: Depth.
        outputs: Outputs.
        rows: Rows in one update, or independent heads with a row each.
        weights: Number of weights of the head.
        stored_bytes: Size of the covariance as this library stores it.
        median_us: Microseconds of a call, median.
        p99_us: 99th percentile.
        roofline: What the machine's memory and cores would need at best, None where no formula is given.
        threads: Threads of PyTorch, or those that share out independent heads.
        dtype: Of the posterior, or empty.
    """

    group: str
    name: str
    structure: str
    features: int
    width: int
    layers: int
    outputs: int
    rows: int
    weights: int
    stored_bytes: int
    median_us: float
    p99_us: float
    roofline: Roofline | None
    threads: int
    dtype: str

    @property
    def limit_us(self) -> float:
        """What the machine would need at best; NaN where no formula is given."""
        return math.nan if self.roofline is None else self.roofline.limit_us


def head_of(
    structure: str, features: int = 16, width: int = 32, layers: int = 2, outputs: int = 1, dtype: str = "float64"
) -> BayesianHead:
    """A head with a start of random means, as after pre-training."""
    torch.manual_seed(0)
    config = HeadConfig(structure=structure, width=width, layers=layers, noise_variance=0.1, dtype=dtype)
    return BayesianHead.from_linear(torch.nn.Linear(features, outputs), config)


def _updates(head: BayesianHead, rows: int = 1) -> Callable[[], Any]:
    """Updates on a stream of 256 samples, again and again; feature entries of order one."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((256, rows, head.in_features))
    labels = rng.standard_normal((256, rows, head.out_features))
    count = iter(range(10**9))

    def call() -> None:
        i = next(count) % 256
        head.update(features[i], labels[i])

    return call


def _now(work: Work) -> Roofline:
    """What must be done, on the machine as fast as it is at the moment."""
    return Roofline(work, limits(work.working_set, work.computed_in))


def _shapes(head: BayesianHead) -> tuple[tuple[int, int], ...]:
    return tuple((shape.n, shape.k) for shape in head.state.spec.shapes)


def _update_work(head: BayesianHead, rows: int = 1) -> Work:
    return update_work(head.state.spec.structure, _shapes(head), head.mean.itemsize, rows)


def _encoder_weights(transformer: DecisionTransformer) -> int:
    """Those that one token meets: it attends to itself, whatever the queries and keys."""
    parts = [*transformer.embed_state.parameters(), *transformer.encoder.parameters()]
    attention = [layer.self_attn for layer in transformer.encoder.layers]
    idle = sum(2 * (each.in_proj_weight.numel() + each.in_proj_bias.numel()) // 3 for each in attention)
    return sum(part.numel() for part in parts) - idle


def _row(group: str, name: str, timing: Timing, roofline: Roofline | None = None) -> Row:
    """A timed call that no head of its own belongs to."""
    threads = torch.get_num_threads()
    return Row(group, name, "", 0, 0, 0, 0, 1, 0, 0, timing.median_us, timing.p99_us, roofline, threads, "")


def _head_row(
    group: str, name: str, timing: Timing, head: BayesianHead, rows: int = 1, roofline: Roofline | None = None
) -> Row:
    """A timed update; its roofline is measured where none is given."""
    state = head.state
    layers = len(state.spec.shapes)
    return Row(
        group, name, state.spec.structure, head.in_features, state.spec.shapes[0].n if layers > 1 else 0, layers,
        head.out_features, rows, len(state.mean), sum(block.nbytes for block in state.cov), timing.median_us,
        timing.p99_us, roofline or _now(_update_work(head, rows)), torch.get_num_threads(), head.config.dtype,
    )  # fmt: skip


def _fastest(time_all: Callable[[], list[Row]]) -> list[Row]:
    """Time everything in rounds, and take the lowest median and the lowest limit of each call.

    A machine that others use too changes its speed between the first call and the last, and is never faster than alone.
    """
    rounds = [time_all() for _ in range(_ROUNDS)]
    return [
        min(found, key=lambda row: row.median_us)._replace(roofline=min(found, key=lambda row: row.limit_us).roofline)
        for found in zip(*rounds, strict=True)
    ]


def paper_head(seconds: float, threads: Sequence[int]) -> list[Row]:
    """Encoder, acting, update of each structure, warm start and a jitted EKF of the same size, in turns.

    Args:
        seconds: For each call and number of threads.
        threads: Of PyTorch.
    """
    env = gym.make(NOMINAL_ID)
    model, baseline = KBT(env=env, seed=0), WarmStart(env=env, seed=0, memory=_MEMORY)
    policy, plain = model.policy, baseline.policy
    states = np.random.default_rng(1).uniform(-1, 1, (256, 1, 4)).astype(np.float32)
    contexts = [policy.start(state) for state in states]
    features = [policy.encode(context) for context in contexts]
    heads = {structure: head_of(structure) for structure in STRUCTURES}
    rival = JaxEKF(16, 0.1)
    rng, count = np.random.default_rng(2), iter(range(10**9))
    inputs, labels = rng.standard_normal((256, 16)), rng.standard_normal(256)

    def turn(function: Callable[[int], Any]) -> Callable[[], Any]:
        return lambda: function(next(count) % 256)

    calls: dict[str, Callable[[], Any]] = {
        "encoder": turn(lambda i: policy.encode(contexts[i])),
        "encoder (PyTorch layers)": turn(lambda i: encode_by_pytorch(plain, contexts[i])),
        "act, plain network": turn(lambda i: plain.act(plain.encode(contexts[i]))),
        "act, mean of the posterior": turn(lambda i: policy.act(policy.encode(contexts[i]))),
        "act, mean and variance": turn(lambda i: policy.head.predict(policy.encode(contexts[i]))),
        "predict, plain network": turn(lambda i: plain.predict(states[i], deterministic=True)),
        "predict, mean of the posterior": turn(lambda i: policy.predict(states[i], deterministic=True)),
        "predict, mean and variance": turn(lambda i: policy.predict_moments(states[i])),
        "head: mean": turn(lambda i: policy.act(features[i])),
        "head: mean and variance": turn(lambda i: policy.head.predict(features[i])),
        **{f"update, {structure}": _updates(head) for structure, head in heads.items()},
        "update, EKF (JAX)": turn(lambda i: rival.update(inputs[i], labels[i])),
    }
    of = {f"update, {structure}": head for structure, head in heads.items()}
    works = _works(policy.head, plain.transformer, baseline)

    def time_one(count: int) -> list[Row]:
        torch.set_num_threads(count)
        try:
            timings = in_turns(calls, seconds / _ROUNDS)
            timings[_RETRAINING] = _retraining(baseline, contexts, seconds / _ROUNDS)
            return [
                _head_row(_PAPER, name, timing, of[name])
                if name in of
                else _row(_PAPER, name, timing, _now(works[name]) if name in works else None)
                for name, timing in timings.items()
            ]
        finally:
            torch.set_num_threads(1)

    return _fastest(lambda: [row for count in threads for row in time_one(count)])


def _works(head: BayesianHead, transformer: DecisionTransformer, baseline: WarmStart) -> dict[str, Work]:
    """What the calls beside the updates must do; to act is to encode and to ask the head."""
    structure, weights = head.state.spec.structure, _encoder_weights(transformer)
    trained = weights + sum(part.numel() for part in transformer.linear.parameters())
    return {
        **dict.fromkeys(("encoder", "encoder (PyTorch layers)"), network_work(weights)),
        "head: mean": prediction_work(structure, _shapes(head), variance=False),
        "head: mean and variance": prediction_work(structure, _shapes(head), variance=True),
        "update, EKF (JAX)": update_work("joint", _shapes(head)),
        _RETRAINING: training_work(trained, baseline.memory, baseline.epochs),
    }


def _retraining(baseline: WarmStart, contexts: list[Any], seconds: float) -> Timing:
    """Time of a training on a full memory over its samples."""

    def train() -> None:
        for context in contexts[:_MEMORY]:
            baseline.update(Sample(context, np.zeros((1, 1))))

    found = in_turns({"train": train}, seconds, burst=1, warm_up=1)["train"]
    return Timing(found.median_us / _MEMORY, found.p99_us / _MEMORY, found.calls * _MEMORY)


def sweeps(seconds: float, largest: int) -> list[Row]:
    """Updates over width, depth, outputs, rows of one update and the precision of the posterior."""
    # From 32: a hidden layer holds a positive and a negative copy of the 16 features.
    widths = [width for width in (32, 64, 128, _WIDEST_JOINT, 256, 512, 1024) if width <= largest]
    cases: dict[str, tuple[BayesianHead, int]] = {}
    for width in widths:
        for structure in STRUCTURES:
            if width <= {"joint": _WIDEST_JOINT, "layer": 256}.get(structure, largest):
                cases[f"width {width}, {structure}"] = head_of(structure, width=width), 1
    for layers in (1, 2, 3, 4):
        for structure in STRUCTURES:
            cases[f"depth {layers}, {structure}"] = head_of(structure, layers=layers), 1
    for outputs in (1, 4, 16, 64):
        for structure in ("layer", "neuron", "diagonal"):
            cases[f"outputs {outputs}, {structure}"] = head_of(structure, outputs=outputs, width=64), 1
    for rows in (1, 4, 16, 64):
        for structure in STRUCTURES:
            cases[f"rows {rows}, {structure}"] = head_of(structure), rows
    for width, rows in ((32, 1), (32, 4), (128, 1)):
        for structure in STRUCTURES:
            for dtype in ("float64", "float32"):
                name = f"precision {dtype}, {structure}, width {width}" + (f", {rows} rows" if rows > 1 else "")
                cases[name] = head_of(structure, width=width, dtype=dtype), rows

    def time_all() -> list[Row]:
        # Alone, as a wide one would empty the caches of the others; and its limit right after it, in the same weather.
        return [
            _head_row(
                name.split()[0], name, in_turns({name: _updates(head, rows)}, seconds / _ROUNDS)[name], head, rows
            )
            for name, (head, rows) in cases.items()
        ]

    return _fastest(time_all)


def independent_heads(seconds: float, largest: int) -> list[Row]:
    """Heads that each learn from a row of their own: a loop over them, and one call on one thread and on two."""
    found: list[Row] = []
    for structure, (features, width, dtype, counts) in itertools.product(STRUCTURES, _FLEETS):
        head = head_of(structure, features, width, dtype=dtype)
        stored = sum(block.nbytes for block in head.state.cov)
        for count in counts:
            if count > largest or count * stored * _COPIES > _MOST_BYTES:
                break
            found += _fastest(_fleet(head, count, seconds))
    return found


def _fleet(head: BayesianHead, count: int, seconds: float) -> Callable[[], list[Row]]:
    """What times ``count`` heads once."""
    loop, batch = [copy.deepcopy(head) for _ in range(count)], HeadBatch(copy.deepcopy(head) for _ in range(count))
    rng, turn = np.random.default_rng(0), iter(range(10**9))
    features, labels = rng.standard_normal((16, count, head.in_features)), rng.standard_normal((16, count, 1))

    def one_by_one() -> None:
        i = next(turn) % 16
        for index, each in enumerate(loop):
            each.update(features[i, index : index + 1], labels[i, index : index + 1])

    def at_once(threads: int) -> None:
        i = next(turn) % 16
        batch.threads = threads
        batch.update(features[i], labels[i])

    ways = {("loop", 1): one_by_one, ("one call", 1): lambda: at_once(1), ("one call", 2): lambda: at_once(2)}

    def time_all() -> list[Row]:
        timings = in_turns({str(way): call for way, call in ways.items()}, seconds / _ROUNDS, burst=1, warm_up=1)
        (work, machine), rows = _now(_update_work(head).of_heads(count)), []
        for name, threads in ways:
            of = f"{head.state.spec.structure}, {head.in_features}-{head.config.width}-1, {count}, {name}"
            roofline = Roofline(work, machine.of_cores(threads))
            row = _head_row(INDEPENDENT, of, timings[str((name, threads))], head, count, roofline)
            rows.append(row._replace(threads=threads))
        return rows

    return time_all


def samples_seen(seconds: float, total: int) -> list[Row]:
    """Updates from the first, the 10th, the 100th ... sample on, in turns with those of a new head: constant time."""
    head = head_of("neuron")
    call, found, seen = _updates(head), [], 0
    mark = 0
    while mark <= total:
        while seen < mark:
            call()
            seen += 1
        first, new = int(head.labels_seen) + 1, head_of("neuron")
        timings = in_turns({"seen": call, "new": _updates(new)}, min(seconds, 0.5), warm_up=0)
        seen = int(head.labels_seen)
        found.append(_head_row("samples seen", f"samples {first:,} to {seen:,}", timings["seen"], head))
        found.append(_head_row("samples seen", "those of a new head, in turns", timings["new"], new))
        mark = next(10**power for power in range(1, 10) if 10**power > seen)
    return found
