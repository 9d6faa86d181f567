"""Two small measurements: the head before any update, and the first-order moments of the softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kbt_rl.agents.kbt import KBT
from kbt_rl.envs.plant import LABEL_BOX
from kbt_rl.experiments.learners import features_of
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.moments import Gaussian, softmax_moments

PRIOR_VARIANCES = tuple(10.0**power for power in range(-8, 3))
LOGIT_VARIANCES = tuple(10.0 ** (power / 2) for power in range(-8, 5))
_CLASSES = 5
_LOGIT_MEANS = 50
_CHUNK = 20_000


def initialisation_errors(model: KBT) -> dict[str, Any]:
    """Largest difference between the head and the pre-trained layer before any update, by prior variance and depth.

    Differences are in units of the label rms, over 1,000 states of the label box.
    """
    policy = model.policy
    box = np.asarray(LABEL_BOX)
    states = np.random.default_rng(0).uniform(-box, box, (1_000, 4))
    features = features_of(policy, states)
    linear = policy.transformer.linear
    wanted = features.double() @ linear.weight.detach().double().mT + linear.bias.detach().double()
    errors: dict[str, list[float]] = {}
    for layers in (1, 2, 3):
        errors[str(layers)] = []
        for variance in PRIOR_VARIANCES:
            config = HeadConfig(layers=layers, structure="neuron", hidden_variance=variance, last_variance=variance)
            head = BayesianHead.from_linear(linear, config, feature_mean=policy.transformer.feature_mean)
            errors[str(layers)].append(float((head(features) - wanted).abs().max()))
    return {"prior_variances": list(PRIOR_VARIANCES), "largest_difference": errors}


def softmax_errors(samples: int, seed: int) -> dict[str, Any]:
    """Error of the first-order softmax moments against sampling, over a range of logit variances.

    Returns:
        Root mean square error of the mean probabilities, and relative error (Frobenius) of their covariance, averaged
        over random mean logits of 5 classes.
    """
    rng = np.random.default_rng([seed, 11])
    means = rng.standard_normal((_LOGIT_MEANS, _CLASSES))
    noise = rng.standard_normal((samples, _CLASSES))
    mean_error, cov_error = [], []
    for variance in LOGIT_VARIANCES:
        pairs = [_sampled_softmax(mean, variance**0.5, noise) for mean in means]
        sampled_mean, sampled_cov = (np.stack(part) for part in zip(*pairs, strict=True))
        cov = variance * torch.eye(_CLASSES, dtype=torch.float64).expand(len(means), -1, -1)
        moments = softmax_moments(Gaussian(torch.from_numpy(means), cov))
        mean_error.append(float(np.sqrt(np.mean((moments.mean.numpy() - sampled_mean) ** 2))))
        difference = np.linalg.norm(moments.cov.numpy() - sampled_cov, axis=(1, 2))
        cov_error.append(float(np.mean(difference / np.linalg.norm(sampled_cov, axis=(1, 2)))))
    return {
        "logit_variances": list(LOGIT_VARIANCES),
        "mean_rmse": mean_error,
        "cov_relative_error": cov_error,
        "samples": samples,
    }


def _sampled_softmax(mean: Any, sd: float, noise: Any) -> tuple[Any, Any]:
    """Mean and covariance of the softmax of Gaussian logits by sampling, a chunk at a time."""
    total, outer = np.zeros(len(mean)), np.zeros((len(mean), len(mean)))
    for begin in range(0, len(noise), _CHUNK):
        logits = mean + sd * noise[begin : begin + _CHUNK]
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        total += probabilities.sum(axis=0)
        outer += probabilities.T @ probabilities
    average = total / len(noise)
    return average, outer / len(noise) - np.outer(average, average)
