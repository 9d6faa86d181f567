"""Two small measurements: the head before any update, and the first-order moments of the softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import norm, qmc
from torch import Tensor

from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.envs.plant import LABEL_BOX
from kbt_rl.experiments.learners import features_of
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.moments import Gaussian, softmax_moments
from kbt_rl.inference.prior import prior_cov, prior_means
from kbt_rl.inference.state import HeadState
from kbt_rl.inference.update import predict_logits

PRIOR_VARIANCES = tuple(10.0**power for power in range(-8, 3))
LOGIT_VARIANCES = tuple(10.0 ** (power / 2) for power in range(-8, 5))
_CLASSES = 5
_LOGIT_MEANS = 50

FloatArray = npt.NDArray[np.float64]


def initialisation_errors(model: OnlineAlgorithm) -> dict[str, Any]:
    """Largest difference between the head and the pre-trained layer before any update, by prior variance and depth.

    Differences are in units of the label rms, over 1,000 states of the label box. The heads are bare posteriors:
    compiling the updates of three kinds of heads, which nobody asks for here, would take 20 s.
    """
    policy = model.policy
    box = np.asarray(LABEL_BOX)
    states = np.random.default_rng(0).uniform(-box, box, (1_000, 4))
    transformer = policy.transformer
    centre = transformer.feature_mean.double()
    weight, bias = (values.detach().double() for values in (transformer.linear.weight, transformer.linear.bias))
    features = features_of(policy, states).double()
    wanted = features @ weight.mT + bias
    errors: dict[str, list[float]] = {}
    for layers in (1, 2, 3):
        errors[str(layers)] = []
        for variance in PRIOR_VARIANCES:
            config = HeadConfig(layers=layers, structure="neuron", hidden_variance=variance, last_variance=variance)
            found = predict_logits(_prior(config, weight, bias + weight @ centre), features - centre).mean
            errors[str(layers)].append(float((found - wanted).abs().max()))
    return {"prior_variances": list(PRIOR_VARIANCES), "largest_difference": errors}


def _prior(config: HeadConfig, weight: Tensor, bias: Tensor) -> HeadState:
    """The posterior of a head before any update, for a pre-trained layer on centred features."""
    outputs, width = weight.shape
    spec, rho = config.resolve(width, outputs)
    mean = torch.cat([layer.flatten() for layer in prior_means(weight, bias, spec.shapes)])
    hidden, last = config.hidden_variance, config.last_variance
    cov = prior_cov(spec.shapes, spec.structure, hidden_variance=hidden, last_variance=last, rho=rho)
    return HeadState(spec, mean, cov)


def softmax_errors(samples: int, seed: int) -> dict[str, Any]:
    """Error of the first-order softmax moments against sampling, over a range of logit variances.

    Returns:
        Root mean square error of the mean probabilities, and relative error (Frobenius) of their covariance, averaged
        over random mean logits of 5 classes.
    """
    means = np.random.default_rng([seed, 11]).standard_normal((_LOGIT_MEANS, _CLASSES))
    noise = _white_noise(samples, seed)
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


def _white_noise(samples: int, seed: int) -> FloatArray:
    """Standard normal points ``(samples, classes)`` that fill space evenly and have mean 0 and covariance I exactly.

    The terms of the softmax that are linear in the noise, by far the largest ones, then have no sampling error.
    """
    points = norm.ppf(qmc.Sobol(_CLASSES, seed=np.random.default_rng([seed, 12])).random(samples))
    points -= points.mean(axis=0)
    white: FloatArray = np.linalg.solve(np.linalg.cholesky(points.T @ points / samples), points.T).T
    return white


def _sampled_softmax(mean: FloatArray, sd: float, noise: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and covariance of the softmax of Gaussian logits by sampling."""
    logits = mean + sd * noise
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = weights / weights.sum(axis=1, keepdims=True)
    average = probabilities.mean(axis=0)
    return average, probabilities.T @ probabilities / len(noise) - np.outer(average, average)
