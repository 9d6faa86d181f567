"""What a Bayesian head keeps: the buffers of a Gaussian posterior, their units and noise, and how they are kept whole.

It keeps its dtype (``HeadConfig.dtype``) whatever dtype the rest of the model has, changes as a whole or not at all,
and is copied, moved to another device and loaded like any module. What is learned and predicted with it is in
:mod:`kbt_rl.inference.head`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from kbt_rl.inference import revision
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.history import History
from kbt_rl.inference.interrupts import interrupts_deferred
from kbt_rl.inference.loading import check_dtypes, check_fits
from kbt_rl.inference.memory import Memory, prepare, prepare_rows
from kbt_rl.inference.noise import NoiseEstimate, NoiseModel
from kbt_rl.inference.output import RULES
from kbt_rl.inference.prior import prior_cov, prior_means
from kbt_rl.inference.state import HeadState


class Posterior(nn.Module):
    """Gaussian posterior over the weights of a small ReLU network, as the buffers of a module.

    Args:
        in_features: Number of features ``d``.
        out_features: Number of outputs ``o``.
        config: Depth, storage, output rule and prior.
    """

    keeps_dtype = True

    mean: Tensor
    noise_cov: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    target_scale: Tensor
    labels_seen: Tensor
    noise_start_cov: Tensor
    noise_labels: Tensor

    def __init__(self, in_features: int, out_features: int, config: HeadConfig | None = None) -> None:
        super().__init__()
        self.config = HeadConfig() if config is None else config
        self.in_features, self.out_features = in_features, out_features
        self.spec, self._rho = self.config.resolve(in_features, out_features)
        self.rule = RULES[self.config.rule]
        self._dtype: torch.dtype = getattr(torch, self.config.dtype)
        self._lock = threading.RLock()  # held while the posterior changes, and by whoever reads several parts of it
        self._bound: Memory | None = None
        self._history = History(self.config.history) if self.config.history else None
        self.register_buffer("mean", torch.zeros(sum(self.spec.sizes), dtype=self._dtype))
        prior = self._prior_cov()
        self._cov_names = tuple(f"cov_{index}" for index in range(len(prior)))
        for name, block in zip(self._cov_names, prior, strict=True):
            self.register_buffer(name, block)
        self.register_buffer("feature_mean", torch.zeros(in_features, dtype=torch.float64))
        self.register_buffer("feature_scale", torch.ones(in_features, dtype=torch.float64))
        self.register_buffer("target_scale", torch.ones(out_features, dtype=torch.float64))
        self.register_buffer("labels_seen", torch.zeros((), dtype=torch.int64))
        self.noise_model = NoiseModel.of(self.config, out_features)
        self.learns_noise = self.config.noise == "learned"
        self.register_buffer("noise_cov", self._configured_noise())
        if self.learns_noise:
            self.register_buffer("noise_start_cov", self.noise_cov.clone())
            self.register_buffer("noise_labels", torch.full((), self.config.noise_labels, dtype=torch.float64))
        prepare(self.spec.structure, len(self.spec.shapes), self.spec.plain_moments, self._dtype)
        self.reset(torch.zeros(out_features, in_features), torch.zeros(out_features))

    def reset(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        feature_mean: Tensor | None = None,
        feature_scale: Tensor | None = None,
        target_scale: Tensor | None = None,
    ) -> None:
        """Return to the prior that reproduces ``weight @ h + bias``; what was learned is forgotten.

        A noise that was set stays, in units of the target; one that was learned starts again from what was set, or from
        the configuration, whose variances are in units of ``target_scale`` squared.
        """
        weight = _finite("weight", weight, (self.out_features, self.in_features), self.feature_mean)
        bias = _finite("bias", bias, (self.out_features,), self.feature_mean)
        centre = torch.zeros_like(self.feature_mean)
        if feature_mean is not None:
            centre = _finite("feature_mean", feature_mean, (self.in_features,), self.feature_mean)
        scale = _positive("feature_scale", feature_scale, self.feature_scale)
        outputs = _positive("target_scale", target_scale, self.target_scale)
        if self.rule.link == "softmax" and not bool((outputs == 1.0).all()):
            raise ValueError("with the softmax link the targets are probabilities; leave target_scale at 1")
        bias = bias + weight @ centre
        means = prior_means(weight * scale / outputs.unsqueeze(-1), bias / outputs, self.spec.shapes)
        mean, priors = torch.cat([mean.flatten() for mean in means]), self._prior_cov()
        if not bool(torch.isfinite(mean).all()):
            raise ValueError("weight and bias are not finite in units of feature_scale and target_scale")
        start = self.noise_start_cov if self.learns_noise else self.noise_cov
        if not torch.equal(start, self._configured_noise()):  # it was set, for targets in their own units
            start = start * self._target_square() / (outputs.unsqueeze(-1) * outputs)
        with self._changing():
            self.mean.copy_(mean)
            for block, prior in zip(self._cov(), priors, strict=True):
                block.copy_(prior)
            self.feature_mean.copy_(centre)
            self.feature_scale.copy_(scale)
            self.target_scale.copy_(outputs)
            self.labels_seen.zero_()
            self.noise_cov.copy_(start)
            if self.learns_noise:
                self.noise_start_cov.copy_(start)
                self.noise_labels.fill_(self.config.noise_labels)

    def _configured_noise(self) -> Tensor:
        """Covariance of the label noise before one was set, ``(o, o)``."""
        variance = self.config.noise_start if self.learns_noise else self.config.noise_variance
        return torch.diag(torch.full_like(self.target_scale, variance))

    def set_noise(self, noise: float | Tensor) -> None:
        """Set the label noise: one variance for all outputs, or a covariance ``(o, o)``, in squared target units.

        Where the noise is learned, learning starts again from here, with the trust of ``HeadConfig.noise_labels``.

        Raises:
            ValueError: Not symmetric, not finite, a negative variance, or a variance of 0 where it must be positive.
        """
        noise_cov = noise.detach() if isinstance(noise, Tensor) else torch.from_numpy(np.array(noise))
        if noise_cov.is_complex():
            raise ValueError("the noise covariance is complex; expected real numbers")
        noise_cov = noise_cov.to(self.mean.device, torch.float64)
        if noise_cov.ndim == 0:
            noise_cov = noise_cov * torch.eye(self.out_features, dtype=torch.float64, device=self.mean.device)
        if noise_cov.shape != self.noise_cov.shape:
            raise ValueError(
                f"the noise covariance has shape {tuple(noise_cov.shape)}; expected a number or "
                f"{tuple(self.noise_cov.shape)}"
            )
        scaled = noise_cov / self._target_square()
        if not bool(torch.isfinite(scaled).all()):
            raise ValueError(
                f"the noise covariance is not finite, in units of target_scale: {noise_cov.tolist()} over "
                f"{self._target_square().tolist()}"
            )
        if not torch.equal(noise_cov, noise_cov.mT):
            raise ValueError("the noise covariance is not symmetric; pass (C + C.T) / 2 if rounding is to blame")
        smallest = float(torch.linalg.eigvalsh(noise_cov)[0])
        # The eigenvalues of a singular covariance come out negative by rounding.
        if not smallest >= -1e-12 * float(noise_cov.diagonal().max()):
            raise ValueError(f"the noise covariance has the eigenvalue {smallest:.3g}; variances are not negative")
        if self.noise_model is not None and not smallest > 0.0:
            raise ValueError(
                f"the noise covariance has the eigenvalue {smallest:.3g}; a noise that is learned, or that labels are "
                "weighed by, must be positive in every direction"
            )
        with self._changing():
            self.noise_cov.copy_(scaled)
            if self.learns_noise:
                self.noise_start_cov.copy_(scaled)
                self.noise_labels.fill_(self.config.noise_labels)

    def prepare_rows(self) -> None:
        """Load the machine code for joint updates of several rows, so that the first one need not wait for it.

        The first time on a machine it is compiled, for some 10 s. That for single rows is loaded with the head.
        """
        prepare_rows(self.spec.structure, len(self.spec.shapes), self.spec.plain_moments, self._dtype)

    @property
    def scales(self) -> tuple[float, float]:
        """What takes averaged variances and log densities into units of the target.

        The average over the outputs of the squared ``target_scale``, to multiply by, and the sum of its logarithms, to
        subtract.
        """
        outputs = self._memory().outputs.tolist()
        return sum(scale * scale for scale in outputs) / len(outputs), sum(map(math.log, outputs))

    @property
    def mean_square_scale(self) -> float:
        """The first of ``scales``."""
        return self.scales[0]

    @property
    def log_scale(self) -> float:
        """The second of ``scales``."""
        return self.scales[1]

    @property
    def state(self) -> HeadState:
        """The posterior; shares memory with the module."""
        return self._memory().state

    def reopen(self, fraction: float = 1.0, noise: NoiseEstimate | None = None) -> None:
        """Keep the means and move the covariance towards the prior's, by default all the way; see ``revision``.

        Args:
            fraction: How far, in (0, 1].
            noise: What a learned noise is put back to, a ``noise_estimate`` of before: labels that no longer fit the
                weights have raised it, and with too large a noise the opened weights would learn slowly.

        Raises:
            ValueError: The fraction is out of range, or the noise of this head is not learned.
        """
        if noise is not None and not self.learns_noise:
            raise ValueError("the noise of this head is not learned, so there is none to put back; see set_noise")
        with self._changing():
            revision.reopen(self.state, self._prior_cov(), fraction)
            if noise is not None:
                self._memory().keep(noise)
                increment_version(self.noise_cov)

    @property
    def noise_estimate(self) -> NoiseEstimate | None:
        """What is thought of a noise that is learned, as a copy in units of ``target_scale``; None for a known one."""
        if not self.learns_noise:
            return None
        with self._lock:
            belief = self._memory().belief()
        assert belief is not None
        return belief.estimate

    def forget(self, factor: float) -> None:
        """Keep the means and divide the covariance by a factor in (0, 1]; see ``revision``."""
        with self._lock:
            revision.forget(self.state, factor)

    def add_process_noise(self, scale: float) -> None:
        """Keep the means and add ``scale`` times the prior's covariance; see ``revision.diffuse``."""
        with self._lock:
            revision.diffuse(self.state, self._prior_cov(), scale)

    def standardise(self, features: Tensor) -> Tensor:
        """Features ``(..., d)`` in float64, centred and scaled as at pre-training."""
        if features.ndim == 0 or features.shape[-1] != self.in_features:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (rows, {self.in_features})")
        return (features.to(self.feature_mean) - self.feature_mean) / self.feature_scale

    def _target_square(self) -> Tensor:
        """What a covariance of the targets is divided by inside, ``(o, o)``."""
        return self.target_scale.unsqueeze(-1) * self.target_scale

    def _cov(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers[name] for name in self._cov_names)  # type: ignore[misc]

    def _prior_cov(self) -> tuple[Tensor, ...]:
        cov = prior_cov(
            self.spec.shapes,
            self.spec.structure,
            hidden_variance=self.config.hidden_variance,
            last_variance=self.config.last_variance,
            rho=self._rho,
            device=self._buffers["mean"].device if "mean" in self._buffers else None,  # type: ignore[union-attr]
        )
        return tuple(block.to(self._dtype) for block in cov)

    def _memory(self) -> Memory:
        """The buffers as the head computes with them; made anew when one of them was replaced or moved."""
        memory = self._bound
        if memory is None or not memory.holds(tuple(self._buffers.values())):
            self._leave_inference_mode()
            recorded = self._history is not None
            memory = self._bound = Memory(
                self.spec, self._cov_names, self._buffers, self.rule, self.noise_model, recorded
            )
        return memory

    def _leave_inference_mode(self) -> None:
        """Copy what was made under ``torch.inference_mode()``: such a tensor has no version, and views go by that."""
        with torch.inference_mode(False):
            for name, buffer in self._buffers.items():
                if buffer is not None and buffer.is_inference():
                    self._buffers[name] = buffer.clone()

    def __getstate__(self) -> dict[str, Any]:
        # What is derived from the buffers is derived again from their copies, and a copy has a lock of its own.
        history = History(self.config.history) if self.config.history else None
        state = {**self.__dict__, "_bound": None, "_history": history}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.RLock()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """All of a change or, to other threads and to an interrupt, none of it."""
        with self._lock, interrupts_deferred():
            yield

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Posterior:
        """Follow a change of device, but never of dtype."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = _moved(buffer, fn(buffer).device)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over saved buffers, all or none.

        Raises:
            RuntimeError: They are of another architecture or dtype.
        """
        check_fits(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_dtypes(self, state_dict, prefix)
        with self._changing():
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
    """A finite tensor of this shape in the dtype of ``like`` and on its device."""
    if given.is_complex():
        raise ValueError(f"{name} is complex; expected real numbers")
    value = given.detach().to(like)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return value
