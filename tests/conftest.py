"""What the tests share: one torch thread, a seed, and random posteriors that are far from degenerate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from kbt_rl.inference.covariance.registry import STRUCTURES as REGISTRY
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.machine_code import kernels
from kbt_rl.inference.types import HeadSpec, HeadState, LayerShape

STRUCTURES = ("joint", "layer", "neuron", "diagonal")
MACHINE_CODE = pytest.mark.skipif(kernels() is None, reason='needs numba: pip install "kbt_rl[fast]"')

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


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=generator(seed))


def linear(features: int, outputs: int, seed: int = 0) -> nn.Linear:
    """A pre-trained layer with random weights and bias."""
    layer = nn.Linear(features, outputs, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(outputs, features, seed=seed))
        layer.bias.copy_(randn(outputs, seed=seed + 1))
    return layer


def random_cov(size: int, seed: int) -> Tensor:
    """A symmetric positive definite matrix with eigenvalues of order 1."""
    root = randn(size, 2 * size, seed=seed)
    cov = root @ root.mT / (2 * size)
    return 0.5 * (cov + cov.mT)


def lower_root(cov: Tensor) -> Tensor:
    """Lower triangular ``R`` with ``R' R = cov``, zero for a covariance of zero."""
    if not bool(cov.any()):
        return torch.zeros_like(cov)
    return torch.linalg.cholesky(cov.flip(-1, -2)).mT.flip(-1, -2)


def blocks_of(cov: Tensor, shapes: Sequence[LayerShape], structure: str) -> tuple[Tensor, ...]:
    """The entries of the full covariance ``(P, P)`` of all weights that ``structure`` has, as covariances."""
    if structure == "joint":
        return (cov,)
    sizes = [shape.size for shape in shapes]
    layers = [rows.split(sizes, dim=1)[i] for i, rows in enumerate(cov.split(sizes))]
    if structure == "layer":
        return tuple(layers)
    if structure in ("diagonal", "rotated"):
        return tuple(layer.diagonal().reshape(shape) for layer, shape in zip(layers, shapes, strict=True))
    return tuple(
        torch.stack([layer[j * k : (j + 1) * k, j * k : (j + 1) * k] for j in range(n)])
        for layer, (n, k) in zip(layers, shapes, strict=True)
    )


def stored(cov: Tensor, shapes: Sequence[LayerShape], structure: str) -> tuple[Tensor, ...]:
    """What ``structure`` keeps of the full covariance of all weights; ``shared`` with a group for each output."""
    blocks = blocks_of(cov, shapes, structure)
    if structure in ("diagonal", "rotated"):
        return tuple(block.clone() for block in blocks)
    roots = tuple(lower_root(block) for block in blocks)
    return (*roots, torch.arange(shapes[-1].n)) if structure == "shared" else roots


def dense(state: HeadState) -> Tensor:
    """The full covariance ``(P, P)``, zero where nothing is stored."""
    return REGISTRY[state.spec.structure].dense(state)


def variances(state: HeadState) -> Tensor:
    return REGISTRY[state.spec.structure].variances(state)


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
    return HeadState(spec, state.mean.clone(), stored(dense(state), spec.shapes, structure))


def smallest_eigenvalue(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[0])


def marginal_likelihood(head: BayesianHead, features: Tensor, targets: Tensor) -> float:
    """Log density of all given targets of Bayesian linear regression, as one normal, in target units."""
    rows, outputs = targets.shape
    inputs = torch.cat([(features - head.feature_mean) / head.feature_scale, features.new_ones(rows, 1)], dim=1)
    identity = torch.eye(outputs, dtype=torch.float64)
    kernel = torch.kron(head.config.last_variance * inputs @ inputs.mT, identity)
    scale = head.target_scale.repeat(rows)
    cov = (kernel + torch.kron(torch.eye(rows, dtype=torch.float64), head.noise_cov)) * scale.unsqueeze(-1) * scale
    given = ~torch.isnan(targets.flatten())
    found = MultivariateNormal(head(features).flatten()[given], cov[given][:, given])
    return float(found.log_prob(targets.flatten()[given]))
