"""The increment of the commonest update in NumPy: one row, one output, two layers, joint covariance.

At this size a PyTorch call costs more than its arithmetic, and NumPy's calls cost a third of it. The formulas are those
of ``joint``, ``moments`` and ``output``, written out for scalars; ``tests/test_scalar_step.py`` holds the two together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import erfc

if TYPE_CHECKING:
    from kbt_rl.inference.update import HeadState

FloatArray = npt.NDArray[np.float64]
_INV_SQRT2 = 1.0 / math.sqrt(2.0)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
_SMALLEST_SD = math.sqrt(np.finfo(np.float64).tiny)
_FAR = 0.5 * math.sqrt(np.finfo(np.float64).max)


class ScalarStep(NamedTuple):
    """Predicted mean and variance of the output, and its covariance with all weights, ``(P,)``."""

    mean: float
    variance: float
    cross_cov: FloatArray


def applies(state: HeadState, rows: int) -> bool:
    """Whether this module can stand in for ``joint.forward``."""
    spec = state.spec
    return (
        rows == 1
        and spec.structure == "joint"
        and len(spec.shapes) == 2
        and spec.outputs == 1
        and spec.relu_order == 2
        and spec.feature_variance == 0.0
        and state.mean.device.type == "cpu"
    )


def propagate(state: HeadState, features: npt.NDArray[Any]) -> ScalarStep:
    """``joint.forward`` for features ``(d,)``."""
    n, k = state.spec.shapes[0]
    hidden = n * k
    mean = state.mean.numpy()
    first, second = (panel.numpy() for panel in state.cov)
    inputs = np.append(features, 1.0)
    projection = (first.reshape(-1, k) @ inputs).reshape(-1, n)  # Cov(theta, u^1)
    logits_cov = inputs @ projection[:hidden].reshape(n, k, n)
    z_mean, z_cov, slope = _relu(mean[:hidden].reshape(n, k) @ inputs, logits_cov)

    carried = projection * slope  # Cov(theta, z)
    shared = carried[hidden:]  # Cov(w_p, z_q), (n + 1, n)
    weights = mean[hidden:]
    inner, activation = weights[:-1], np.append(z_mean, 1.0)
    own = second[hidden:]
    variance = (
        activation @ own @ activation
        + np.vdot(own[:-1, :-1], z_cov)
        + inner @ z_cov @ inner
        + 2.0 * (activation @ shared @ inner)
        + np.vdot(shared[:-1], shared[:-1].T)
    )
    output = weights @ activation + shared[:-1].trace()
    return ScalarStep(float(output), float(variance), second @ activation + carried @ inner)


def variances(state: HeadState) -> FloatArray:
    """Variance of each weight, ``(P,)``."""
    first, second = (panel.numpy() for panel in state.cov)
    return np.concatenate([first.diagonal(), second[first.shape[1] :].diagonal()])


def _relu(mean: FloatArray, cov: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """``moments.relu_moments`` with a series of two terms."""
    variance = cov.diagonal()
    with np.errstate(invalid="ignore"):  # a NaN travels on and is refused as a whole
        sd = np.maximum(np.sqrt(variance), _SMALLEST_SD)
    ratio = np.minimum(np.maximum(mean / sd, -_FAR), _FAR)
    upper, lower = 0.5 * erfc(ratio * -_INV_SQRT2), 0.5 * erfc(ratio * _INV_SQRT2)
    density = np.exp(-0.5 * ratio * ratio) * _INV_SQRT_2PI
    curvature = density / sd
    out = np.multiply.outer(curvature, curvature)
    out *= 0.5 * cov
    out += np.multiply.outer(upper, upper)
    out *= cov
    spread = upper + ratio * (ratio * (upper * lower) - density * (upper - lower)) - density * density
    np.fill_diagonal(out, variance * np.maximum(spread, 0.0))
    return mean * upper + sd * density, out, upper
