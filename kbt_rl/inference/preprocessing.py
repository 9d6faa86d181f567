"""Algorithm 1: a pair of sequences as the rows of one joint update.

A training pair of a sequence model expands into one prefix for each position. All rows of a pair enter one update, so
that pairs stay independent of each other while the rows of a pair need not be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Rows = Literal["all", "last"]


def prefix_rows(
    encode: Callable[[Tensor], Tensor], sequence: Tensor, targets: Tensor, rows: Rows = "last"
) -> tuple[Tensor, Tensor]:
    """Features and targets of every prefix of one sequence, stacked for a single joint update.

    With a causal encoder the first ``i`` rows of all longer prefixes are copies of each other. ``rows="all"`` keeps
    them, as the paper prints it: the same evidence counts several times (``k`` equal rows with noise ``R`` act like one
    with ``R / k``), and the predicted covariance is singular. ``rows="last"`` uses each position once.

    Args:
        encode: T1: a prefix ``(i, s)`` to its features ``(i, d)``.
        sequence: Inputs ``(T, s)``.
        targets: Target of each position, ``(T, o)``.
        rows: ``last`` for the newest row of each prefix, ``all`` for every row (Algorithm 1).

    Returns:
        Features ``(R, d)`` and targets ``(R, o)`` with ``R = T`` or ``T (T + 1) / 2``.
    """
    if len(sequence) != len(targets) or len(sequence) == 0:
        raise ValueError(
            f"{len(sequence)} inputs and {len(targets)} targets; expected one target a position, at least 1"
        )
    if rows not in ("all", "last"):
        raise ValueError(f"rows is {rows!r}; choose 'all' or 'last'")
    features, labels = [], []
    for length in range(1, len(sequence) + 1):
        encoded = encode(sequence[:length])
        if encoded.shape[0] != length:
            raise ValueError(
                f"encode returned {encoded.shape[0]} rows for a prefix of {length}; expected one a position"
            )
        first = 0 if rows == "all" else length - 1
        features.append(encoded[first:])
        labels.append(targets[first:length])
    return torch.cat(features), torch.cat(labels)
