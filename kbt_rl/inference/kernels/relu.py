"""Moments of ReLU units (``moments.relu_moments``, a series of two terms) without a call into a library.

libm's exp and erfc are calls, which no loop over units can turn into vector instructions; these are arithmetic alone.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kbt_rl.inference.kernels.jit import compiled, in_order, inlined

Array = npt.NDArray[np.float64]

_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
# As in ``moments``: beyond it the square of a ratio leaves float64.
_FAR = 0.5 * math.sqrt(np.finfo(np.float64).max)
_SMALLEST_SD = math.sqrt(np.finfo(np.float64).tiny)
# For ``_exp``: a number to which a float can be added only in whole units, and ln 2 as a short number and the rest.
_LOG2_E, _SHIFT = 1.0 / math.log(2.0), 1.5 * 2.0**52
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33")


@in_order
def _exp(exponent: float) -> float:
    """``exp`` of a number of at most 0, to two units in the last place; 0 below -700, so that none is subnormal."""
    shifted = max(exponent, -700.0) * _LOG2_E + _SHIFT  # the last bits are now the nearest whole power of 2
    power = shifted - _SHIFT
    rest = (max(exponent, -700.0) - power * _LN2_HIGH) - power * _LN2_LOW
    series = rest * (1.0 / 6227020800.0) + 1.0 / 479001600.0
    series = (series * rest + 1.0 / 39916800.0) * rest + 1.0 / 3628800.0
    series = (series * rest + 1.0 / 362880.0) * rest + 1.0 / 40320.0
    series = (series * rest + 1.0 / 5040.0) * rest + 1.0 / 720.0
    series = (series * rest + 1.0 / 120.0) * rest + 1.0 / 24.0
    series = (series * rest + 1.0 / 6.0) * rest + 0.5
    series = (series * rest + 1.0) * rest + 1.0
    bits = np.float64(shifted).view(np.int64)
    scale = np.int64((bits + 1023) << 52).view(np.float64)
    return series * scale if exponent >= -700.0 or exponent != exponent else 0.0


@in_order
def _mills(x: float) -> float:
    """Mills' ratio ``(1 - Phi(x)) / phi(x)`` for ``x >= 0``, to a few units in the last place.

    ``(x + 5)`` times it is a smooth function of ``t = (x - 5) / (x + 5)``, here as the first 23 terms of its Chebyshev
    series, in powers of ``t``; what is left out is 6e-17 of it.
    """
    inverse = 1.0 / (x + 5.0)
    t = (x - 5.0) * inverse
    p = -1.968820796668673e-09
    p = (p * t + 1.2681778133106914e-09) * t + 2.324918339616538e-08
    p = (p * t - 1.2601401701289641e-08) * t - 1.6898908396071304e-07
    p = (p * t + 8.984895390080813e-08) * t + 1.0865648093633823e-06
    p = (p * t - 8.29951776733244e-07) * t - 6.9405498481783575e-06
    p = (p * t + 9.971212523126543e-06) * t + 4.181269707272043e-05
    p = (p * t - 0.00012473429411922815) * t - 0.00014883252854029768
    p = (p * t + 0.0013658588260150296) * t - 0.0019999620670556138
    p = (p * t - 0.007503282770439648) * t + 0.05212550242182693
    p = (p * t - 0.17325473409133701) * t + 0.41364471573217226
    p = (p * t - 0.7859110755463842) * t + 1.241547061573877
    p = (p * t - 1.667866595188962) * t + 1.9280810471531575
    return p * inverse


@inlined
def relu_unit(mean: float, variance: float) -> tuple[float, float, float, float]:
    """Of ``relu(u)``: mean, variance beyond ``Phi^2 Var u``, slope ``Phi``, and density over sd for the series.

    Without a branch, so that a loop over units runs on several at a time.
    """
    sd = math.sqrt(variance)
    sd = _SMALLEST_SD if sd < _SMALLEST_SD else sd
    ratio = mean / sd
    ratio = _FAR if ratio > _FAR else ratio
    ratio = -_FAR if ratio < -_FAR else ratio
    density = _exp(-0.5 * ratio * ratio) * _INV_SQRT_2PI
    tail = density * _mills(abs(ratio))  # the other one is at least 1/2, and 1 minus this one to rounding
    upper = 1.0 - tail if ratio > 0.0 else tail
    lower = tail if ratio > 0.0 else 1.0 - tail
    curved = upper * lower + ratio * (ratio * (upper * lower) - density * (upper - lower)) - density * density
    curved = 0.0 if curved < 0.0 else curved
    return mean * upper + sd * density, variance * curved, upper, density / sd


@compiled
def relu_moments(
    means: Array, linears: Array, excesses: Array, outs: Array, covs: Array, slopes: Array, rests: Array
) -> None:
    """``moments.relu_moments`` with two terms for each of ``N`` problems: means ``(N, r)``, covariances ``(N, r, r)``.

    ``excesses`` is ``(0, 0, 0)`` for none. The last four arguments receive the mean, the covariance, the slope and the
    part of the covariance that is not linear.
    """
    count, size = means.shape
    curvature, curved = np.empty(size), np.empty(size)
    for index in range(count):
        mean, linear, slope = means[index], linears[index], slopes[index]
        cov, rest = covs[index], rests[index]
        extra = excesses[index] if len(excesses) > 0 else linear
        share = 1.0 if len(excesses) > 0 else 0.0
        for j in range(size):
            outs[index, j], curved[j], slope[j], curvature[j] = relu_unit(mean[j], linear[j, j] + share * extra[j, j])
        for j in range(size):
            half, own = 0.5 * curvature[j], slope[j]
            for i in range(size):
                total = linear[j, i] + share * extra[j, i]
                known = own * slope[i]
                rest[j, i] = (half * total) * (curvature[i] * total) + share * known * extra[j, i]
                cov[j, i] = rest[j, i] + known * linear[j, i]
            rest[j, j] = curved[j] + share * own * own * extra[j, j]
            cov[j, j] = rest[j, j] + own * own * linear[j, j]
