"""What a posterior stored in float32 can resolve, and the repair where a label would go below it.

Rounding moves an entry of the covariance by up to 6e-8 of itself. Where an output is known much better than its weights
are apart, its variance ``g' Sigma g`` (``g``: the Jacobian of its mean) is a small difference of large terms, and
rounding can make it negative; every later downdate would then make it more so. The measure is

    ``q = g' Sigma g / sum_r g_r^2 Sigma_rr``,

a Rayleigh quotient of the weights' correlation matrix, whose smallest eigenvalue it bounds from above. Rows with
``q`` below ``HeadState.least_quotient`` are learned after the repair ``Sigma <- (1 - f) Sigma + f diag(Sigma)``, with
the ``f`` that makes ``q`` twice that, doubled until the update leaves no variance negative. It lets no variance grow,
raises the smallest eigenvalue of the correlations to ``(1 - f) lambda + f``, and forgets a share ``f`` of what is known
of the weights together. It is part of the increment, and counted.

Float64 has nine digits more and is not repaired; ``diagonal`` has nothing to repair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbt_rl.inference.compiled import RowEngine
from kbt_rl.inference.moments import relu_mean
from kbt_rl.inference.smoother import augment
from kbt_rl.inference.state import HeadState
from kbt_rl.inference.structures import LAYERWISE

# Combinations of rows with a smaller share of the largest one's variance are the same row but for rounding.
_ALIKE = 1e-9


def shrinkage(state: HeadState, features: Tensor, cross_cov: Tensor, variances: Tensor) -> float:
    """The ``f`` that rows ``(B, d)`` need before they are learned jointly, 0 for none.

    For several rows or outputs ``q`` is the smallest over all their linear combinations. That it is large enough is
    asked of a Cholesky factorisation; how small it is otherwise, of the eigenvalues.

    Args:
        state: The posterior, of one or two layers.
        features: In the head's own units.
        cross_cov: ``Sigma g`` of all rows and outputs, ``(P, B o)``.
        variances: Of the weights, ``(P,)``.
    """
    limit = state.least_quotient
    if limit == 0.0:
        return 0.0
    gradients = jacobian(state, features)
    apart = gradients.mT @ (variances.unsqueeze(-1) * gradients)
    together = gradients.mT @ cross_cov
    together = 0.5 * (together + together.mT)
    if int(torch.linalg.cholesky_ex(together - limit * apart).info) == 0:
        return 0.0
    sizes, axes = torch.linalg.eigh(apart)
    known = sizes > _ALIKE * sizes[-1]
    if not bool(known.any()):
        return 0.0
    axes = axes[:, known] * sizes[known].rsqrt()
    quotient = float(torch.linalg.eigvalsh(axes.mT @ together @ axes)[0])
    return 0.0 if quotient >= limit else min((2.0 * limit - quotient) / (1.0 - quotient), 1.0)


def jacobian(state: HeadState, features: Tensor) -> Tensor:
    """Derivative of the mean logits of rows ``(B, d)`` by the weights, ``(P, B o)``, as the update linearises it."""
    if isinstance(state.engine, RowEngine):
        return torch.from_numpy(state.engine.gradients(features.numpy())).mT
    return general_jacobian(state, features)


def general_jacobian(state: HeadState, features: Tensor) -> Tensor:
    """``jacobian`` as it is defined, through PyTorch."""
    inputs = augment(features)  # (B, k)
    rows, outputs = len(inputs), state.spec.outputs
    eye = torch.eye(outputs, dtype=inputs.dtype, device=inputs.device)
    if len(state.spec.shapes) == 1:
        return torch.einsum("bp,jo->jpbo", inputs, eye).reshape(-1, rows * outputs)
    first, last = (weight.to(inputs.dtype) for weight in state.weights)
    structure = "layer" if state.spec.structure == "joint" else state.spec.structure
    blocks = LAYERWISE[structure].neuron_blocks(state.cov[0], state.spec.shapes[0]).to(inputs.dtype)
    mean, variance = inputs @ first.mT, torch.einsum("bp,jpq,bq->bj", inputs, blocks, inputs).clamp_min(0.0)
    activation, slope = relu_mean(mean, variance)
    hidden = torch.einsum("oj,bj,bp->jpbo", last[:, :-1], slope, inputs)
    above = torch.einsum("bp,jo->jpbo", augment(activation), eye)
    return torch.cat([part.reshape(-1, rows * outputs) for part in (hidden, above)])


def repaired(state: HeadState, forgotten: float) -> HeadState:
    """A copy of the posterior after the repair with ``f = forgotten``."""
    copy = state.clone()
    scale_correlations_(copy, 1.0 - forgotten, copy.variances())
    return copy


def scale_correlations_(state: HeadState, factor: float, variances: Tensor) -> None:
    """Multiply every covariance of two weights by ``factor``, in place.

    Args:
        state: The posterior.
        factor: At most 1, or one over such a factor to take it back.
        variances: ``state.variances()``, which stay as they are, bit for bit.
    """
    ops = LAYERWISE["layer" if state.spec.structure == "joint" else state.spec.structure]
    for block in state.cov:
        block.mul_(factor)
    for block, shape, own in zip(state.cov, state.spec.shapes, variances.split(state.spec.sizes), strict=False):
        ops.set_variances_(block, shape, own)
