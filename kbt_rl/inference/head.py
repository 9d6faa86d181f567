"""The Bayesian head: a pre-trained linear layer turned into a Gaussian network that learns sample by sample.

``BayesianHead`` only holds the buffers of a posterior and converts at the border; the mathematics is in the pure
functions of this package. It keeps float64 whatever dtype the rest of the model has.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from kbt_rl.inference import compiled, revision
from kbt_rl.inference import update as functional
from kbt_rl.inference.acting import ActingView, acting_view, view_mean
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.history import History, Record, Undo
from kbt_rl.inference.memory import Memory, prepare
from kbt_rl.inference.moments import Gaussian, softmax_jacobian, softmax_moments
from kbt_rl.inference.noise import NoiseEstimate, NoiseModel
from kbt_rl.inference.output import RULES
from kbt_rl.inference.prior import prior_cov, prior_means
from kbt_rl.inference.update import HeadState, Increment, UpdateInfo

Array = npt.NDArray[Any]
# A version of the posterior, what acting needs of it, and the machine code that acts by it.
Published = tuple[tuple[HeadState, int], ActingView, compiled.RowActor | None]
# Rows that act one by one in machine code; more of them share a matrix product.
_FEW_ROWS = 16
# How far the sum of a target distribution, often float32, may be from 1.
_SUM_TOLERANCE = 1e-5


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

    One thread may learn while others predict: a prediction is that of one posterior, never of half an update. Two
    threads must not learn at the same time, and ``state`` and ``state_dict`` are the live memory.

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
    noise_start_cov: Tensor
    noise_labels: Tensor

    def __init__(self, in_features: int, out_features: int, config: HeadConfig | None = None) -> None:
        super().__init__()
        self.config = HeadConfig() if config is None else config
        self.in_features, self.out_features = in_features, out_features
        self.spec, self._rho = self.config.resolve(in_features, out_features)
        self.rule = RULES[self.config.rule]
        self._lock = threading.RLock()  # held while the posterior changes, and by whoever reads several parts of it
        self._bound: Memory | None = None
        self._history = History(self.config.history) if self.config.history else None
        self._published: Published | None = None
        self.register_buffer("mean", torch.zeros(sum(self.spec.sizes), dtype=torch.float64))
        prior = self._prior_cov()
        self._cov_names = tuple(f"cov_{index}" for index in range(len(prior)))
        for name, block in zip(self._cov_names, prior, strict=True):
            self.register_buffer(name, block)
        self.register_buffer("noise_cov", torch.zeros(out_features, out_features, dtype=torch.float64))
        self.register_buffer("feature_mean", torch.zeros(in_features, dtype=torch.float64))
        self.register_buffer("feature_scale", torch.ones(in_features, dtype=torch.float64))
        self.register_buffer("target_scale", torch.ones(out_features, dtype=torch.float64))
        self.register_buffer("labels_seen", torch.zeros((), dtype=torch.int64))
        self.noise_model = NoiseModel.of(self.config, out_features)
        self.learns_noise = self.config.noise == "learned"
        self.noise_cov.diagonal().fill_(self.config.noise_start if self.learns_noise else self.config.noise_variance)
        if self.learns_noise:
            self.register_buffer("noise_start_cov", self.noise_cov.clone())
            self.register_buffer("noise_labels", torch.full((), self.config.noise_labels, dtype=torch.float64))
        prepare(self.spec.structure, len(self.spec.shapes), self.spec.plain_moments)
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
        """Return to the prior that reproduces ``weight @ h + bias``; what was learned is forgotten.

        A noise that was set stays; one that was learned starts again from what was set, or from the configuration.
        """
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
        mean, priors = torch.cat([mean.flatten() for mean in means]), self._prior_cov()
        with self._changing():
            self.mean.copy_(mean)
            for block, prior in zip(self._cov(), priors, strict=True):
                block.copy_(prior)
            self.feature_mean.copy_(centre)
            self.feature_scale.copy_(scale)
            self.target_scale.copy_(outputs)
            self.labels_seen.zero_()
            if self.learns_noise:
                self.noise_cov.copy_(self.noise_start_cov)
                self.noise_labels.fill_(self.config.noise_labels)

    def set_noise(self, noise: float | Tensor) -> None:
        """Set the label noise: one variance for all outputs, or a covariance ``(o, o)``, in squared target units.

        Where the noise is learned, learning starts again from here, with the trust of ``HeadConfig.noise_labels``.

        Raises:
            ValueError: Not symmetric, not finite, a negative variance, or a variance of 0 where it must be positive.
        """
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
        if self.noise_model is not None and not smallest > 0.0:
            raise ValueError(
                f"the noise covariance has the eigenvalue {smallest:.3g}; a noise that is learned, or that labels are "
                "weighed by, must be positive in every direction"
            )
        scaled = noise_cov / self._target_square()
        with self._changing():
            self.noise_cov.copy_(scaled)
            if self.learns_noise:
                self.noise_start_cov.copy_(scaled)
                self.noise_labels.fill_(self.config.noise_labels)

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

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Predicted mean of the target, ``(N, o)``, for features ``(N, d)``; class probabilities with softmax."""
        logits = self._mean_logits(features)
        return torch.softmax(logits, dim=-1) if self.rule.link == "softmax" else logits * self.target_scale

    def _mean_logits(self, features: Tensor) -> Tensor:
        """Mean of the last layer's output, ``(N, o)``, by the shortest way."""
        if len(self.spec.shapes) > 2:
            return self.predict_logits(features).mean
        _, view, actor = self._publish()
        if actor is None or not 0 < len(features) <= _FEW_ROWS or features.shape[1:] != (self.in_features,):
            return view_mean(view, self.standardise(features))
        memory = self._memory()
        rows = memory.take(features).astype(np.float64, copy=False)
        return torch.from_numpy(actor(memory.centre, memory.scale, rows))

    @torch.no_grad()
    def predict(self, features: Tensor) -> Prediction:
        """Distribution of the target for each row of ``features``, ``(N, d)``."""
        with self._lock:
            logits, noise_cov = self.predict_logits(features), self.noise_cov.clone()
        if self.rule.link == "softmax":
            moments = softmax_moments(logits)
            return Prediction(moments.mean, moments.cov, softmax_jacobian(moments.mean))
        square = self._target_square()
        aleatoric = (noise_cov * square).expand_as(logits.cov)
        return Prediction(logits.mean * self.target_scale, logits.cov * square, aleatoric)

    @torch.no_grad()
    def predict_logits(self, features: Tensor) -> Gaussian:
        """Distribution of the last layer's output for each row, before the link and in units of ``target_scale``."""
        with self._lock:
            return functional.predict_logits(self.state, self.standardise(features))

    @torch.no_grad()
    def view(self) -> ActingView:
        """What acting needs, as a copy; ``standardise`` its features and multiply its mean by ``target_scale``.

        The copy is made once after each change of the posterior, while none is under way, and swapped in by one
        assignment, so that whoever acts in another thread never sees half an update and mostly does not wait.
        """
        return self._publish()[1]

    def _acting_view(self) -> ActingView:
        """A view of the posterior as it is; a head that acts in another way than by its moments overrides this."""
        return acting_view(self.state)

    def _publish(self) -> Published:
        state = self._memory().state
        published = self._published
        if published is None or published[0] != (state, state.mean._version):
            with self._lock:
                version, view = (state, state.mean._version), self._acting_view()
                published = self._published = version, view, compiled.actor(view)
        return published

    def increment(self, features: Tensor | Array, target: Tensor | Array) -> Increment:
        """What one joint update on rows ``(B, d)`` with targets ``(B, o)``, B up to 32, would add to the posterior.

        Raises:
            ValueError: Wrong shape, or not finite.
            UpdateError: The result would not be a proper posterior.
        """
        rows, labels = self._checked(features, target)
        if len(rows) > functional.MAX_JOINT_ROWS:
            raise ValueError(
                f"{len(rows)} rows in one joint update; at most {functional.MAX_JOINT_ROWS} (update() splits "
                "longer batches into successive blocks)"
            )
        memory = self._memory()
        return functional.increment(
            memory.state, torch.as_tensor(rows), torch.as_tensor(labels), self.rule, memory.noise_cov, memory.belief()
        )

    def apply_increment(self, step: Increment) -> None:
        """Add an increment to the posterior, in place, and take over what it makes of the noise."""
        memory, rows = self._memory(), step.info.labels // self.out_features
        before = self._before()
        with self._changing():
            functional.apply(memory.state, step)
            memory.keep(step.noise)
            memory.labels_seen += rows
            self._remember([step], before, rows)

    def update(self, features: Tensor | Array, target: Tensor | Array) -> UpdateInfo:
        """Condition the posterior on labelled rows; either completes or changes nothing.

        Up to 32 rows are one joint update; longer batches are successive blocks of 32, computed on a copy.

        Args:
            features: Output of the encoder, ``(B, d)``.
            target: What the outputs should have been, ``(B, o)``; one-hot rows or distributions with softmax.

        Returns:
            The record of the update in units of ``target_scale``, over all blocks where there are several.
        """
        memory = self._memory()
        with self._lock:
            done = memory.learn(features, target)
        if done is not None:
            return done
        all_rows, all_labels = self._checked(features, target)
        count, before = len(all_rows), self._before()
        engine = memory.state.engine if count == 1 else None
        if engine is not None and engine.propagates:
            belief = None if memory.noise_model is None else memory.belief()
            row = functional.row_step(engine, all_rows[0], all_labels, self.rule, memory.noise_cov, belief)
            with self._changing():
                engine.commit(row.mean_step, row.factor, row.signs)
                memory.keep(row.noise)
                memory.labels_seen += 1
                self._remember([row.as_increment()], before, 1)
            return row.info
        successive = count > functional.MAX_JOINT_ROWS
        state = memory.state.clone() if successive else memory.state
        steps: list[Increment] = []
        noise_cov, belief = memory.noise_cov, memory.belief()
        blocks = (torch.as_tensor(values).split(functional.MAX_JOINT_ROWS) for values in (all_rows, all_labels))
        for rows, labels in zip(*blocks, strict=True):
            step = functional.increment(state, rows, labels, self.rule, noise_cov, belief)
            if successive:
                functional.apply(state, step)
            steps.append(step)
            if belief is not None and step.noise is not None:  # the next block knows what this one has learned
                belief = belief._replace(estimate=step.noise)
                noise_cov = torch.from_numpy(step.noise.cov).to(noise_cov)
        info = functional.merge([step.info for step in steps]) if successive else steps[0].info
        with self._changing():
            if successive:
                functional.overwrite(memory.state, state)
            else:
                functional.apply(state, steps[0])
            memory.keep(None if belief is None else belief.estimate)
            memory.labels_seen += count
            self._remember(steps, before, count)
        return info

    def rollback(self, n: int = 1) -> int:
        """Take back the last ``n`` updates: all of them, or, with an error, none.

        An update is a call of ``update`` or ``apply_increment``, whatever its rows. The posterior, a learned noise and
        ``labels_seen`` become what they were before, the first to rounding. What a head remembers is its own:
        ``HeadConfig(history=...)`` says how much, and it starts from nothing in a copy, after ``load_state_dict``, and
        after anything else that changes the posterior or the noise, such as ``reopen`` and ``set_noise``.

        Args:
            n: Updates to undo, 1 to ``undoable``.

        Returns:
            The labelled rows that these updates had used.

        Raises:
            TypeError: ``n`` is no whole number.
            ValueError: Fewer updates are kept.
            UpdateError: What is left would not be a proper posterior.
        """
        undo = self.plan_rollback(n)
        self.apply_rollback(undo)
        return undo.rows

    @property
    def undoable(self) -> int:
        """How many updates ``rollback`` could take back now."""
        return 0 if self._history is None else self._history.current(self._memory())

    def plan_rollback(self, n: int = 1) -> Undo:
        """What ``rollback`` would leave, for ``apply_rollback``; everything that can fail, and changes nothing."""
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"rollback takes a number of updates; got {n!r}")
        if self._history is None:
            raise ValueError(f"rollback({n}) on a head that keeps no updates; make it with HeadConfig(history=...)")
        return self._history.plan(self._memory(), n)

    def apply_rollback(self, undo: Undo) -> None:
        """Take over what ``plan_rollback`` has found; nothing must have changed the posterior in between."""
        memory = self._memory()
        assert self._history is not None
        with self._changing():
            functional.overwrite(memory.state, undo.state)
            memory.keep(undo.noise)
            memory.labels_seen -= undo.rows
            # Views go by the version of the mean. Once more after the covariance, for those in another thread.
            increment_version(memory.state.mean)
            self._history.drop(memory, undo.updates)

    def _before(self) -> NoiseEstimate | None:
        """What the history has to know in front of an update; nothing without a history."""
        if self._history is None:
            return None
        memory = self._memory()
        self._history.current(memory)
        belief = memory.belief()
        return None if belief is None else belief.estimate

    def _remember(self, steps: list[Increment], before: NoiseEstimate | None, rows: int) -> None:
        """Keep an update for ``rollback``."""
        if self._history is not None:
            self._history.add(self._memory(), Record(steps, before, rows))

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
        return (features.to(self.mean) - self.feature_mean) / self.feature_scale

    def _target_square(self) -> Tensor:
        """What a covariance of the targets is divided by inside, ``(o, o)``."""
        return self.target_scale.unsqueeze(-1) * self.target_scale

    def _cov(self) -> tuple[Tensor, ...]:
        return tuple(self._buffers[name] for name in self._cov_names)  # type: ignore[misc]

    def _prior_cov(self) -> tuple[Tensor, ...]:
        return prior_cov(
            self.spec.shapes,
            self.spec.structure,
            hidden_variance=self.config.hidden_variance,
            last_variance=self.config.last_variance,
            rho=self._rho,
            device=self._buffers["mean"].device if "mean" in self._buffers else None,  # type: ignore[union-attr]
        )

    def _checked(self, features: Tensor | Array, target: Tensor | Array) -> tuple[Any, Any]:
        """Features and target in the head's own units, or an error that says what came and what was expected.

        On the CPU they are NumPy arrays, whose operations cost less per call than PyTorch's; elsewhere tensors.
        """
        memory = self._memory()
        features, target = memory.take(features), memory.take(target)
        if features.ndim != 2 or features.shape[1] != self.in_features or len(features) == 0:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (rows >= 1, {self.in_features})")
        if target.shape != (len(features), self.out_features):
            raise ValueError(
                f"target has shape {tuple(target.shape)}; expected {(len(features), self.out_features)}, one row a "
                "row of features"
            )
        features, target = (features - memory.centre) / memory.scale, target / memory.outputs
        if not memory.finite(features, target):
            raise ValueError("features or target hold NaN or infinity; leave rows without a label out of the update")
        if self.rule.link == "softmax" and not (
            float(target.min()) >= 0.0 and float(abs(target.sum(-1) - 1.0).max()) < _SUM_TOLERANCE
        ):
            raise ValueError("with the softmax link each target row is one-hot or a distribution: >= 0, sum 1")
        return features, target

    def _memory(self) -> Memory:
        """The buffers as ``_checked`` and ``update`` use them; made anew when one of them was replaced."""
        memory, buffers = self._bound, tuple(self._buffers.values())
        if memory is None or not all(map(is_, memory.buffers, buffers)):
            recorded = self._history is not None
            memory = self._bound = Memory(
                self.spec, self._cov_names, self._buffers, self.rule, self.noise_model, recorded
            )
        return memory

    def __getstate__(self) -> dict[str, Any]:
        # What is derived from the buffers is derived again from their copies, and a copy has a lock of its own.
        history = History(self.config.history) if self.config.history else None
        state = {**self.__dict__, "_bound": None, "_published": None, "_history": history}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.RLock()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """All of a change or, to other threads and to an interrupt, none of it."""
        with self._lock, functional.interrupts_deferred():
            yield

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
    """A finite tensor of this shape in the head's dtype and on its device."""
    value = given.detach().to(like)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinity")
    return value
