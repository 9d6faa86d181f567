"""What a head predicts of a target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kbt_rl.inference.likelihoods.base import Link
from kbt_rl.inference.moments import softmax_jacobian, softmax_variances


@dataclass(frozen=True, eq=False)
class Prediction:
    """Distribution of the target for each row; unpacks as mean ``(N, o)`` and two covariances ``(N, o, o)``.

    The predictive covariance is ``epistemic + aleatoric``: what the weights do not know, and what no weights can know.
    With the softmax link the mean is the class probabilities. Covariances are made when they are asked for;
    ``epistemic_variance`` and ``aleatoric_variance`` ``(N, o)`` do without them, for many classes.

    Attributes:
        mean: Of the target, ``(N, o)``.
    """

    mean: Tensor
    _cov: Tensor
    _link: Link
    _noise: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.mean, self.epistemic, self.aleatoric))

    @property
    def epistemic(self) -> Tensor:
        """Covariance from the weights."""
        cov = torch.diag_embed(self._cov) if self._cov.ndim == 2 else self._cov
        if self._link == "identity":
            return cov
        jacobian = softmax_jacobian(self.mean)
        return jacobian @ cov @ jacobian

    @property
    def aleatoric(self) -> Tensor:
        """Covariance of the label noise, or of the choice of a class."""
        if self._link == "softmax":
            return softmax_jacobian(self.mean)
        return self._noise.expand(*self.mean.shape, self.mean.shape[-1])

    @property
    def epistemic_variance(self) -> Tensor:
        """Diagonal of ``epistemic``, ``(N, o)``."""
        cov = self._cov
        if self._link == "softmax" and cov.ndim == 2:
            return softmax_variances(self.mean, cov)
        return cov if cov.ndim == 2 else self.epistemic.diagonal(dim1=-2, dim2=-1)

    @property
    def aleatoric_variance(self) -> Tensor:
        """Diagonal of ``aleatoric``, ``(N, o)``."""
        if self._link == "softmax":
            return self.mean * (1.0 - self.mean)
        return self._noise.diagonal(dim1=-2, dim2=-1).expand_as(self.mean)
