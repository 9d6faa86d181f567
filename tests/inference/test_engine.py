"""Every fast path equals the definition, and without numba everything works the same."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MACHINE_CODE, generator, linear, randn
from torch import Tensor
from wholeness.attacks import bits

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.engines.classes import ClassesEngine
from kbt_rl.inference.engines.outputs import OutputsEngine
from kbt_rl.inference.engines.small import SmallEngine
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.model_average import ModelAverage

pytestmark = MACHINE_CODE

FEATURES = 5
# Kinds of heads with machine code: the engine, outputs, and settings.
KINDS: dict[str, tuple[type, int, dict[str, Any]]] = {
    "shared, one output": (OutputsEngine, 1, {}),
    "shared, four outputs": (OutputsEngine, 4, {}),
    "neuron, four outputs": (OutputsEngine, 4, {"structure": "neuron"}),
    "laplace, neuron": (ClassesEngine, 4, {"rule": "laplace"}),
    "fisher, neuron": (ClassesEngine, 4, {"rule": "fisher", "last_variance": 0.3}),
    "laplace, diagonal": (ClassesEngine, 4, {"rule": "laplace", "structure": "diagonal"}),
    "laplace, rotated": (ClassesEngine, 4, {"rule": "laplace", "structure": "rotated"}),
    "laplace, active classes": (ClassesEngine, 4, {"rule": "laplace", "active_probability": 0.2}),
    "laplace, process noise": (
        ClassesEngine,
        4,
        {"rule": "laplace", "structure": "diagonal", "forgetting": "process_noise", "forgetting_rate": 0.01},
    ),
    "two layers, joint": (SmallEngine, 1, {"layers": 2, "structure": "joint", "hidden_variance": 0.1}),
    "two layers, layer": (SmallEngine, 1, {"layers": 2, "structure": "layer", "hidden_variance": 0.1}),
    "two layers, neuron": (SmallEngine, 1, {"layers": 2, "structure": "neuron", "hidden_variance": 0.1}),
    "two layers, diagonal": (SmallEngine, 1, {"layers": 2, "structure": "diagonal", "hidden_variance": 0.1}),
    "two layers, stiff": (SmallEngine, 1, {"layers": 2, "hidden_variance": 1e-8, "noise_variance": 1e-6}),
}


def head_of(kind: str) -> BayesianHead:
    _, outputs, settings = KINDS[kind]
    head = BayesianHead(FEATURES, outputs, HeadConfig(**settings))
    basis = torch.linalg.qr(randn(FEATURES, FEATURES, seed=1)).Q if settings.get("structure") == "rotated" else None
    scale = None if head.rule.link == "softmax" else randn(outputs, seed=2).exp()
    head.reset(
        randn(outputs, FEATURES, seed=3),
        randn(outputs, seed=4),
        feature_mean=randn(FEATURES, seed=5),
        feature_scale=randn(FEATURES, seed=6).exp(),
        feature_basis=basis,
        target_scale=scale,
    )
    return head


def by_definition(kind: str) -> BayesianHead:
    head = head_of(kind)
    head._engine = None  # there is no public way to leave machine code out for one head
    return head


def labels(head: BayesianHead, count: int, seed: int = 10) -> tuple[Tensor, Tensor]:
    target = randn(count, head.out_features, seed=seed + 1)
    if head.rule.link == "softmax":
        target = torch.nn.functional.one_hot(target.argmax(-1), head.out_features).double()
    return randn(count, FEATURES, seed=seed), target


def assert_same(ours: BayesianHead, theirs: BayesianHead) -> None:
    for name, value in ours.state_dict().items():
        other = theirs.state_dict()[name]
        largest = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12 * max(largest, 1e-12), msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_and_predictions_equal_the_definition(kind: str) -> None:
    fast, slow = head_of(kind), by_definition(kind)
    assert type(fast._engine) is KINDS[kind][0]  # which one is taken is not told in public
    features, target = labels(fast, 30)
    for row in range(30):
        one = slice(row, row + 1)
        ours, theirs = fast.update(features[one], target[one]), slow.update(features[one], target[one])
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-8, atol=1e-10)
    assert_same(fast, slow)
    probes = randn(7, FEATURES, seed=20)
    for ours, theirs in zip(fast.predict(probes), slow.predict(probes), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fast(probes), slow(probes), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast(probes.float()), slow(probes.float()), rtol=1e-5, atol=1e-5)


WAYS = {"new": lambda head: head, "copied": copy.deepcopy, "pickled": lambda head: pickle.loads(pickle.dumps(head))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_one_call_of_machine_code_learns_a_label(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path is taken, so that the comparison above compares two things."""
    fast = WAYS[way](head_of(kind))

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the general way was taken")

    monkeypatch.setattr(type(fast.kind), "planned", forbidden)
    features, target = labels(fast, 1)
    fast.update(features, target)
    assert int(fast.labels_seen) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, -1e200])
@pytest.mark.parametrize("where", ["features", "target"])
def test_what_machine_code_leaves_the_definition_refuses(kind: str, value: float, where: str) -> None:
    fast, slow = head_of(kind), by_definition(kind)
    features, target = labels(fast, 1)
    (features if where == "features" else target)[0, 0] = value
    before = {name: tensor.clone() for name, tensor in fast.state_dict().items()}
    outcomes = []
    for head in (fast, slow):
        try:
            outcomes.append(head.update(features, target).labels)
        except ValueError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    assert outcomes[0] == outcomes[1]
    if isinstance(outcomes[0], str):
        assert all(torch.equal(tensor, before[name]) for name, tensor in fast.state_dict().items())


def test_labels_that_tell_outputs_apart_go_the_general_way() -> None:
    fast, slow = head_of("shared, four outputs"), by_definition("shared, four outputs")
    features, target = labels(fast, 3)
    target[1, 2] = torch.nan
    for row in range(3):
        fast.update(features[row : row + 1], target[row : row + 1])
        slow.update(features[row : row + 1], target[row : row + 1])
    assert len(fast.state.cov[0]) == 2
    assert_same(fast, slow)


def test_an_engine_follows_buffers_that_are_replaced_or_moved() -> None:
    head, other = head_of("two layers, joint"), by_definition("two layers, joint")
    features, target = labels(head, 3)
    head.update(features[:1], target[:1])
    head.mean = head.mean.clone()
    head.cov_0 = head.cov_0.share_memory_()  # moves it in place, as sending it to another process does
    for row in (1, 2):
        head.update(features[row : row + 1], target[row : row + 1])
    for row in range(3):
        other.update(features[row : row + 1], target[row : row + 1])
    assert_same(head, other)


# ---------------------------------------------------------------------- a layer under several noises

# Outputs, settings, and how many entries of the labels are missing.
AVERAGES: dict[str, tuple[int, dict[str, Any], float]] = {
    "one output": (1, {}, 0.0),
    "three outputs": (3, {}, 0.0),
    "missing entries": (3, {}, 0.4),
    "one noise": (3, {"ratios": [0.05], "shares": [1.0]}, 0.0),
    "four noises": (2, {"ratios": [1e-4, 1e-3, 0.1, 1.0], "shares": [0.1, 0.2, 0.3, 0.4], "first": 1.0}, 0.2),
}


def average_of(outputs: int, **settings: Any) -> ModelAverage:
    head, layer = ModelAverage(FEATURES, outputs, 0.25, **settings), linear(FEATURES, outputs, seed=1)
    units = {"feature_mean": randn(FEATURES, seed=5), "feature_scale": randn(FEATURES, seed=6).exp()}
    head.reset(layer.weight, layer.bias, spread=9.0, target_scale=randn(outputs, seed=7).exp(), **units)
    return head


def average_by_definition(outputs: int, **settings: Any) -> ModelAverage:
    head = average_of(outputs, **settings)
    head._engine = head.head._engine = None
    return head


@pytest.mark.parametrize("name", AVERAGES)
def test_updates_and_means_of_a_model_average_equal_the_definition(name: str) -> None:
    outputs, settings, missing = AVERAGES[name]
    fast, slow = average_of(outputs, **settings), average_by_definition(outputs, **settings)
    features, target, at = randn(30, FEATURES, seed=10), randn(30, outputs, seed=11), randn(5, FEATURES, seed=20)
    target[torch.rand(30, outputs, generator=generator(8)) < missing] = torch.nan
    target[20] *= 100.0  # a wild one
    for row in range(30):
        one = slice(row, row + 1)
        ours, theirs = fast.update(features[one], target[one]), slow.update(features[one], target[one])
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(fast.mean_outputs(at), slow.mean_outputs(at), rtol=1e-11, atol=1e-12)
    for key, value in fast.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[key], rtol=1e-11, atol=1e-12, msg=key)


def test_one_call_of_machine_code_learns_a_label_under_all_noises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head whose first label has parted its models, and of copies of it."""

    def forbidden(*_: Any) -> None:
        raise AssertionError("the general way was taken")

    features, target, head = randn(2, FEATURES, seed=10), randn(2, 3, seed=11), average_of(3)
    head.update(features[:1], target[:1])
    heads = [way(head) for way in WAYS.values()]
    monkeypatch.setattr(ModelAverage, "_learned", forbidden)
    for one in heads:
        one.update(features[1:].float(), target[1:].numpy())
        assert int(one.labels_seen) == 2
    assert bits(heads[0]) == bits(heads[1]) == bits(heads[2])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, -1e200])
@pytest.mark.parametrize("where", ["features", "target"])
def test_what_machine_code_leaves_the_definition_refuses_under_all_noises(value: float, where: str) -> None:
    outcomes = []
    for head in (average_of(3), average_by_definition(3)):
        features, target = randn(2, FEATURES, seed=10), randn(2, 3, seed=11)
        head.update(features[:1], target[:1])
        (features if where == "features" else target)[1, 0] = value
        before = bits(head)
        try:
            outcomes.append(head.update(features[1:], target[1:]).labels)
        except ValueError as error:
            outcomes.append(f"{type(error).__name__}: {error}")
            assert bits(head) == before
    assert outcomes[0] == outcomes[1]


SCRIPT = """
    import sys, warnings
    {before}
    warnings.simplefilter("always")
    import torch
    from kbt_rl.inference.config import HeadConfig
    from kbt_rl.inference.head import BayesianHead
    from kbt_rl.inference.model_average import ModelAverage
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        total = 0.0
        average = ModelAverage(3, 1)
        for step in range(3):
            average.update(torch.full((1, 3), 0.1 * step), torch.ones(1, 1))
        total += float(average.mean_outputs(torch.ones(1, 3)))
        for layers in ({layers},):
            head = BayesianHead(3, 1, HeadConfig(layers=layers))
            for step in range(3):
                head.update(torch.full((1, 3), 0.1 * step), torch.ones(1, 1))
            total += float(head.predict(torch.ones(1, 3)).mean)
    print(repr(total))
    print(len(caught), *(str(warning.message)[:60] for warning in caught))
"""
ABSENT = 'sys.modules["numba"] = None'
BROKEN = """
    import importlib.abc, importlib.machinery
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "numba":
                raise ValueError("numba needs another NumPy")
    sys.meta_path.insert(0, Broken())
"""


@cache
def outcome(before: str, layers: str = "1, 2") -> tuple[float, str]:
    """What the script prints in a process of its own: a prediction, and the warnings."""
    indented = textwrap.indent(textwrap.dedent(before), "    ").lstrip()
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT.replace("{before}", indented).replace("{layers}", layers))],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    value, warned = result.stdout.splitlines()
    return float(value), warned


@pytest.mark.slow
def test_without_a_usable_numba_results_are_the_same_with_one_warning() -> None:
    expected, warned = outcome("")
    assert warned == "0"
    for before, text in ((ABSENT, "1 numba is not installed"), (BROKEN, "1 numba cannot be used (ValueError")):
        value, warned = outcome(before)
        assert value == pytest.approx(expected, rel=1e-12)
        assert warned.startswith(text)


@pytest.mark.slow
def test_no_place_for_compiled_code_costs_time_and_one_warning() -> None:
    before = """
        from numba.core import caching
        def nowhere(cls, *args):
            raise RuntimeError("cannot cache function: no locator available")
        caching._CacheLocator.from_function = classmethod(nowhere)
        for kind in caching.CacheImpl._locator_classes:
            kind.from_function = classmethod(lambda cls, *args: None)
    """
    expected, _ = outcome("", "1")
    value, warned = outcome(before, "1")  # what is compiled in each process takes its time
    assert value == pytest.approx(expected, rel=1e-12)
    assert warned.startswith("1 numba finds no folder")
