"""How well a prior predicts a stream: the sum of one-step-ahead log predictive densities.

By the chain rule that sum is the logarithm of the probability of all labels under the model, its evidence, if the
updates are exact: so for one layer with known noise, in any order. Else it is the evidence of the model as it is in
use, approximations and all, and depends a little on the order (Dawid 1984, "Statistical theory: the prequential
approach"). Either way nothing is held out and nothing is optimised: each label is judged before it is learned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import numpy.typing as npt
from torch import Tensor

from kbt_rl.inference.head import BayesianHead

Rows = Tensor | npt.NDArray[Any]


def sequential_log_density(head: BayesianHead, batches: Iterable[tuple[Rows, Rows]]) -> float:
    """Sum of the log predictive densities of a stream, each before its closed-form update.

    Args:
        head: From which to start; a copy learns, the head itself stays as it is.
        batches: Features ``(B, d)`` and targets ``(B, o)`` of one update after another. To go row by row:
            ``zip(features.split(1), targets.split(1))``.

    Returns:
        In nats, with targets in their own units; a sum over all batches, 0 without any. With the softmax link the sum
        of the labels' log probabilities.

    Raises:
        ValueError: Wrong shape, or not finite.
        UpdateError: An update would not leave a proper posterior.
    """
    learner, total = copy.deepcopy(head), 0.0
    for features, targets in batches:
        info = learner.update(features, targets)
        total += info.log_density - (info.labels // learner.out_features) * learner.log_scale
    return total
