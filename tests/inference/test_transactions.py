"""An update completes or changes nothing, whatever comes in: random heads, random input.

What interrupts it and where memory runs out is in ``wholeness``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import STRUCTURES, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from wholeness.attacks import bits

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.likelihoods.registry import LIKELIHOODS
from kbt_rl.inference.transactions import replace_buffers

NAN, INF = float("nan"), float("inf")
FEATURES = 3


def make_head(outputs: int = 2, **config: Any) -> BayesianHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(FEATURES, outputs)
    config = {"layers": 2, "noise_variance": 0.1, "hidden_variance": 1e-2, **config}
    basis = torch.eye(FEATURES) if config.get("structure") == "rotated" else None
    return BayesianHead.from_linear(linear, HeadConfig(**config), feature_basis=basis)


@st.composite
def heads(draw: st.DrawFn) -> BayesianHead:
    rule = draw(st.sampled_from(sorted(LIKELIHOODS)))
    structure, layers = draw(st.sampled_from((*STRUCTURES, "shared", "rotated"))), draw(st.integers(1, 4))
    single = structure in ("shared", "rotated")
    outputs = draw(st.integers(1, 3)) if LIKELIHOODS[rule].link == "identity" else draw(st.integers(2, 3))
    variance = st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6])
    if structure == "shared" and not LIKELIHOODS[rule].has_each:
        rule = "measure"
    config: dict[str, Any] = {"rule": rule, "structure": structure, "layers": 1 if single else layers}
    config |= {"hidden_variance": draw(variance), "last_variance": draw(variance), "noise_variance": draw(variance)}
    if not single and draw(st.booleans()):
        config |= {"relu_order": draw(st.integers(1, 3)), "feature_variance": draw(st.sampled_from([0.0, 0.1]))}
    if rule == "measure" and draw(st.booleans()):
        statistic = draw(st.sampled_from(["innovation", "variational"]))
        config |= {"noise": "learned", "noise_statistic": statistic, "noise_start": draw(st.sampled_from([1e-6, 0.1]))}
        config |= {"robust_dof": None if structure == "shared" else draw(st.sampled_from([None, 4.0]))}
    if draw(st.booleans()):
        name, rate = draw(st.sampled_from([("process_noise", 1e-3), ("towards_prior", 0.1), ("fading", 0.9)]))
        config |= {"forgetting": name, "forgetting_rate": rate}
    config |= {"history": draw(st.sampled_from([0, 3]))}
    return make_head(outputs, **config)


ENTRIES = st.one_of(
    st.floats(-3.0, 3.0), st.sampled_from([NAN, INF, -INF, 0.0, 1e-320, 1e-160, 1e30, 1e160, -1e200, 1.7e308])
)


@st.composite
def arrays(draw: st.DrawFn, rows: int, columns: int) -> Any:
    """Mostly ``(rows, columns)`` of good numbers; sometimes of another shape or dtype, or with any entry."""
    bad = ["large", "shape", "integers", "text", "complex", "float16"]
    kind = draw(st.sampled_from(["good"] * 6 + ["entry"] * 3 + bad))
    values = np.random.default_rng(draw(st.integers(0, 2**16))).normal(size=(rows, columns))
    if kind == "entry":
        values[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = draw(ENTRIES)
    elif kind == "large":
        values *= 10.0 ** draw(st.floats(0.0, 26.0))
    elif kind == "shape":
        shape = draw(st.sampled_from([(rows,), (columns,), (), (0, columns), (rows + 1, columns), (rows, columns, 1)]))
        values = np.ones(shape)
    elif kind in ("integers", "text", "complex", "float16"):
        values = values.astype({"integers": "i4", "text": "U8", "complex": "c16", "float16": "f2"}[kind])
    form = draw(st.sampled_from(["array", "float32", "tensor", "float32 tensor", "with gradient"]))
    if kind in ("integers", "text", "complex") or form == "array":
        return values
    with np.errstate(over="ignore"):
        values = values.astype(np.float32) if form.startswith("float32") else values
    if form == "float32":
        return values
    return torch.from_numpy(values).requires_grad_(form == "with gradient")


@st.composite
def samples(draw: st.DrawFn, head: BayesianHead) -> tuple[Any, Any]:
    rows = draw(st.sampled_from([1, 1, 1, 2, 5, 33]))
    features, target = draw(arrays(rows, FEATURES)), draw(arrays(rows, head.out_features))
    if head.rule.link == "softmax" and draw(st.integers(0, 5)):
        classes = np.arange(rows) % head.out_features
        target = classes if draw(st.booleans()) else np.eye(head.out_features)[classes]
    if draw(st.integers(0, 4)) == 0 and isinstance(features, np.ndarray) and features.shape == (rows, FEATURES):
        features = np.repeat(features[:1], rows, axis=0)  # repeated rows, singular without noise
    return features, target


def check_stream(head: BayesianHead, data: st.DataObject) -> None:
    """Good and bad samples in turn: what fails leaves every bit, and what does not leaves a proper posterior."""
    for _ in range(data.draw(st.integers(1, 5))):
        features, target = data.draw(samples(head))
        before = bits(head)
        try:
            info = head.update(features, target)
        except (ValueError, TypeError):
            assert bits(head) == before
        else:
            assert (bits(head) != before) == (info.labels > 0)  # the count of labels at least
        assert bool(torch.isfinite(head.mean).all())
        assert all(bool(torch.isfinite(block).all()) for block in head.state.cov)
        assert float(head.variances().min()) >= 0.0
        if head.undoable and data.draw(st.booleans()):
            head.rollback(head.undoable)
    prediction = head.predict(randn(2, FEATURES, seed=1))
    assert bool(torch.isfinite(prediction.mean).all())
    assert bool(torch.isfinite(prediction.epistemic).all())
    assert bool((prediction.epistemic_variance >= 0.0).all())


@pytest.mark.filterwarnings("ignore:the posterior runs away")
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(heads(), st.data())
def test_a_failed_update_changes_nothing(head: BayesianHead, data: st.DataObject) -> None:
    check_stream(head, data)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:the posterior runs away")
@settings(max_examples=20_000, derandomize=False, suppress_health_check=list(HealthCheck))
@given(heads(), st.data())
def test_a_failed_update_changes_nothing_in_twenty_thousand_cases(head: BayesianHead, data: st.DataObject) -> None:
    check_stream(head, data)


def test_buffers_are_replaced_in_place_unless_their_shape_changes() -> None:
    buffers = {"mean": torch.zeros(3), "cov": torch.zeros(1, 2)}
    kept = dict(buffers)
    replace_buffers(buffers, {"mean": torch.ones(3), "cov": torch.ones(2, 2)})
    assert buffers["mean"] is kept["mean"]
    assert torch.equal(buffers["mean"], torch.ones(3))
    assert torch.equal(buffers["cov"], torch.ones(2, 2))
