"""The block-triangular storage against the full matrix it stands for."""

from __future__ import annotations

import pytest
import torch
from conftest import randn, random_cov

from kbt_rl.inference import joint, triangle
from kbt_rl.inference.triangle import LayerShape

# One block row, several with a shorter last one, one neuron a block row, one output.
SHAPES = [LayerShape(3, 4), LayerShape(9, 17), LayerShape(4, 70), LayerShape(1, 33), LayerShape(32, 17)]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> LayerShape:
    return request.param


def test_packing_loses_nothing(shape: LayerShape) -> None:
    dense = random_cov(shape.size, seed=0)
    flat = triangle.pack(dense, shape)
    assert flat.shape == (triangle.storage_size(shape),)
    assert torch.equal(triangle.unpack(flat, shape), dense)


def test_storage_is_little_more_than_a_triangle() -> None:
    shape = LayerShape(32, 17)
    assert triangle.storage_size(shape) < 0.57 * shape.size**2


def test_independent_neurons_are_the_blocks_of_the_diagonal(shape: LayerShape) -> None:
    blocks = torch.stack([random_cov(shape.k, seed=j) for j in range(shape.n)])
    flat = triangle.pack_neurons(blocks)
    assert torch.equal(triangle.unpack(flat, shape), torch.block_diag(*blocks))
    assert torch.equal(triangle.neuron_blocks(flat, shape), blocks)


def test_every_question_has_the_answer_of_the_full_matrix(shape: LayerShape) -> None:
    n, k = shape
    dense = random_cov(shape.size, seed=1)
    flat, rows = triangle.pack(dense, shape), randn(3, k, seed=2)
    expected = torch.einsum("rjp,bp->rjb", dense.view(-1, n, k), rows)
    torch.testing.assert_close(triangle.project(flat, shape, rows), expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(triangle.diagonal(flat, shape), dense.diagonal())
    own = torch.stack([dense[j * k : (j + 1) * k, j * k : (j + 1) * k] for j in range(n)])
    assert torch.equal(triangle.neuron_blocks(flat, shape), own)


def test_the_downdate_is_that_of_the_full_matrix(shape: LayerShape) -> None:
    dense, factor = random_cov(shape.size, seed=3), randn(shape.size, 2, seed=4)
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    flat = triangle.pack(dense, shape)
    triangle.downdate_(flat, shape, factor, factor * signs)
    expected = dense + (factor * signs) @ factor.mT
    torch.testing.assert_close(triangle.unpack(flat, shape), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_joint_storage_loses_nothing(layers: int) -> None:
    shapes = [LayerShape(9, 17), LayerShape(9, 10), LayerShape(2, 10)][:layers]
    dense = random_cov(sum(shape.size for shape in shapes), seed=5)
    assert torch.equal(joint.unpack(joint.pack(dense, shapes), shapes), dense)
