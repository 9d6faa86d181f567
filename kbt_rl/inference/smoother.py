"""Forward pass of moments and backward pass of mean Jacobians for layers that are independent of each other.

The paper smooths layer by layer with an inverse at each step, Eqs. (37) to (45). With the exact cross-covariance of the
ReLU every one of these inverses meets its own matrix, and what is left is ``G^{i-1} = G^i M^i diag(Phi)`` from the
output down: a Jacobian of means. ``Cov(w^i, u^L)`` is then one product with the weight covariance, and nothing is
inverted but the covariance of the output. The literal smoother is in ``reference``; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kbt_rl.inference.moments import Gaussian, linear_cov, relu_moments, without_negative_variances
from kbt_rl.inference.structures import Structure
from kbt_rl.inference.triangle import LayerShape


class LayerPass(NamedTuple):
    """What one layer leaves for the backward pass: ``Sigma (I (x) z~)``, and the slopes ``Phi`` of its ReLU."""

    projection: Tensor
    slope: Tensor | None


class ForwardPass(NamedTuple):
    """Distribution of the output logits of all rows jointly, and what each layer left behind."""

    output: Gaussian
    layers: tuple[LayerPass, ...]


def augment(inputs: Tensor) -> Tensor:
    """``z~ = [z; 1]``: append the constant of the bias, ``(..., B, m)`` to ``(..., B, m + 1)``."""
    return functional.pad(inputs, (0, 1), value=1.0)


def isotropic(features: Tensor, variance: float) -> Tensor | None:
    """``variance * I`` over the features of all rows (Algorithm 2, line 13), or None for exact features."""
    if variance == 0.0:
        return None
    size = features.shape[-1] * features.shape[-2]
    return (variance * torch.eye(size, dtype=features.dtype, device=features.device)).expand(
        *features.shape[:-2], size, size
    )


def forward(
    structure: Structure,
    weights: Sequence[Tensor],
    cov: Sequence[Tensor],
    features: Tensor,
    *,
    feature_variance: float = 0.0,
    relu_order: int = 2,
) -> ForwardPass:
    """Propagate means and covariances from the features to the output, Eqs. (19) to (23).

    Args:
        structure: How ``cov`` is stored.
        weights: Mean of each layer, ``(n_i, k_i)``, bias last.
        cov: Weight covariance of each layer.
        features: Rows ``(..., B, d)``; rows share the weights and are therefore correlated.
        feature_variance: Variance of each feature, the paper's epsilon in line 13 of Algorithm 2.
        relu_order: Terms of the ReLU's covariance series.

    Returns:
        Output logits with mean ``(..., B o)`` and covariance ``(..., B o, B o)``, and the record of the layers.
    """
    rows = features.shape[-2]
    inputs, input_cov = augment(features), isotropic(features, feature_variance)
    layers: list[LayerPass] = []
    for depth, (weight, weight_cov) in enumerate(zip(weights, cov, strict=True)):
        shape = LayerShape(*weight.shape)
        projection = structure.project(weight_cov, shape, inputs)
        weight_term = structure.output_cov(weight_cov, shape, projection, inputs, input_cov)
        logits = Gaussian((inputs @ weight.mT).flatten(-2), linear_cov(weight, weight_term, input_cov))
        if depth == len(weights) - 1:
            layers.append(LayerPass(projection, None))
            return ForwardPass(logits, tuple(layers))
        activation = relu_moments(without_negative_variances(logits), relu_order)
        layers.append(LayerPass(projection, activation.slope.unflatten(-1, (rows, shape.n))))
        inputs, input_cov = augment(activation.output.mean.unflatten(-1, (rows, shape.n))), activation.output.cov
    raise ValueError("the head has no layers; it needs at least one linear layer")


def cross_cov(structure: Structure, weights: Sequence[Tensor], forward_pass: ForwardPass) -> Tensor:
    """``Cov(w, u^L)`` of all weights, layer after layer, by the recursion of mean Jacobians.

    Returns:
        ``(..., P, B o)``; columns are ordered by row, then output.
    """
    slope_shape = forward_pass.output.mean
    outputs = weights[-1].shape[0]
    rows = slope_shape.shape[-1] // outputs
    jacobian = torch.eye(outputs, dtype=slope_shape.dtype, device=slope_shape.device)
    jacobian = jacobian.expand(*slope_shape.shape[:-1], rows, outputs, outputs)
    blocks: list[Tensor] = []
    for depth in reversed(range(len(weights))):
        blocks.append(structure.cross_cov(forward_pass.layers[depth].projection, jacobian))
        if depth:
            slope = forward_pass.layers[depth - 1].slope
            assert slope is not None
            jacobian = (jacobian @ weights[depth][:, :-1]) * slope.unsqueeze(-2)
    return torch.cat(blocks[::-1], dim=-2)
