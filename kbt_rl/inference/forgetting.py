"""Loosen a posterior whose world may change: keep the means or move them back, and doubt them again.

Updates only contract the covariance, so a converged posterior hardly learns another plant. Fading divides the
covariance by a constant, as all evidence so far counted that much less; in directions without data it grows without
bound (wind-up). Process noise adds a part of the prior's covariance: weights that wander. Towards the prior, means and
covariance return to it at a rate (Ornstein-Uhlenbeck; Titsias et al. 2023, arXiv 2306.08448), which cannot wind up.

``FORGETTING`` holds what a head can do by itself after each update. When a change is detected, ``reopen`` goes back to
the prior's covariance at once.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from kbt_rl.inference.covariance.base import Cov
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.types import HeadState


class Forgetting(Protocol):
    """What happens to a posterior after each update."""

    def check(self, rate: float) -> None:
        """Raise ValueError for a rate out of range."""

    def __call__(self, state: HeadState, prior: HeadState, rate: float) -> HeadState:
        """A new posterior; nothing has changed."""


def reopened(state: HeadState, prior: HeadState, fraction: float = 1.0) -> HeadState:
    """``Sigma <- (1 - fraction) Sigma + fraction Sigma_prior``, means kept; the prior's own at ``fraction`` 1."""
    check_fraction(fraction)
    return _with_cov(state, _added(state, prior.cov, 1.0 - fraction, fraction))


def check_fraction(fraction: float) -> None:
    """Raise ValueError unless it lies in (0, 1]."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}; it lies in (0, 1], and 1 is the prior's covariance")


class Fading:
    """``Sigma <- Sigma / rate``, means kept: all evidence so far counts ``rate`` times as much."""

    def check(self, rate: float) -> None:
        """See ``Forgetting``."""
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"the forgetting factor is {rate}; it lies in (0, 1], and 1 forgets nothing")

    def __call__(self, state: HeadState, prior: HeadState, rate: float) -> HeadState:
        """See ``Forgetting``."""
        self.check(rate)
        return _with_cov(state, _added(state, state.cov, 1.0 / rate, 0.0))


class ProcessNoise:
    """``Sigma <- Sigma + rate Sigma_prior``, means kept: the weights have taken a step of a random walk."""

    def check(self, rate: float) -> None:
        """See ``Forgetting``."""
        if not 0.0 <= rate < math.inf:
            raise ValueError(f"the process noise is {rate}; it is finite and not negative")

    def __call__(self, state: HeadState, prior: HeadState, rate: float) -> HeadState:
        """See ``Forgetting``."""
        self.check(rate)
        return _with_cov(state, _added(state, prior.cov, 1.0, rate))


class TowardsPrior:
    """``m <- g m + (1 - g) m0``, ``Sigma <- g^2 Sigma + (1 - g^2) Sigma0`` with ``g = 1 - rate``."""

    def check(self, rate: float) -> None:
        """See ``Forgetting``."""
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"the rate towards the prior is {rate}; it lies in [0, 1], and 0 forgets nothing")

    def __call__(self, state: HeadState, prior: HeadState, rate: float) -> HeadState:
        """See ``Forgetting``."""
        self.check(rate)
        kept = (1.0 - rate) ** 2
        moved = _with_cov(state, _added(state, prior.cov, kept, 1.0 - kept))
        return HeadState(state.spec, torch.lerp(state.mean, prior.mean, rate), moved.cov)


FORGETTING: dict[str, Forgetting] = {
    "process_noise": ProcessNoise(),
    "towards_prior": TowardsPrior(),
    "fading": Fading(),
}


def _added(state: HeadState, other: Cov, scale: float, other_scale: float) -> Cov:
    return STRUCTURES[state.spec.structure].added(state.cov, other, scale, other_scale)


def _with_cov(state: HeadState, cov: Cov) -> HeadState:
    # One sum finds any NaN or infinity of a block; inf - inf is NaN.
    if not all(math.isfinite(float(block.sum())) for block in cov):
        raise UpdateError(
            "the loosened covariance would not be finite; the posterior is unchanged. Forgetting without data in some "
            "direction winds the covariance up: use reopen with a small fraction, which the prior bounds"
        )
    return HeadState(state.spec, state.mean, cov)
