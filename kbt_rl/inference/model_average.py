"""One linear layer under several label noises at once, weighted by how well each predicts: nobody has to choose one.

The mean of a Bayesian linear layer depends on the ratio of label noise and prior variance alone, and no ratio suits all
tasks. So the layer is learned with each of a few ratios ``lambda_k``, exactly, as the outputs of one ``shared`` head,
and what it predicts is their mixture, whose weights are in :mod:`kbt_rl.inference.mixture`. The variance of a label
under a model is ``V_k = h' P_k h + lambda_k``. A label of a state that hardly differs from the one before says hardly
anything new, so that it counts for ``w = min(1, |h - h_before|^2 / tr Cov(h))``.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kbt_rl.inference import checks, loading
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.engines import registry as engines
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.likelihoods.base import Link
from kbt_rl.inference.mixture import Array, Evidence, Mask
from kbt_rl.inference.prediction import Prediction
from kbt_rl.inference.transactions import replace_buffers
from kbt_rl.inference.types import Rows, UpdateInfo
from kbt_rl.inference.whole import WholeModule

# Ratios of label noise to prior variance, and what each is trusted before any label: labels that follow each other in
# an episode resemble each other and want a large one.
RATIOS = (1e-3, 1e-2, 1e-1)
SHARES = (0.02, 0.18, 0.80)
# What the very first label counts for, which has none before it to differ from.
FIRST = 0.03


class ModelAverage(WholeModule):
    """Bayesian linear regression averaged over several label noises.

    It has the interface of ``BayesianHead`` as far as policies ask for it.

    Args:
        in_features: Number of features ``d``.
        out_features: Number of outputs ``o``.
        prior_variance: Of each weight, in units of ``target_scale`` squared; one over the mean square of the features
            makes a prior variance of the output of 1.
        ratios: Label noise over ``target_scale`` squared, of each model.
        shares: Prior weight of each model, positive.
        first: What the very first label counts for.
        history: Updates to keep for ``rollback``.
    """

    log_shares: Tensor
    misfit: Tensor
    dof: Tensor
    last: Tensor  # scaled features of the label before, NaN where there was none
    link: Link = "identity"
    plain_noise = False
    learns_noise = False  # in the sense of ``BayesianHead``: there is no estimate to put back
    noise_estimate = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        prior_variance: float = 1.0,
        *,
        ratios: Sequence[float] = RATIOS,
        shares: Sequence[float] = SHARES,
        first: float = FIRST,
        history: int = 0,
    ) -> None:
        super().__init__()
        positive = all(0.0 < value < math.inf for value in (*ratios, *shares))
        if len(ratios) != len(shares) or len(ratios) == 0 or not positive:
            raise ValueError(f"ratios are {ratios} and shares {shares}; as many of each, positive and finite")
        self.in_features, self.out_features, self.models = in_features, out_features, len(ratios)
        self.ratios, self.start_shares = np.array(ratios)[:, None], np.array(shares)
        config = HeadConfig(structure="shared", rho=0.0, last_variance=prior_variance, history=history)
        self.head = BayesianHead(in_features, out_features * self.models, config)
        self._own_lock()
        self.spread, self.first = float(in_features), first
        self._engine = engines.average_engine_for(self.head.kind)
        for name, value in self._at_start().items():
            self.register_buffer(name, value)
        # The mixture's mean as a layer; None after a change, until it is asked for.
        self._mean: tuple[Tensor, Tensor] | None = None
        # Evidence before each update. The newest belong to what the head remembers; older ones are never asked for.
        self._before: deque[dict[str, Tensor]] = deque(maxlen=history)

    def _own_lock(self) -> None:
        """One lock for both: with one each, a fork could take them in another order than an update and wait forever."""
        super()._own_lock()
        if "head" in self._modules:
            self.head._lock = self._lock

    def settings(self) -> dict[str, Any]:
        """Keyword arguments that make such a head again, for a file."""
        return {
            "prior_variance": self.head.config.last_variance,
            "ratios": self.ratios[:, 0].tolist(),
            "shares": self.start_shares.tolist(),
            "first": self.first,
            "history": self.head.config.history,
        }

    def reset(self, weight: Tensor, bias: Tensor, *, spread: float | None = None, **units: Tensor | None) -> None:
        """Return to the prior that reproduces ``weight @ h + bias``; what was learned is forgotten.

        Args:
            weight: ``(o, d)``.
            bias: ``(o,)``.
            spread: Sum of the variances of the scaled features, by which the step from one label to the next is judged;
                their number if None.
            **units: ``feature_mean``, ``feature_scale`` and ``target_scale`` of ``BayesianHead.reset``.
        """
        if spread is not None and not 0.0 < spread < math.inf:
            raise ValueError(f"spread is {spread}; a sum of variances is positive and finite")
        given = units.pop("target_scale", None)
        scale = checks.positive("target_scale", given, (self.out_features,), self.head.mean)
        evidence, tiled = self._at_start(), {"target_scale": scale.repeat(self.models)}
        with self._lock:
            started = copy.deepcopy(self.head)  # two changes, of which the second may fail
            started.reset(weight.repeat(self.models, 1), bias.repeat(self.models), **units, **tiled)
            # To the bit the same for all outputs of a model, which would else not share a covariance.
            started.noise_cov = torch.from_numpy(self.ratios).to(scale).repeat(1, self.out_features).flatten().diag()
            with self._changing():
                self.head.load_state_dict(started.state_dict())
                self._replace(evidence)
                self.spread = float(self.in_features) if spread is None else spread

    # ------------------------------------------------------------------ learning

    def update(self, features: Rows, target: Rows) -> UpdateInfo:
        """Condition all models on labelled rows; completes or changes nothing.

        Args:
            features: ``(B, d)``.
            target: ``(B, o)``; an entry of NaN has no label.

        Returns:
            The record of the mixture in units of ``target_scale``.

        Raises:
            ValueError: Wrong shape, or not finite.
            UpdateError: The result would not be a proper posterior.
        """
        with self._lock:
            done = self._at_once(features, target)
            return self._learned(features, target) if done is None else done

    def _at_once(self, features: Rows, target: Rows) -> UpdateInfo | None:
        """A whole update by machine code, of one row; None, and nothing done, for all others."""
        if self._engine is None or self._before.maxlen:
            return None
        self.changed()  # before, so that no signal comes between the update and this
        return self._engine.learn_all(self._all_buffers(), features, target, self.ratios, self.spread, self.first)

    def _learned(self, features: Rows, target: Rows) -> UpdateInfo:
        """An update by the definition."""
        rows, labels = checks.as_array(features), np.asarray(checks.as_array(target), dtype=np.float64)
        if labels.shape != (len(rows), self.out_features):
            raise ValueError(
                f"target has shape {labels.shape}; expected {(len(rows), self.out_features)}, one row a row of features"
            )
        given = ~np.isnan(labels)
        some = given.any(axis=1)
        if not some.any():
            return UpdateInfo.without_labels()
        return self._learn(rows[some], labels[some], given[some])

    def _learn(self, rows: Array, labels: Array, given: Mask) -> UpdateInfo:
        """Learn rows that all have a label for some output."""
        tiled = np.tile(labels, self.models)
        with np.errstate(all="ignore"):
            evidence, last, info = self._plan(rows, labels, given)
        if not evidence.finite:
            self.head.kind.checked(dict(self.head.named_buffers()), rows, tiled)
            raise UpdateError(
                "the square of a label's error leaves float64; the posterior is unchanged. Check features and target "
                "for huge values."
            )
        new, before = self._as_buffers(evidence, last), self.copied_buffers() if self._before.maxlen else {}
        with self._changing():
            self.head.update(rows, tiled)
            self._replace(new)
            self._before.append(before)
        return info

    def _plan(self, rows: Array, labels: Array, given: Mask) -> tuple[Evidence, Array, UpdateInfo]:
        """The evidence after labels ``(B, o)``, the scaled features of the last one, and the record."""
        before, scale = self.evidence, self._scale()
        means, own = self._each(rows)
        variances = own + self.ratios
        errors = np.where(given[:, None], (labels / scale)[:, None] - means, 0.0)
        squares = errors * errors / variances
        weights, last = self._novelty(rows)
        evidence, log_density = before, 0.0
        for square, variance, known, weight in zip(squares, variances, given, weights, strict=True):
            densities = evidence.densities(square, variance, known)
            log_density += float(np.logaddexp.reduce(evidence.logs + densities))
            evidence = evidence.after(square, densities, known, weight)
        predicted = before.mixture(means, own, self.ratios)
        share = given * (scale * scale / (scale @ scale / len(scale))) / given.sum()
        innovation = np.where(given, labels / scale - predicted.mean, 0.0)
        info = UpdateInfo(
            innovation=math.sqrt(float((share * innovation * innovation).sum())),
            nis=float((squares / before.scale)[:, before.logs.argmax()].sum()),
            epistemic_variance=float((share * predicted.epistemic).sum()),
            predictive_variance=float((share * (predicted.epistemic + predicted.aleatoric)).sum()),
            labels=int(given.sum()),
            log_density=log_density,
            dof=float(before.dof.min()),
        )
        return evidence, last, info

    def _novelty(self, rows: Array) -> tuple[list[float], Array]:
        """What the evidence of each row counts for, and the scaled features of the last."""
        centre, scale, last = (
            buffer.cpu().numpy() for buffer in (self.head.feature_mean, self.head.feature_scale, self.last)
        )
        weights = []
        for here in (rows - centre) / scale:
            move = here - last
            step = float(move @ move) / self.spread
            weights.append(self.first if math.isnan(step) else min(1.0, step))
            last = here
        return weights, last

    def rollback(self, n: int = 1) -> int:
        """See ``BayesianHead.rollback``."""
        with self._changing():
            undone = self.head.rollback(n)
            for _ in range(n):
                before = self._before.pop()
            self._replace(before)
        return undone

    @property
    def undoable(self) -> int:
        """See ``BayesianHead.undoable``."""
        return self.head.undoable

    def reopen(self, fraction: float = 1.0) -> None:
        """See ``BayesianHead.reopen``; the evidence goes the same way back."""
        with self._changing():
            opened = self.evidence.towards(Evidence.start(self.start_shares, self.out_features), fraction)
            new = self._as_buffers(opened, self.last.cpu().numpy())
            self.head.reopen(fraction)
            self._replace(new)

    def forget(self, factor: float) -> None:
        """See ``BayesianHead.forget``."""
        self.head.forget(factor)

    def add_process_noise(self, scale: float) -> None:
        """See ``BayesianHead.add_process_noise``."""
        self.head.add_process_noise(scale)

    # ------------------------------------------------------------------ prediction

    def mean_outputs(self, features: Rows) -> Tensor:
        """Mean of the outputs in units of the target, ``(..., o)``."""
        rows = features.detach() if isinstance(features, Tensor) else torch.from_numpy(checks.as_array(features))
        if rows.ndim == 0 or rows.shape[-1] != self.in_features:
            raise ValueError(f"features have shape {tuple(rows.shape)}; expected (rows, {self.in_features})")
        with self._lock:
            weight, bias = self._layer()
        return torch.nn.functional.linear(rows.to(weight), weight, bias)

    def _layer(self) -> tuple[Tensor, Tensor]:
        """Weight ``(o, d)`` and bias ``(o,)`` of the mixture's mean, for features and targets in their own units."""
        if self._mean is None:
            found = None if self._engine is None else self._engine.layer(self._all_buffers())
            self._mean = self._folded() if found is None else found
        return self._mean

    @torch.no_grad()
    def _folded(self) -> tuple[Tensor, Tensor]:
        shares = self.log_shares.softmax(0)
        mixed = (shares @ self.head.mean.view(self.models, -1)).view(self.out_features, -1)
        mixed = mixed * self.target_scale.unsqueeze(-1)
        weight = mixed[:, :-1] / self.head.feature_scale
        return weight, mixed[:, -1] - weight @ self.head.feature_mean

    def _all_buffers(self) -> dict[str, Any]:
        """Of the head and its evidence."""
        return {**self.head._buffers, **self._buffers}

    def predict(self, features: Rows) -> Prediction:
        """Distribution of the target for each row of ``features`` ``(B, d)``, of the mixture.

        Variances are squared scales of Student's t distributions with ``predictive_dof`` degrees of freedom.
        """
        with self._lock:
            predicted, unit = self.evidence.mixture(*self._each(features), self.ratios), self.target_scale.clone()
        mean, epistemic, aleatoric = (torch.from_numpy(part).to(unit) for part in predicted)
        square = unit.square()
        return Prediction(mean * unit, epistemic * square, "identity", torch.diag(aleatoric * square))

    def epistemic_variance(self, features: Rows) -> Tensor:
        """Variance of each output from the weights, ``(B, o)``, in units of ``target_scale`` squared."""
        with self._lock:
            predicted = self.evidence.mixture(*self._each(features), self.ratios)
        return torch.from_numpy(predicted.epistemic).to(self.log_shares)

    @property
    def evidence(self) -> Evidence:
        """How well each model has predicted; shares memory with the module on a CPU."""
        return Evidence(*(buffer.cpu().numpy() for buffer in (self.log_shares, self.misfit, self.dof)))

    @property
    def noise_cov(self) -> Tensor:
        """Covariance of the label noise, ``(o, o)``, in units of ``target_scale`` squared."""
        return torch.diag(torch.from_numpy(self.evidence.noise(self.ratios)).to(self.log_shares))

    @property
    def labels_seen(self) -> Tensor:
        """Labelled rows learned from."""
        return self.head.labels_seen

    @property
    def predictive_dof(self) -> float:
        """Degrees of freedom of predictions."""
        return float(self.dof.min())

    @property
    def target_scale(self) -> Tensor:
        """Scale of each target, ``(o,)``."""
        return self.head.target_scale[: self.out_features]

    @property
    def mean_square_scale(self) -> float:
        """See ``Posterior``."""
        return self.head.mean_square_scale

    def variances(self) -> Tensor:
        """Variance of each weight of each model in its own units, ``(k o (d + 1),)``."""
        return self.head.variances()

    def _scale(self) -> Array:
        scale: Array = self.target_scale.cpu().numpy()
        return scale

    def _each(self, rows: Rows) -> tuple[Array, Array]:
        """Means and epistemic variances of each model ``(B, k, o)``, in units of ``target_scale`` and of the scale."""
        means, own = self.head.predict_each(rows)
        shape = len(means), self.models, self.out_features
        return means.reshape(shape), own.reshape(shape)

    # ------------------------------------------------------------------ the buffers

    def check_saved(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """See ``WholeModule``."""
        for name, buffer in self.named_buffers(recurse=False):
            loaded = state_dict.get(prefix + name)
            if loaded is None:
                continue
            loading.check_dtype(prefix + name, buffer, loaded)
            known = torch.isfinite(loaded) if name != "last" else ~torch.isinf(loaded)
            if not bool(known.all()) or (name in ("misfit", "dof") and not bool((loaded > 0.0).all())):
                raise RuntimeError(f"{prefix + name} is not finite, or not positive where it must be; it is broken")

    def changed(self) -> None:
        """See ``WholeModule``."""
        self._mean = None

    def _fresh(self) -> dict[str, Any]:
        # The head of the same moment: what a copy holds is copied when the lock is free again.
        empty = deque[Any](maxlen=self._before.maxlen)
        return {"_before": empty, "_modules": {"head": copy.deepcopy(self.head)}, "_engine": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine = engines.average_engine_for(self.head.kind)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModelAverage:
        """Follow a change of device, as the head inside does."""
        self.head._apply(fn)
        return super()._apply(fn, recurse)

    def _replace(self, new: Mapping[str, Tensor]) -> None:
        """Take over the evidence after the head has changed; cannot fail."""
        replace_buffers(self._buffers, new)
        self.changed()

    def _at_start(self) -> dict[str, Tensor]:
        nothing = np.full(self.in_features, math.nan)
        return self._as_buffers(Evidence.start(self.start_shares, self.out_features), nothing)

    def _as_buffers(self, evidence: Evidence, last: Array) -> dict[str, Tensor]:
        parts = zip(("log_shares", "misfit", "dof", "last"), (*evidence, last), strict=True)
        return {name: torch.from_numpy(part).to(self.head.mean.device) for name, part in parts}
