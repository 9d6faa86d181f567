"""Many independent heads of the same shape, one row each, in one call: a posterior for every robot of a fleet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference import checks, loading
from kbt_rl.inference.density import LOG_TWO_PI
from kbt_rl.inference.engines import registry as engines
from kbt_rl.inference.head import BayesianHead, HeadKind, Plan
from kbt_rl.inference.history import History, Record, moves_to_keep
from kbt_rl.inference.prediction import Prediction
from kbt_rl.inference.transactions import replace_buffers, signals_deferred
from kbt_rl.inference.types import Gaussian, HeadState, Rows, UpdateInfo
from kbt_rl.inference.whole import WholeModule

_COUNTS = ("labels", "repairs")


class BatchInfo(NamedTuple):
    """``UpdateInfo`` of each head as arrays ``(H,)``; NaN, or 0 labels and repairs, where a head has learned nothing.

    ``refused`` tells by index which heads would not learn, and by which error: the one that ``update`` of that head
    would raise. They are what they were before.
    """

    innovation: npt.NDArray[Any]
    nis: npt.NDArray[Any]
    epistemic_variance: npt.NDArray[Any]
    predictive_variance: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    label_weight: npt.NDArray[Any]
    log_density: npt.NDArray[Any]
    repairs: npt.NDArray[Any]
    dof: npt.NDArray[Any]
    log_ratio: npt.NDArray[Any]
    refused: dict[int, ValueError]

    @classmethod
    def empty(cls, heads: int) -> BatchInfo:
        """Of heads that have learned nothing yet."""
        fields = {
            name: np.zeros(heads, dtype=np.int64) if name in _COUNTS else np.full(heads, np.nan)
            for name in UpdateInfo._fields
        }
        return cls(**fields, refused={})

    def of(self, head: int) -> UpdateInfo:
        """The record of one head."""
        values: dict[str, Any] = {name: getattr(self, name)[head].item() for name in UpdateInfo._fields}
        return UpdateInfo(**values)

    def put(self, head: int, record: UpdateInfo) -> None:
        """Enter the record of one head."""
        for name, value in record._asdict().items():
            getattr(self, name)[head] = value

    def merged(self) -> UpdateInfo:
        """One record of all heads that have learned: sums of NIS, log density and labels, else averages over labels."""
        used = np.flatnonzero(self.labels)
        counts = self.labels[used]
        total = int(counts.sum())

        def average(values: npt.NDArray[Any]) -> float:
            return float(values[used] @ counts) / total if total else math.nan

        return UpdateInfo(
            innovation=math.sqrt(average(self.innovation**2)),
            nis=float(self.nis[used].sum()),
            epistemic_variance=average(self.epistemic_variance),
            predictive_variance=average(self.predictive_variance),
            labels=total,
            label_weight=average(self.label_weight),
            log_density=float(self.log_density[used].sum()),
            repairs=int(self.repairs.sum()),
            dof=float(self.dof[used].min(initial=math.inf)),
            log_ratio=float(self.log_ratio[used].sum()),
        )


class HeadBatch(WholeModule):
    """Independent posteriors, ``H`` heads of the same configuration: row ``i`` belongs to head ``i``.

    It owns their buffers, stacked in front; ``batch[i]`` is a copy of one of them, and ``batch[i] = head`` takes one
    over.

    Two-layer heads with one output, the rule ``measure`` and known noise learn and predict in one call of machine code
    (``pip install "kbt_rl[fast]"``); others take the same steps one after another. Both equal as many separate heads to
    rounding.

    Args:
        heads: Of the same sizes and configuration; they are copied.

    Raises:
        ValueError: No heads, or heads of different kinds.

    Example:
        >>> batch = HeadBatch(BayesianHead(16, 1) for _ in range(1024))
        >>> info = batch.update(torch.randn(1024, 16), torch.zeros(1024, 1))
        >>> mean = batch(torch.randn(1024, 16))
    """

    def __init__(self, heads: Iterable[BayesianHead]) -> None:
        super().__init__()
        given = list(heads)
        if not given:
            raise ValueError("a batch needs at least one head")
        kinds = {(head.in_features, head.out_features, head.config) for head in given}
        if len(kinds) > 1:
            raise ValueError(f"the heads of a batch must be of one kind; got {len(kinds)} sizes or configurations")
        self.kind: HeadKind = given[0].kind
        self.link, self.plain_noise = self.kind.rule.link, self.kind.config.plain_noise
        limit = self.kind.config.history
        self._history = History(limit, len(given)) if limit else None
        copies = [head.copied_buffers() for head in given]
        for name, buffer in copies[0].items():
            each = [copied[name] for copied in copies]
            if any(other.shape != buffer.shape for other in each):
                raise ValueError("the heads' outputs have had different labels; use structure='neuron'")
            self.register_buffer(name, torch.stack(each))
        self._engine = engines.batch_engine_for(self.kind)

    def __len__(self) -> int:
        return len(self.get_buffer("mean"))

    def __getitem__(self, index: int) -> BayesianHead:
        """A copy of the head of row ``index``."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"head {index} was asked for; there are {len(self)}")
        head = BayesianHead(self.kind.in_features, self.kind.out_features, self.kind.config)
        with self._lock:
            head.to(self.get_buffer("mean").device)
            head.load_state_dict(self._slice(index))
        return head

    def __setitem__(self, index: int, head: BayesianHead) -> None:
        """Take over the posterior of a head of the same kind.

        Raises:
            ValueError: It is of another kind, or its outputs have had different labels.
        """
        if (head.in_features, head.out_features, head.config) != (
            self.kind.in_features,
            self.kind.out_features,
            self.kind.config,
        ):
            raise ValueError(f"a head of this batch is a {self[0]!r}; got {head!r}")
        new = head.copied_buffers()
        with self._lock:
            own = self._slice(index)
            if any(own[name].shape != value.shape for name, value in new.items()):
                raise ValueError("the head's outputs have had different labels; use structure='neuron'")
            kept = self._known_buffers()
            with signals_deferred():
                replace_buffers(own, new)
                if self._history is not None:
                    self._history.forget(kept, index % len(self))

    def __iter__(self) -> Iterator[BayesianHead]:
        return (self[index] for index in range(len(self)))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        spec = self.kind.spec
        return (
            f"{len(self)} heads, in_features={self.kind.in_features}, out_features={self.kind.out_features}, "
            f"layers={len(spec.shapes)}, structure={spec.structure!r}, rule={self.kind.config.rule!r}"
        )

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Mean of each head's outputs ``(H, o)`` for its row of ``features`` ``(H, d)``; logits with softmax."""
        rows = self._rows(features, 1)
        with self._lock:
            found = None if self._engine is None else self._engine.predict_heads(self._buffers, rows, False)
            mean = self._each(rows, 1, variances=False).mean if found is None else found.mean
            return mean * self.get_buffer("target_scale")

    def predict(self, features: Tensor) -> Prediction:
        """Distribution of each head's target for its row of ``features`` ``(H, d)``."""
        with self._lock, torch.no_grad():
            mean, cov = self._logits(self._rows(features, 1), 1)
            scale, noise = self.get_buffer("target_scale"), self.get_buffer("noise_cov")
        if self.kind.rule.link == "softmax":
            return Prediction(torch.softmax(mean, dim=-1), cov, "softmax", noise)
        square = scale.unsqueeze(-1) * scale.unsqueeze(-2)
        return Prediction(mean * scale, cov * square, "identity", noise * square)

    def predict_logits(self, features: Tensor, each: int = 1) -> Gaussian:
        """Distribution of each head's outputs for ``each`` successive rows of ``features`` ``(H each, d)``."""
        with self._lock, torch.no_grad():
            return self._logits(self._rows(features, each), each)

    def epistemic_variance(self, features: Tensor, each: int = 1) -> Tensor:
        """Variance of each output from the weights, ``(H each, o)``, in units of ``target_scale`` squared."""
        return self.predict_logits(features, each).cov.diagonal(dim1=-2, dim2=-1)

    @torch.no_grad()
    def update(self, features: Rows, target: Rows, *, together: bool = False) -> BatchInfo:
        """Condition each head on its row; each either completes or changes nothing.

        Args:
            features: Output of the encoder, ``(H, d)``.
            target: ``(H, o)``; a head whose row is all NaN has no label and stays as it is.
            together: Whether all complete or none changes.

        Returns:
            A record of each head, and why a head has refused.

        Raises:
            ValueError: Wrong shape; with ``together`` also for an infinite entry.
            UpdateError: With ``together``, a result would not be a proper posterior.
        """
        given = checks.as_array(features), checks.as_array(target)
        shapes = (len(self), self.kind.in_features), (len(self), self.kind.out_features)
        for name, array, shape in zip(("features", "target"), given, shapes, strict=True):
            if array.shape != shape:
                raise ValueError(f"{name} have shape {array.shape}; expected {shape}, one row a head")
        rows, labels = given
        info = BatchInfo.empty(len(self))
        wanted = np.flatnonzero(~np.isnan(labels).all(axis=1))
        with self._lock:
            left = self._learn_fast(wanted, rows, labels, info, together)
            plans: list[tuple[int, Plan]] = []
            for index in left.tolist():
                try:
                    plans.append((index, self._planned(index, rows[index : index + 1], labels[index : index + 1])))
                except ValueError as error:  # UpdateError is one
                    if together:
                        raise
                    info.refused[index] = error
            self._commit(plans)
            for index, plan in plans:
                info.put(index, plan.info)
        return info

    def _learn_fast(
        self, wanted: npt.NDArray[Any], rows: Rows, labels: Rows, info: BatchInfo, together: bool
    ) -> npt.NDArray[Any]:
        """Learn by machine code where there is some; returns the heads that it leaves to the general way."""
        if self._engine is None or self._history is not None or not len(wanted):
            return wanted
        found = self._engine.learn_heads(self._buffers, wanted, rows, labels, together)
        if found is None:
            return wanted
        own, records = found
        done = records[:, 3] == 1.0
        if together and not done.all():
            return wanted
        used, record = wanted[done], records[done]
        error = own[used] - record[:, 0]
        info.innovation[used], info.nis[used] = abs(error), error * error / record[:, 2]
        info.epistemic_variance[used], info.predictive_variance[used] = record[:, 1], record[:, 2]
        info.labels[used], info.label_weight[used], info.dof[used] = 1, 1.0, math.inf
        info.log_density[used] = -0.5 * (info.nis[used] + np.log(record[:, 2]) + LOG_TWO_PI)
        left: npt.NDArray[Any] = wanted[~done]
        return left

    def _planned(self, index: int, rows: Rows, labels: Rows) -> Plan:
        own = self._slice(index)
        plan = self.kind.planned(own, self.kind.checked(own, rows, labels))
        if any(own[name].shape != value.shape for name, value in plan.buffers.items()):
            raise ValueError(
                "the label tells outputs apart (some have none), which heads of a batch with structure='shared' cannot "
                "store; use structure='neuron'"
            )
        return plan

    def _commit(self, plans: Sequence[tuple[int, Plan]]) -> None:
        """Take over what was planned for some heads, all or none."""
        own = {index: self._slice(index) for index, _ in plans}
        records: list[tuple[int, Record]] = []
        kept = self._known_buffers()
        if self._history is not None:
            names = ("mean", "noise_cov", "noise_labels") if self.kind.learns_noise else ("mean",)
            forgets = self.kind.config.forgetting != "none"
            for index, plan in plans:
                before = {name: own[index][name].clone() for name in names}
                cov = tuple(own[index][name] for name in self.kind.cov_names)
                moves = moves_to_keep(self.kind.spec.structure, cov, plan.steps, forgets)
                records.append((index, Record(moves, before, plan.rows)))
        with signals_deferred():
            for index, plan in plans:
                replace_buffers(own[index], plan.buffers)
            for index, record in records:
                assert self._history is not None
                self._history.add(kept, record, index)

    def rollback(self, n: int = 1, index: int | None = None) -> int:
        """Take back the last ``n`` updates of one head or of each, all or none; see ``BayesianHead.rollback``.

        Args:
            n: Updates to undo.
            index: Which head; None for each of them.

        Returns:
            The labelled rows that these updates had used.

        Raises:
            TypeError: ``n`` is no whole number.
            ValueError: Fewer updates are kept.
            UpdateError: What is left would not be a proper posterior.
        """
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"rollback takes a number of updates; got {n!r}")
        if self._history is None:
            raise ValueError(f"rollback({n}) on heads that keep no updates; make them with HeadConfig(history=...)")
        with self._lock, torch.no_grad():
            kept, undone = self._known_buffers(), []
            for head in range(len(self)) if index is None else [index]:
                own = self._slice(head)
                state = HeadState(self.kind.spec, own["mean"], tuple(own[name] for name in self.kind.cov_names))
                undo = self._history.plan(state, kept, n, head)
                new = undo.buffers | dict(zip(self.kind.cov_names, undo.state.cov, strict=True))
                undone.append((head, own, new | {"labels_seen": own["labels_seen"] - undo.rows}, undo.rows))
            with signals_deferred():
                for _, own, new, _ in undone:
                    replace_buffers(own, new)
                for head, *_ in undone:
                    self._history.drop(kept, n, head)
        return sum(rows for *_, rows in undone)

    def _known_buffers(self) -> list[Tensor]:
        """The buffers by which the history notices a foreign change; drops what is no longer true."""
        kept = [buffer for buffer in self._buffers.values() if buffer is not None]
        if self._history is not None:
            self._history.current(kept)
        return kept

    def _slice(self, index: int) -> dict[str, Tensor]:
        return {name: buffer[index] for name, buffer in self.named_buffers()}

    def _logits(self, rows: Tensor, each: int) -> Gaussian:
        found = None if self._engine is None else self._engine.predict_heads(self._buffers, rows)
        if found is not None:
            return found
        mean, cov = self._each(rows, each)
        return Gaussian(mean, torch.diag_embed(cov) if cov.ndim == 2 else cov)

    def _each(self, rows: Tensor, each: int, variances: bool = True) -> Gaussian:
        parts = []
        for index, block in enumerate(rows.split(each)):
            own = self._slice(index)
            parts.append(self.kind.logits(own, self.kind.in_units(own, block), variances=variances))
        return Gaussian(torch.cat([part.mean for part in parts]), torch.cat([part.cov for part in parts]))

    def _rows(self, features: Tensor, each: int) -> Tensor:
        expected = each * len(self), self.kind.in_features
        if tuple(features.shape) != expected:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected {expected}, {each} row(s) a head")
        return features

    def check_saved(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """See ``WholeModule``."""
        loading.check_posterior(self, self.kind, state_dict, prefix)

    def flexible(self) -> frozenset[str]:
        """See ``WholeModule``."""
        return frozenset(self.kind.cov_names)

    def _fresh(self) -> dict[str, Any]:
        return {"_history": None if self._history is None else self._history.fresh(), "_engine": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine = engines.batch_engine_for(self.kind)
