"""KBT as the paper prints it, with only its misprints corrected: an ablation behind the learners' interface.

Layer-by-layer smoother with the diagonal cross-covariance of Eq. (47), the output replaced by ``N(y, Sigma_data)``, one
prior variance for all weights, and plain inverses. In most settings it ends with a NaN or a negative variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kbt_rl.agents.bayesian import KBTInfo
from kbt_rl.agents.behaviour_cloning import Array
from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.network import weights_of
from kbt_rl.inference.paper import rts_update
from kbt_rl.inference.types import Gaussian
from kbt_rl.models.context import ContextWindow
from studies.cloned import Setting
from studies.frozen import FrozenPolicy, TwoLayers, unit_covariances


class PrintedPolicy(DecisionTransformerPolicy):
    """Acts by the moments of weights and covariances of its own; the head's are the prior, and its units."""

    weights: list[Tensor]
    cov: list[Tensor]
    labels: int
    layers: TwoLayers

    def reset_head(self) -> None:
        """Start from the prior."""
        super().reset_head()
        self.take_prior()

    def take_prior(self) -> None:
        """Take over the head's prior."""
        sizes = self.head.spec.sizes
        weights, rows = [weight.clone() for weight in weights_of(self.head.state)], self.head.covariance().split(sizes)
        self.take(weights, [part.split(sizes, dim=1)[layer].clone() for layer, part in enumerate(rows)], 0)

    def in_units(self, features: Tensor) -> Tensor:
        """Features as the posterior takes them, ``(n, d)``."""
        return (features.double() - self.head.feature_mean) / self.head.feature_scale

    def freeze(self) -> FrozenPolicy:
        """As it is now, see ``frozen``."""
        return FrozenPolicy(self, self.layers)

    def act(self, features: Tensor) -> Array:
        """Mean action; rows on their own."""
        with torch.inference_mode():
            actions: Array = (self.layers.mean(self.in_units(features)) * self.head.target_scale).numpy()
            return actions

    def take(self, weights: list[Tensor], cov: list[Tensor], labels: int) -> None:
        """Act by these from now on; the layers are independent of each other."""
        (first, last), self.weights, self.cov, self.labels = weights, weights, cov, labels
        units, feature_variance = (
            unit_covariances(cov[0], len(first)),
            first.new_tensor(self.head.spec.feature_variance),
        )
        self.layers = TwoLayers(first, last, units, torch.zeros_like(first), feature_variance)


class PrintedKBT(KBT):
    """``KBT`` with Algorithm 2 of the paper as update."""

    policy: PrintedPolicy

    @property
    def labels_used(self) -> int:
        """Labels that its own moments have learned from."""
        return self.policy.labels

    def _forget_samples(self) -> None:
        super()._forget_samples()
        self.policy.take_prior()

    def _update(self, context: ContextWindow, target: Array, features: Tensor | None, rows: Array) -> KBTInfo:
        policy, head = self.policy, self.policy.head
        inputs = policy.in_units(policy.encode(context) if features is None else features)
        labels = torch.from_numpy(target) / head.target_scale
        data_cov = torch.block_diag(*([head.noise_cov] * len(target)))
        try:
            with torch.inference_mode():
                weights, cov = rts_update(
                    policy.weights,
                    policy.cov,
                    inputs,
                    lambda output: Gaussian(labels.flatten(), data_cov),
                    cross="diagonal",
                    feature_variance=head.spec.feature_variance,
                    relu_order=head.spec.relu_order,
                    inverse=torch.linalg.inv,
                )
        except RuntimeError as error:
            raise UpdateError(f"the printed update broke after {self.labels_used} labels: {error}") from error
        finite = all(bool(torch.isfinite(part.sum())) for part in (*weights, *cov))
        if not finite or not all(bool((part.diagonal() >= 0.0).all()) for part in cov):
            raise UpdateError(f"the printed update broke after {self.labels_used} labels: NaN or a negative variance")
        policy.take(weights, cov, policy.labels + len(target))
        return KBTInfo(labels=len(target), innovation=float("nan"))


def build(setting: Setting, epsilon: float) -> PrintedKBT:
    """A learner with the prior variance ``epsilon`` for all weights and features; see ``methods.build``."""
    head = HeadConfig.paper(epsilon, rule="replace")
    model = PrintedKBT(
        PrintedPolicy, setting.task.env(), seed=setting.pretrained.seed, policy_kwargs={"head": head, "skip": "none"}
    )
    model.start_from(setting.pretrained)
    return model
