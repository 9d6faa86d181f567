"""Loosen a posterior whose world may have changed: keep the means, and doubt them again.

Updates only contract the covariance, so a converged posterior hardly learns another plant. Three remedies: move the
covariance back towards the prior's (all the way: re-open it), divide it by a constant (forgetting), add the covariance
of a process noise. Forgetting has no bound: in directions without data the covariance grows by ``1 / factor`` with
every call (wind-up). A step towards the prior cannot grow beyond it.

Each function computes the new covariance beside the old one, checks it, and then replaces it in place; an interrupt
that arrives meanwhile is delivered afterwards. Sums of positive semi-definite matrices stay so in every structure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.state import HeadState
from kbt_rl.inference.update import overwrite


def reopen(state: HeadState, prior_cov: Sequence[Tensor], fraction: float = 1.0) -> None:
    """``Sigma <- (1 - fraction) Sigma + fraction Sigma_prior``, means kept; the prior itself at ``fraction`` 1.

    Args:
        state: The posterior, changed in place.
        prior_cov: The prior's covariance in the storage of ``state``.
        fraction: How far to go, in (0, 1].

    Raises:
        ValueError: ``fraction`` is outside (0, 1], or ``prior_cov`` is not stored as the posterior is.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}; it lies in (0, 1], and 1 is the prior's covariance")
    _check_storage(state, prior_cov, "prior_cov")
    if fraction == 1.0:
        _replace_cov(state, prior_cov)
        return
    _replace_cov(state, [torch.lerp(mine, prior, fraction) for mine, prior in zip(state.cov, prior_cov, strict=True)])


def forget(state: HeadState, factor: float) -> None:
    """``Sigma <- Sigma / factor``, means kept: all evidence so far counts ``factor`` times as much.

    Args:
        state: The posterior, changed in place.
        factor: In (0, 1].

    Raises:
        ValueError: ``factor`` is outside (0, 1].
        UpdateError: The covariance would no longer be finite; the posterior is unchanged.
    """
    if not 0.0 < factor <= 1.0:
        raise ValueError(f"the forgetting factor is {factor}; it lies in (0, 1], and 1 forgets nothing")
    _replace_cov(state, [block / factor for block in state.cov])


def diffuse(state: HeadState, process_cov: Sequence[Tensor], scale: float = 1.0) -> None:
    """``Sigma <- Sigma + scale Q``, means kept: the weights have taken a step of a random walk.

    Args:
        state: The posterior, changed in place.
        process_cov: ``Q``, positive semi-definite, in the storage of ``state``.
        scale: Not negative.

    Raises:
        ValueError: ``scale`` is negative or not finite, or ``process_cov`` is not stored as the posterior is.
        UpdateError: The covariance would no longer be finite; the posterior is unchanged.
    """
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"the process noise is {scale}; it is finite and not negative")
    _check_storage(state, process_cov, "process_cov")
    _replace_cov(state, [torch.add(mine, step, alpha=scale) for mine, step in zip(state.cov, process_cov, strict=True)])


def _check_storage(state: HeadState, cov: Sequence[Tensor], name: str) -> None:
    mine, other = ([(tuple(block.shape), block.dtype) for block in blocks] for blocks in (state.cov, cov))
    if mine != other:
        raise ValueError(f"{name} is stored as {other}; the posterior ({state.spec.structure}) as {mine}")


def _replace_cov(state: HeadState, cov: Sequence[Tensor]) -> None:
    """Replace the covariance and let everyone know who caches what follows from the posterior."""
    # One sum finds any NaN or infinity of a block; inf - inf is NaN.
    if not all(math.isfinite(float(block.sum())) for block in cov):
        raise UpdateError(
            "the loosened covariance would not be finite; the posterior is unchanged. Forgetting without data in some "
            "direction winds the covariance up: use reopen with a small fraction, which the prior bounds"
        )
    overwrite(state, HeadState(state.spec, state.mean, tuple(cov)))
    # Caches go by the version of the mean. Once more after the covariance, for those who looked from another thread.
    increment_version(state.mean)
