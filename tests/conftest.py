"""What the tests share: one torch thread, a seed, and random posteriors that are far from degenerate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from kbt_rl.inference import compiled, joint, triangle
from kbt_rl.inference.state import HeadSpec, HeadState
from kbt_rl.inference.triangle import LayerShape

STRUCTURES = ("joint", "layer", "neuron", "diagonal")
MACHINE_CODE = pytest.mark.skipif(compiled.kernels() is None, reason='needs numba: pip install "kbt_rl[fast]"')

settings.register_profile("kbt_rl", deadline=None, derandomize=True, database=None)
settings.load_profile("kbt_rl")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a new layer begins with does not depend on the tests before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _short_block_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small layers in several block rows, as large ones have."""
    monkeypatch.setattr(triangle, "_ROW_WEIGHTS", 8)
    triangle._bounds.cache_clear()
    yield
    triangle._bounds.cache_clear()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=generator(seed))


def random_cov(size: int, seed: int) -> Tensor:
    """A symmetric positive definite matrix with eigenvalues of order 1."""
    root = randn(size, 2 * size, seed=seed)
    cov = root @ root.mT / (2 * size)
    return 0.5 * (cov + cov.mT)


def stored(cov: Tensor, shapes: Sequence[LayerShape], structure: str) -> tuple[Tensor, ...]:
    """What ``structure`` keeps of the full covariance ``(P, P)`` of all weights."""
    sizes = [shape.size for shape in shapes]
    if structure == "joint":
        return joint.pack(cov, shapes)
    layers = [rows.split(sizes, dim=1)[i] for i, rows in enumerate(cov.split(sizes))]
    if structure == "layer":
        return tuple(triangle.pack(layer, shape) for layer, shape in zip(layers, shapes, strict=True))
    by_weight = zip(layers, shapes, strict=True)
    if structure == "diagonal":
        return tuple(layer.diagonal().reshape(shape).clone() for layer, shape in by_weight)
    blocks = [[layer[j * k : (j + 1) * k, j * k : (j + 1) * k] for j in range(n)] for layer, (n, k) in by_weight]
    return tuple(torch.stack(neurons) for neurons in blocks)


def random_state(
    layers: int,
    structure: str = "layer",
    *,
    features: int = 3,
    width: int = 4,
    outputs: int = 2,
    variance: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> HeadState:
    """A posterior with random means and a random, well-conditioned covariance as the structure stores it."""
    sizes = [features, *[width] * (layers - 1), outputs]
    shapes = tuple(LayerShape(n, m + 1) for m, n in pairwise(sizes))
    count = sum(shape.size for shape in shapes)
    cov = variance * random_cov(count, seed + 1)
    return HeadState(HeadSpec(shapes, structure, **options), randn(count, seed=seed), stored(cov, shapes, structure))


def restructured(state: HeadState, structure: str) -> HeadState:
    """The same posterior in another structure, as far as that one can store it."""
    spec = HeadSpec(state.spec.shapes, structure, state.spec.feature_variance, state.spec.relu_order)
    return HeadState(spec, state.mean.clone(), stored(state.dense_cov(), spec.shapes, structure))


def smallest_eigenvalue(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[0])
