"""The Bayesian head: a pre-trained linear layer turned into a Gaussian network that learns sample by sample.

``BayesianHead`` converts at the border, between the caller's units and those of its posterior (its base class); the
mathematics is in the pure functions of this package.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from kbt_rl.inference import compiled
from kbt_rl.inference import update as functional
from kbt_rl.inference.acting import ActingView, acting_view, view_mean
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.history import Before, Record, Undo
from kbt_rl.inference.memory import Memory
from kbt_rl.inference.moments import Gaussian, softmax_moments
from kbt_rl.inference.output import Link, are_distributions
from kbt_rl.inference.posterior import Posterior
from kbt_rl.inference.record import LARGEST, Increment, UpdateInfo, merge
from kbt_rl.inference.rows import row_step
from kbt_rl.inference.state import HeadState

Array = npt.NDArray[Any]
# A version of the posterior, what acting needs of it, and the machine code that acts by it.
Published = tuple[tuple[HeadState, int], ActingView, compiled.RowActor | None]
# Rows that act one by one in machine code; more of them share a matrix product.
_FEW_ROWS = 16


class Prediction(NamedTuple):
    """Distribution of the target for each row: mean ``(N, o)``, covariances ``(N, o, o)``.

    The predictive covariance is ``epistemic + aleatoric``: what the weights do not know, and what no weights can know.
    With the softmax link the mean is the class probabilities.
    """

    mean: Tensor
    epistemic: Tensor
    aleatoric: Tensor


def of_targets(logits: Gaussian, link: Link, noise_cov: Tensor, target_scale: Tensor) -> Prediction:
    """The distribution of the targets from that of the logits ``(N, o)``.

    Args:
        logits: In the head's units.
        link: Of the head's rule.
        noise_cov: ``(o, o)``, or one for each row, in the head's units.
        target_scale: ``(o,)``, or one for each row.
    """
    if link == "softmax":
        moments = softmax_moments(logits)
        return Prediction(moments.mean, moments.cov, moments.jacobian)
    square = target_scale.unsqueeze(-1) * target_scale.unsqueeze(-2)
    aleatoric = (noise_cov * square).expand_as(logits.cov)
    return Prediction(logits.mean * target_scale, logits.cov * square, aleatoric)


class BayesianHead(Posterior):
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

    def __init__(self, in_features: int, out_features: int, config: HeadConfig | None = None) -> None:
        super().__init__(in_features, out_features, config)
        self._published: Published | None = None

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

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Predicted mean of the target, ``(N, o)``, for features ``(N, d)``; class probabilities with softmax."""
        logits = self._mean_logits(features)
        return torch.softmax(logits, dim=-1) if self.rule.link == "softmax" else logits * self.target_scale

    def _mean_logits(self, features: Tensor) -> Tensor:
        """Mean of the last layer's output, ``(N, o)``, by the shortest way."""
        if len(self.spec.shapes) > 2:
            return self.predict_logits(features).mean
        memory = self._memory()
        _, view, actor = self._publish(memory)
        if actor is None or not 0 < len(features) <= _FEW_ROWS or features.shape[1:] != (self.in_features,):
            return view_mean(view, self.standardise(features))
        return torch.from_numpy(actor(memory.centre, memory.scale, memory.rows(features)))

    def predict(self, features: Tensor) -> Prediction:
        """Distribution of the target for each row of ``features``, ``(N, d)``."""
        if self.rule.link == "softmax":
            return of_targets(self.predict_logits(features), "softmax", self.noise_cov, self.target_scale)
        with self._lock:
            memory = self._memory()
            mean, epistemic = self._moments(memory, features, memory.outputs)
            aleatoric = memory.noise_of_target()
        return Prediction(mean, epistemic, aleatoric.expand_as(epistemic))

    def predict_logits(self, features: Tensor) -> Gaussian:
        """Distribution of the last layer's output for each row, before the link and in units of ``target_scale``."""
        with self._lock:
            memory = self._memory()
            return self._moments(memory, features, memory.ones)

    def _moments(self, memory: Memory, features: Tensor, outputs: Any) -> Gaussian:
        """Distribution of the last layer's output, times ``outputs`` ``(o,)``, by the shortest way; under the lock."""
        with torch.no_grad():
            found = memory.predict(features, outputs)
            if found is not None:
                return found
            logits = functional.predict_logits(memory.state, self.standardise(features))
            scale = torch.as_tensor(outputs)
            return Gaussian(logits.mean * scale, logits.cov * (scale.unsqueeze(-1) * scale))

    @torch.no_grad()
    def view(self) -> ActingView:
        """What acting needs, as a copy; ``standardise`` its features and multiply its mean by ``target_scale``.

        It is of the view that the head itself acts by, which is made once after each change of the posterior, while
        none is under way, and swapped in by one assignment, so that whoever acts in another thread never sees half an
        update and mostly does not wait.
        """
        return self._publish(self._memory())[1].clone()

    def _acting_view(self) -> ActingView:
        """A view of the posterior as it is; a head that acts in another way than by its moments overrides this."""
        return acting_view(self.state)

    def _publish(self, memory: Memory) -> Published:
        state = memory.state
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
            memory.state, torch.as_tensor(rows), torch.as_tensor(labels), self.rule, memory.noise_cov, memory.belief(),
            memory.weights(),
        )  # fmt: skip

    def apply_increment(self, step: Increment) -> None:
        """Add an increment to the posterior, in place, and take over what it makes of the noise.

        Raises:
            ValueError: It is of a head with other weights.
            UpdateError: A variance would be negative, as it was computed for another state of the posterior.
        """
        memory, rows = self._memory(), step.info.labels // self.out_features
        functional.check_fits(memory.state, step)
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
        with self._lock:
            memory = self._memory()
            done = memory.learn(features, target)
        if done is not None:
            return done
        all_rows, all_labels = self._checked(features, target)
        count, before = len(all_rows), self._before()
        # What may need a repair goes by the increment that can hold one.
        few = functional.is_moved_by_rows(memory.state, count * self.out_features)
        engine = memory.state.engine if few and not memory.state.least_quotient else None
        if engine is not None and engine.takes(count, self.out_features):
            belief = None if memory.noise_model is None else memory.belief()
            row = row_step(engine, all_rows, all_labels, self.rule, memory.noise_cov, belief, memory.weights())
            with self._changing():
                engine.commit(row.mean_step, row.factor, row.signs)
                memory.keep(row.noise)
                memory.labels_seen += count
                if before is not None:
                    self._remember([row.as_increment()], before, count)
            return row.info
        successive = count > functional.MAX_JOINT_ROWS
        state = memory.state.clone() if successive else memory.state
        steps: list[Increment] = []
        noise_cov, belief, weights = memory.noise_cov, memory.belief(), memory.weights()
        blocks = (torch.as_tensor(values).split(functional.MAX_JOINT_ROWS) for values in (all_rows, all_labels))
        for rows, labels in zip(*blocks, strict=True):
            step = functional.increment(state, rows, labels, self.rule, noise_cov, belief, weights)
            if successive:
                functional.apply(state, step)
            steps.append(step)
            if belief is not None and step.noise is not None:  # the next block knows what this one has learned
                belief = belief._replace(estimate=step.noise)
                noise_cov = torch.from_numpy(step.noise.cov).to(noise_cov)
        info = merge([step.info for step in steps]) if successive else steps[0].info
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

    def _before(self) -> Before | None:
        """What the history keeps of the posterior in front of an update; nothing without a history."""
        if self._history is None:
            return None
        memory = self._memory()
        self._history.current(memory)
        belief = memory.belief()
        return Before(memory.state.mean.clone(), None if belief is None else belief.estimate)

    def _remember(self, steps: list[Increment], before: Before | None, rows: int) -> None:
        """Keep an update for ``rollback``."""
        if self._history is not None and before is not None:
            self._history.add(self._memory(), Record(steps, before, rows))

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
        largest = memory.largest(features, target)
        if not math.isfinite(largest):
            raise ValueError("features or target hold NaN or infinity; leave rows without a label out of the update")
        if largest > LARGEST:
            raise UpdateError(
                f"features or target reach {largest:.3g} in the head's own units, and products of such numbers leave "
                "float64; the posterior is unchanged. Check features and target for huge values."
            )
        if self.rule.link == "softmax" and not are_distributions(target).all():
            raise ValueError("with the softmax link each target row is one-hot or a distribution: >= 0, sum 1")
        return features, target

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_published": None}  # what a copy acts by is made of its own buffers
