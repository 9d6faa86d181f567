"""The same update with the covariance between layers kept: weights and activations as one Gaussian.

The paper treats layers as independent after every step. Nothing in the closed form needs that: Stein's lemma carries
the covariance of any weight through a ReLU, ``Cov(theta, relu(u_k)) = Cov(theta, u_k) Phi(a_k)``, and a product of two
correlated Gaussians has ``E wz = E w E z + Cov(w, z)``, ``Cov(theta, wz) = Cov(theta, w) E z + E w Cov(theta, z)`` and
a variance by Isserlis' theorem. Carrying ``Cov(theta, z)`` forward therefore ends at ``Cov(theta, u^L)``; no backward
pass is left. It is a Gaussian projection and, from two layers on, not exact. With layers forced independent it is the
``layer`` structure.

The covariance is stored as one panel a layer, ``panel_i = Cov(theta, w^i)`` of shape ``(P, n_i k_i)``, so that each is
contiguous and is read once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kbt_rl.inference.moments import Gaussian, linear_cov, relu_moments
from kbt_rl.inference.smoother import augment, isotropic
from kbt_rl.inference.structures import dense_output_cov


class JointPass(NamedTuple):
    """Distribution of the output logits and ``Cov(theta, u^L)``, ``(..., P, B o)``."""

    output: Gaussian
    cross_cov: Tensor


def split(matrix: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """A full covariance ``(P, P)`` as contiguous panels ``(P, n_i k_i)``."""
    return tuple(panel.contiguous() for panel in matrix.split(list(sizes), dim=1))


def forward(
    weights: Sequence[Tensor],
    panels: Sequence[Tensor],
    features: Tensor,
    *,
    feature_variance: float = 0.0,
    relu_order: int = 2,
) -> JointPass:
    """Propagate moments and the covariance with all weights from the features to the output.

    Args:
        weights: Mean of each layer, ``(n_i, k_i)``, bias last.
        panels: ``Cov(theta, w^i)`` of each layer, ``(P, n_i k_i)``.
        features: Rows ``(..., B, d)``.
        feature_variance: Variance of each feature.
        relu_order: Terms of the ReLU's covariance series.

    Returns:
        Output logits of all rows, and their covariance with all weights.
    """
    rows, lead = features.shape[-2], features.shape[:-2]
    inputs, input_cov = augment(features), isotropic(features, feature_variance)
    carried: Tensor | None = None  # Cov(theta, z), (..., P, B, m): zero for the features
    offset = 0
    for depth, (weight, panel) in enumerate(zip(weights, panels, strict=True)):
        n, k = weight.shape
        total = panel.shape[0]
        own = slice(offset, offset + n * k)
        offset += n * k
        projection = (panel.view(-1, k) @ inputs.mT).reshape(*lead, total, n, rows)
        own_cov = panel[own].view(n, k, n, k)
        weight_term = dense_output_cov(own_cov, projection[..., own, :, :], inputs, input_cov)
        mean = inputs @ weight.mT
        cov = linear_cov(weight, weight_term, input_cov)
        cross = projection.mT  # Cov(theta, u), (..., P, B, n)
        if carried is not None:
            shared = carried[..., own, :, :].reshape(*lead, n, k, rows, k - 1)  # Cov(w_jp, z_bq)
            mean = mean + shared[..., :-1, :, :].diagonal(dim1=-3, dim2=-1).sum(-1).mT
            cov = cov + _product_cov(weight, shared, inputs)
            cross = cross + carried @ weight[:, :-1].mT
        logits = Gaussian(mean.flatten(-2), cov)
        if depth == len(weights) - 1:
            return JointPass(logits, cross.flatten(-2))
        activation = relu_moments(logits, relu_order)
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


def downdate_(panels: Sequence[Tensor], factor: Tensor, signs: Tensor) -> None:
    """``Sigma += V diag(signs) V'`` in place, panel by panel, for ``V`` of shape ``(P, q)``."""
    signed, offset = factor * signs, 0
    for panel in panels:
        size = panel.shape[1]
        panel.addmm_(signed, factor[offset : offset + size].mT)
        offset += size
