"""Many independent heads of the same shape, one row each, in one call: a posterior for every robot of a fleet.

The heads of a ``HeadBatch`` are heads like any other. Their buffers lie one after another in stacked arrays, so that
machine code can go through all of them; where there is none for them, each is asked in turn.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kbt_rl.inference import compiled
from kbt_rl.inference.batch_record import BatchInfo
from kbt_rl.inference.head import BayesianHead, Prediction, of_targets
from kbt_rl.inference.interrupts import interrupts_deferred
from kbt_rl.inference.loading import check_fits
from kbt_rl.inference.memory import as_array
from kbt_rl.inference.moments import Gaussian
from kbt_rl.inference.output import measure, replace
from kbt_rl.inference.stack import HeadStack

Array = npt.NDArray[Any]
_stacking = threading.Lock()


class HeadBatch(nn.ModuleList):
    """Independent posteriors, ``H`` heads of the same configuration: row ``i`` belongs to head ``i``.

    ``batch[i]`` is a ``BayesianHead`` on the batch's memory: what is done with either is seen by the other. Copying,
    saving, loading and moving to a device are those of a ``ModuleList``.

    Heads with machine code (one or two layers, two terms of the ReLU's series, exact features, on the CPU, no
    ``history``) predict in one call; they learn in one call where they have one output, the rule ``measure`` or
    ``replace`` and a noise that is known. Others take the same steps one after another. The results of both ways, and
    those of as many separate heads, are equal to rounding: 1e-10 relative to the largest entry.

    Args:
        heads: Of the same sizes and configuration.
        threads: Threads that share out the heads of one call, the caller's and others that wait for all such calls of
            the process; no global setting changes.

    Raises:
        ValueError: No heads, or heads of different kinds.

    Example:
        >>> batch = HeadBatch(BayesianHead(16, 1) for _ in range(1024))
        >>> info = batch.update(torch.randn(1024, 16), torch.zeros(1024, 1))
        >>> mean = batch(torch.randn(1024, 16))
    """

    def __init__(self, heads: Iterable[BayesianHead], threads: int = 1) -> None:
        super().__init__(heads)
        if len(self) == 0:
            raise ValueError("a batch needs at least one head")
        self._known = tuple(self)
        _check_kinds(self._known)
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads is {threads!r}; a whole number, at least 1")
        self.threads = threads
        self._stack: HeadStack | None = None
        self._lock = threading.RLock()

    def __getitem__(self, index: int) -> BayesianHead:  # type: ignore[override]
        """The head of row ``index``."""
        return super().__getitem__(index)  # type: ignore[return-value]

    def __iter__(self) -> Iterator[BayesianHead]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Predicted mean of each head's target ``(H, o)`` for its row of ``features`` ``(H, d)``."""
        rows = self._rows(features)
        with self._held() as stack:
            if stack is None:
                return torch.cat([head(row) for head, row in zip(self, rows.split(1), strict=True)])
            logits = torch.from_numpy(stack.means(as_array(rows), self.threads))
            scale = torch.from_numpy(stack["target_scale"].copy())
        return torch.softmax(logits, dim=-1) if self[0].rule.link == "softmax" else logits * scale

    @torch.no_grad()
    def predict(self, features: Tensor) -> Prediction:
        """Distribution of each head's target for its row of ``features`` ``(H, d)``."""
        rows = self._rows(features)
        with self._held() as stack:
            if stack is None:
                found = [head.predict(row) for head, row in zip(self, rows.split(1), strict=True)]
                return Prediction(*(torch.cat(part) for part in zip(*found, strict=True)))
            logits = Gaussian(*map(torch.from_numpy, stack.moments(as_array(rows), self.threads)))
            noise_cov, scale = (torch.from_numpy(stack[name].copy()) for name in ("noise_cov", "target_scale"))
        return of_targets(logits, self[0].rule.link, noise_cov, scale)

    @torch.no_grad()
    def predict_logits(self, features: Tensor, each: int = 1) -> Gaussian:
        """Distribution of each head's logits for ``each`` successive rows of ``features`` ``(H each, d)``."""
        rows = self._rows(features, each)
        with self._held() as stack:
            if stack is None:
                blocks = [head.predict_logits(block) for head, block in zip(self, rows.split(each), strict=True)]
                return Gaussian(torch.cat([block.mean for block in blocks]), torch.cat([block.cov for block in blocks]))
            return Gaussian(*map(torch.from_numpy, stack.moments(as_array(rows), self.threads)))

    def update(self, features: Tensor | Array, target: Tensor | Array, *, together: bool = False) -> BatchInfo:
        """Condition each head on its row; each either completes or changes nothing.

        An interrupt leaves every head as it was before or as it is after its update.

        Args:
            features: Output of the encoder, ``(H, d)``.
            target: ``(H, o)``; a head whose row holds a NaN has no label and stays as it is.
            together: Whether all complete or none changes, at the price of reading the posteriors once more.

        Returns:
            A record of each head, and why a head has refused.

        Raises:
            ValueError: Wrong shape; with ``together`` also for an infinite entry.
            UpdateError: With ``together``, a result would not be a proper posterior.
        """
        head, given = self[0], (as_array(features), as_array(target))
        shapes = (len(self), head.in_features), (len(self), head.out_features)
        for name, array, shape in zip(("features", "target"), given, shapes, strict=True):
            if array.shape != shape:
                raise ValueError(f"{name} have shape {array.shape}; expected {shape}, one row a head")
        rows, labels = given
        info = BatchInfo.empty(len(self))
        wanted = np.flatnonzero(~np.isnan(labels).any(axis=1))
        with self._held() as held:
            stack = held if self._learns_in_one_call else None
            if together:
                self._learn_together(stack, wanted, rows, labels, info)
            else:
                left = wanted if stack is None else stack.learn(wanted, rows, labels, info, self.threads)
                for index in left:  # what the machine code refuses takes the general way, which tells why
                    self._learn_alone(int(index), rows, labels, info)
        return info

    def _learn_alone(self, index: int, rows: Array, labels: Array, info: BatchInfo) -> None:
        try:
            info.put(index, self[index].update(rows[index : index + 1], labels[index : index + 1]))
        except ValueError as error:  # UpdateError is one
            info.refused[index] = error

    def _learn_together(
        self, stack: HeadStack | None, wanted: Array, rows: Array, labels: Array, info: BatchInfo
    ) -> None:
        plan = None if stack is None else stack.plan(wanted, rows, labels, info, self.threads)
        left = wanted if plan is None else wanted[~plan.done]
        steps = [(int(i), self[int(i)].increment(rows[i : i + 1], labels[i : i + 1])) for i in left]
        with interrupts_deferred():
            if stack is not None and plan is not None:
                stack.commit(plan, self.threads)
            for index, step in steps:
                self[index].apply_increment(step)
                info.put(index, step.info)

    def _rows(self, features: Tensor, each: int = 1) -> Tensor:
        expected = each * len(self), self[0].in_features
        if tuple(features.shape) != expected:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected {expected}, {each} row(s) a head")
        return features

    @property
    def _learns_in_one_call(self) -> bool:
        head = self[0]
        return head.out_features == 1 and head.noise_model is None and head.rule.condition in (measure, replace)

    @contextmanager
    def _held(self) -> Iterator[HeadStack | None]:
        """The lock, and meanwhile the stack on which all heads are; None if no machine code serves them.

        The stack is made anew when a head or a buffer was replaced. Not to be nested: who makes one takes
        ``_stacking``, its own lock and those of the heads in this order, so that batches that share heads cannot wait
        for each other.
        """
        code, heads = compiled.kernels(), tuple(self)
        with self._lock:
            if self._stack is not None and not self._stack.holds(heads):
                self._stack = None
            if self._stack is None and heads != self._known:
                _check_kinds(heads)
                self._known = heads
            if code is None or self._stack is not None or not HeadStack.serves(heads):
                yield None if code is None else self._stack
                return
        with _stacking, self._lock:
            if self._stack is None or not self._stack.holds(heads):
                self._stack = HeadStack(heads, code, self._lock)
            yield self._stack

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over the saved buffers of as many heads, all or none; see ``Posterior.load_state_dict``."""
        check_fits(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_stack": None}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.RLock()


def _check_kinds(heads: tuple[BayesianHead, ...]) -> None:
    """Raise ValueError unless these are different heads of one kind."""
    kinds = {(type(head), head.in_features, head.out_features, head.config) for head in heads}
    if len(kinds) > 1:
        raise ValueError(f"the heads of a batch must be of one kind; got {len(kinds)} sizes or configurations")
    if len(set(map(id, heads))) < len(heads):
        raise ValueError("a head is in the batch twice; each row of a batch has a head of its own (copy.deepcopy)")
