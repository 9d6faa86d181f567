"""How well a prior predicts a stream: the sum of one-step-ahead log predictive densities.

By the chain rule that sum is the logarithm of the probability of all labels under the model, its evidence, if the
updates are exact: so for one layer with known noise, in any order. Else it is the evidence of the model as it is in
use, approximations and all, and depends a little on the order (Dawid 1984, "Statistical theory: the prequential
approach"). Either way nothing is held out and nothing is optimised: each label is judged before it is learned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.types import Rows


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
        total += learner.update(features, targets).log_density - _log_units(learner, targets)
    return total


def _log_units(head: BayesianHead, targets: Rows) -> float:
    """What takes a log density of these targets from the head's units into their own; entries of NaN have none."""
    if head.rule.link == "softmax":
        return 0.0
    given = ~torch.isnan(torch.as_tensor(targets, dtype=torch.float64, device=head.target_scale.device))
    return float(given.sum(0).double() @ head.target_scale.log())
