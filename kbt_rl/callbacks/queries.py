"""When a label is worth asking for: rules that look at a sample before the expert is asked.

An expert costs something: a person's attention, a slow solver, a measurement. A rule sees the contexts that a stream
offers and the learner's own uncertainty about them, and says which rows to ask for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kbt_rl.agents import posteriors
from kbt_rl.agents.bayesian import BayesianLearner
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.arguments import between

Mask = npt.NDArray[np.bool_]


class QueryRule(ABC):
    """Decides which rows of a sample are worth a label."""

    def check(self, model: OnlineAlgorithm) -> None:  # noqa: B027
        """Raise an error if this rule cannot serve the model; called before training starts."""

    @abstractmethod
    def wants(self, model: OnlineAlgorithm, features: Tensor) -> Mask:
        """Rows to ask for, ``(n,)``, given the encoded contexts ``(n, width)``."""


class Always(QueryRule):
    """Every row."""

    def wants(self, model: OnlineAlgorithm, features: Tensor) -> Mask:
        """See ``QueryRule``."""
        return np.ones(len(features), dtype=bool)


class Random(QueryRule):
    """Each row with a fixed probability; draws from the model's stream generator, so that a saved model resumes.

    Args:
        probability: Of asking, in (0, 1].
    """

    def __init__(self, probability: float) -> None:
        expected = "it must lie in (0, 1]"
        self.probability = between("probability", probability, 0.0, 1.0, expected=expected, open_low=True)

    def wants(self, model: OnlineAlgorithm, features: Tensor) -> Mask:
        """See ``QueryRule``."""
        mask: Mask = model.stream_rng.random(len(features)) < self.probability
        return mask


class VarianceGate(QueryRule):
    """Rows whose epistemic variance exceeds a multiple of the label noise: where a label still tells something.

    Args:
        threshold: Epistemic over noise variance, averaged over the outputs, from which to ask. At 1 a label and the
            posterior are equally good; below 0.1 a label changes the prediction by less than a tenth of its error. With
            discrete actions the variance of the logits.
    """

    def __init__(self, threshold: float = 1.0) -> None:
        expected = "it is a variance ratio, finite and not negative"
        self.threshold = between("threshold", threshold, 0.0, expected=expected)

    def check(self, model: OnlineAlgorithm) -> None:
        """Only a posterior has an epistemic variance, and only noise a unit for it."""
        noise_variance(model)

    def wants(self, model: OnlineAlgorithm, features: Tensor) -> Mask:
        """See ``QueryRule``."""
        mask: Mask = epistemic_variance(model, features) > self.threshold * noise_variance(model)
        return mask


def epistemic_variance(model: OnlineAlgorithm, features: Tensor, each: int = 1) -> npt.NDArray[Any]:
    """Average epistemic variance of the outputs in the head's own units, ``(n,)``.

    Args:
        model: The learner.
        features: ``(n, width)``; with one posterior for each environment, ``each`` successive rows of each.
        each: See there.

    Raises:
        TypeError: The model has no posterior.
    """
    variances = posteriors.epistemic_variance(_heads_of(model), features, each)
    variance: npt.NDArray[Any] = variances.mean(-1).cpu().numpy()
    return variance


def noise_variance(model: OnlineAlgorithm) -> npt.NDArray[Any]:
    """Average noise variance of the outputs of each posterior in the head's own units, ``(posteriors,)``.

    1 with the softmax link, whose labels have no noise variance: what is compared with it is the variance of logits.

    Raises:
        TypeError: The model has no posterior.
        ValueError: A noise variance is 0.
    """
    heads = _heads_of(model)
    if posteriors.link(heads) == "softmax":
        return np.ones(len(heads))
    noise = posteriors.noise_covs(heads)
    variances: npt.NDArray[Any] = noise.diagonal(dim1=-2, dim2=-1).mean(-1).cpu().numpy()
    if not (variances > 0.0).all():
        raise ValueError("the head's noise variance is 0, so nothing is small beside it; set_noise to what labels have")
    return variances


def _heads_of(model: OnlineAlgorithm) -> posteriors.Heads:
    if not isinstance(model, BayesianLearner):
        raise TypeError(f"{type(model).__name__} has no posterior to ask; variance-based queries need KBT")
    heads: posteriors.Heads = model.policy.heads
    return heads
