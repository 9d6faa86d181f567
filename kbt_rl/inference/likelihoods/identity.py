"""Rules for the identity link: a number was measured, or is printed over the prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from kbt_rl.inference.covariance.roots import eye, inverse_root, signed_root
from kbt_rl.inference.density import LOG_TWO_PI
from kbt_rl.inference.errors import NotPositiveDefiniteError
from kbt_rl.inference.likelihoods.base import Conditioning, EachConditioning, Likelihood, Link
from kbt_rl.inference.types import Gaussian


class Measure(Likelihood):
    """Bayes' rule for ``y = u + noise``: ``dm = (S+R)^-1 (y-m)``."""

    link: Link = "identity"
    has_each = True

    def condition(self, predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
        """See ``Likelihood``."""
        innovation = target.flatten() - predicted.mean
        root = inverse_root(predicted.cov + noise_cov, "the predicted covariance plus noise")
        white = root @ innovation
        nis = white @ white
        density = _gaussian_log_density(root, nis)
        return Conditioning(root.mT @ white, eye(innovation), noise_cov, innovation, nis, density)

    def each(self, mean: Tensor, variance: Tensor, target: Tensor, noise: Tensor, active: float) -> EachConditioning:
        """See ``Likelihood``; an entry of NaN has no label."""
        given = ~torch.isnan(target)
        innovation = torch.where(given, target - mean, 0.0)
        total = variance + noise
        if not bool((total > 0.0).all()):
            raise NotPositiveDefiniteError("the predicted variance plus noise", float(total.min()))
        step = innovation / total
        nis = innovation @ step
        density = -0.5 * (nis + torch.where(given, total.log() + LOG_TWO_PI, 0.0).sum())
        return EachConditioning(step, torch.where(given, noise, torch.inf), innovation, nis, density)


class Replace(Likelihood):
    """Force the output to ``N(y, Sigma_data)`` as Algorithm 2 prints it: ``dm = S^-1 (y-m)``.

    This is not Bayes' rule: the covariance grows where ``Sigma_data > S``, and the mean keeps chasing the noise.
    """

    link: Link = "identity"

    def condition(self, predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
        """See ``Likelihood``; ``noise_cov`` is ``Sigma_data``."""
        innovation = target.flatten() - predicted.mean
        root = inverse_root(predicted.cov, "the predicted covariance, which the rule 'replace' inverts without noise")
        inverse = root.mT @ root
        change = signed_root(inverse @ noise_cov @ inverse - inverse)
        predictive = inverse_root(predicted.cov + noise_cov, "the predicted covariance plus noise")
        white = predictive @ innovation
        nis = white @ white
        density = _gaussian_log_density(predictive, nis)
        return Conditioning(inverse @ innovation, eye(innovation), noise_cov, innovation, nis, density, change=change)


def _gaussian_log_density(root: Tensor, nis: Tensor) -> Tensor:
    """Of a vector with the squared innovation ``nis`` and the covariance ``P``, given ``L^-1`` for ``P = L L'``."""
    # log det P = -2 sum log diag(L^-1).
    return root.diagonal().log().sum() - 0.5 * (nis + len(root) * LOG_TWO_PI)
