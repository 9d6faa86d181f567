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
    if record["layers"] == 1:
        assert record["mean_error"] < 1e-10
        assert record["cov_error"] < 1e-9


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_two_thousand_updates(structure: str, layers: int, dtype: str) -> None:
    check(long_run.run(structure, layers, dtype, 2_000))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_million_updates(structure: str, layers: int, dtype: str) -> None:
    check(long_run.run(structure, layers, dtype, 1_000_000))
