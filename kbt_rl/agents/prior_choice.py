"""The prior without tuning by hand: the candidate that predicts a short labelled stream best, one step ahead.

Each candidate starts as the pre-trained policy and learns the stream by closed-form updates; its score is the sum of
the log predictive densities, see ``inference.evidence``. There is no gradient, no inner loop and no held-out set, and
the model itself stays as it is. What is chosen goes into a new model: ``policy_kwargs={"head": choice.config}``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.sample import Sample, labelled
from kbt_rl.arguments import instance, shown
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.evidence import sequential_log_density
from kbt_rl.inference.head import BayesianHead

Batch = tuple[Tensor, npt.NDArray[np.float64]]

HIDDEN_VARIANCES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
LAST_VARIANCES = (0.01, 0.1, 1.0, 10.0, 100.0)
RHOS = (0.0, 0.9, 0.99, 0.999, 0.9999)


class PriorScore(NamedTuple):
    """One candidate: its prior, and the log predictive density of the streams in nats, with labels in action units.

    ``log_density`` is the sum over all labels, minus infinity where an update failed; ``per_label`` its mean.
    """

    hidden_variance: float
    last_variance: float | None
    rho: float
    noise_variance: float
    log_density: float
    per_label: float


class PriorChoice(NamedTuple):
    """The candidate with the largest score, and the scores of all in their order."""

    config: HeadConfig
    scores: list[PriorScore]


def prior_grid(
    base: HeadConfig | None = None,
    *,
    hidden: Sequence[float] = HIDDEN_VARIANCES,
    last: Sequence[float] = LAST_VARIANCES,
    rhos: Sequence[float] = RHOS,
    noise: Sequence[float] | None = None,
) -> list[HeadConfig]:
    """Every combination of the given priors; what a head of this kind has no use for is not varied.

    Args:
        base: All other settings; the default head if None.
        hidden: Prior variances of the hidden layers' weights; not varied with one layer.
        last: Prior variances of the last layer's weights.
        rhos: Ties of pairs in the last layer; not varied with one layer or the structure ``diagonal``.
        noise: Variances of the label noise; as in ``base`` if None.
    """
    base = HeadConfig() if base is None else base
    hidden = (base.hidden_variance,) if base.layers == 1 else hidden
    ties: Sequence[float | None] = (base.rho,) if base.layers == 1 or base.structure == "diagonal" else rhos
    noises = (base.noise_variance,) if noise is None else noise
    return [
        replace(base, hidden_variance=h, last_variance=v, rho=rho, noise_variance=n)
        for h, v, rho, n in itertools.product(hidden, last, ties, noises)
    ]


def choose_prior(model: KBT, *streams: Sequence[Sample], candidates: Iterable[HeadConfig] | None = None) -> PriorChoice:
    """Score each candidate on labelled streams, each of which starts from the prior.

    Label noise that was set with ``set_noise`` on the model's head holds for every candidate whose own settings of the
    noise are those of the model; another ``noise_variance`` is a candidate's own guess, in units of ``target_scale``
    squared.

    Args:
        model: Pre-trained; its transformer and its units serve all candidates, and it is not changed.
        *streams: Samples in the order in which they come; several streams for several plants. Of equal candidates, the
            first is chosen, so that the choice is repeatable.
        candidates: What to choose from; ``prior_grid`` around the model's own head if None.

    Raises:
        ValueError: No labels, no candidates, a candidate whose rule does not fit the actions, a sample of a wrong
            shape, or every candidate failed.
    """
    instance("model", model, KBT)
    for name, given in (*((f"stream {i}", stream) for i, stream in enumerate(streams)), ("candidates", candidates)):
        if isinstance(given, (str, bytes, Tensor, np.ndarray)) or not (given is None or isinstance(given, Iterable)):
            raise TypeError(f"{name} is {shown(given)}; expected several of them")
    grid = prior_grid(model.policy.head_config) if candidates is None else list(candidates)
    if not grid:
        raise ValueError("there are no candidates to choose a prior from")
    for config in grid:
        instance("a candidate", config, HeadConfig)
    encoded = [list(_batches(model, stream)) for stream in streams]
    labels = sum(len(targets) for batches in encoded for _, targets in batches)
    if not labels:
        raise ValueError("no sample has a label; a prior is chosen by how well it predicts labels")
    scores = [_score(model.policy, config, encoded, labels) for config in grid]
    best = max(range(len(grid)), key=lambda index: scores[index].log_density)
    if scores[best].log_density == -math.inf:
        raise ValueError(
            f"all {len(grid)} candidates failed on these samples; raise their noise variance or lower the priors"
        )
    return PriorChoice(grid[best], scores)


def _batches(model: KBT, stream: Sequence[Sample]) -> Iterator[Batch]:
    """Features and targets of the rows that have a label, as ``KBT.update`` takes them."""
    policy = model.policy
    for sample in stream:
        given = labelled(policy, sample)
        if len(given.rows):
            features = policy.encode(given.context) if given.features is None else given.features
            yield features, given.target


def _score(
    policy: DecisionTransformerPolicy, config: HeadConfig, streams: Sequence[Sequence[Batch]], labels: int
) -> PriorScore:
    head = candidate_head(policy, config)
    try:
        total = sum(sequential_log_density(head, batches) for batches in streams)
    except UpdateError:  # no proper posterior: a prior that cannot learn this stream
        total = -math.inf
    rho = config.resolve(head.in_features, head.out_features)[1]
    return PriorScore(config.hidden_variance, config.last_variance, rho, config.noise_variance, total, total / labels)


def candidate_head(policy: DecisionTransformerPolicy, config: HeadConfig) -> BayesianHead:
    """A head with another prior that starts as the pre-trained policy, see ``choose_prior`` for its noise."""
    head, own = policy.prior_head(config), policy.head
    if all(getattr(config, name) == getattr(own.config, name) for name in ("noise", "noise_variance", "noise_start")):
        noise = own.noise_start_cov if own.learns_noise else own.noise_cov
        head.set_noise(noise * own.target_scale.unsqueeze(-1) * own.target_scale)
    return head
