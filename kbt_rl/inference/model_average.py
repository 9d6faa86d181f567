"""One linear layer under several label noises at once, weighted by how well each predicts: nobody has to choose one.

The mean of a Bayesian linear layer depends on the ratio of label noise and prior variance alone, and no ratio suits all
tasks. So the layer is learned with each of a few ratios ``lambda_k``, exactly, as the outputs of one ``shared`` head.
Let ``e`` be the error of a label before it is learned and ``V = h' P_k h + lambda_k`` its variance in units of an
unknown scale, whose inverse has a gamma distribution. Then the label has Student's t density,

    log p_k = sum_j -1/2 log(b_kj V_k / n_j) - (n_j + 1)/2 log(1 + e_kj^2 / (b_kj V_k)) + const

and after it ``b <- b + w e^2 / V``, ``n <- n + w``, ``log v_k <- log v_k + w log p_k``. A label of a state that hardly
differs from the one before says hardly anything new, so that its evidence counts by
``w = min(1, |h - h_before|^2 / tr Cov(h))``. What is predicted is the mixture with the weights ``v``.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import gammaln
from torch import Tensor, nn

from kbt_rl.inference import checks, loading
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.prediction import Prediction
from kbt_rl.inference.transactions import register_writer, replace_buffers, signals_deferred
from kbt_rl.inference.types import Rows, UpdateInfo

# Ratios of label noise to prior variance, and what each is trusted before any label: labels that follow each other in
# an episode resemble each other and want a large one.
RATIOS = (1e-3, 1e-2, 1e-1)
SHARES = (0.02, 0.18, 0.80)
# An episode starts where others have started.
FIRST = 0.03
# Labels' worth of trust in the scale of the errors before any label, which is that of the target.
START_DOF = 2.0

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


class Evidence(NamedTuple):
    """How well each model has predicted, and how large the errors are.

    Attributes:
        logs: Logarithm of the weight of each model, ``(k,)``.
        misfit: Sum of squared errors over their variances, ``(k, o)``.
        dof: Labels that it is the sum of, ``(o,)``.
    """

    logs: Array
    misfit: Array
    dof: Array

    @property
    def shares(self) -> Array:
        """Weight of each model, ``(k,)``."""
        shares: Array = np.exp(self.logs - np.logaddexp.reduce(self.logs))
        return shares

    @property
    def scale(self) -> Array:
        """Squared scale of the errors in units of their variances, ``(k, o)``."""
        scale: Array = self.misfit / self.dof
        return scale

    def densities(self, squares: Array, variances: Array, given: Mask) -> Array:
        """Log density of a label under each model, ``(k,)``.

        Args:
            squares: Squared errors over ``variances``, ``(k, o)``.
            variances: Of the label in units of the scale, ``(k, o)``.
            given: Outputs that have a label, ``(o,)``.
        """
        normaliser = gammaln(0.5 * (self.dof + 1.0)) - gammaln(0.5 * self.dof) - 0.5 * np.log(math.pi * self.dof)
        each = normaliser - 0.5 * np.log(self.scale * variances)
        each = each - 0.5 * (self.dof + 1.0) * np.log1p(squares / self.misfit)
        densities: Array = np.where(given, each, 0.0).sum(axis=1)
        return densities

    def after(self, squares: Array, densities: Array, given: Mask, weight: float) -> Evidence:
        """The evidence after a label that counts for ``weight``."""
        logs = self.logs + weight * densities
        return Evidence(
            logs - np.logaddexp.reduce(logs), self.misfit + weight * squares * given, self.dof + weight * given
        )


class ModelAverage(nn.Module):
    """Bayesian linear regression averaged over several label noises.

    It has the interface of ``BayesianHead`` as far as policies ask for it.

    Args:
        in_features: Number of features ``d``.
        out_features: Number of outputs ``o``.
        prior_variance: Of each weight, in units of ``target_scale`` squared; one over the mean square of the features
            makes a prior variance of the output of 1.
        ratios: Label noise over ``target_scale`` squared, of each model.
        shares: Prior weight of each model, positive.
        first: What the evidence of a label counts for that has none before it.
        history: Updates to keep for ``rollback``.
    """

    log_shares: Tensor
    misfit: Tensor
    dof: Tensor
    last: Tensor  # features of the label before, NaN where there was none
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
        self._lock = threading.RLock()  # as in ``Posterior``
        register_writer(self)
        positive = all(0.0 < value < math.inf for value in (*ratios, *shares))
        if len(ratios) != len(shares) or len(ratios) == 0 or not positive:
            raise ValueError(f"ratios are {ratios} and shares {shares}; as many of each, positive and finite")
        self.in_features, self.out_features, self.models = in_features, out_features, len(ratios)
        self.ratios, self.start_shares = np.array(ratios)[:, None], np.array(shares) / sum(shares)
        config = HeadConfig(structure="shared", rho=0.0, last_variance=prior_variance, history=history)
        self.head = BayesianHead(in_features, out_features * self.models, config)
        for name, value in self._as_buffers(self._start(), self._nothing()).items():
            self.register_buffer(name, value)
        self.spread, self.first = float(in_features), first
        self._history_size = history
        # Weights ``(d + 1, o)`` of the mixture's mean; None after a change, until they are asked for.
        self._mean: Tensor | None = None
        self._history: deque[dict[str, Tensor]] = deque(maxlen=history)

    def settings(self) -> dict[str, Any]:
        """Keyword arguments that make such a head again, for a file."""
        return {
            "prior_variance": self.head.config.last_variance,
            "ratios": self.ratios[:, 0].tolist(),
            "shares": self.start_shares.tolist(),
            "first": self.first,
            "history": self.head.config.history,
        }

    def reset(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        feature_mean: Tensor | None = None,
        feature_scale: Tensor | None = None,
        target_scale: Tensor | None = None,
        spread: float | None = None,
    ) -> None:
        """Return to the prior that reproduces ``weight @ h + bias``; what was learned is forgotten.

        Args:
            weight: ``(o, d)``.
            bias: ``(o,)``.
            feature_mean: See ``BayesianHead.reset``.
            feature_scale: See there.
            target_scale: See there.
            spread: Sum of the variances of the scaled features, by which the step from one label to the next is judged;
                their number if None.
        """
        if spread is not None and not 0.0 < spread < math.inf:
            raise ValueError(f"spread is {spread}; a sum of variances is positive and finite")
        scale = checks.positive("target_scale", target_scale, (self.out_features,), self.head.mean)
        noise = torch.from_numpy(self.ratios).to(scale) * scale.square()
        evidence = self._as_buffers(self._start(), self._nothing())
        with self._lock:
            started = copy.deepcopy(self.head)  # two changes, of which the second may fail
            started.reset(
                weight.repeat(self.models, 1),
                bias.repeat(self.models),
                feature_mean=feature_mean,
                feature_scale=feature_scale,
                target_scale=scale.repeat(self.models),
            )
            started.set_noise(torch.diag(noise.flatten()))
            with signals_deferred():
                self.head.load_state_dict(started.state_dict())
                self._replace(evidence)
                self.spread = float(self.in_features) if spread is None else spread
                self._history.clear()

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
        rows, labels = checks.as_array(features), np.asarray(checks.as_array(target), dtype=np.float64)
        if labels.shape != (len(rows), self.out_features):
            raise ValueError(
                f"target has shape {labels.shape}; expected {(len(rows), self.out_features)}, one row a row of features"
            )
        given = labels == labels
        if not given.any():
            return UpdateInfo.without_labels()
        with self._lock:
            return self._learn(rows, labels, given)

    def _learn(self, rows: Array, labels: Array, given: Mask) -> UpdateInfo:
        own_labels = np.tile(labels, self.models)
        with np.errstate(all="ignore"):
            evidence, last, info = self._plan(rows, labels, given)
        if not math.isfinite(sum(float(part.sum()) for part in evidence)):
            self.head.kind.checked(dict(self.head.named_buffers()), rows, own_labels)
            raise UpdateError(
                "the square of a label's error leaves float64; the posterior is unchanged. Check features and target "
                "for huge values."
            )
        kept = (
            {name: buffer.clone() for name, buffer in self.named_buffers(recurse=False)} if self._history_size else {}
        )
        buffers = self._as_buffers(evidence, last)
        with signals_deferred():
            self.head.update(rows, own_labels)
            self._replace(buffers)
            self._history.append(kept)
        return info

    def _plan(self, rows: Array, labels: Array, given: Mask) -> tuple[Evidence, Array, UpdateInfo]:
        """The evidence after labels ``(B, o)``, the features of the last one, and the record."""
        before, scale = self.evidence, self._scale()
        means, own = self._each(rows)
        variances = own + self.ratios
        errors = np.where(given[:, None], (labels / scale)[:, None] - means, 0.0)
        squares = errors * errors / variances
        labelled = np.flatnonzero(given.any(axis=1))
        weights, last = self._novelty(rows, labelled)
        evidence, log_density = before, 0.0
        for row in labelled:
            densities = evidence.densities(squares[row], variances[row], given[row])
            log_density += float(np.logaddexp.reduce(evidence.logs + densities))
            evidence = evidence.after(squares[row], densities, given[row], float(weights[row]))
        mean, epistemic, aleatoric = _mixture(before, means, own, self.ratios)
        share = given * (scale * scale / (scale @ scale / len(scale))) / given.sum()
        innovation = np.where(given, labels / scale - mean, 0.0)
        info = UpdateInfo(
            innovation=math.sqrt(float((share * innovation * innovation).sum())),
            nis=float((squares / before.scale)[:, before.logs.argmax()].sum()),
            epistemic_variance=float((share * epistemic).sum()),
            predictive_variance=float((share * (epistemic + aleatoric)).sum()),
            labels=int(given.sum()),
            log_density=log_density,
            dof=float(before.dof.min()),
        )
        return evidence, last, info

    def _novelty(self, rows: Array, labelled: npt.NDArray[np.intp]) -> tuple[Array, Array]:
        """What the evidence of each row counts for, ``(B,)``, and the features of the last that has a label."""
        centre, scale, last = (
            buffer.cpu().numpy() for buffer in (self.head.feature_mean, self.head.feature_scale, self.last)
        )
        weights = np.zeros(len(rows))
        for row in labelled:
            here = (rows[row] - centre) / scale
            move = here - last
            step = float(move @ move) / self.spread
            weights[row], last = self.first if math.isnan(step) else min(1.0, step), here
        return weights, last

    def rollback(self, n: int = 1) -> int:
        """See ``BayesianHead.rollback``."""
        with self._lock, signals_deferred():
            undone = self.head.rollback(n)
            for _ in range(n):
                before = self._history.pop()
            self._replace(before)
        return undone

    @property
    def undoable(self) -> int:
        """See ``BayesianHead.undoable``."""
        return self.head.undoable

    def reopen(self, fraction: float = 1.0) -> None:
        """See ``BayesianHead.reopen``; the evidence goes the same way back."""
        with self._lock, signals_deferred():
            start, now = self._start(), self.evidence
            opened = Evidence(*[(1.0 - fraction) * old + fraction * new for old, new in zip(now, start, strict=True)])
            self.head.reopen(fraction)
            self._replace(self._as_buffers(opened, self.last.cpu().numpy()))
            self._history.clear()

    def forget(self, factor: float) -> None:
        """See ``BayesianHead.forget``."""
        self._loosen("fading", factor)

    def add_process_noise(self, scale: float) -> None:
        """See ``BayesianHead.add_process_noise``."""
        self._loosen("process_noise", scale)

    def _loosen(self, forgetting: str, rate: float) -> None:
        with self._lock, signals_deferred():
            self._mean = None
            self.head.loosen(forgetting, rate)
            self._history.clear()

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def mean_outputs(self, features: Rows) -> Tensor:
        """Mean of the outputs in units of the target, ``(B, o)``."""
        rows = features if isinstance(features, Tensor) else torch.from_numpy(checks.as_array(features))
        if rows.ndim == 0 or rows.shape[-1] != self.in_features:
            raise ValueError(f"features have shape {tuple(rows.shape)}; expected (rows, {self.in_features})")
        with self._lock:
            if self._mean is None:
                shares = torch.from_numpy(self.evidence.shares).to(self.head.mean)
                each = self.head.mean.view(self.models, self.out_features, -1)
                self._mean = torch.einsum("k,koi->io", shares, each) * self.target_scale
            scaled = (rows.to(self._mean) - self.head.feature_mean) / self.head.feature_scale
            flat = torch.addmm(self._mean[-1], scaled.reshape(-1, self.in_features), self._mean[:-1])
            return flat.view(*rows.shape[:-1], self.out_features)

    def predict(self, features: Rows) -> Prediction:
        """Distribution of the target for each row of ``features`` ``(B, d)``, of the mixture.

        Variances are squared scales of Student's t distributions with ``predictive_dof`` degrees of freedom.
        """
        with self._lock:
            evidence, scale = Evidence(*[part.copy() for part in self.evidence]), self._scale()
            means, own = self._each(features)
        parts = _mixture(evidence, means, own, self.ratios)
        mean, epistemic, aleatoric = (torch.from_numpy(part).to(self.log_shares) for part in parts)
        unit = torch.from_numpy(scale).to(mean)
        return Prediction(mean * unit, epistemic * unit.square(), "identity", torch.diag(aleatoric * unit.square()))

    def epistemic_variance(self, features: Rows) -> Tensor:
        """Variance of each output from the weights, ``(B, o)``, in units of ``target_scale`` squared."""
        with self._lock:
            means, own = self._each(features)
            return torch.from_numpy(_mixture(self.evidence, means, own, self.ratios)[1]).to(self.log_shares)

    @property
    def evidence(self) -> Evidence:
        """How well each model has predicted; shares memory with the module on a CPU."""
        return Evidence(*(self._buffers[name].cpu().numpy() for name in ("log_shares", "misfit", "dof")))  # type: ignore[union-attr]

    @property
    def noise_cov(self) -> Tensor:
        """Covariance of the label noise, ``(o, o)``, in units of ``target_scale`` squared."""
        evidence = self.evidence
        noise = (evidence.shares[:, None] * evidence.scale * self.ratios).sum(axis=0)
        return torch.diag(torch.from_numpy(noise).to(self.log_shares))

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
        return self.scales[0]

    @property
    def scales(self) -> tuple[float, float]:
        """See ``Posterior.scales``."""
        outputs = self.target_scale.tolist()
        return sum(scale * scale for scale in outputs) / len(outputs), sum(map(math.log, outputs))

    def variances(self) -> Tensor:
        """Variance of each weight of each model in its own units, ``(k o d,)``."""
        return self.head.variances()

    def _scale(self) -> Array:
        scale: Array = self.target_scale.cpu().numpy()
        return scale

    def _each(self, rows: Rows) -> tuple[Array, Array]:
        """Means and epistemic variances of each model ``(B, k, o)``, in units of ``target_scale`` and of the scale."""
        means, own = self.head.predict_each(rows)
        shape = len(means), self.models, self.out_features
        return means.reshape(shape), own.reshape(shape)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # a copy is of one moment, and has a lock and a history of its own
            head, buffers = copy.deepcopy(self.head), {name: value.clone() for name, value in self._named_evidence()}
        history: deque[Any] = deque(maxlen=self._history_size)
        state = {**self.__dict__, "_buffers": buffers, "_modules": {"head": head}, "_history": history, "_mean": None}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.RLock()
        register_writer(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over saved buffers, all or none."""
        with self._lock:
            self._mean = None
            self._history.clear()
            return loading.load_whole(self, state_dict, strict)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._mean = None
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModelAverage:
        """Follow a change of device, but never of dtype, as the head inside does."""
        with self._lock:
            self._mean = None
            self.head._apply(fn)
            self._buffers.update({name: checks.moved(one, fn(one).device) for name, one in self._named_evidence()})
        return self

    def _replace(self, new: Mapping[str, Tensor]) -> None:
        """Take over the evidence after the head has changed; cannot fail."""
        self._mean = None
        replace_buffers(self._buffers, new)

    def _named_evidence(self) -> list[tuple[str, Tensor]]:
        return list(self.named_buffers(recurse=False))

    def _start(self) -> Evidence:
        shape = self.models, self.out_features
        return Evidence(np.log(self.start_shares), np.full(shape, START_DOF), np.full(self.out_features, START_DOF))

    def _nothing(self) -> Array:
        return np.full(self.in_features, math.nan)

    def _as_buffers(self, evidence: Evidence, last: Array) -> dict[str, Tensor]:
        parts = zip(("log_shares", "misfit", "dof", "last"), (*evidence, last), strict=True)
        return {name: torch.from_numpy(part).to(self.head.mean.device) for name, part in parts}


def _mixture(evidence: Evidence, means: Array, own: Array, ratios: Array) -> tuple[Array, Array, Array]:
    """Mean and epistemic variance ``(B, o)`` of the mixture, and its noise variance ``(o,)``."""
    shares = evidence.shares[:, None]
    mean = (shares * means).sum(axis=1)
    epistemic = (shares * (own * evidence.scale + (means - mean[:, None]) ** 2)).sum(axis=1)
    return mean, epistemic, (shares * evidence.scale * ratios).sum(axis=0)
