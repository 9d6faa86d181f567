"""The paper's smoother as printed, layer by layer with an inverse at each step: oracle and ablation, not the engine.

Three misprints are corrected: (23) squares its second term, (47) has ``Phi`` for ``phi``, and (43) to (45) use
``Cov(z, u)`` and the increment of ``u`` (as printed, ``Cov(z, w)`` is zero by the paper's own independence assumption).

``cross="full"`` uses the exact ``Cov(u, relu(u)) = Cov(u) diag(Phi)``; the result then equals the collapsed recursion
of ``network``. ``cross="diagonal"`` keeps only its diagonal, which the paper does for want of the full form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kbt_rl.inference.moments import relu_moments
from kbt_rl.inference.network import augment
from kbt_rl.inference.types import Gaussian

Cross = Literal["full", "diagonal"]


class _LayerRecord(NamedTuple):
    """Prior moments of one layer in one step."""

    weight_cross: Tensor  # Cov(w, u) with columns ordered row by row, (n k, B n); Eq. (46)
    logits: Gaussian  # u, (B n,)
    activation: Gaussian | None  # z = relu(u), None for the last layer
    slope: Tensor | None


def rts_update(
    weights: Sequence[Tensor],
    cov: Sequence[Tensor],
    features: Tensor,
    condition: Callable[[Gaussian], Gaussian],
    *,
    cross: Cross = "full",
    feature_variance: float = 0.0,
    relu_order: int = 2,
    inverse: Callable[[Tensor], Tensor] = torch.linalg.pinv,
) -> tuple[list[Tensor], list[Tensor]]:
    """One step of Algorithm 2: forward moments, then Eqs. (37) to (45) from the last layer to the first.

    Args:
        weights: Mean of each layer, ``(n_i, k_i)``, bias last.
        cov: Full covariance of each layer's weights, ``(n_i k_i, n_i k_i)``.
        features: Rows ``(B, d)``, all in one joint update.
        condition: What the target makes of the predicted output logits (all rows), for example ``N(y, Sigma_data)``.
        cross: ``full``, or ``diagonal`` as Eq. (47) is printed.
        feature_variance: Variance of each feature.
        relu_order: Terms of the ReLU's covariance series.
        inverse: How matrices are inverted. Bare inverses often do not exist: ``Cov(u^1)`` is singular for repeated
            rows, and ``Cov(z)`` underflows for stiff priors.

    Returns:
        New means and covariances, one a layer.
    """
    records = _forward(weights, cov, features, feature_variance, relu_order)
    new_weights, new_cov = list(weights), list(cov)
    after = condition(records[-1].logits)
    for depth in reversed(range(len(weights))):
        record, weight = records[depth], weights[depth]
        if record.activation is not None:
            after = _through_relu(record, after, cross, inverse)
        logits = record.logits
        mean_change, cov_change = after.mean - logits.mean, after.cov - logits.cov
        gain = record.weight_cross @ inverse(logits.cov)  # (40)
        new_weights[depth] = weight + (gain @ mean_change).view_as(weight)  # (41)
        new_cov[depth] = torch.addmm(cov[depth], gain @ cov_change, gain.mT)  # (42)
        if depth:
            below = records[depth - 1].activation
            assert below is not None
            input_cross = _input_cross_cov(below.cov, weight, len(features))
            gain = input_cross @ inverse(logits.cov)  # (43) with Cov(z, u)
            after = Gaussian(below.mean + gain @ mean_change, below.cov + gain @ cov_change @ gain.mT)  # (44), (45)
    return new_weights, new_cov


def _forward(
    weights: Sequence[Tensor], cov: Sequence[Tensor], features: Tensor, feature_variance: float, relu_order: int
) -> list[_LayerRecord]:
    """Eqs. (19) to (23), layer by layer."""
    inputs, input_cov = augment(features), feature_variance * torch.eye(features.numel()).to(features)
    records: list[_LayerRecord] = []
    for depth, (weight, weight_cov) in enumerate(zip(weights, cov, strict=True)):
        n, k = weight.shape
        projection = (weight_cov.reshape(-1, k) @ inputs.mT).view(n * k, n, -1)
        weight_cross = projection.mT.reshape(n * k, -1)
        logits = Gaussian(
            (inputs @ weight.mT).flatten(), _linear_cov(weight, weight_cov, projection, inputs, input_cov)
        )
        if depth == len(weights) - 1:
            records.append(_LayerRecord(weight_cross, logits, None, None))
            break
        activation = relu_moments(logits, order=relu_order)
        records.append(_LayerRecord(weight_cross, logits, activation.output, activation.slope))
        inputs, input_cov = augment(activation.output.mean.view(-1, n)), activation.output.cov
    return records


def _linear_cov(weight: Tensor, cov: Tensor, projection: Tensor, inputs: Tensor, input_cov: Tensor) -> Tensor:
    """Eqs. (20), (21) for all rows jointly, ``(B n, B n)``; ``projection`` is ``Sigma (I (x) z~)``, ``(n k, n, B)``."""
    (n, k), rows = weight.shape, len(inputs)
    by_rows = input_cov.view(rows, k - 1, rows, k - 1)
    own = torch.einsum("bp,jplc->bjcl", inputs, projection.view(n, k, n, rows))
    both = torch.einsum("jplq,bpcq->bjcl", cov.view(n, k, n, k)[:, :-1, :, :-1], by_rows)
    through = torch.einsum("jp,bpcq,lq->bjcl", weight[:, :-1], by_rows, weight[:, :-1])
    return (own + both + through).reshape(rows * n, rows * n)


def _through_relu(record: _LayerRecord, after: Gaussian, cross: Cross, inverse: Callable[[Tensor], Tensor]) -> Gaussian:
    """Eqs. (37) to (39): from the smoothed activation to the smoothed logits."""
    logits, activation = record.logits, record.activation
    assert activation is not None
    assert record.slope is not None
    cross_cov = logits.cov * record.slope
    if cross == "diagonal":
        cross_cov = torch.diag(cross_cov.diagonal())
    gain = cross_cov @ inverse(activation.cov)
    return Gaussian(
        logits.mean + gain @ (after.mean - activation.mean),
        logits.cov + gain @ (after.cov - activation.cov) @ gain.mT,
    )


def _input_cross_cov(input_cov: Tensor, weight: Tensor, rows: int) -> Tensor:
    """``Cov(z, u) = Cov(z) (I (x) M')`` without the bias column, ``(B m, B n)``."""
    m = weight.shape[1] - 1
    return (input_cov.view(-1, rows, m) @ weight[:, :-1].mT).reshape(rows * m, -1)
