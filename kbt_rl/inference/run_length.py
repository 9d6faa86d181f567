"""How long a CUSUM of chi-square log-likelihood ratios runs before it cries wolf, and the threshold for a given time.

Computed, not simulated: the sum is a Markov chain on an interval (Brook and Evans, Biometrika 59, 1972).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2

# Cells of the CUSUM's state space; Richardson's extrapolation from half as many removes the leading error.
_CELLS = 200


@lru_cache(maxsize=64)
def cusum_threshold(false_alarm_rate: float, inflation: float, labels: int = 1) -> float:
    """Threshold at which ``Cusum`` has this false-alarm rate on chi-square NIS.

    The root of ``cusum_run_length(threshold) = 1 / false_alarm_rate``. It is at most ``-log(false_alarm_rate)``,
    because the mean run length of any CUSUM of log-likelihood ratios is at least ``exp(threshold)`` (Lorden 1971).
    """

    def excess(threshold: float) -> float:
        return math.log(cusum_run_length(threshold, inflation, labels) * false_alarm_rate)

    if excess(0.0) > 0.0:
        raise ValueError(
            f"a CUSUM for inflation {inflation} alarms less often than {false_alarm_rate} a sample at every "
            "threshold; pass a smaller false_alarm_rate"
        )
    return float(brentq(excess, 0.0, -math.log(false_alarm_rate), xtol=1e-9))


def cusum_run_length(threshold: float, inflation: float, labels: int = 1) -> float:
    """Mean number of samples up to and including the alarm, from a restart, while the NIS are chi-square.

    The sum is a Markov chain on [0, threshold] (Brook and Evans 1972). Its run length solves the integral equation
    ``L(g) = 1 + L(0) F(-g) + integral_0^h L(x) f(x - g) dx``; here the sum is rounded to the nearest of equally spaced
    points, 0 among them, and the two resolutions are extrapolated.
    """
    coarse = _chain_run_length(threshold, inflation, labels, _CELLS // 2)
    fine = _chain_run_length(threshold, inflation, labels, _CELLS)
    return 2.0 * fine - coarse


def _chain_run_length(threshold: float, inflation: float, labels: int, cells: int) -> float:
    """Run length from 0 of the chain on the points ``0, w, ..., cells w`` with ``(cells + 1/2) w = threshold``."""
    width = threshold / (cells + 0.5)
    gain, drift = 0.5 * (1.0 - 1.0 / inflation), 0.5 * labels * math.log(inflation)
    edges = width * (np.arange(-cells, cells + 2) - 0.5)  # of the cell of each difference between two points
    below = chi2.cdf((edges + drift) / gain, labels)
    difference = np.arange(cells + 1) - np.arange(cells + 1)[:, None]  # [from, to]
    transition = np.diff(below)[difference + cells]
    transition[:, 0] = below[cells + 1 - np.arange(cells + 1)]  # what falls below half a cell is put to 0
    lengths = np.linalg.solve(np.eye(cells + 1) - transition, np.ones(cells + 1))
    return float(lengths[0])
