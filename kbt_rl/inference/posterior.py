"""What a Bayesian head keeps: the buffers of a Gaussian posterior, their units and their noise.

How they are kept whole is in :mod:`kbt_rl.inference.whole`; what is learned and predicted with them is in
:mod:`kbt_rl.inference.head`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kbt_rl.inference import checks, loading
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.covariance.base import Cov
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.forgetting import FORGETTING, reopened
from kbt_rl.inference.history import History
from kbt_rl.inference.kind import Kind
from kbt_rl.inference.likelihoods.base import Likelihood
from kbt_rl.inference.prior import prior_means
from kbt_rl.inference.transactions import replace_buffers
from kbt_rl.inference.types import HeadSpec, HeadState, NoiseEstimate, Tensors
from kbt_rl.inference.whole import WholeModule


class Posterior(WholeModule):
    """Gaussian posterior over the weights of a small network, as the buffers of a module.

    Args:
        kind: Sizes and configuration.

    Attributes:
        link: Of the output rule.
        plain_noise: Whether the label noise is known and Gaussian.
    """

    mean: Tensor
    prior_mean: Tensor
    noise_cov: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    target_scale: Tensor
    labels_seen: Tensor
    noise_start_cov: Tensor
    noise_labels: Tensor

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind, self.link, self.plain_noise = kind, kind.rule.link, kind.config.plain_noise
        self._history = History(self.config.history) if self.config.history else None
        for name, value in self.kind.tensors().items():
            self.register_buffer(name, value)

    @property
    def config(self) -> HeadConfig:
        """The configuration."""
        return self.kind.config

    @property
    def spec(self) -> HeadSpec:
        """Layers and structure."""
        return self.kind.spec

    @property
    def rule(self) -> Likelihood:
        """The output rule."""
        return self.kind.rule

    @property
    def in_features(self) -> int:
        """Number of features."""
        return self.kind.in_features

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self.kind.out_features

    @property
    def learns_noise(self) -> bool:
        """Whether the noise is estimated from the labels."""
        return self.kind.learns_noise

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        spec = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, layers={len(spec.shapes)}, "
            f"structure={spec.structure!r}, rule={self.config.rule!r}, labels_seen={int(self.labels_seen)}"
        )

    def reset(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        feature_mean: Tensor | None = None,
        feature_scale: Tensor | None = None,
        feature_basis: Tensor | None = None,
        target_scale: Tensor | None = None,
    ) -> None:
        """Return to the prior that reproduces ``weight @ h + bias``; what was learned is forgotten.

        A noise that was set stays, in units of the target; one that was learned starts again from what was set, or from
        the configuration, whose variances are in units of ``target_scale`` squared.
        """
        given = (weight, bias, feature_mean, feature_scale, feature_basis, target_scale)
        with self._lock:
            self._take_over(self._started(*given))

    def _started(
        self,
        weight: Tensor,
        bias: Tensor,
        feature_mean: Tensor | None,
        feature_scale: Tensor | None,
        feature_basis: Tensor | None,
        target_scale: Tensor | None,
    ) -> Tensors:
        """The buffers after ``reset``."""
        kind, like = self.kind, self.mean
        d, o = kind.in_features, kind.out_features
        weight = checks.finite("weight", weight, (o, d), like)
        bias = checks.finite("bias", bias, (o,), like)
        centre = checks.finite("feature_mean", feature_mean, (d,), like, default=0.0)
        scale = checks.positive("feature_scale", feature_scale, (d,), like)
        outputs = checks.positive("target_scale", target_scale, (o,), like)
        if self.rule.link == "softmax" and not bool((outputs == 1.0).all()):
            raise ValueError("with the softmax link the targets are probabilities; leave target_scale at 1")
        bias = bias + weight @ centre
        weight = weight * scale
        basis = None
        if kind.spec.structure == "rotated":
            basis = checks.orthogonal("feature_basis", feature_basis, d, like)
            weight = weight @ basis
        elif feature_basis is not None:
            raise ValueError(f"feature_basis is for structure='rotated'; this head has {kind.spec.structure!r}")
        means = prior_means(weight / outputs.unsqueeze(-1), bias / outputs, kind.spec.shapes)
        mean = torch.cat([part.flatten() for part in means])
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("weight and bias are not finite in units of feature_scale and target_scale")
        configured = torch.diag(torch.full_like(self.target_scale, kind.start_noise))
        start = self.noise_start_cov if kind.learns_noise else self.noise_cov
        if not torch.equal(start, configured):  # it was set, for targets in their own units
            start = start * self._target_square() / (outputs.unsqueeze(-1) * outputs)
        new: Tensors = {"mean": mean, "prior_mean": mean.clone(), "feature_mean": centre, "feature_scale": scale}
        new |= {"target_scale": outputs, "labels_seen": torch.zeros_like(self.labels_seen), "noise_cov": start.clone()}
        if kind.follows_layer:
            new["last_variance"] = kind.variance_of(weight)
        if basis is not None:
            new["feature_basis"] = basis
        if kind.learns_noise:
            new |= {"noise_start_cov": start.clone(), "noise_labels": kind.start_labels()}
        return new | dict(zip(kind.cov_names, kind.prior_cov(self._buffers | new), strict=True))

    def set_noise(self, noise: float | Tensor) -> None:
        """Set the label noise: one variance for all outputs, or a covariance ``(o, o)``, in squared target units.

        Where the noise is learned, learning starts again from here, with the trust of ``HeadConfig.noise_labels``.

        Raises:
            ValueError: Not symmetric, not finite, a negative variance, or a variance of 0 where it must be positive.
        """
        kind = self.kind
        noise_cov = checks.noise_covariance(noise, kind.out_features, self.mean, kind.noise_model is not None)
        with self._lock:
            scaled = noise_cov / self._target_square()
            if not bool(torch.isfinite(scaled).all()):
                raise ValueError(
                    f"the noise covariance is not finite, in units of target_scale: {noise_cov.tolist()} over "
                    f"{self._target_square().tolist()}"
                )
            if kind.spec.structure == "shared" and not kind.learns_noise:
                checks.diagonal_noise(scaled)
            new: Tensors = {"noise_cov": scaled}
            if kind.learns_noise:
                new |= {"noise_start_cov": scaled.clone(), "noise_labels": kind.start_labels()}
            if kind.spec.in_noise_units:  # the weights' own covariance stays what it was
                ratio = float(self.noise_cov.diagonal().mean() / scaled.diagonal().mean())
                root, group = self._cov()
                new |= dict(zip(kind.cov_names, (root * ratio**0.5, group), strict=True))
            self._take_over(new)

    @property
    def mean_square_scale(self) -> float:
        """Average over the outputs of the squared ``target_scale``: what takes averaged variances into target units."""
        return float(self.target_scale.square().mean())

    @property
    def log_scale(self) -> float:
        """Sum over the outputs of the logarithm of ``target_scale``: what a log density in target units is less."""
        return float(self.target_scale.log().sum())

    @property
    def state(self) -> HeadState:
        """The posterior; shares memory with the module."""
        return HeadState(self.spec, self.mean, self._cov())

    @property
    def prior(self) -> HeadState:
        """The posterior before any label."""
        cov = tuple(block.to(self.mean.device) for block in self.kind.prior_cov(self._buffers))
        return HeadState(self.spec, self.prior_mean, cov)

    def variances(self) -> Tensor:
        """Variance of each weight, ``(P,)``, in the head's own units."""
        with self._lock:
            own = STRUCTURES[self.spec.structure].variances(self.state)
            if not self.spec.in_noise_units:
                return own
            return (own.view(self.spec.shapes[0]) * self.noise_cov.diagonal().unsqueeze(-1)).flatten()

    def covariance(self) -> Tensor:
        """The full covariance of the weights ``(P, P)``, in the head's own units; for tests, plots and small heads."""
        with self._lock:
            if not self.spec.in_noise_units:
                return STRUCTURES[self.spec.structure].dense(self.state)
            root, group = self._cov()
            each = root[group]  # outputs i, j have the covariance V_ij R_i' R_j
            full = torch.einsum("ij,imp,jmq->ipjq", self.noise_cov, each, each)
            return full.reshape(len(self.mean), -1)

    def reopen(self, fraction: float = 1.0, noise: NoiseEstimate | None = None) -> None:
        """Keep the means and move the covariance towards the prior's, by default all the way.

        Args:
            fraction: How far, in (0, 1].
            noise: What a learned noise is put back to, a ``noise_estimate`` of before: labels that no longer fit the
                weights have raised it, and with too large a noise the opened weights would learn slowly.

        Raises:
            ValueError: The fraction is out of range, or the noise of this head is not learned.
        """
        if noise is not None and not self.learns_noise:
            raise ValueError("the noise of this head is not learned, so there is none to put back; see set_noise")
        with self._lock:
            new = self._loosened(reopened(self.state, self.prior, fraction))
            if noise is not None:
                new |= {
                    "noise_cov": torch.from_numpy(noise.cov).to(self.noise_cov),
                    "noise_labels": torch.as_tensor(noise.labels).to(self.noise_labels),
                }
            self._take_over(new)

    def forget(self, factor: float) -> None:
        """Keep the means and divide the covariance by a factor in (0, 1]; see ``forgetting.Fading``."""
        self.loosen("fading", factor)

    def add_process_noise(self, scale: float) -> None:
        """Keep the means and add ``scale`` times the prior's covariance; see ``forgetting.ProcessNoise``."""
        self.loosen("process_noise", scale)

    def loosen(self, forgetting: str, rate: float) -> None:
        """Forget once, by a name of ``forgetting.FORGETTING``."""
        with self._lock:
            self._take_over(self._loosened(FORGETTING[forgetting](self.state, self.prior, rate)))

    def _loosened(self, state: HeadState) -> Tensors:
        return {"mean": state.mean} | dict(zip(self.kind.cov_names, state.cov, strict=True))

    @property
    def noise_estimate(self) -> NoiseEstimate | None:
        """What is thought of a noise that is learned, as a copy in units of ``target_scale``; None for a known one."""
        if not self.learns_noise:
            return None
        with self._lock:
            return NoiseEstimate(self.noise_cov.cpu().numpy().copy(), self.noise_labels.cpu().numpy().copy())

    @property
    def predictive_dof(self) -> float:
        """Degrees of freedom of predictions, whose covariances are scales of Student's t; infinite if Gaussian."""
        return float(self.noise_labels.min()) if self.spec.in_noise_units else math.inf

    def _target_square(self) -> Tensor:
        """What a covariance of the targets is divided by inside, ``(o, o)``."""
        return self.target_scale.unsqueeze(-1) * self.target_scale

    def _cov(self) -> Cov:
        return tuple(self._buffers[name] for name in self.kind.cov_names)  # type: ignore[misc]

    def _take_over(self, new: Tensors) -> None:
        """Replace buffers, all or none."""
        with self._changing():
            replace_buffers(self._buffers, new)

    def check_saved(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """See ``WholeModule``."""
        loading.check_posterior(self, self.kind, state_dict, prefix)

    def flexible(self) -> frozenset[str]:
        """See ``WholeModule``."""
        return frozenset(self.kind.cov_names)

    def _fresh(self) -> dict[str, Any]:
        return {"_history": None if self._history is None else self._history.fresh()}
