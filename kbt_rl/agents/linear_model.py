"""Bayesian linear regression of a plant's discrete-time model ``s' = A s + B u`` from its transitions.

The regression is on rates, ``(s' - s) / dt = W [s; u]``, so that a plant that does nothing is the zero matrix. Every
row of ``W`` has a Gaussian prior and a noise variance of its own. Only sums over the transitions are kept: the
posterior does not depend on their order, and forgetting fades the sums while the prior stays, so the covariance cannot
wind up.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import expm

from kbt_rl.arguments import instance, number
from kbt_rl.envs.inverted_pendulum import real_array
from kbt_rl.envs.plant import DT, FloatArray, InvertedPendulumParams, linearize

# Terms of the series of the matrix logarithm: enough for modes of up to 30 per second at 50 Hz.
_LOGARITHM_TERMS = 12
# Plants a side of the grid that a prior is made from.
_GRID = 5
# Standard deviation of every coefficient besides, for example of friction, in SI units.
_UNMODELLED = 0.05


def discrete_rates(A: npt.ArrayLike, B: npt.ArrayLike, dt: float) -> FloatArray:
    """Rates ``[A_d - I, B_d] / dt``, ``(n, n + m)``, of ``ds/dt = A s + B u`` with ``u`` held for ``dt`` seconds.

    ``[[A_d, B_d], [0, I]] = exp(dt [[A, B], [0, 0]])`` (C. F. Van Loan, Computing integrals involving the matrix
    exponential, 1978).
    """
    block = _stacked(np.hstack([np.asarray(A, dtype=np.float64), np.asarray(B, dtype=np.float64)]))
    rates: FloatArray = (expm(dt * block) - np.eye(len(block)))[: len(np.asarray(A))] / dt
    return rates


def continuous_model(rates: FloatArray, dt: float) -> tuple[FloatArray, FloatArray]:
    """The inverse of :func:`discrete_rates`: ``A``, ``(n, n)``, and ``B``, ``(n, m)``.

    ``log M = 2 (X + X^3 / 3 + X^5 / 5 + ...)`` with ``X = (M - I)(M + I)^-1``, which converges where every eigenvalue
    of ``M`` has a positive real part.

    Raises:
        ValueError: The series does not converge: some mode is too fast for ``dt``, or the rates are not finite.
    """
    step = dt * _stacked(rates)
    identity = np.eye(len(step))
    try:
        term = np.linalg.solve((step + 2.0 * identity).T, step.T).T
    except np.linalg.LinAlgError as error:
        raise ValueError(f"the model has no logarithm: {error}") from error
    square, total = term @ term, term.copy()
    for order in range(3, 2 * _LOGARITHM_TERMS, 2):
        term = term @ square
        total += term / order
    if not (np.isfinite(total).all() and np.abs(term).max() <= 1e-12 * max(1.0, np.abs(total).max())):
        raise ValueError(f"the model has a mode that is too fast for a step of {dt} s; it has no continuous form")
    logarithm: FloatArray = 2.0 / dt * total
    n = len(rates)
    return logarithm[:n, :n], logarithm[:n, n:]


class LinearModelPosterior:
    """Gaussian posterior over the rates of ``n`` states as linear functions of ``p = n + m`` states and inputs.

    Row ``i`` has the precision ``P_i^-1 + G / r_i`` and the mean ``precision^-1 (P_i^-1 w_i + h_i / r_i)``, with ``G``
    the sum of ``z z'`` and ``h_i`` that of ``z y_i`` (C. M. Bishop, Pattern Recognition and Machine Learning, 2006,
    Eqs. 3.50 and 3.51).

    Args:
        prior_mean: Rates of the nominal model, ``(n, p)``.
        prior_cov: Prior covariance of each row, ``(n, p, p)``, positive definite.
        noise_variance: Variance of each rate about the linear model, ``(n,)``: sensor noise and, above all, what is not
            linear.
        forgetting: What the weight of every past transition is multiplied by when a new one comes; 1 forgets nothing.

    Raises:
        ValueError: A shape, a covariance that is not positive definite, or a number out of its range.
    """

    def __init__(
        self,
        prior_mean: npt.ArrayLike,
        prior_cov: npt.ArrayLike,
        noise_variance: npt.ArrayLike,
        forgetting: float = 1.0,
    ) -> None:
        self.prior_mean = _finite("prior_mean", prior_mean, 2)
        n, p = self.prior_mean.shape
        self.prior_cov = _finite("prior_cov", prior_cov, 3)
        self.noise_variance = _finite("noise_variance", noise_variance, 1)
        if n > p or self.prior_cov.shape != (n, p, p) or self.noise_variance.shape != (n,):
            raise ValueError(
                f"prior_mean {(n, p)}, prior_cov {self.prior_cov.shape} and noise_variance "
                f"{self.noise_variance.shape} do not fit; expected (n, p), (n, p, p) and (n,) with p >= n"
            )
        if not (self.noise_variance > 0).all():
            raise ValueError(f"noise_variance must be positive, got {self.noise_variance}")
        if not 0.0 < number("forgetting", forgetting) <= 1.0:
            raise ValueError(f"forgetting must be in (0, 1], got {forgetting!r}; 1 forgets nothing")
        smallest = np.linalg.eigvalsh(self.prior_cov)[:, 0]
        if not np.allclose(self.prior_cov, self.prior_cov.transpose(0, 2, 1)) or not (smallest > 0).all():
            raise ValueError(f"prior_cov must be symmetric and positive definite; smallest eigenvalues {smallest}")
        self.forgetting = float(forgetting)
        self._prior_precision: FloatArray = np.linalg.inv(self.prior_cov)
        self._prior_information: FloatArray = np.einsum("ijk,ik->ij", self._prior_precision, self.prior_mean)
        self.forget_all()

    def forget_all(self) -> None:
        """Return to the prior."""
        n, p = self.prior_mean.shape
        self._gram, self._moment, self.transitions = np.zeros((p, p)), np.zeros((n, p)), 0

    def observe(self, inputs: npt.ArrayLike, rates: npt.ArrayLike) -> None:
        """Condition on transitions; with forgetting they count as simultaneous.

        Args:
            inputs: States and inputs, ``(k, p)``.
            rates: ``(s' - s) / dt``, ``(k, n)``.

        Raises:
            ValueError: A wrong shape, or not finite; nothing has changed.
        """
        z, y = _finite("inputs", inputs, 2), _finite("rates", rates, 2)
        n, p = self.prior_mean.shape
        if z.shape[1] != p or y.shape != (len(z), n):
            raise ValueError(f"inputs {z.shape} and rates {y.shape} do not fit; expected (k, {p}) and (k, {n})")
        if len(z) == 0:
            return
        self._gram = self.forgetting * self._gram + z.T @ z
        self._moment = self.forgetting * self._moment + y.T @ z
        self.transitions += len(z)

    @property
    def precision(self) -> FloatArray:
        """Posterior precision of each row, ``(n, p, p)``."""
        precision: FloatArray = self._prior_precision + self._gram / self.noise_variance[:, None, None]
        return precision

    @property
    def mean(self) -> FloatArray:
        """Posterior mean of the rates, ``(n, p)``."""
        information = self._prior_information + self._moment / self.noise_variance[:, None]
        mean: FloatArray = np.linalg.solve(self.precision, information[..., None])[..., 0]
        return mean

    @property
    def cov(self) -> FloatArray:
        """Posterior covariance of each row, ``(n, p, p)``."""
        return np.asarray(np.linalg.inv(self.precision), dtype=np.float64)


def pendulum_prior(
    nominal: InvertedPendulumParams,
    *,
    spread: float = 20.0,
    model_error: float = 0.5,
    forgetting: float = 1.0,
    dt: float = DT,
) -> LinearModelPosterior:
    """A prior about the linear model of a nominal pendulum, wide enough for plants far from it.

    Its mean is the nominal model. Its covariance is the mean square deviation from it over a grid of plants whose
    masses and length are the nominal ones times factors from ``1 / spread`` to ``spread``: what all plants have in
    common (no dependence on the cart's position, say) stays nearly certain, and what changes together stays correlated.

    Args:
        nominal: The plant that is known.
        spread: Largest factor, above 1.
        model_error: Standard deviation of an acceleration about the linear model, m/s^2 and rad/s^2.
        forgetting: See ``LinearModelPosterior``.
        dt: Time between two observations, s.

    Raises:
        ValueError: A number out of its range.
    """
    instance("nominal", nominal, InvertedPendulumParams)
    spread, model_error, dt = number("spread", spread), number("model_error", model_error), number("dt", dt)
    if not (np.isfinite(spread) and spread > 1.0):
        raise ValueError(f"spread is a factor above 1, got {spread!r}")
    for name, value in (("model_error", model_error), ("dt", dt)):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    mean = discrete_rates(*linearize(nominal), dt)
    factors = np.geomspace(1.0 / spread, spread, _GRID).tolist()
    plants = [
        replace(
            nominal,
            cart_mass=nominal.cart_mass * cart,
            pole_mass=nominal.pole_mass * pole,
            pole_half_length=nominal.pole_half_length * length,
        )
        for cart, pole, length in itertools.product(factors, repeat=3)
    ]
    deviations = np.stack([discrete_rates(*linearize(plant), dt) - mean for plant in plants])
    # An acceleration held for dt changes the mean velocity of the step, which is the position's rate, by dt / 2.
    unit = np.array([dt / 2, 1.0, dt / 2, 1.0])
    floor = (_UNMODELLED * unit) ** 2
    cov = np.einsum("kij,kil->ijl", deviations, deviations) / len(plants) + floor[:, None, None] * np.eye(5)
    return LinearModelPosterior(mean, cov, (model_error * unit) ** 2, forgetting)


def _stacked(rows: FloatArray) -> FloatArray:
    """``rows`` ``(n, p)`` above zeros, ``(p, p)``."""
    n, p = rows.shape
    return np.vstack([rows, np.zeros((p - n, p))])


def _finite(name: str, value: npt.ArrayLike, ndim: int) -> npt.NDArray[Any]:
    array: FloatArray = real_array(name, value).copy()
    if array.ndim != ndim or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite with {ndim} axes, got shape {array.shape}: {value!r}")
    return array
