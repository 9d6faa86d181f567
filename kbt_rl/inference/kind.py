"""What of a head never changes, and the posterior that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.covariance.base import Cov
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.likelihoods.base import Likelihood
from kbt_rl.inference.likelihoods.registry import LIKELIHOODS
from kbt_rl.inference.noise.conjugate import ConjugateNoise
from kbt_rl.inference.noise.learned import NoiseModel
from kbt_rl.inference.noise.registry import NOISES
from kbt_rl.inference.prior import prior_layers
from kbt_rl.inference.types import HeadSpec, Tensors

# Prior variance of the weights of a softmax layer that starts from zeros, and else over the mean square of its weights.
LAYER_OF_ZEROS, OF_LAYER = 20.0, 0.2

Self = TypeVar("Self", bound="Kind")


@dataclass(frozen=True, eq=False)
class Kind:
    """What of a head never changes: its sizes and configuration, and what follows from them."""

    in_features: int
    out_features: int
    config: HeadConfig
    spec: HeadSpec
    rho: float
    rule: Likelihood
    noise_model: NoiseModel | ConjugateNoise | None
    cov_names: tuple[str, ...]

    @classmethod
    def of(cls: type[Self], in_features: int, out_features: int, config: HeadConfig) -> Self:
        """The kind of a head of these sizes.

        Raises:
            ValueError: A size is no whole number of at least 1, or the configuration does not fit them.
        """
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; a whole number, at least 1")
        spec, rho = config.resolve(in_features, out_features)
        noise_model = NOISES[config.noise](config, out_features, spec.in_noise_units)
        names = tuple(f"cov_{index}" for index in range(STRUCTURES[spec.structure].count(spec.shapes)))
        return cls(in_features, out_features, config, spec, rho, LIKELIHOODS[config.rule], noise_model, names)

    @property
    def learns_noise(self) -> bool:
        """Whether the noise is estimated from the labels."""
        return self.config.noise == "learned"

    @property
    def start_noise(self) -> float:
        """Variance of the label noise before one was set."""
        return self.config.noise_start if self.learns_noise else self.config.noise_variance

    @property
    def follows_layer(self) -> bool:
        """Whether the prior goes by the layer that the head starts from."""
        return self.config.last_variance is None and self.rule.link == "softmax"

    def last_variance(self, buffers: Mapping[str, Any] | None = None) -> float:
        """Prior variance of the last layer's weights."""
        if self.follows_layer:
            return LAYER_OF_ZEROS if buffers is None else float(buffers["last_variance"])
        return 1.0 if self.config.last_variance is None else self.config.last_variance

    def prior_cov(self, buffers: Mapping[str, Any] | None = None) -> Cov:
        """Covariance of the prior, by what ``buffers`` say of the noise and of the layer that the head starts from."""
        unit = self.start_noise
        layers = prior_layers(
            self.spec.shapes,
            hidden_variance=self.config.hidden_variance,
            last_variance=self.last_variance(buffers),
            rho=self.rho,
        )
        if self.spec.in_noise_units:
            unit = unit if buffers is None else float(buffers["noise_start_cov"].diagonal().mean())
            layers = [layer._replace(root=layer.root / unit**0.5) for layer in layers]
        return STRUCTURES[self.spec.structure].from_prior(layers)

    def variance_of(self, weight: Tensor) -> Tensor:
        """Prior variance of the weights of a softmax layer that starts from ``weight``, see ``HeadConfig``."""
        square = weight.square().mean()
        return torch.where(square > 0.0, OF_LAYER * square, LAYER_OF_ZEROS)

    def tensors(self) -> Tensors:
        """The buffers of a new head, whose weights are zero."""
        d, o, float64 = self.in_features, self.out_features, torch.float64
        noise = torch.diag(torch.full((o,), self.start_noise, dtype=float64))
        tensors: Tensors = {"mean": torch.zeros(sum(self.spec.sizes), dtype=float64)}
        tensors |= dict(zip(self.cov_names, self.prior_cov(), strict=True))
        tensors |= {"feature_mean": torch.zeros(d, dtype=float64), "feature_scale": torch.ones(d, dtype=float64)}
        if self.spec.structure == "rotated":
            tensors["feature_basis"] = torch.eye(d, dtype=float64)
        tensors |= {"target_scale": torch.ones(o, dtype=float64), "labels_seen": torch.zeros((), dtype=torch.int64)}
        tensors["prior_mean"] = torch.zeros_like(tensors["mean"])
        if self.follows_layer:
            tensors["last_variance"] = torch.tensor(LAYER_OF_ZEROS, dtype=float64)
        tensors["noise_cov"] = noise
        if self.learns_noise:
            tensors["noise_start_cov"] = noise.clone()
            tensors["noise_labels"] = self.start_labels()
        return tensors

    def start_labels(self) -> Tensor:
        """The labels' worth of trust that a learned noise starts with."""
        shape = (self.out_features,) if self.spec.in_noise_units else ()
        return torch.full(shape, self.config.noise_labels, dtype=torch.float64)
