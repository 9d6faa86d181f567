"""What one call saw of many heads, a number for each."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kbt_rl.inference.record import UpdateInfo

Array = npt.NDArray[Any]
_COUNTS = ("labels", "repairs")


class BatchInfo(NamedTuple):
    """``UpdateInfo`` of each head as arrays ``(H,)``; NaN, or 0 labels and repairs, where a head has learned nothing.

    ``refused`` tells by index which heads would not learn, and by which error: the one that ``update`` of that head
    would raise. They are what they were before.
    """

    innovation: Array
    nis: Array
    epistemic_variance: Array
    predictive_variance: Array
    smallest_variance: Array
    labels: Array
    label_weight: Array
    log_density: Array
    repairs: Array
    refused: dict[int, ValueError]

    @classmethod
    def empty(cls, heads: int) -> BatchInfo:
        """Of heads that have learned nothing yet."""
        numbers = iter(np.full((len(UpdateInfo._fields), heads), np.nan))
        counts = iter(np.zeros((2, heads), dtype=np.int64))
        fields = {name: next(counts if name in _COUNTS else numbers) for name in UpdateInfo._fields}
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
        """One record of all heads that have learned.

        Sums of NIS, log density and labels, the smallest variance of any weight, else averages over the labels.
        """
        used = np.flatnonzero(self.labels)
        counts = self.labels[used]
        total = int(counts.sum())

        def average(values: Array) -> float:
            return float(values[used] @ counts) / total if total else math.nan

        return UpdateInfo(
            innovation=math.sqrt(average(self.innovation**2)),
            nis=float(self.nis[used].sum()),
            epistemic_variance=average(self.epistemic_variance),
            predictive_variance=average(self.predictive_variance),
            smallest_variance=float(self.smallest_variance[used].min(initial=math.inf)),
            labels=total,
            label_weight=average(self.label_weight),
            log_density=float(self.log_density[used].sum()),
            repairs=int(self.repairs.sum()),
        )
