"""Long streams: the covariance stays symmetric and positive, never grows, and does not drift from the exact one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from conftest import STRUCTURES

_SPEC = importlib.util.spec_from_file_location("long_run", Path(__file__).parents[1] / "benchmarks" / "long_run.py")
assert _SPEC is not None
assert _SPEC.loader is not None
long_run = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(long_run)


def check(record: dict[str, Any]) -> None:
    assert record["smallest_eigenvalue"] > 0.0
    assert record["smallest_variance"] > 0.0
    assert record["asymmetry"] <= 1e-15 * record["largest_eigenvalue"]
    assert record["variances_grown"] == 0
    assert record["refused"] == 0
    narrow, uneven = record["dtype"] == "float32", record["stream"] == "uneven"
    if not narrow:
        assert record["repairs"] == 0
        assert max(record["mean_error"], record["cov_error"]) < (1e-6 if uneven else 1e-10)
    elif not uneven or record["structure"] == "diagonal":
        assert record["repairs"] == 0
        assert max(record["mean_error"], record["cov_error"]) < (1e-3 if record["updates"] < 10_000 else 2e-2)


@pytest.mark.parametrize("stream", ["even", "uneven"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_two_thousand_updates(structure: str, layers: int, stream: str) -> None:
    records = long_run.run(structure, layers, stream, 2_000)
    for record in records:
        check(record)
    row = long_run.page(records).splitlines()[-1]
    assert row.startswith(f"| {structure} | {layers} | {stream} | float32 | {records[-1]['smallest_eigenvalue']:.2g} |")


@pytest.mark.nightly
@pytest.mark.parametrize("stream", ["even", "uneven"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_million_updates(structure: str, layers: int, stream: str) -> None:
    for record in long_run.run(structure, layers, stream, 1_000_000):
        check(record)
