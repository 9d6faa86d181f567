"""Time and memory of the paper's head: encoder, acting, updates and retraining; and sweeps of the head's size."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import kbt_rl  # noqa: F401  registers the environments
from benchmarks.peers import STRUCTURES, JaxEKF
from benchmarks.rows import Case, Row, shapes_of, stored_bytes, timed, turns, update_case
from benchmarks.work import network_work, prediction_work, training_work, update_work
from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.warm_start import WarmStart
from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.config import HeadConfig, StructureName
from kbt_rl.inference.head import BayesianHead
from kbt_rl.models.decision_transformer import DecisionTransformer
from studies.timing import encode_by_pytorch

PAPER, INDEPENDENT = "paper's head", "independent heads"
_MEMORY = 20
_WIDEST_JOINT = 222  # 3,997 weights
# A head is there in the loop, in the batch, and once more while the batch stacks it.
_COPIES, _MOST_BYTES = 3, 10**9
# Inputs and width of the heads, and how many: the paper's, and one so small that its memory does not count.
_FLEETS = ((16, 32, (1, 16, 64, 256, 1024, 4096)), (4, 8, (64, 1024)))


def head_of(
    structure: StructureName, features: int = 16, width: int = 32, layers: int = 2, outputs: int = 1, **options: Any
) -> BayesianHead:
    """A head with a start of random means, as after pre-training; the paper's by default."""
    torch.manual_seed(0)
    config = HeadConfig(structure=structure, width=width, layers=layers, noise_variance=0.1, **options)
    return BayesianHead.from_linear(torch.nn.Linear(features, outputs), config)


def paper_head(seconds: float) -> tuple[list[Row], dict[str, str]]:
    """Encoder, acting, update of each structure, warm start and a jitted EKF of the same size, in turns.

    Returns:
        The rows, and the reasons of rivals that could not run.
    """
    env = gym.make("kbt_rl/InvertedPendulum-v0")
    model = KBT(env=env, seed=0, policy_kwargs={"head": HeadConfig(layers=2), "skip": "none"})
    baseline = WarmStart(env=env, seed=0, memory=_MEMORY)
    policy, plain = model.policy, baseline.policy
    states = np.random.default_rng(1).uniform(-1, 1, (64, 1, 4)).astype(np.float32)
    contexts = [policy.start(state) for state in states]
    features = [policy.encode(context) for context in contexts]
    rng, turn = np.random.default_rng(2), turns()
    inputs, labels = rng.standard_normal((64, 16)), rng.standard_normal(64)

    def in_order(function: Callable[[int], Any]) -> Callable[[], Any]:
        return lambda: function(next(turn))

    def train() -> None:
        for context in contexts[:_MEMORY]:
            baseline.update(Sample(context, np.zeros((1, 1))))

    weights = encoder_weights(plain.transformer)
    trained = weights + sum(part.numel() for part in plain.transformer.linear.parameters())
    encoding, structure, shapes = network_work(weights), policy.head.spec.structure, shapes_of(policy.head)
    ask = {variance: prediction_work(structure, shapes, variance=variance) for variance in (False, True)}
    cases = [
        Case("encoder (PyTorch layers)", in_order(lambda i: encode_by_pytorch(plain, contexts[i])), work=encoding),
        Case("encoder", in_order(lambda i: policy.encode(contexts[i])), work=encoding),
        Case("predict, plain network", in_order(lambda i: plain.predict(states[i], deterministic=True))),
        Case("predict, mean of the posterior", in_order(lambda i: policy.predict(states[i], deterministic=True))),
        Case("predict, mean and variance", in_order(lambda i: policy.predict_moments(states[i]))),
        Case("head: mean", in_order(lambda i: policy.act(features[i])), work=ask[False]),
        Case("head: mean and variance", in_order(lambda i: policy.head.predict(features[i])), work=ask[True]),
        *(update_case(f"update, {each}", head_of(each)) for each in STRUCTURES),
        update_case("update, joint, linearised", head_of("joint", propagation="linearised")),
    ]
    missing: dict[str, str] = {}
    try:
        rival = JaxEKF(16, 0.1)
        work = update_work("joint", shapes)
        cases.append(
            Case("update, EKF (JAX)", in_order(lambda i: rival.update(inputs[i], float(labels[i]))), work=work)
        )
    except ImportError as error:
        missing["EKF (JAX)"] = str(error)
    training = training_work(trained, baseline.memory, baseline.epochs)
    retraining = Case(f"warm start {_MEMORY}, per sample", train, work=training, samples=_MEMORY)
    return timed(PAPER, cases, seconds) + timed(PAPER, [retraining], seconds, burst=1, warm_up=1), missing


def encoder_weights(transformer: DecisionTransformer) -> int:
    """Those that one token meets: it attends to itself, whatever the queries and keys."""
    parts = [*transformer.embed_state.parameters(), *transformer.encoder.parameters()]
    attention = [layer.self_attn for layer in transformer.encoder.layers]
    idle = sum(2 * (each.in_proj_weight.numel() + each.in_proj_bias.numel()) // 3 for each in attention)
    return int(sum(part.numel() for part in parts) - idle)


def sweeps(seconds: float, largest: int) -> list[Row]:
    """Updates over width, depth, outputs and rows of one update."""
    # From 32: a hidden layer holds a positive and a negative copy of the 16 features.
    widths = [width for width in (32, 64, 128, _WIDEST_JOINT, 512, 1024) if width <= largest]
    dense = min(largest, _WIDEST_JOINT)
    cases: dict[str, list[Case]] = {
        "width": [
            update_case(f"width {width}, {each}", head_of(each, width=width))
            for width, each in itertools.product(widths, STRUCTURES)
            if width <= dense or each in ("neuron", "diagonal")
        ],
        "depth": [
            update_case(f"depth {layers}, {each}", head_of(each, layers=layers))
            for layers, each in itertools.product((1, 2, 3), STRUCTURES)
        ],
        "outputs": [
            update_case(f"outputs {outputs}, {each}", head_of(each, outputs=outputs, width=64))
            for outputs, each in itertools.product((1, 4, 16, 64), STRUCTURES[1:])
            if outputs <= largest // 16
        ],
        "rows": [
            update_case(f"rows {rows}, {each}", head_of(each), rows)
            for rows, each in itertools.product((1, 4, 16, 64), STRUCTURES)
        ],
    }
    return [row for group, own in cases.items() for row in timed(group, own, seconds, alone=True)]


def independent_heads(seconds: float, largest: int) -> list[Row]:
    """Heads that each learn from a row of their own: a loop over them, and one call."""
    found: list[Row] = []
    for structure, (features, width, counts) in itertools.product(STRUCTURES, _FLEETS):
        head = head_of(structure, features, width)
        for count in counts:
            if count <= largest and count * stored_bytes(head) * _COPIES <= _MOST_BYTES:
                found += timed(INDEPENDENT, _fleet(head, count), seconds, rounds=3, burst=1, warm_up=1)
    return found


def _fleet(head: BayesianHead, count: int) -> list[Case]:
    loop, batch = [copy.deepcopy(head) for _ in range(count)], HeadBatch(head for _ in range(count))
    rng, turn = np.random.default_rng(0), turns(16)
    features, labels = rng.standard_normal((16, count, head.in_features)), rng.standard_normal((16, count, 1))

    def one_by_one() -> None:
        i = next(turn)
        for index, each in enumerate(loop):
            each.update(features[i, index : index + 1], labels[i, index : index + 1])

    def at_once() -> None:
        i = next(turn)
        batch.update(features[i], labels[i])

    work = update_work(head.spec.structure, shapes_of(head)).of_heads(count)
    of = f"{head.spec.structure}, {head.in_features}-{head.config.width}-1, {count}"
    return [Case(f"{of}, loop", one_by_one, head, count, work), Case(f"{of}, one call", at_once, head, count, work)]


def samples_seen(seconds: float, total: int) -> list[Row]:
    """Updates of a head that has seen 0, 100 ... samples, in turns with those of a new head: constant time."""
    head, found = head_of("neuron"), []
    seen = update_case("", head)
    for mark in (0, *(10**power for power in (2, 4, 6) if 10**power <= total)):
        while int(head.labels_seen) < mark:
            seen.call()
        cases = [update_case("a new head, in turns", head_of("neuron")), seen._replace(name=f"after {mark:,} samples")]
        found += timed("samples seen", cases, seconds, rounds=1)
    return found
