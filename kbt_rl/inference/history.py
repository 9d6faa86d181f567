"""The last updates of a head, kept as increments so that they can be taken back.

An update adds ``V diag(signs) V'`` to the covariance; to undo it is to subtract that, which restores what it was to
rounding at a fraction of the memory of a copy. The means are kept as they were: a label that is far off moves them so
much that in float32 a subtraction would not bring them back. In all that is ``P (q + 2)`` numbers for ``P`` weights and
an increment of rank ``q``, which for one row is the number of outputs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.memory import Memory
from kbt_rl.inference.noise import NoiseEstimate
from kbt_rl.inference.record import Increment
from kbt_rl.inference.resolution import scale_correlations_
from kbt_rl.inference.state import HeadState
from kbt_rl.inference.update import apply


class Before(NamedTuple):
    """What an update overwrites: the means, a copy of ``(P,)``, and the noise, None where it is known."""

    mean: Tensor
    noise: NoiseEstimate | None


class Record(NamedTuple):
    """One update as it can be undone.

    Attributes:
        steps: Its increments in the order in which they were applied; several for more than 32 rows.
        before: What it has overwritten.
        rows: Labelled rows that it used.
    """

    steps: Sequence[Increment]
    before: Before
    rows: int


class Undo(NamedTuple):
    """What a rollback would leave: the posterior and the noise of before ``updates`` updates of ``rows`` rows."""

    state: HeadState
    noise: NoiseEstimate | None
    updates: int
    rows: int


class History:
    """The last updates of one posterior, valid as long as nothing else changes it.

    Increments can only be subtracted from the posterior that they were added to. Whatever else writes to a buffer of
    the head (``reset``, ``reopen``, ``set_noise``, ``load_state_dict``, a hand) moves that buffer's version counter,
    by which the history notices and starts again.

    Args:
        limit: Updates to keep at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._records: deque[Record] = deque(maxlen=limit)
        self._memory: Memory | None = None
        self._versions: tuple[int, ...] = ()

    def current(self, memory: Memory) -> int:
        """How many updates of this posterior are kept; drops those of any other and those before a foreign change."""
        if memory is not self._memory or _versions(memory) != self._versions:
            self._records.clear()
            self._memory = memory
        return len(self._records)

    def add(self, memory: Memory, record: Record) -> None:
        """Keep an update that has just been applied; ``current`` was called before that."""
        self._records.append(record)
        self._versions = _versions(memory)

    def plan(self, memory: Memory, count: int) -> Undo:
        """What undoing the last ``count`` updates would leave; changes nothing.

        Raises:
            ValueError: Fewer updates are kept.
            UpdateError: What is left would not be a proper posterior.
        """
        kept = self.current(memory)
        if not 1 <= count <= kept:
            raise ValueError(
                f"rollback({count}) while {kept} updates are kept; pass 1 to what is kept. The history holds the last "
                f"{self.limit} updates and starts again when the posterior or its noise is changed otherwise (reset, "
                "reopen, forget, add_process_noise, set_noise, loading, copying)"
            )
        undone = list(islice(reversed(self._records), count))
        state = reverted(memory.state, (step for record in undone for step in reversed(record.steps)))
        state.mean.copy_(undone[-1].before.mean)
        return Undo(state, undone[-1].before.noise, count, sum(record.rows for record in undone))

    def drop(self, memory: Memory, count: int) -> None:
        """Forget the last ``count`` updates, which have just been undone."""
        for _ in range(count):
            self._records.pop()
        self._versions = _versions(memory)


def reverted(state: HeadState, steps: Iterable[Increment]) -> HeadState:
    """The posterior before ``steps``, the last one first, as a copy.

    Raises:
        UpdateError: A variance would be negative, or something not finite: these steps were not the last ones. Or one
            of them has forgotten all correlations, of which nothing is left to restore.
    """
    before = state.clone()
    for step in steps:
        if step.correlation == 0.0:
            raise UpdateError(
                "one of these updates was repaired by forgetting all correlations between weights, which cannot be "
                "taken back; the posterior is unchanged. Roll back fewer updates, or use dtype='float64'"
            )
        apply(before, step._replace(mean_step=-step.mean_step, signs=-step.signs, correlation=1.0))
        if step.correlation != 1.0:
            scale_correlations_(before, 1.0 / step.correlation, before.variances())
    smallest = float(before.variances().min())
    # One sum finds any NaN or infinity of a block; inf - inf is NaN.
    if not math.isfinite(sum(float(block.sum()) for block in (before.mean, *before.cov))) or smallest < 0.0:
        raise UpdateError(
            f"taking back these updates would leave no proper posterior (smallest weight variance {smallest:.3g}); it "
            "is unchanged. They are not the last ones that were applied to it"
        )
    return before


def _versions(memory: Memory) -> tuple[int, ...]:
    return tuple(buffer._version for buffer in memory.buffers)
