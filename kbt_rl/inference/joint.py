"""The same update with the covariance between layers kept: weights and activations as one Gaussian.

The paper treats layers as independent after every step. Nothing in the closed form needs that: Stein's lemma carries
the covariance of any weight through a ReLU, ``Cov(theta, relu(u_k)) = Cov(theta, u_k) Phi(a_k)``, and a product of two
correlated Gaussians has ``E wz = E w E z + Cov(w, z)``, ``Cov(theta, wz) = Cov(theta, w) E z + E w Cov(theta, z)`` and
a variance by Isserlis' theorem. Carrying ``Cov(theta, z)`` forward therefore ends at ``Cov(theta, u^L)``; no backward
pass is left. It is a Gaussian projection and, from two layers on, not exact. With layers forced independent it is the
``layer`` structure.

The covariance is stored as that of ``layer``, one block triangle a layer, followed by ``Cov(w^l, w^i)`` of shape
``(n_l k_l, n_i k_i)`` for each pair ``i < l``: (1, 0), (2, 0), (2, 1), ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kbt_rl.inference import triangle
from kbt_rl.inference.moments import Gaussian, linear_cov, relu_moments, without_negative_variances
from kbt_rl.inference.smoother import augment, isotropic
from kbt_rl.inference.structures import dense_output_cov
from kbt_rl.inference.triangle import LayerShape

Block = TypeVar("Block")  # a tensor, or an array on its memory


class JointPass(NamedTuple):
    """Distribution of the output logits and ``Cov(theta, u^L)``, ``(..., P, B o)``."""

    output: Gaussian
    cross_cov: Tensor


def _pairs(layers: int) -> list[tuple[int, int]]:
    """The pairs ``(l, i)``, ``i < l``, in the order of storage."""
    return [(above, below) for above in range(layers) for below in range(above)]


def between(cov: Sequence[Block], layers: int) -> dict[tuple[int, int], Block]:
    """``Cov(w^l, w^i)`` by pair ``(l, i)``, views of the stored covariance."""
    return dict(zip(_pairs(layers), cov[layers:], strict=True))


def with_independent_layers(triangles: Sequence[Tensor], shapes: Sequence[LayerShape]) -> tuple[Tensor, ...]:
    """The joint covariance of layers that are independent so far."""
    zeros = [triangles[0].new_zeros(shapes[above].size, shapes[below].size) for above, below in _pairs(len(shapes))]
    return (*triangles, *zeros)


def pack(dense: Tensor, shapes: Sequence[LayerShape]) -> tuple[Tensor, ...]:
    """A full covariance ``(P, P)`` in stored form."""
    sizes = [shape.size for shape in shapes]
    blocks = [row.split(sizes, dim=1) for row in dense.split(sizes, dim=0)]
    triangles = [triangle.pack(blocks[depth][depth], shape) for depth, shape in enumerate(shapes)]
    return (*triangles, *(blocks[above][below].clone() for above, below in _pairs(len(shapes))))


def unpack(cov: Sequence[Tensor], shapes: Sequence[LayerShape]) -> Tensor:
    """The full covariance ``(P, P)``."""
    layers = len(shapes)
    pairs = between(cov, layers)
    rows = []
    for depth, shape in enumerate(shapes):
        row = [pairs[depth, below] for below in range(depth)]
        row.append(triangle.unpack(cov[depth], shape))
        row += [pairs[above, depth].mT for above in range(depth + 1, layers)]
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)


def _project(cov: Sequence[Tensor], shapes: Sequence[LayerShape], depth: int, inputs: Tensor) -> Tensor:
    """``Cov(theta, w^depth) (I (x) z~)`` for inputs ``(..., B, k)``, shape ``(..., P, n, B)``."""
    n, k = shapes[depth]
    rows = inputs.reshape(-1, k)
    pairs = between(cov, len(shapes))
    parts = [(rows @ pairs[depth, below].view(n, k, -1)).permute(2, 0, 1) for below in range(depth)]
    parts.append(triangle.project(cov[depth], shapes[depth], rows))
    for above in range(depth + 1, len(shapes)):
        parts.append((pairs[above, depth].view(-1, k) @ rows.mT).view(-1, n, len(rows)))
    return triangle.unflatten_rows(torch.cat(parts), inputs)


def forward(
    weights: Sequence[Tensor],
    cov: Sequence[Tensor],
    features: Tensor,
    *,
    feature_variance: float = 0.0,
    relu_order: int = 2,
) -> JointPass:
    """Propagate moments and the covariance with all weights from the features to the output.

    Args:
        weights: Mean of each layer, ``(n_i, k_i)``, bias last.
        cov: The stored covariance.
        features: Rows ``(..., B, d)``.
        feature_variance: Variance of each feature.
        relu_order: Terms of the ReLU's covariance series.

    Returns:
        Output logits of all rows, and their covariance with all weights.
    """
    rows, lead = features.shape[-2], features.shape[:-2]
    shapes = [LayerShape(*weight.shape) for weight in weights]
    inputs, input_cov = augment(features), isotropic(features, feature_variance)
    carried: Tensor | None = None  # Cov(theta, z), (..., P, B, m): zero for the features
    offset = 0
    for depth, (weight, (n, k)) in enumerate(zip(weights, shapes, strict=True)):
        own = slice(offset, offset + n * k)
        offset += n * k
        projection = _project(cov, shapes, depth, inputs)
        own_cov = None if input_cov is None else triangle.unpack(cov[depth], shapes[depth])
        weight_term = dense_output_cov(own_cov, projection[..., own, :, :], inputs, input_cov)
        mean = inputs @ weight.mT
        logits_cov = linear_cov(weight, weight_term, input_cov)
        cross = projection.mT  # Cov(theta, u), (..., P, B, n)
        if carried is not None:
            shared = carried[..., own, :, :].reshape(*lead, n, k, rows, k - 1)  # Cov(w_jp, z_bq)
            mean = mean + shared[..., :-1, :, :].diagonal(dim1=-3, dim2=-1).sum(-1).mT
            logits_cov = logits_cov + _product_cov(weight, shared, inputs)
            cross = cross + carried @ weight[:, :-1].mT
        logits = Gaussian(mean.flatten(-2), logits_cov)
        if depth == len(weights) - 1:
            return JointPass(logits, cross.flatten(-2))
        activation = relu_moments(without_negative_variances(logits), relu_order)
        carried = cross * activation.slope.reshape(*lead, 1, rows, n)
        inputs, input_cov = augment(activation.output.mean.unflatten(-1, (rows, n))), activation.output.cov
    raise ValueError("the head has no layers; it needs at least one linear layer")


def _product_cov(weight: Tensor, shared: Tensor, inputs: Tensor) -> Tensor:
    """What ``Cov(w, z)`` adds to ``Cov(w_j . z_b, w_l . z_c)``, by Isserlis' theorem.

    Args:
        weight: Mean ``(n, k)``.
        shared: ``Cov(w_jp, z_bq)`` of the layer's own weights and inputs, ``(..., n, k, B, m)``.
        inputs: ``z~``, ``(..., B, k)``.

    Returns:
        ``(..., B n, B n)``.
    """
    n, rows = weight.shape[0], inputs.shape[-2]
    lead, m = inputs.shape[:-2], weight.shape[1] - 1
    # Cov(w_l, z_bp) . z~_c, [l, c, b, p]
    turned = (inputs.unsqueeze(-3) @ shared.flatten(-2)).reshape(*lead, n, rows, rows, m)
    one_sided = turned @ weight[:, :-1].mT  # [l, c, b, j]
    inner = shared[..., :-1, :, :]  # [j, p, c, q]
    both = torch.einsum("...jpcq,...lqbp->...lcbj", inner, inner)
    flat = (one_sided + 0.5 * both).permute(*range(len(lead)), -2, -1, -3, -4)
    flat = flat.reshape(*lead, rows * n, rows * n)
    return flat + flat.mT


def downdate_(cov: Sequence[Tensor], shapes: Sequence[LayerShape], factor: Tensor, signed: Tensor) -> None:
    """``Sigma += V diag(signs) V'`` in place, for ``V`` and ``signed`` = ``V diag(signs)`` of shape ``(P, q)``."""
    parts, signed_parts = (whole.split([shape.size for shape in shapes]) for whole in (factor, signed))
    for block, shape, part, signed_part in zip(cov, shapes, parts, signed_parts, strict=False):
        triangle.downdate_(block, shape, part, signed_part)
    for (above, below), block in between(cov, len(shapes)).items():
        block.addmm_(signed_parts[above], parts[below].mT)
