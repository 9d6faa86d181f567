"""One layer of any width beside its rivals, and every layer of the paper's transformer: time and memory of an update.

``shared`` against plain recursive least squares, a batch solve and laplace-torch; classes against a step of Adam;
``LinearisedHead`` against a forward and backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import Tensor, nn

from benchmarks.rows import Case, Row, shapes_of, timed, turns, update_case
from benchmarks.work import update_work
from kbt_rl.inference.config import HeadConfig, StructureName
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.linearised import LinearisedHead
from kbt_rl.models.decision_transformer import DecisionTransformer

Array = npt.NDArray[np.float64]
Learner = Callable[[Array, Array], Any]

# Features and outputs of the layers, and the labels that a batch solve has seen.
REGRESSIONS = ((64, 1), (256, 17), (2048, 17))
SEEN = 1_000
# Features and classes, and the rows of a batch.
CLASSES = ((64, 96), (256, 1000))
BATCH = 32
# Labels before they come again: what is known by heart is learned in less time.
STREAM = 4_096
# laplace-torch takes half a minute a label for 4,369 weights, and would need 10 GB for 34,833.
_MOST_LAPLACE_WEIGHTS = 5_000
NOISE = 0.1
_CLASS_STRUCTURES: tuple[StructureName, ...] = ("rotated", "diagonal", "neuron")
_MODULE_STRUCTURES: tuple[StructureName, ...] = ("low_rank", "diagonal")


def recursive_least_squares(features: int, outputs: int) -> Learner:
    """Plain NumPy: the covariance changes by a matrix of rank one."""
    mean, cov = np.zeros((outputs, features + 1)), np.eye(features + 1)

    def update(x: Array, y: Array) -> Array:
        inputs = np.append(x, 1.0)
        projected = cov @ inputs
        gain = projected / (inputs @ projected + NOISE)
        mean[:] += np.outer(y - mean @ inputs, gain)
        cov[:] -= np.outer(projected, gain)
        return mean

    return update


def batch_solve(features: int, outputs: int, seen: int = SEEN) -> Learner:
    """As ALPaCA adapts (Harrison et al. 2018): the normal equations of all labels seen so far, here always ``seen``."""
    rng, turn = np.random.default_rng(3), turns(seen)
    inputs = np.column_stack([rng.standard_normal((seen, features)), np.ones(seen)])
    labels = rng.standard_normal((seen, outputs))
    prior = NOISE * np.eye(features + 1)

    def update(x: Array, y: Array) -> Array:
        i = next(turn)
        inputs[i, :-1], labels[i] = x, y
        factor = cho_factor(inputs.T @ inputs + prior, check_finite=False)
        solved: Array = cho_solve(factor, inputs.T @ labels, check_finite=False)
        return solved

    return update


def laplace_torch(features: int, outputs: int) -> Learner:
    """laplace-torch with the full Hessian of the layer, fitted to one more label and ready to predict; float32.

    It leaves the mean to whoever trains the network.

    Raises:
        ImportError: It or a part of it cannot be imported.
    """
    try:
        from laplace import Laplace
        from torch.utils.data import DataLoader, TensorDataset
    except Exception as error:  # its own requirements fail in many ways where their versions do not fit
        raise ImportError(f"{type(error).__name__}: {error}") from error
    # Of the whole network, which is this one layer: that of a last layer cannot be fitted label by label.
    found: Any = Laplace(
        nn.Linear(features, outputs), "regression", subset_of_weights="all", hessian_structure="full",
        sigma_noise=NOISE**0.5,
    )  # fmt: skip

    def update(x: Array, y: Array) -> Tensor:
        row = TensorDataset(torch.from_numpy(x[None]).float(), torch.from_numpy(y[None]).float())
        found.fit(DataLoader(row, batch_size=1), override=False)
        scale: Tensor = found.posterior_scale
        return scale

    update(np.zeros(features), np.zeros(outputs))
    return update


def shared_layer(seconds: float, quick: bool) -> tuple[list[Row], dict[str, str]]:
    """``shared`` beside its rivals, one label; and the reasons of rivals that could not run."""
    found: list[Row] = []
    missing: dict[str, str] = {}
    for features, outputs in REGRESSIONS:
        group = f"one layer, {features:,} features, {outputs} output{'s' if outputs > 1 else ''}"
        head = BayesianHead.from_linear(
            nn.Linear(features, outputs), HeadConfig(structure="shared", noise_variance=NOISE)
        )
        work = update_work("shared", shapes_of(head))
        recursive = _learning("recursive least squares (NumPy)", recursive_least_squares, features, outputs)
        found += timed(group, [recursive._replace(work=work), update_case("shared", head)], seconds)
        slow = [_learning(f"batch solve of {SEEN:,} labels (ALPaCA's way)", batch_solve, features, outputs)]
        weights = outputs * (features + 1)
        if weights > _MOST_LAPLACE_WEIGHTS:
            missing[f"laplace-torch, {group}"] = f"its Hessian of {weights:,} weights takes {4e-9 * weights**2:.1f} GB"
        elif quick and weights > 1_000:
            missing[f"laplace-torch, {group}"] = "takes too long for --quick"
        else:
            try:
                slow.append(_learning("full Laplace (laplace-torch)", laplace_torch, features, outputs))
            except ImportError as error:
                missing["laplace-torch"] = str(error)
        for case in slow:
            found += timed(group, [case], seconds, rounds=1, burst=1, warm_up=1)
    return found, missing


def _learning(name: str, make: Callable[[int, int], Learner], features: int, outputs: int) -> Case:
    rng, turn = np.random.default_rng(0), turns()
    rows, labels = rng.standard_normal((64, features)), rng.standard_normal((64, outputs))
    learn = make(features, outputs)

    def call() -> None:
        i = next(turn)
        learn(rows[i], labels[i])

    return Case(name, call)


def classes(seconds: float, quick: bool) -> list[Row]:
    """Softmax layers beside one step of Adam on the same layer, a label as a whole number.

    Labels are drawn from the layer's own probabilities, which are as sure as a language model's: logits have a standard
    deviation of 3.
    """
    found: list[Row] = []
    for features, count in CLASSES:
        torch.manual_seed(0)
        layer = nn.Linear(features, count)
        with torch.no_grad():
            layer.weight.normal_(0.0, 3.0 / features**0.5)
        rows = torch.randn(STREAM, features)
        labels = torch.multinomial(torch.softmax(layer(rows), -1), 1)[:, 0]
        cases = [Case("Adam step (PyTorch)", _adam(layer, rows, labels))]
        for structure in _CLASS_STRUCTURES:
            if quick and structure == "neuron" and count > 100:
                continue  # 0.5 GB
            for active in (0.0, 0.01):
                name = structure if active == 0.0 else f"{structure}, active classes"
                cases.append(_class_case(name, structure, layer, rows, labels, active))
        group = f"softmax, {count:,} classes, {features} features"
        found += timed(group, cases, seconds)
        head, whole = _class_head("rotated", layer, 0.0), (rows[:BATCH].double().numpy(), labels[:BATCH].numpy())
        batch = [
            Case(f"rotated, {BATCH} rows", partial(head.update, *whole), head, BATCH),
            Case(f"rotated, {BATCH} rows predicted with variances", partial(_predict, head, whole[0]), head, BATCH),
        ]
        found += timed(group, batch, seconds, rounds=1, burst=1)
    return found


def _predict(head: BayesianHead, rows: Array) -> Tensor:
    return head.predict(rows).epistemic_variance


def _class_head(structure: StructureName, layer: nn.Linear, active: float) -> BayesianHead:
    config = HeadConfig(structure=structure, rule="laplace", active_probability=active)
    basis = None
    if structure == "rotated":
        basis = torch.linalg.qr(torch.randn(layer.in_features, layer.in_features, dtype=torch.float64)).Q
    return BayesianHead.from_linear(layer, config, feature_basis=basis)


def _class_case(
    name: str, structure: StructureName, layer: nn.Linear, rows: Tensor, labels: Tensor, active: float
) -> Case:
    head, turn = _class_head(structure, layer, active), turns(STREAM)
    features, whole = rows.double().numpy(), labels.numpy()

    def call() -> None:
        i = next(turn)
        head.update(features[i : i + 1], whole[i : i + 1])

    # How many classes are active is not known before.
    work = update_work(structure, shapes_of(head)) if active == 0.0 else None
    return Case(name, call, head, work=work)


def _adam(layer: nn.Linear, rows: Tensor, labels: Tensor, rate: float = 1e-3) -> Callable[[], None]:
    """A step of Adam on a copy's cross entropy in float32, the fastest that PyTorch has."""
    network, turn = copy.deepcopy(layer), turns(STREAM)
    optimiser = torch.optim.Adam(network.parameters(), rate, fused=True)
    samples = list(zip(rows.split(1), labels.split(1), strict=True))

    def step() -> None:
        inputs, label = samples[next(turn)]
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(inputs), label).backward()
        optimiser.step()

    return step


class OneToken(nn.Module):
    """The paper's policy as a plain network: a state ``(B, 4)`` in, an action ``(B, 1)`` out."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = DecisionTransformer(4, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Of the state alone; actions and time steps are not looked at."""
        tokens = states.unsqueeze(1)
        actions: Tensor = self.transformer(tokens, tokens[..., :1], tokens.new_zeros(len(tokens)))
        return actions[:, -1]


def every_layer(seconds: float) -> list[Row]:
    """All layers of the paper's transformer, beside a forward and backward pass of it."""
    torch.manual_seed(0)
    network, turn = OneToken().eval(), turns()
    states, labels = torch.randn(64, 1, 4), np.random.default_rng(0).standard_normal((64, 1, 1))
    weights = sum(part.numel() for part in network.parameters())

    def there_and_back() -> None:
        network.zero_grad()
        network(states[next(turn)]).sum().backward()

    cases = [Case("forward and backward pass (PyTorch)", there_and_back)]
    for structure in _MODULE_STRUCTURES:
        head = LinearisedHead(network, 1, HeadConfig(structure=structure, rank=10, noise_variance=NOISE))

        def call(head: LinearisedHead = head) -> None:
            i = next(turn)
            head.update(states[i], labels[i])

        cases.append(Case("low_rank, rank 10" if structure == "low_rank" else structure, call, head))
    return timed(f"every layer of the paper's transformer, {weights:,} weights", cases, seconds)
