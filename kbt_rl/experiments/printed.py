"""KBT as the paper prints it, with only its misprints corrected: an ablation behind the learners' interface.

Layer-by-layer smoother with the diagonal cross-covariance of Eq. (47), the output replaced by ``N(y, Sigma_data)``, one
prior variance for all weights, and plain inverses. It stops with a NaN or an indefinite covariance in most settings;
from then on it counts as failed and keeps its last posterior.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kbt_rl.agents.behaviour_cloning import Array
from kbt_rl.agents.kbt import KBT, KBTInfo
from kbt_rl.inference import triangle
from kbt_rl.inference.moments import Gaussian
from kbt_rl.inference.reference import rts_update
from kbt_rl.models.context import ContextWindow


class PrintedKBT(KBT):
    """``KBT`` with Algorithm 2 of the paper as update, for ``HeadConfig.paper(epsilon, rule="replace")``."""

    failed_after: int | None = None

    def _update(self, context: ContextWindow, target: Array, features: Tensor | None, rows: Array) -> KBTInfo:
        nothing = KBTInfo(labels=len(target), innovation=float("nan"))
        if self.failed_after is not None:
            return nothing
        if features is None:
            features = self.policy.encode(context)
        head = self.policy.head
        inputs = head.standardise(features)
        labels = torch.from_numpy(target) / head.target_scale
        data_cov = torch.block_diag(*([head.noise_cov] * len(target)))
        state = head.state
        layers = list(zip(state.cov, state.spec.shapes, strict=True))
        try:
            with torch.inference_mode():
                weights, cov = rts_update(
                    state.weights,
                    [triangle.unpack(block, shape) for block, shape in layers],
                    inputs,
                    lambda output: Gaussian(labels.flatten(), data_cov),
                    cross="diagonal",
                    feature_variance=state.spec.feature_variance,
                    relu_order=state.spec.relu_order,
                    inverse=torch.linalg.inv,
                )
        except RuntimeError:  # torch.linalg.LinAlgError: a matrix to invert is singular
            weights = cov = []
        if not _proper(weights, cov):
            self.failed_after = self.labels_used
            return nothing
        with torch.inference_mode():
            state.mean.copy_(torch.cat([weight.flatten() for weight in weights]))
            for (block, shape), new in zip(layers, cov, strict=True):
                block.copy_(triangle.pack(new, shape))
        return nothing


def _proper(weights: list[Tensor], cov: list[Tensor]) -> bool:
    """Whether an update left finite means and no negative variance."""
    if not weights:
        return False
    finite = all(math.isfinite(tensor.sum()) for tensor in (*weights, *cov))  # one sum finds any NaN or infinity
    return finite and all(bool((block.diagonal() >= 0).all()) for block in cov)
