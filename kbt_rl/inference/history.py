"""The last updates of a head, kept as increments so that they can be taken back.

A measurement is inverted, so that the covariance comes back to rounding at a fraction of the memory of a copy. The
means are kept as they were. In all that is ``P (q + 2)`` numbers for ``P`` weights and an update with ``q`` labels.
Where a measurement has no noise, or the head forgets, the covariance itself is kept.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from kbt_rl.inference.covariance.base import Cov, Replacement
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.types import HeadState, Increment


class Record(NamedTuple):
    """One update as it can be undone.

    Attributes:
        moves: Of the covariance, in the order in which they were applied.
        before: The means, and the buffers of a learned noise, as they were.
        rows: Labelled rows that it used.
    """

    moves: Sequence[Any]
    before: dict[str, Tensor]
    rows: int


def moves_to_keep(structure: str, cov: Cov, steps: Sequence[Increment], forgets: bool) -> list[Any]:
    """What takes an update back: its moves, or what was stored before it, ``cov``, where they cannot be inverted."""
    moves = [step.moves for step in steps]
    if not forgets and all(STRUCTURES[structure].invertible(move) for move in moves):
        return moves
    return [Replacement(tuple(block.clone() for block in cov), ())]


class Undo(NamedTuple):
    """What a rollback would leave: the posterior and the buffers of before ``updates`` updates of ``rows`` rows."""

    state: HeadState
    buffers: dict[str, Tensor]
    updates: int
    rows: int


class History:
    """The last updates of one posterior or of several stacked ones, valid as long as nothing else changes them.

    Moves can only be taken back from the posterior that they were made of. Whatever else writes to a buffer (``reset``,
    ``reopen``, ``set_noise``, ``load_state_dict``, a hand) moves that buffer's version counter, or replaces it, by
    which the history notices and starts again, for all posteriors that share the buffer.

    Args:
        limit: Updates to keep at most of each posterior.
        heads: Number of posteriors.
    """

    def __init__(self, limit: int, heads: int = 1) -> None:
        self.limit = limit
        self._records: list[deque[Record]] = [deque(maxlen=limit) for _ in range(heads)]
        self._seen: list[tuple[Tensor, int]] = []

    def fresh(self) -> History:
        """An empty history of the same size."""
        return History(self.limit, len(self._records))

    def current(self, buffers: Sequence[Tensor], head: int = 0) -> int:
        """How many updates of a posterior are kept; drops those before a foreign change."""
        now = _versions(buffers)
        same = len(now) == len(self._seen) and all(
            one is other and version == seen for (one, version), (other, seen) in zip(now, self._seen, strict=True)
        )
        if not same:
            for records in self._records:
                records.clear()
        return len(self._records[head])

    def add(self, buffers: Sequence[Tensor], record: Record, head: int = 0) -> None:
        """Keep an update that has just been applied; ``current`` was called before that."""
        self._records[head].append(record)
        self._seen = _versions(buffers)

    def plan(self, state: HeadState, buffers: Sequence[Tensor], count: int, head: int = 0) -> Undo:
        """What undoing the last ``count`` updates would leave; changes nothing.

        Raises:
            ValueError: Fewer updates are kept.
            UpdateError: What is left would not be a proper posterior.
        """
        kept = self.current(buffers, head)
        if not 1 <= count <= kept:
            raise ValueError(
                f"rollback({count}) while {kept} updates are kept; pass 1 to what is kept. The history holds the last "
                f"{self.limit} updates and starts again when the posterior or its noise is changed otherwise (reset, "
                "reopen, forget, add_process_noise, set_noise, loading, copying)"
            )
        undone = list(islice(reversed(self._records[head]), count))
        structure, cov = STRUCTURES[state.spec.structure], state.cov
        for record in undone:
            for moves in reversed(record.moves):
                cov = moves.before if isinstance(moves, Replacement) else structure.revert(cov, moves)
        if not all(math.isfinite(float(block.sum())) for block in cov):
            raise UpdateError("taking back these updates would leave no proper posterior; it is unchanged")
        before = undone[-1].before
        rows = sum(record.rows for record in undone)
        return Undo(HeadState(state.spec, before["mean"], cov), before, count, rows)

    def drop(self, buffers: Sequence[Tensor], count: int, head: int = 0) -> None:
        """Forget the last ``count`` updates, which have just been undone."""
        for _ in range(count):
            self._records[head].pop()
        self._seen = _versions(buffers)

    def forget(self, buffers: Sequence[Tensor], head: int) -> None:
        """Drop the updates of one posterior, which has just been replaced; ``current`` was called before that."""
        self._records[head].clear()
        self._seen = _versions(buffers)


def _versions(buffers: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    return [(buffer, buffer._version) for buffer in buffers if not buffer.is_inference()]
