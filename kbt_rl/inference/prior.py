"""The prior: a network of ReLU layers that reproduces a pre-trained linear layer exactly, and how sure it is of it.

Means, Eqs. (34) to (36): each hidden layer carries a positive and a negative copy of the features, ``relu(h)`` and
``relu(-h)``, and the last layer subtracts them: ``relu(h) - relu(-h) = h``. The predicted mean equals the pre-trained
layer for every prior variance, since ``E relu(u) - E relu(-u) = E u`` as long as both copies have equal variance.

Variances: the paper gives one epsilon to all layers. One value is a poor prior, since the hidden layers must be much
stiffer than the last; here they are two. The tied prior correlates the last-layer weights of a pair by ``-rho``: their
difference, which acts linearly on the features, stays free, and their sum, which opens the non-linear capacity, is
stiff. ``rho = 0`` is the paper's independent prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kbt_rl.inference.covariance.base import PriorLayer
from kbt_rl.inference.types import LayerShape


def layer_shapes(features: int, outputs: int, layers: int, width: int | None) -> tuple[LayerShape, ...]:
    """Shapes of the head's layers; ``width`` defaults to twice the features, the least that holds both copies."""
    if layers < 1:
        raise ValueError(f"the head has {layers} layers; it needs at least 1 (which is linear regression)")
    width = 2 * features if width is None else width
    if layers > 1 and width < 2 * features:
        raise ValueError(
            f"width is {width}; the hidden layers carry a positive and a negative copy of the {features} features "
            f"and need at least {2 * features} units"
        )
    sizes = [features, *[width] * (layers - 1), outputs]
    return tuple(LayerShape(n, m + 1) for m, n in pairwise(sizes))


def prior_means(weight: Tensor, bias: Tensor, shapes: Sequence[LayerShape]) -> list[Tensor]:
    """Weight means that reproduce ``weight @ h + bias``, Eqs. (34) to (36).

    Note:
        The paper prints ``n_i`` and ``n_L`` in (35) and (36) where ``n_{i-1}`` and ``n_{L-1}`` are meant.

    Args:
        weight: The pre-trained layer's weight, ``(o, d)``.
        bias: Its bias, ``(o,)``.
        shapes: Shapes of the head's layers.

    Returns:
        One matrix ``(n_i, k_i)`` a layer, bias last.
    """
    if len(shapes) == 1:
        return [torch.cat([weight, bias.unsqueeze(-1)], dim=-1)]
    copies = _copies(weight.shape[1], shapes[0].n).to(weight)
    means = [_without_bias(copies)]
    means += [_without_bias(copies @ copies.mT) for _ in shapes[1:-1]]
    means.append(torch.cat([weight @ copies.mT, bias.unsqueeze(-1)], dim=-1))
    return means


def _copies(features: int, width: int) -> Tensor:
    """``E = [I; 0; -I]``, ``(width, features)``: positive copy, spare units, negative copy."""
    copies = torch.zeros(width, features)
    copies[:features] = torch.eye(features)
    copies[width - features :] = -torch.eye(features)
    return copies


def _without_bias(matrix: Tensor) -> Tensor:
    return torch.cat([matrix, matrix.new_zeros(len(matrix), 1)], dim=-1)


def prior_layers(
    shapes: Sequence[LayerShape], *, hidden_variance: float, last_variance: float, rho: float
) -> list[PriorLayer]:
    """The tied prior, layer by layer; variances in squared target units.

    Args:
        shapes: Shapes of the head's layers.
        hidden_variance: Variance of each hidden-layer weight.
        last_variance: Variance of each last-layer weight.
        rho: Minus the correlation of the last-layer weights of a pair, in [0, 1).
    """
    layers = [
        PriorLayer(shape.n, hidden_variance**0.5 * torch.eye(shape.k, dtype=torch.float64)) for shape in shapes[:-1]
    ]
    pairs = shapes[0].k - 1 if len(shapes) > 1 else 0
    layers.append(PriorLayer(shapes[-1].n, last_variance**0.5 * _tied_root(shapes[-1].k, pairs, rho)))
    return layers


def _tied_root(k: int, pairs: int, rho: float) -> Tensor:
    """Root of the correlations of one output's weights: ``-rho`` between a pair's copies, bias and spare units untied.

    Of a pair, the later weight has the whole row: ``[[sqrt(1 - rho^2), 0], [-rho, 1]]``, whose columns have unit norm.
    """
    root = torch.eye(k, dtype=torch.float64)
    positive = torch.arange(pairs)
    negative = positive + (k - 1 - pairs)
    root[positive, positive] = (1.0 - rho * rho) ** 0.5
    root[negative, positive] = -rho
    return root
