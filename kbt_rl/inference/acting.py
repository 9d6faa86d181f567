"""What acting needs of the posterior: a small immutable view from which the predicted mean follows.

The mean of a two-layer head depends on the weight means, on the variance of each hidden unit (the covariance of that
unit's own weights) and, where layers are correlated, on the covariance of each hidden unit with the weight above it.
That is a small part of the posterior. A view can be kept, stacked and evaluated for many posteriors at once while the
posterior moves on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kbt_rl.inference.compiled import RowEngine
from kbt_rl.inference.moments import relu_mean
from kbt_rl.inference.smoother import augment
from kbt_rl.inference.state import HeadState
from kbt_rl.inference.structures import LAYERWISE


class ActingView(NamedTuple):
    """Enough of a posterior of one or two layers to predict its mean; leading dimensions stack several posteriors.

    Attributes:
        weights: Weight means ``(..., n_i, k_i)``, bias last.
        hidden_form: Covariance of each hidden unit's weights as a quadratic form on the products ``z~_p z~_q`` with
            ``p <= q``, ``(..., k (k+1) / 2, n)``; None for one layer.
        coupling: ``Cov(w2_jl, w1_l)``, ``(..., o, n, k)``; None where layers are independent.
        feature_part: Variance of each hidden unit from uncertain features, ``(..., n)``; None for exact features.
    """

    weights: tuple[Tensor, ...]
    hidden_form: Tensor | None = None
    coupling: Tensor | None = None
    feature_part: Tensor | None = None

    def clone(self) -> ActingView:
        """A copy that shares no memory with it."""
        form, coupling, part = (None if each is None else each.clone() for each in self[1:])
        return ActingView(tuple(weight.clone() for weight in self.weights), form, coupling, part)


def acting_view(state: HeadState) -> ActingView:
    """A view of the posterior as it is now; shares no memory with it.

    Raises:
        ValueError: The head has more than two layers, whose mean needs the whole covariance.
    """
    layers = len(state.spec.shapes)
    if layers > 2:
        raise ValueError(f"an acting view holds heads of at most two layers; this one has {layers}")
    if layers == 2 and not state.spec.feature_variance and isinstance(state.engine, RowEngine):
        first, last, form, coupled = (torch.from_numpy(array) for array in state.engine.acting_form())
        return ActingView((first, last), form, coupled if len(coupled) else None)
    weights = tuple(weight.to(torch.float64, copy=True) for weight in state.weights)
    if layers == 1:
        return ActingView(weights)
    (n, k), (outputs, _) = state.spec.shapes
    coupling = None
    structure = "layer" if state.spec.structure == "joint" else state.spec.structure
    hidden = LAYERWISE[structure].neuron_blocks(state.cov[0], state.spec.shapes[0]).double()
    if state.spec.structure == "joint":
        above = state.cov[2].view(outputs, n + 1, n, k)[:, :n]
        coupling = torch.diagonal(above, dim1=1, dim2=2).mT.to(torch.float64, copy=True)
    feature_part = None
    if state.spec.feature_variance:
        inner = hidden[:, :-1, :-1].diagonal(dim1=-2, dim2=-1).sum(-1)
        feature_part = state.spec.feature_variance * (inner + weights[0][:, :-1].square().sum(-1))
    return ActingView(weights, _packed(hidden), coupling, feature_part)


@lru_cache(maxsize=16)
def _pairs(k: int) -> tuple[Tensor, Tensor]:
    """Indices ``p <= q`` of a symmetric ``k x k`` matrix."""
    p, q = torch.triu_indices(k, k)
    return p, q


def _packed(blocks: Tensor) -> Tensor:
    """Symmetric ``(n, k, k)`` as coefficients of ``z_p z_q``, ``p <= q``: off-diagonal entries count twice."""
    p, q = _pairs(blocks.shape[-1])
    return (blocks[:, p, q] * (2.0 - (p == q).double())).mT.contiguous()


def stack_views(views: Sequence[ActingView]) -> ActingView:
    """One view of several posteriors of the same head, stacked in front."""

    def stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.stack(present) if present else None

    weights = tuple(torch.stack(layer) for layer in zip(*(view.weights for view in views), strict=True))
    return ActingView(
        weights,
        stacked([view.hidden_form for view in views]),
        stacked([view.coupling for view in views]),
        stacked([view.feature_part for view in views]),
    )


def view_mean(view: ActingView, features: Tensor) -> Tensor:
    """Predicted mean of the logits for rows ``(..., N, d)``, shape ``(..., N, o)``; rows are independent."""
    inputs = augment(features)
    hidden_mean = inputs @ view.weights[0].mT
    if view.hidden_form is None:
        return hidden_mean
    # A matrix product instead of a quadratic form a unit; rounding may leave a variance of 0 a little below.
    variance = (_products(inputs) @ view.hidden_form).clamp_min(0.0)  # (..., N, n)
    if view.feature_part is not None:
        variance = variance + view.feature_part.unsqueeze(-2)
    activation, slope = relu_mean(hidden_mean, variance)
    mean = augment(activation) @ view.weights[1].mT
    if view.coupling is not None:
        # E w z = E w E z + Cov(w, z), and Cov(w, z_l) = Cov(w, u_l) Phi(a_l) by Stein's lemma.
        cross = inputs.unsqueeze(-3) @ view.coupling.mT  # Cov(w2_jl, u_l), (..., o, N, n)
        mean = mean + (cross * slope.unsqueeze(-3)).sum(-1).mT
    return mean


def _products(inputs: Tensor) -> Tensor:
    """``z_p z_q`` with ``p <= q`` in the order of ``_pairs``, ``(..., k (k+1) / 2)``.

    Computed along the rows, which are many where this takes time: along ``q`` there would be a few numbers at a time.
    """
    k = inputs.shape[-1]
    columns = inputs.reshape(-1, k).mT.contiguous()
    out = inputs.new_empty(k * (k + 1) // 2, columns.shape[1])
    start = 0
    for p in range(k):
        torch.mul(columns[p], columns[p:], out=out[start : start + k - p])
        start += k - p
    return out.view(-1, *inputs.shape[:-1]).movedim(0, -1)
