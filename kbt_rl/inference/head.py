"""The Bayesian head: a pre-trained linear layer turned into a Gaussian network that learns sample by sample.

``BayesianHead`` only holds the buffers of a posterior and converts at the border; the mathematics is in the pure
functions of this package. It keeps float64 whatever dtype the rest of the model has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kbt_rl.inference import update as functional
from kbt_rl.inference.acting import ActingView, acting_view, view_mean
from kbt_rl.inference.moments import Gaussian, softmax_jacobian, softmax_moments
from kbt_rl.inference.output import RULES, Link
from kbt_rl.inference.prior import layer_shapes, prior_cov, prior_means
from kbt_rl.inference.structures import STRUCTURES
from kbt_rl.inference.update import HeadSpec, HeadState, Increment, UpdateInfo

# A joint covariance of 4,000 weights takes 128 MB.
_MAX_JOINT_WEIGHTS = 4_000


@dataclass(frozen=True)
class HeadConfig:
    """Depth, storage, output rule and prior of the head. Variances are in units of ``target_scale`` squared.

    Attributes:
        layers: Number of linear layers, ReLU between them; 1 is exact Bayesian linear regression.
        width: Hidden units, at least twice the features, which is the default.
        structure: ``joint``, ``layer``, ``neuron``, ``diagonal``, or ``auto``: joint up to 4,000 weights, layer above.
        rule: ``measure`` or ``replace`` (identity link), ``fisher``, ``taylor`` or ``replace_softmax`` (softmax link).
        noise_variance: Variance of the label noise; for ``replace`` the paper's Sigma_data.
        hidden_variance: Prior variance of the hidden layers' weights.
        last_variance: Prior variance of the last layer's weights.
        rho: Minus the prior correlation of the last-layer weights of a pair; 0 is the paper's independent prior. None
            is 0.99, or 0 for the diagonal structure, which cannot store it.
        feature_variance: Variance of each feature (Algorithm 2, line 13), 0 for exact features.
        relu_order: Terms of the ReLU's covariance series; the paper prints 2.
    """

    layers: int = 2
    width: int | None = None
    structure: str = "auto"
    rule: str = "measure"
    noise_variance: float = 1e-3
    hidden_variance: float = 1e-5
    last_variance: float = 1.0
    rho: float | None = None
    feature_variance: float = 0.0
    relu_order: int = 2

    def __post_init__(self) -> None:
        _check_choice("structure", self.structure, ("auto", *STRUCTURES))
        _check_choice("rule", self.rule, tuple(RULES))
        for name in ("noise_variance", "hidden_variance", "last_variance", "feature_variance"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; a variance is finite and not negative")
        if self.rho is not None and not 0.0 <= self.rho < 1.0:
            raise ValueError(f"rho is {self.rho}; it must lie in [0, 1), and 0 is the paper's independent prior")
        if self.relu_order < 1:
            raise ValueError(f"relu_order is {self.relu_order}; the series needs at least 1 term")

    @classmethod
    def paper(cls, epsilon: float, **changes: Any) -> HeadConfig:
        """The paper's prior: one variance ``epsilon`` for all weights, and for the features as well."""
        base = cls(structure="layer", hidden_variance=epsilon, last_variance=epsilon, feature_variance=epsilon, rho=0.0)
        return replace(base, **changes)

    @property
    def link(self) -> Link:
        """Link of the output rule."""
        return RULES[self.rule].link

    def resolve(self, features: int, outputs: int) -> tuple[HeadSpec, float]:
        """The head's fixed part and ``rho``, with ``auto`` and None decided."""
        shapes = layer_shapes(features, outputs, self.layers, self.width)
        structure = self.structure
        if structure == "auto":
            structure = "joint" if sum(shape.size for shape in shapes) <= _MAX_JOINT_WEIGHTS else "layer"
        rho = self.rho if self.rho is not None else (0.0 if structure == "diagonal" else 0.99)
        return HeadSpec(shapes, structure, self.feature_variance, self.relu_order), rho


class Prediction(NamedTuple):
    """Distribution of the target for each row: mean ``(N, o)``, covariances ``(N, o, o)``.

    The predictive covariance is ``epistemic + aleatoric``: what the weights do not know, and what no weights can know.
    With the softmax link the mean is the class probabilities.
    """

    mean: Tensor
    epistemic: Tensor
    aleatoric: Tensor


class BayesianHead(nn.Module):
    """Gaussian posterior over the weights of a small ReLU network that starts as a pre-trained linear layer.

    Args:
        in_features: Number of features ``d``.
        out_features: Number of outputs ``o``.
        config: Depth, storage, output rule and prior.

    Example:
        >>> head = BayesianHead.from_linear(nn.Linear(16, 1), HeadConfig(noise_variance=1e-3))
        >>> info = head.update(torch.randn(1, 16), torch.zeros(1, 1))
        >>> mean, epistemic, aleatoric = head.predict(torch.randn(5, 16))
    """

    mean: Tensor
    noise_cov: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    target_scale: Tensor
    labels_seen: Tensor

    def __init__(self, in_features: int, out_features: int, config: HeadConfig | None = None) -> None:
        super().__init__()
        self.config = HeadConfig() if config is None else config
        self.in_features, self.out_features = in_features, out_features
        self.spec, self._rho = self.config.resolve(in_features, out_features)
        self.rule = RULES[self.config.rule]
        self._published: tuple[tuple[int, ...], ActingView] | None = None
        self.register_buffer("mean", torch.zeros(sum(self.spec.sizes), dtype=torch.float64))
        for depth, block in enumerate(self._prior_cov()):
            self.register_buffer(f"cov_{depth}", block)
        self.register_buffer("noise_cov", torch.zeros(out_features, out_features, dtype=torch.float64))
        self.register_buffer("feature_mean", torch.zeros(in_features, dtype=torch.float64))
        self.register_buffer("feature_scale", torch.ones(in_features, dtype=torch.float64))
        self.register_buffer("target_scale", torch.ones(out_features, dtype=torch.float64))
        self.register_buffer("labels_seen", torch.zeros((), dtype=torch.int64))
        self.noise_cov.diagonal().fill_(self.config.noise_variance)
        self.reset(torch.zeros(out_features, in_features), torch.zeros(out_features))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: HeadConfig | None = None,
        *,
        feature_mean: Tensor | None = None,
        feature_scale: Tensor | None = None,
        target_scale: Tensor | None = None,
    ) -> BayesianHead:
        """A head whose predicted mean equals ``linear`` for every prior variance.

        Args:
            linear: The pre-trained last layer.
            config: See ``HeadConfig``.
            feature_mean: Mean of the features in pre-training, ``(d,)``; the head learns on centred features.
            feature_scale: Scale of the features in pre-training, ``(d,)``, positive.
            target_scale: Scale of each target, ``(o,)``, positive; the config's variances are in units of its square.
        """
        head = cls(linear.in_features, linear.out_features, config).to(linear.weight.device)
        bias = linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
        head.reset(
            linear.weight, bias, feature_mean=feature_mean, feature_scale=feature_scale, target_scale=target_scale
        )
        return head

    def reset(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        feature_mean: Tensor | None = None,
        feature_scale: Tensor | None = None,
        target_scale: Tensor | None = None,
    ) -> None:
        """Return to the prior that reproduces ``weight @ h + bias``; what was learned is forgotten."""
        weight = _finite("weight", weight, (self.out_features, self.in_features), self.mean)
        bias = _finite("bias", bias, (self.out_features,), self.mean)
        centre = torch.zeros_like(self.feature_mean)
        if feature_mean is not None:
            centre = _finite("feature_mean", feature_mean, (self.in_features,), self.mean)
        scale = _positive("feature_scale", feature_scale, self.feature_scale)
        outputs = _positive("target_scale", target_scale, self.target_scale)
        if self.rule.link == "softmax" and not bool((outputs == 1.0).all()):
            raise ValueError("with the softmax link the targets are probabilities; leave target_scale at 1")
        bias = bias + weight @ centre
        means = prior_means(weight * scale / outputs.unsqueeze(-1), bias / outputs, self.spec.shapes)
        self.mean.copy_(torch.cat([mean.flatten() for mean in means]))
        for block, prior in zip(self._cov(), self._prior_cov(), strict=True):
            block.copy_(prior)
        self.feature_mean.copy_(centre)
        self.feature_scale.copy_(scale)
        self.target_scale.copy_(outputs)
        self.labels_seen.zero_()

    def set_noise(self, noise: float | Tensor) -> None:
        """Set the label noise: one variance for all outputs, or a covariance ``(o, o)``, in squared target units."""
        noise_cov = torch.as_tensor(noise, dtype=torch.float64, device=self.mean.device)
        if noise_cov.ndim == 0:
            noise_cov = noise_cov * torch.eye(self.out_features, dtype=torch.float64, device=self.mean.device)
        if noise_cov.shape != self.noise_cov.shape:
            raise ValueError(
                f"the noise covariance has shape {tuple(noise_cov.shape)}; expected a number or "
                f"{tuple(self.noise_cov.shape)}"
            )
        if not bool(torch.isfinite(noise_cov).all()):
            raise ValueError(f"the noise covariance is not finite: {noise_cov.tolist()}")
        if not torch.equal(noise_cov, noise_cov.mT):
            raise ValueError("the noise covariance is not symmetric; pass (C + C.T) / 2 if rounding is to blame")
        smallest = float(torch.linalg.eigvalsh(noise_cov)[0])
        # The eigenvalues of a singular covariance come out negative by rounding.
        if not smallest >= -1e-12 * float(noise_cov.diagonal().max()):
            raise ValueError(f"the noise covariance has the eigenvalue {smallest:.3g}; variances are not negative")
        self.noise_cov.copy_(noise_cov / self._target_square())

    @property
    def state(self) -> HeadState:
        """The posterior; shares memory with the module."""
        return HeadState(self.spec, self.mean, self._cov())

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Predicted mean of the target, ``(N, o)``, for features ``(N, d)``; class probabilities with softmax."""
        if len(self.spec.shapes) > 2:
            logits = functional.predict_logits(self.state, self.standardise(features)).mean
        else:
            logits = view_mean(self.view(), self.standardise(features))
        return torch.softmax(logits, dim=-1) if self.rule.link == "softmax" else logits * self.target_scale

    @torch.no_grad()
    def predict(self, features: Tensor) -> Prediction:
        """Distribution of the target for each row of ``features``, ``(N, d)``."""
        logits = functional.predict_logits(self.state, self.standardise(features))
        if self.rule.link == "softmax":
            moments = softmax_moments(logits)
            return Prediction(moments.mean, moments.cov, softmax_jacobian(moments.mean))
        square = self._target_square()
        aleatoric = (self.noise_cov * square).expand_as(logits.cov)
        return Prediction(logits.mean * self.target_scale, logits.cov * square, aleatoric)

    @torch.no_grad()
    def predict_logits(self, features: Tensor) -> Gaussian:
        """Distribution of the last layer's output for each row, before the link and in units of ``target_scale``."""
        return functional.predict_logits(self.state, self.standardise(features))

    @torch.no_grad()
    def view(self) -> ActingView:
        """What acting needs, as a copy; ``standardise`` its features and multiply its mean by ``target_scale``.

        The copy is made once after each change of the posterior and swapped in by one assignment, so that whoever acts
        in another thread never sees half an update.
        """
        version = (self.mean.data_ptr(), self.mean._version, *(block._version for block in self._cov()))
        published = self._published
        if published is None or published[0] != version:
            published = self._published = (version, acting_view(self.state))
        return published[1]

    @torch.no_grad()
    def increment(self, features: Tensor, target: Tensor) -> Increment:
        """What one joint update on rows ``(B, d)`` with targets ``(B, o)``, B up to 32, would add to the posterior.

        Raises:
            ValueError: Wrong shape, or not finite.
            UpdateError: The result would not be a proper posterior.
        """
        features, target = self._checked(features, target)
        if len(features) > functional.MAX_JOINT_ROWS:
            raise ValueError(
                f"{len(features)} rows in one joint update; at most {functional.MAX_JOINT_ROWS} (update() splits "
                "longer batches into successive blocks)"
            )
        return functional.increment(self.state, features, target, self.rule, self.noise_cov)

    @torch.no_grad()
    def apply_increment(self, step: Increment) -> None:
        """Add an increment to the posterior, in place."""
        functional.apply(self.state, step)
        self.labels_seen += step.info.labels // self.out_features

    @torch.no_grad()
    def update(self, features: Tensor, target: Tensor) -> UpdateInfo:
        """Condition the posterior on labelled rows; either completes or changes nothing.

        Up to 32 rows are one joint update; longer batches are successive blocks of 32, computed on a copy.

        Args:
            features: Output of the encoder, ``(B, d)``.
            target: What the outputs should have been, ``(B, o)``; one-hot rows or distributions with softmax.

        Returns:
            The record of the update in units of ``target_scale``, over all blocks where there are several.
        """
        if len(features) <= functional.MAX_JOINT_ROWS:
            step = self.increment(features, target)
            self.apply_increment(step)
            return step.info
        features, target = self._checked(features, target)
        copy = self.state.clone()
        size = functional.MAX_JOINT_ROWS
        records: list[UpdateInfo] = []
        for rows, labels in zip(features.split(size), target.split(size), strict=True):
            step = functional.increment(copy, rows, labels, self.rule, self.noise_cov)
            functional.apply(copy, step)
            records.append(step.info)
        functional.overwrite(self.state, copy)
        self.labels_seen += len(features)
        return functional.merge(records)

    def standardise(self, features: Tensor) -> Tensor:
        """Features ``(..., d)`` in float64, centred and scaled as at pre-training."""
        if features.ndim == 0 or features.shape[-1] != self.in_features:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (rows, {self.in_features})")
        return (features.to(self.mean) - self.feature_mean) / self.feature_scale

    def _target_square(self) -> Tensor:
        """What a covariance of the targets is divided by inside, ``(o, o)``."""
        return self.target_scale.unsqueeze(-1) * self.target_scale

    def _cov(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers[f"cov_{depth}"] for depth in range(len(self.spec.shapes)))  # type: ignore[misc]

    def _prior_cov(self) -> tuple[Tensor, ...]:
        return prior_cov(
            self.spec.shapes,
            self.spec.structure,
            hidden_variance=self.config.hidden_variance,
            last_variance=self.config.last_variance,
            rho=self._rho,
            device=self._buffers["mean"].device if "mean" in self._buffers else None,  # type: ignore[union-attr]
        )

    def _checked(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised features and float64 targets, or an error that says what came and what was expected."""
        features, target = torch.as_tensor(features), torch.as_tensor(target)
        if features.ndim != 2 or features.shape[1] != self.in_features or len(features) == 0:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (rows >= 1, {self.in_features})")
        if target.shape != (len(features), self.out_features):
            raise ValueError(
                f"target has shape {tuple(target.shape)}; expected {(len(features), self.out_features)}, one row a "
                "row of features"
            )
        features, target = self.standardise(features), target.to(self.mean) / self.target_scale
        total = float(features.sum() + target.sum())
        if total - total != 0.0:
            raise ValueError("features or target hold NaN or infinity; leave rows without a label out of the update")
        if self.rule.link == "softmax" and (
            float(target.min()) < 0.0 or not torch.allclose(target.sum(-1), torch.ones_like(target[:, 0]))
        ):
            raise ValueError("with the softmax link each target row is one-hot or a distribution: >= 0, sum 1")
        return features, target

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BayesianHead:
        """Follow a change of device, but never of dtype: the posterior stays in float64."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = _moved(buffer, fn(buffer).device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if loaded is not None and buffer is not None and loaded.dtype != buffer.dtype:
                raise ValueError(
                    f"{prefix + name} is {loaded.dtype} in the file and {buffer.dtype} in the head; a posterior that "
                    "was cast has lost digits it needs, save it again without casting"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def _moved(buffer: Tensor, device: torch.device) -> Tensor:
    try:
        return buffer.to(device)
    except TypeError as error:
        raise TypeError(
            f"the device {device} has no float64, which the posterior needs; keep the model on the CPU (one update is "
            "bound by latency, not by arithmetic)"
        ) from error


def _positive(name: str, given: Tensor | None, like: Tensor) -> Tensor:
    """A positive vector like ``like``, ones if None."""
    if given is None:
        return torch.ones_like(like)
    scale = _finite(name, given, tuple(like.shape), like)
    if not bool((scale > 0).all()):
        raise ValueError(f"{name} must be positive everywhere; its smallest value is {float(scale.min())}")
    return scale


def _finite(name: str, given: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A finite tensor of this shape in the head's dtype and on its device."""
    value = given.detach().to(like)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
