"""Long streams: the covariance stays symmetric and positive, never grows, and does not drift from the exact one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_SPEC = importlib.util.spec_from_file_location("long_run", Path(__file__).parents[1] / "benchmarks" / "long_run.py")
assert _SPEC is not None
assert _SPEC.loader is not None
long_run = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(long_run)


def check(record: dict[str, Any]) -> None:
    assert record["smallest_eigenvalue"] > 0.0
    assert record["smallest_variance"] > 0.0
    assert record["variances_grown"] == 0
    assert record["refused"] == 0
    assert max(record["mean_error"], record["cov_error"]) < (1e-6 if record["stream"] == "uneven" else 1e-10)


HEADS = [(structure, layers) for layers in long_run.FEATURES for structure in long_run.STRUCTURES[layers - 1 :]]


@pytest.mark.parametrize("stream", long_run.STREAMS)
@pytest.mark.parametrize(("structure", "layers"), HEADS)
def test_two_thousand_updates(structure: str, layers: int, stream: str) -> None:
    record = long_run.run(structure, layers, stream, 2_000)
    check(record)
    row = long_run.page([record]).splitlines()[-1]
    assert row.startswith(f"| {structure} | {layers} | {stream} | {record['smallest_eigenvalue']:.2g} |")


@pytest.mark.nightly
@pytest.mark.parametrize("stream", long_run.STREAMS)
@pytest.mark.parametrize(("structure", "layers"), HEADS)
def test_a_million_updates(structure: str, layers: int, stream: str) -> None:
    check(long_run.run(structure, layers, stream, 1_000_000))
