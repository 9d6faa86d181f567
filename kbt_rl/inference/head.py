"""The Bayesian head: a pre-trained linear layer turned into a Gaussian network that learns sample by sample.

It converts at the border, between the caller's units and those of its posterior (its base class); the mathematics is in
``network``. ``planned`` serves ``HeadBatch`` too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from kbt_rl.inference import checks, each_output, network
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.engines import registry as engines
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.forgetting import FORGETTING
from kbt_rl.inference.history import Record, Undo, moves_to_keep
from kbt_rl.inference.kind import Kind
from kbt_rl.inference.noise.registry import NoiseBelief
from kbt_rl.inference.posterior import Posterior
from kbt_rl.inference.prediction import Prediction
from kbt_rl.inference.transactions import replace_buffers, signals_deferred
from kbt_rl.inference.types import (
    Array,
    Gaussian,
    HeadState,
    Increment,
    NoiseEstimate,
    Rows,
    UpdateInfo,
    merge,
)

# Rows of one joint update: the ReLU covariance has (rows x width)^2 entries.
MAX_JOINT_ROWS = 32
# Rows whose mean machine code predicts one by one.
_FEW_ROWS = 16
Buffers = MutableMapping[str, Any]


class Labels(NamedTuple):
    """Rows to learn from, in the head's units: features ``(B, d)``, target and perhaps noise variances ``(B, o)``."""

    features: Tensor
    target: Tensor
    noise: Tensor | None


class Plan(NamedTuple):
    """What an update would do: all that can fail is behind it, and what is left is to copy.

    Attributes:
        buffers: Their values after it.
        steps: Its increments, one after another.
        info: The record.
        rows: Labelled rows used.
    """

    buffers: dict[str, Tensor]
    steps: list[Increment]
    info: UpdateInfo
    rows: int


class HeadKind(Kind):
    """What follows from a kind on the way of an update and of a prediction."""

    def state(self, buffers: Buffers) -> HeadState:
        """The posterior in these buffers; shares their memory."""
        return HeadState(self.spec, buffers["mean"], tuple([buffers[name] for name in self.cov_names]))

    def rows(self, buffers: Buffers, features: Rows) -> Tensor:
        """Features to learn from as a tensor ``(B, d)``."""
        rows = _tensor(features, buffers["mean"])
        if rows.ndim != 2 or rows.shape[1] != self.in_features or len(rows) == 0:
            raise ValueError(f"features have shape {tuple(rows.shape)}; expected (rows >= 1, {self.in_features})")
        return rows

    def in_units(self, buffers: Buffers, features: Rows) -> Tensor:
        """Features ``(..., d)`` in float64, centred, scaled and rotated as at pre-training."""
        rows: Tensor = _tensor(features, buffers["mean"])
        if rows.ndim == 0 or rows.shape[-1] != self.in_features:
            raise ValueError(f"features have shape {tuple(rows.shape)}; expected (rows, {self.in_features})")
        rows = (rows - buffers["feature_mean"]) / buffers["feature_scale"]
        if "feature_basis" in buffers:
            rows = rows @ buffers["feature_basis"]
        return rows

    def checked(self, buffers: Buffers, features: Rows, target: Rows, noise: Rows | None = None) -> Labels:
        """The rows that have a label, in the head's own units."""
        like = buffers["mean"]
        rows, labels = self.rows(buffers, features), _tensor(target, like)
        classes = self.rule.link == "softmax"
        if classes and labels.ndim == 1 and checks.is_whole(target):
            labels = checks.one_hot(labels, self.out_features)
        if labels.shape != (len(rows), self.out_features):
            whole = f", or whole numbers ({len(rows)},)" if classes else ""
            raise ValueError(
                f"target has shape {tuple(labels.shape)}; expected {(len(rows), self.out_features)}{whole}, one row a "
                "row of features"
            )
        variances = None if noise is None else checks.noise_rows(self.rule.link, _tensor(noise, like), labels)
        given = ~torch.isnan(labels).all(dim=1)
        if not bool(given.all()):
            rows, labels = rows[given], labels[given]
            variances = None if variances is None else variances[given]
        square = buffers["target_scale"].square()
        rows, labels = self.in_units(buffers, rows), labels / buffers["target_scale"]
        _check_size(rows, labels)
        if classes:
            labels = checks.distributions(labels, target)
        return Labels(rows, labels, None if variances is None else variances / square)

    @property
    def propagate(self) -> network.Propagation:
        """Distribution of the outputs of this head's layers."""
        return network.PROPAGATIONS[self.config.propagation]

    @property
    def one_by_one(self) -> bool:
        """Whether rows are learned one after another, which for a single layer with known noise is the joint update."""
        plain = self.noise_model is None and self.config.rule == "measure"
        return len(self.spec.shapes) == 1 and plain and self.spec.feature_variance == 0.0

    def planned(self, buffers: Buffers, labels: Labels, propagate: network.Propagation | None = None) -> Plan:
        """What an update on labelled rows would do; changes nothing.

        Up to 32 rows are one joint update, more are successive blocks of 32.
        """
        propagate = self.propagate if propagate is None else propagate
        state, noise_cov = self.state(buffers), buffers["noise_cov"]
        belief = self._belief(buffers)
        each = self.conditions_each(noise_cov, belief)
        size = 1 if each or self.one_by_one else MAX_JOINT_ROWS
        count, weights = len(labels.features), _output_weights(buffers["target_scale"])
        steps: list[Increment] = []
        for start in range(0, count, size):
            block = slice(start, start + size)
            rows, target = labels.features[block], labels.target[block]
            own = None if labels.noise is None else labels.noise[block]
            if own is not None and belief is not None:
                raise ValueError("a noise of each label is for heads whose noise is known and Gaussian")
            if each:
                noise = noise_cov.diagonal() if own is None else own[0]
                active = self.config.active_probability
                step = each_output.increment(state, rows, target, self.rule, noise, belief, weights, active)
            else:
                noise = noise_cov if own is None else torch.diag_embed(own)
                step = network.increment(state, rows, target, self.rule, noise, belief, weights, propagate)
            state = network.apply(state, step)
            if count > size and not self.config.history:  # the moves of all rows would take many times the posterior
                step = step._replace(mean_step=step.mean_step[:0], moves=None)
            steps.append(step)
            if belief is not None and step.noise is not None:  # the next block knows what this one has learned
                belief = NoiseBelief(belief.model, step.noise)
                noise_cov = torch.from_numpy(step.noise.cov).to(noise_cov)
        if steps and self.config.forgetting != "none":
            prior = HeadState(self.spec, buffers["prior_mean"], self.prior_cov(buffers))
            state = FORGETTING[self.config.forgetting](state, prior, self.config.forgetting_rate)
        return self.plan(buffers, state, steps, None if belief is None else belief.estimate)

    def plan(self, buffers: Buffers, state: HeadState, steps: list[Increment], noise: NoiseEstimate | None) -> Plan:
        """What the buffers will be after ``steps``, which have led to ``state``."""
        rows = sum([step.rows for step in steps])
        info = steps[0].info if len(steps) == 1 else merge([step.info for step in steps])
        new = {"mean": state.mean, "labels_seen": buffers["labels_seen"] + rows}
        new |= dict(zip(self.cov_names, state.cov, strict=True))
        if noise is not None and self.learns_noise:
            like = buffers["noise_cov"]
            new |= {
                "noise_cov": torch.from_numpy(noise.cov).to(like),
                "noise_labels": torch.as_tensor(noise.labels).to(like),
            }
        return Plan(new if steps else {}, steps, info, rows)

    def logits(
        self,
        buffers: Buffers,
        rows: Tensor,
        *,
        variances: bool = True,
        propagate: network.Propagation | None = None,
    ) -> Gaussian:
        """Distribution of the outputs for rows ``(N, d)`` in the head's own units, each on its own.

        Returns:
            Mean ``(N, o)``, and the covariance ``(N, o, o)``, or variances ``(N, o)`` where outputs are independent; in
            units of the target's scale.
        """
        state = self.state(buffers)
        structure = STRUCTURES[self.spec.structure]
        if not (structure.independent_outputs and len(self.spec.shapes) == 1 and self.spec.feature_variance == 0.0):
            return network.predict_logits(state, rows, self.propagate if propagate is None else propagate)
        inputs = network.augment(rows)
        mean = inputs @ network.weights_of(state)[0].mT
        if not variances:
            return Gaussian(mean, torch.zeros_like(mean))
        own = structure.output_variances(state, inputs)
        if self.spec.in_noise_units:
            root = own.sqrt()
            return Gaussian(mean, root.unsqueeze(-1) * buffers["noise_cov"] * root.unsqueeze(-2))
        return Gaussian(mean, own)

    def _belief(self, buffers: Buffers) -> NoiseBelief | None:
        """What is thought of the noise, as a copy; None where it is known and Gaussian."""
        if self.noise_model is None:
            return None
        labels = buffers["noise_labels"].cpu().numpy().copy() if self.learns_noise else math.inf
        return NoiseBelief(self.noise_model, NoiseEstimate(buffers["noise_cov"].cpu().numpy().copy(), labels))

    def conditions_each(self, noise_cov: Tensor, belief: NoiseBelief | None) -> bool:
        """Whether each output of this head is conditioned on its own."""
        spec, rule = self.spec, self.rule
        if not STRUCTURES[spec.structure].independent_outputs or len(spec.shapes) > 1 or spec.feature_variance != 0.0:
            return False
        if spec.structure == "shared":
            return True
        if belief is not None or not rule.has_each:
            return False
        return rule.link == "softmax" or bool(torch.equal(noise_cov.diagonal().diag(), noise_cov))


class BayesianHead(Posterior):
    """Gaussian posterior over the weights of a small ReLU network that starts as a pre-trained linear layer.

    Threads may learn and predict at the same time: they wait for each other. ``state`` and ``state_dict`` are the live
    memory. As a layer of a network it returns the mean of its outputs, logits with the softmax link, without gradient.

    Args:
        in_features: Number of features ``d``.
        out_features: Number of outputs ``o``.
        config: Depth, storage, output rule and prior.

    Example:
        >>> head = BayesianHead.from_linear(nn.Linear(16, 1), HeadConfig(noise_variance=1e-3))
        >>> info = head.update(torch.randn(1, 16), torch.zeros(1, 1))
        >>> mean, epistemic, aleatoric = head.predict(torch.randn(5, 16))
    """

    kind: HeadKind

    def __init__(self, in_features: int, out_features: int, config: HeadConfig | None = None) -> None:
        super().__init__(HeadKind.of(in_features, out_features, HeadConfig() if config is None else config))
        self._engine = engines.engine_for(self.kind)
        self._loss, self._warned = 1.0, False  # of labels, in units of guessing

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        config: HeadConfig | None = None,
        *,
        feature_mean: Tensor | None = None,
        feature_scale: Tensor | None = None,
        feature_basis: Tensor | None = None,
        target_scale: Tensor | None = None,
    ) -> BayesianHead:
        """A head whose predicted mean equals ``linear`` for every prior variance.

        Args:
            linear: The pre-trained last layer.
            config: See ``HeadConfig``.
            feature_mean: Mean of the features in pre-training, ``(d,)``; the head learns on centred features.
            feature_scale: Scale of the features in pre-training, ``(d,)``, positive.
            feature_basis: Eigenvectors of the scaled features' covariance, one a column, ``(d, d)``, for the structure
                ``rotated``.
            target_scale: Scale of each target, ``(o,)``, positive; the config's variances are in units of its square.
        """
        head = cls(linear.in_features, linear.out_features, config).to(linear.weight.device)
        bias = linear.bias if linear.bias is not None else linear.weight.new_zeros(linear.out_features)
        head.reset(
            linear.weight,
            bias,
            feature_mean=feature_mean,
            feature_scale=feature_scale,
            feature_basis=feature_basis,
            target_scale=target_scale,
        )
        return head

    @torch.no_grad()
    def forward(self, features: Rows) -> Tensor:
        """Mean of the outputs, ``(..., o)``, for features ``(..., d)``, in the features' floating dtype.

        With the softmax link these are logits, so that a head can take the place of a model's last layer.
        """
        like = features.dtype if isinstance(features, Tensor) and features.is_floating_point() else torch.float64
        return self.mean_outputs(features).to(like)

    @torch.no_grad()
    def mean_outputs(self, features: Rows) -> Tensor:
        """``forward`` in float64, with a row for each row of features."""
        features = features if isinstance(features, Tensor) else checks.as_array(features)
        lead = features.shape[:-1]
        with self._lock:
            found = self._fast_mean(features)
            if found is None:
                rows = self.kind.in_units(self._buffers, features).reshape(-1, self.in_features)
                found = self.kind.logits(self._buffers, rows, variances=False, propagate=self._propagation()).mean
            return found.view(*lead, self.out_features) * self.target_scale

    def _propagation(self) -> network.Propagation:
        """Distribution of the outputs; a head of another network overrides this."""
        return self.kind.propagate

    def _fast_mean(self, features: Rows) -> Tensor | None:
        """By machine code, for a few rows: many share a matrix product."""
        if self._engine is None or features.ndim != 2 or not 0 < len(features) <= _FEW_ROWS:
            return None
        found = self._engine.predict(self._buffers, features, False)
        return None if found is None else found.mean

    def predict(self, features: Rows, *, moderated: bool = False) -> Prediction:
        """Distribution of the target for each row of ``features``, ``(N, d)``.

        Args:
            features: Output of the encoder.
            moderated: With the softmax link, whether the probabilities are less sure where the weights are: all logits
                of a row are divided by ``sqrt(1 + pi/8 sum_k p_k s_k)`` (MacKay 1992, with one factor for all classes).
        """
        with self._lock, torch.no_grad():
            logits = self._logits(features)
            scale, noise = self.target_scale, self.noise_cov
            if self.rule.link == "softmax":
                mean = logits.mean
                if moderated:
                    own = logits.cov if logits.cov.ndim == 2 else logits.cov.diagonal(dim1=-2, dim2=-1)
                    spread = (torch.softmax(mean, dim=-1) * own).sum(-1, keepdim=True)
                    mean = mean / (1.0 + math.pi / 8.0 * spread).sqrt()
                return Prediction(torch.softmax(mean, dim=-1), logits.cov, "softmax", noise)
            square = scale.unsqueeze(-1) * scale
            cov = logits.cov * (scale.square() if logits.cov.ndim == 2 else square)
            return Prediction(logits.mean * scale, cov, "identity", noise * square)

    def predict_logits(self, features: Rows) -> Gaussian:
        """Distribution of the outputs for each row, before the link and in units of ``target_scale``: ``(N, o, o)``."""
        with self._lock, torch.no_grad():
            mean, cov = self._logits(features)
        return Gaussian(mean, torch.diag_embed(cov) if cov.ndim == 2 else cov)

    def epistemic_variance(self, features: Rows) -> Tensor:
        """Variance of each output from the weights, ``(N, o)``, in units of ``target_scale`` squared; of logits too."""
        with self._lock, torch.no_grad():
            cov = self._logits(features).cov
        return cov if cov.ndim == 2 else cov.diagonal(dim1=-2, dim2=-1)

    def predict_each(self, features: Rows) -> tuple[Array, Array]:
        """Mean and epistemic variance of each output, arrays ``(N, o)`` in units of ``target_scale``; of logits too."""
        with self._lock, torch.no_grad():
            mean, cov = self._logits(features)
        own = cov if cov.ndim == 2 else cov.diagonal(dim1=-2, dim2=-1)
        return mean.cpu().numpy(), own.cpu().numpy()

    def _logits(self, features: Rows) -> Gaussian:
        features = features if isinstance(features, Tensor) else checks.as_array(features)
        if self._engine is not None and features.ndim == 2 and len(features) > 0:
            found = self._engine.predict(self._buffers, features)
            if found is not None:
                return found
        rows = self.kind.in_units(self._buffers, features)
        if rows.ndim != 2:
            raise ValueError(f"features have shape {tuple(rows.shape)}; expected (rows, {self.in_features})")
        return self.kind.logits(self._buffers, rows, propagate=self._propagation())

    @torch.no_grad()
    def increment(self, features: Rows, target: Rows, noise: Rows | None = None) -> Increment:
        """What one update on rows ``(B, d)`` with targets ``(B, o)``, B up to 32, would add to the posterior.

        For a single layer with independent outputs it is one row.

        Raises:
            ValueError: Wrong shape, or not finite.
            UpdateError: The result would not be a proper posterior.
        """
        with self._lock:
            labels = self.kind.checked(self._buffers, features, target, noise)
            plan = self.kind.planned(self._buffers, labels, self._propagation())
        if len(plan.steps) != 1 or self.config.forgetting != "none":
            raise ValueError(
                f"{plan.rows} labelled rows make {len(plan.steps)} increments of this head, each of which starts where "
                f"the one before ends; pass 1 to {MAX_JOINT_ROWS} that are learned jointly, or use update()"
            )
        return plan.steps[0]

    @torch.no_grad()
    def apply_increment(self, step: Increment) -> None:
        """Add an increment to the posterior, in place, and take over what it makes of the noise.

        It must have been computed for the posterior as it is.

        Raises:
            ValueError: It is of a head with other weights.
        """
        if step.mean_step.shape != self.mean.shape:
            raise ValueError(
                f"the increment has a step of shape {tuple(step.mean_step.shape)}; expected {tuple(self.mean.shape)}: "
                "it is of another head"
            )
        with self._lock:
            state = network.apply(self.kind.state(self._buffers), step)
            self._commit(self.kind.plan(self._buffers, state, [step], step.noise))

    def update(self, features: Rows, target: Rows, noise: Rows | None = None) -> UpdateInfo:
        """Condition the posterior on labelled rows; either completes or changes nothing.

        Args:
            features: Output of the encoder, ``(B, d)``.
            target: What the outputs should have been, ``(B, o)``; an entry of NaN has no label. With the softmax link
                one-hot rows or distributions, or class indices ``(B,)`` of an integer type, -100 for none.
            noise: Variance of each label, ``(B,)`` or ``(B, o)``, in squared target units, where it is not that of
                ``set_noise``.

        Returns:
            The record of the update in units of ``target_scale``.

        Raises:
            ValueError: Wrong shape, or not finite.
            UpdateError: The result would not be a proper posterior.
        """
        with self._lock:
            if self._engine is not None and noise is None and self._history is None:
                done = self._engine.learn(self._buffers, features, target)
                if done is not None:
                    self._watch(done)
                    return done
            with torch.no_grad():
                labels = self.kind.checked(self._buffers, features, target, noise)
                plan = self.kind.planned(self._buffers, labels, self._propagation())
                self._commit(plan)
            self._watch(plan.info)
        return plan.info

    def _watch(self, info: UpdateInfo) -> None:
        """Warn once of a posterior that runs away: it predicts classes far worse than by chance, label after label."""
        if self.kind.rule.link != "softmax" or not info.labels:
            return
        chance = math.log(self.out_features)
        loss = -info.log_density * self.out_features / info.labels / chance
        self._loss += (min(loss, 100.0) - self._loss) / 32.0
        if self._loss > 10.0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"the posterior runs away: over the last labels its log loss is {self._loss:.0f} times that of "
                f"guessing (rule {self.config.rule!r}). Rules as printed, forgetting without bound ('fading', "
                "forget()) and too wide a prior do this; use rule='laplace', a smaller last_variance, and "
                "'process_noise' or 'towards_prior' to forget",
                RuntimeWarning,
                stacklevel=3,
            )

    def _commit(self, plan: Plan) -> None:
        record = None
        if self._history is not None and plan.rows:
            self._history.current(self._kept_buffers())
            names = ("mean", "noise_cov", "noise_labels") if self.learns_noise else ("mean",)
            before = {name: self._buffers[name].clone() for name in names}  # type: ignore[union-attr]
            forgets = self.config.forgetting != "none"
            record = Record(moves_to_keep(self.spec.structure, self._cov(), plan.steps, forgets), before, plan.rows)
        with signals_deferred():
            replace_buffers(self._buffers, plan.buffers)
            if record is not None and self._history is not None:
                self._history.add(self._kept_buffers(), record)

    def _kept_buffers(self) -> list[Tensor]:
        return [buffer for buffer in self._buffers.values() if buffer is not None]

    def rollback(self, n: int = 1) -> int:
        """Take back the last ``n`` updates: all of them or, with an error, none.

        An update is a call of ``update`` or ``apply_increment``, whatever its rows. The means, a learned noise and
        ``labels_seen`` become what they were before, the covariance to rounding. What a head remembers is its own:
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
        with self._lock:
            undo = self.plan_rollback(n)
            self.apply_rollback(undo)
        return undo.rows

    @property
    def undoable(self) -> int:
        """How many updates ``rollback`` could take back now."""
        return 0 if self._history is None else self._history.current(self._kept_buffers())

    def plan_rollback(self, n: int = 1) -> Undo:
        """What ``rollback`` would leave, for ``apply_rollback``; everything that can fail, and changes nothing."""
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"rollback takes a number of updates; got {n!r}")
        if self._history is None:
            raise ValueError(f"rollback({n}) on a head that keeps no updates; make it with HeadConfig(history=...)")
        with self._lock, torch.no_grad():
            return self._history.plan(self.state, self._kept_buffers(), n)

    def apply_rollback(self, undo: Undo) -> None:
        """Take over what ``plan_rollback`` has found; nothing must have changed the posterior in between."""
        assert self._history is not None
        new = undo.buffers | dict(zip(self.kind.cov_names, undo.state.cov, strict=True))
        with self._changing(), torch.no_grad():
            self._take_over(new | {"labels_seen": self.labels_seen - undo.rows})
            self._history.drop(self._kept_buffers(), undo.updates)

    def _fresh(self) -> dict[str, Any]:
        return {**super()._fresh(), "_engine": None}  # it is bound to these buffers

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine = engines.engine_for(self.kind)


def _output_weights(scale: Tensor) -> Tensor | None:
    """Squared scales of the outputs over their mean, ``(o,)``; None where they are equal."""
    if bool((scale == scale[0]).all()):
        return None
    return scale.square() / scale.square().mean()


def _tensor(values: Rows, like: Tensor) -> Tensor:
    """Real numbers as a float64 tensor on the device of ``like``, detached."""
    if isinstance(values, Tensor):
        if values.is_complex():
            raise TypeError(f"features or target hold {values.dtype}; expected real numbers")
        return values.detach().to(like)
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(
            "features or target: a masked array, whose mask would be lost; use NaN for no label, or fill it"
        )
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"features or target hold {array.dtype}; expected real numbers")
    return torch.from_numpy(np.array(array, dtype=np.float64, order="C")).to(like.device)


def _check_size(features: Tensor, labels: Tensor) -> None:
    """Raise an error for infinite or absurd numbers in rows that have a label."""
    known = torch.nan_to_num(labels, nan=0.0, posinf=math.inf, neginf=-math.inf)
    largest = float(features.abs().max() + known.abs().max()) if len(features) else 0.0
    if not math.isfinite(largest):
        raise ValueError("features or target hold NaN or infinity; leave rows without a label out of the update")
    if largest > network.LARGEST:
        raise UpdateError(
            f"features or target reach {largest:.3g} in the head's own units, and products of such numbers leave "
            "float64; the posterior is unchanged. Check features and target for huge values."
        )
