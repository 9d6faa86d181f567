"""One head for all environments, or one for each: the same questions asked of either.

With one head every row of features is its business. With several, row ``i`` belongs to head ``i``, which knows nothing
of the others.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.checks import as_array
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.likelihoods.base import Link
from kbt_rl.inference.model_average import ModelAverage
from kbt_rl.inference.prediction import Prediction
from kbt_rl.inference.types import Gaussian, UpdateInfo

# One head, or a head for each environment.
Heads: TypeAlias = tuple[BayesianHead | ModelAverage] | HeadBatch


def _asked(heads: Heads) -> BayesianHead | ModelAverage | HeadBatch:
    return heads if isinstance(heads, HeadBatch) else heads[0]


def link(heads: Heads) -> Link:
    """Link of the output rule."""
    return _asked(heads).link


def plain_noise(heads: Heads) -> bool:
    """Whether the label noise is known and Gaussian."""
    return _asked(heads).plain_noise


def check_rows(heads: Heads, rows: int, each: int = 1) -> None:
    """Raise ValueError unless there are ``each`` rows a head; a single head takes any number."""
    if len(heads) > 1 and rows != each * len(heads):
        raise ValueError(
            f"this policy has {len(heads)} posteriors, one for each environment, and needs {each * len(heads)} rows in "
            f"their order; got {rows}. policy.select(i) takes one of them out, as a policy for any number of rows"
        )


def mean(heads: Heads, features: Tensor) -> Tensor:
    """Predicted mean of the target, ``(n, o)``, float64; class probabilities with softmax."""
    check_rows(heads, len(features))
    asked = _asked(heads)
    outputs = asked(features) if isinstance(asked, HeadBatch) else asked.mean_outputs(features)
    return torch.softmax(outputs, dim=-1) if link(heads) == "softmax" else outputs


def predict(heads: Heads, features: Tensor) -> Prediction:
    """Distribution of the target for each row."""
    check_rows(heads, len(features))
    return _asked(heads).predict(features)


def logits(heads: Heads, features: Tensor, each: int = 1) -> Gaussian:
    """Distribution of the last layer's output, in the heads' units, for ``each`` successive rows a head."""
    check_rows(heads, len(features), each)
    if isinstance(heads, HeadBatch):
        return heads.predict_logits(features, each)
    assert isinstance(heads[0], BayesianHead)
    return heads[0].predict_logits(features)


def epistemic_variance(heads: Heads, features: Tensor, each: int = 1) -> Tensor:
    """Variance of each output from the weights, ``(n, o)``, in the heads' units, of logits with softmax."""
    check_rows(heads, len(features), each)
    if isinstance(heads, HeadBatch):
        return heads.epistemic_variance(features, each)
    return heads[0].epistemic_variance(features)


def noise_covs(heads: Heads) -> Tensor:
    """Covariance of the label noise of each head, ``(heads, o, o)``, in the heads' units."""
    return heads.get_buffer("noise_cov") if isinstance(heads, HeadBatch) else heads[0].noise_cov.unsqueeze(0)


def labels_seen(heads: Heads) -> int:
    """Labelled rows that the heads have learned from, all together."""
    return int(torch.as_tensor(_asked(heads).labels_seen).sum())


def scales(heads: Heads, target: npt.NDArray[np.float64]) -> tuple[float, float]:
    """What averaged variances are multiplied by, and a log density of labels ``(B, o)`` is less, in target units.

    All heads have the same scales; an entry of NaN is no label and has no density.
    """
    outputs = torch.as_tensor(_asked(heads).target_scale).view(-1, target.shape[1])[0].cpu().numpy()
    known = (~np.isnan(target)).sum(axis=0)
    return float(outputs @ outputs) / len(outputs), float(known @ np.log(outputs))


def update(heads: Heads, rows: npt.NDArray[np.intp], features: Tensor, target: npt.NDArray[np.float64]) -> UpdateInfo:
    """Condition the heads on labelled rows: one head on all of them jointly, of several each on its own.

    Either all complete or nothing changes.

    Args:
        heads: The posteriors.
        rows: Which head each row belongs to, ``(B,)``, in ascending order; a single head does not look at it.
        features: ``(B, d)``.
        target: ``(B, o)``.

    Returns:
        The record over all rows.

    Raises:
        ValueError: Wrong shape, or not finite.
        UpdateError: A result would not be a proper posterior.
    """
    if not isinstance(heads, HeadBatch):
        return heads[0].update(features, target)
    inputs, labels = np.zeros((len(heads), features.shape[1])), np.full((len(heads), target.shape[1]), np.nan)
    inputs[rows], labels[rows] = as_array(features), target
    return heads.update(inputs, labels, together=True).merged()


def rollback(heads: Heads, n: int, index: int | None = None) -> int:
    """Take back the last ``n`` updates of one head or of each, all or none; returns the labelled rows they had used."""
    return heads.rollback(n, index) if isinstance(heads, HeadBatch) else heads[0].rollback(n)
