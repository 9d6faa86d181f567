"""An update completes or changes nothing: whatever comes in, whenever it is interrupted, wherever memory runs out."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STRUCTURES, randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kbt_rl.inference import compiled
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.output import RULES

NAN, INF = float("nan"), float("inf")
FEATURES = 3


def make_head(outputs: int = 2, **config: Any) -> BayesianHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(FEATURES, outputs)
    return BayesianHead.from_linear(linear, HeadConfig(**{"noise_variance": 0.1, "hidden_variance": 1e-2, **config}))


def bits(head: BayesianHead) -> dict[str, bytes]:
    """All buffers, so that NaN equals NaN and 0 differs from -0."""
    return {name: value.numpy().tobytes() for name, value in head.state_dict().items()}


# ---------------------------------------------------------------------- random heads, random input


@st.composite
def heads(draw: st.DrawFn) -> BayesianHead:
    rule = draw(st.sampled_from(sorted(RULES)))
    structure, layers = draw(st.sampled_from(STRUCTURES)), draw(st.integers(1, 4))
    outputs = draw(st.integers(1, 3)) if RULES[rule].link == "identity" else draw(st.integers(2, 3))
    variance = st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e6])
    config: dict[str, Any] = {"rule": rule, "structure": structure, "layers": layers}
    config |= {"hidden_variance": draw(variance), "last_variance": draw(variance), "noise_variance": draw(variance)}
    if draw(st.booleans()):
        config |= {"relu_order": draw(st.integers(1, 3)), "feature_variance": draw(st.sampled_from([0.0, 0.1]))}
    if rule == "measure" and draw(st.booleans()):
        statistic = draw(st.sampled_from(["innovation", "variational"]))
        config |= {"noise": "learned", "noise_statistic": statistic, "noise_start": draw(st.sampled_from([1e-6, 0.1]))}
        config |= {"robust_dof": draw(st.sampled_from([None, 4.0]))}
    return make_head(outputs, **config)


ENTRIES = st.one_of(
    st.floats(-3.0, 3.0),
    st.sampled_from([NAN, INF, -INF, 0.0, 1e-320, 1e-160, 1e30, 1e160, -1e200, 1.7e308]),
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
        target = np.eye(head.out_features)[np.arange(rows) % head.out_features]
    if draw(st.integers(0, 4)) == 0 and isinstance(features, np.ndarray) and features.shape == (rows, FEATURES):
        features = np.repeat(features[:1], rows, axis=0)  # repeated rows, singular without noise
    return features, target


def check_stream(head: BayesianHead, data: st.DataObject) -> None:
    """Good and bad samples in turn: what fails leaves every bit, and what does not leaves a proper posterior."""
    for _ in range(data.draw(st.integers(1, 5))):
        features, target = data.draw(samples(head))
        before = bits(head)
        try:
            head.update(features, target)
        except (ValueError, TypeError, UpdateError):
            assert bits(head) == before
        else:
            assert bits(head) != before  # the count of labels at least
        assert bool(torch.isfinite(head.mean).all())
        assert all(bool(torch.isfinite(block).all()) for block in head._cov())
        assert float(head.state.variances().min()) >= 0.0
    prediction = head.predict(randn(2, FEATURES, seed=1))
    assert bool(torch.isfinite(prediction.mean).all())
    assert bool(torch.isfinite(prediction.epistemic).all())


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(heads(), st.data())
def test_a_failed_update_changes_nothing(head: BayesianHead, data: st.DataObject) -> None:
    check_stream(head, data)


@pytest.mark.nightly
@settings(max_examples=20_000, derandomize=False, suppress_health_check=list(HealthCheck))
@given(heads(), st.data())
def test_a_failed_update_changes_nothing_in_twenty_thousand_cases(head: BayesianHead, data: st.DataObject) -> None:
    check_stream(head, data)


# ---------------------------------------------------------------------- interrupts

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one row, one output": (1, {"outputs": 1}),
    "one row, two outputs": (1, {}),
    "one row, learned noise": (1, {"outputs": 1, "noise": "learned"}),
    "one row, learned noise, two outputs": (1, {"noise": "learned"}),
    **{f"five rows, {structure}": (5, {"structure": structure}) for structure in STRUCTURES},
    "five rows, learned noise": (5, {"noise": "learned"}),
    "successive blocks": (70, {}),
    "successive blocks, learned noise": (70, {"noise": "learned"}),
    "three layers": (1, {"layers": 3, "structure": "layer"}),
}


class _InterruptAt:
    """Sends SIGINT to this process when it reaches the ``count``-th line of the library's mathematics."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if f"kbt_rl{os.sep}inference" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self


def interrupted(work: Callable[[], object], line: int) -> bool:
    """Whether a SIGINT at the ``line``-th line stopped ``work``; later, it is delivered afterwards."""
    tracer = _InterruptAt(line)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    assert tracer.left <= 0, "there are fewer lines"
    return False


def lines_of(work: Callable[[], object]) -> int:
    """Lines of the library that ``work`` executes."""
    tracer = _InterruptAt(10**9)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        work()
    finally:
        sys.settrace(before)
    return 10**9 - tracer.left


def check_interrupts(start: BayesianHead, change: Callable[[BayesianHead], object], all_lines: bool) -> None:
    """Interrupt a change of copies of a head: at every line, or at every late one, which commit, and some before."""
    done = copy.deepcopy(start)
    done._memory()
    lines = lines_of(partial(change, done))
    old, new, handler = bits(start), bits(done), signal.getsignal(signal.SIGINT)
    assert old != new
    late = max(lines - 40, 0)
    chosen = range(1, lines + 1) if all_lines else [*range(1, late, max(late // 15, 1)), *range(late + 1, lines + 1)]
    outcomes = set()
    for line in chosen:
        head = copy.deepcopy(start)
        head._memory()
        interrupted(partial(change, head), line)
        after = bits(head)
        assert after in (old, new), f"half a change after an interrupt at line {line} of {lines}"
        outcomes.add(after == new)
        assert signal.getsignal(signal.SIGINT) is handler
        assert head._lock.acquire(blocking=False)
        head._lock.release()
    assert outcomes == {False, True}


def update_of(way: str) -> tuple[BayesianHead, Callable[[BayesianHead], object]]:
    rows, config = WAYS[way]
    start = make_head(**config)
    features, target = randn(rows, FEATURES, seed=2), randn(rows, start.out_features, seed=3)
    return start, lambda head: head.update(features, target)


@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_leaves_all_of_the_update_or_nothing(way: str) -> None:
    """Noise and the count of labels included; and SIGINT is what it was."""
    check_interrupts(*update_of(way), all_lines=False)


@pytest.mark.nightly
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("machine_code", [True, False], ids=["numba", "torch"])
def test_an_interrupt_at_every_line_leaves_all_of_the_update_or_nothing(
    way: str, machine_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not machine_code:
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    check_interrupts(*update_of(way), all_lines=True)


OTHER_CHANGES: dict[str, Callable[[BayesianHead], object]] = {
    "reset": lambda head: head.reset(torch.ones(1, FEATURES), torch.ones(1)),
    "reopen": lambda head: head.reopen(0.5),
    "forget": lambda head: head.forget(0.9),
    "process noise": lambda head: head.add_process_noise(0.1),
    "noise": lambda head: head.set_noise(0.3),
}


@pytest.mark.parametrize("way", OTHER_CHANGES)
def test_an_interrupt_of_another_change_leaves_all_or_nothing(way: str) -> None:
    start = make_head(1, noise="learned")
    start.update(randn(1, FEATURES, seed=2), randn(1, 1, seed=3))
    check_interrupts(start, OTHER_CHANGES[way], all_lines=True)


# ---------------------------------------------------------------------- out of memory


class _NoMemoryError(RuntimeError):
    """PyTorch's own is a RuntimeError too."""


class _OutOfMemory(TorchDispatchMode):
    """Lets the ``count``-th operation that would allocate fail as PyTorch's allocator does."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allocates = any(result.alias_info is None for result in func._schema.returns)
        if allocates:
            self.left -= 1
            if self.left == 0:
                raise _NoMemoryError("DefaultCPUAllocator: can't allocate memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("machine_code", [True, False], ids=["numba", "torch"])
def test_no_memory_at_any_operation_leaves_nothing_changed(
    way: str, machine_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not machine_code:
        monkeypatch.setattr(compiled, "kernels", lambda: None)
    rows, config = WAYS[way]
    start = make_head(**config)
    sample = randn(rows, FEATURES, seed=2), randn(rows, start.out_features, seed=3)
    done = copy.deepcopy(start)
    done.update(*sample)
    old, new, count = bits(start), bits(done), 1
    while True:
        head = copy.deepcopy(start)
        head._memory()
        with _OutOfMemory(count) as allocator, suppress(_NoMemoryError):
            head.update(*sample)
        if allocator.left > 0:
            break
        assert bits(head) == old, f"half an update without memory for operation {count}"
        count += 1
    assert bits(head) == new
    assert machine_code or count > 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
@pytest.mark.parametrize("way", ["one row", "rows", "blocks"])
def test_a_real_limit_of_memory_leaves_nothing_changed(way: str) -> None:
    """In a process of its own, whose address space is limited more and more until an update succeeds."""
    command = [sys.executable, str(Path(__file__).with_name("limited_memory.py")), way]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    record = json.loads(result.stdout)
    assert record["failed"] >= 3
    assert record["succeeded"] >= 1
    assert record["broken"] == 0


def test_the_allocator_of_these_tests_sees_what_allocates() -> None:
    values: Tensor = torch.ones(4)
    with _OutOfMemory(1) as allocator:
        values.add_(1.0)
        values.view(2, 2)
        assert allocator.left == 1
        with pytest.raises(_NoMemoryError):
            values + 1.0
