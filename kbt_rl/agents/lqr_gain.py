"""Gains of linear-quadratic regulators, and checks of their costs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kbt_rl.arguments import instance, number
from kbt_rl.envs.inverted_pendulum import real_array
from kbt_rl.envs.plant import FloatArray, InvertedPendulumParams, linearize

# Of the fastest pole, the least that the slowest must have of it.
_SLOWEST = 1e-9


def lqr_gain(
    params: InvertedPendulumParams, Q: npt.ArrayLike | None = None, R: npt.ArrayLike | None = None
) -> FloatArray:
    """Gain of the continuous-time linear-quadratic regulator at the upright equilibrium.

    The force ``u = -gain @ state``, in newtons, minimises the integral of ``s'Q s + R u^2`` for the linearised plant.

    Args:
        params: The plant.
        Q: State cost, ``(4, 4)``, symmetric and positive semidefinite; the identity by default.
        R: Force cost, a positive number or ``(1, 1)``; 1 by default.

    Returns:
        The gain, ``(1, 4)``. Its entries are negative: a pole that leans to the right is caught by a push to the right.

    Raises:
        ValueError: Q or R is not as described, or no gain stabilises the plant at a finite cost.
    """
    instance("params", params, InvertedPendulumParams)
    state_cost, force_cost = check_state_cost(Q), check_force_cost(R)
    return stabilising_gain(*linearize(params), state_cost, force_cost, f"{params} with Q={Q!r} and R={R!r}")


def stabilising_gain(
    A: FloatArray, B: FloatArray, state_cost: FloatArray, force_cost: FloatArray, plant: str
) -> FloatArray:
    """Gain of the continuous-time linear-quadratic regulator of ``s' = A s + B u``, ``(1, 4)``.

    Args:
        A: ``(4, 4)``.
        B: ``(4, 1)``.
        state_cost: Q, ``(4, 4)``.
        force_cost: R, ``(1, 1)``.
        plant: What an error calls the plant.

    Raises:
        ValueError: No gain stabilises the plant at a finite cost.
    """
    import control  # imports pyplot: not on every import of the package

    try:
        gain, _, poles = control.lqr(A, B, state_cost, force_cost)
    except (np.linalg.LinAlgError, control.ControlArgument, ValueError) as error:
        raise ValueError(f"no stabilising gain exists for {plant}: {error}") from error
    # A mode that the cost does not see stays where it is: its pole is 0 but for rounding.
    if not (np.isfinite(gain).all() and (np.real(poles) < -_SLOWEST * np.abs(poles).max()).all()):
        raise ValueError(f"the best gain for {plant} does not stabilise it: poles {poles}")
    return np.asarray(gain, dtype=np.float64)


def check_state_cost(Q: npt.ArrayLike | None) -> FloatArray:
    """The state cost as a symmetric, positive semidefinite matrix ``(4, 4)``, or a ValueError; None is the identity."""
    cost = np.eye(4) if Q is None else real_array("Q", Q)
    if cost.shape != (4, 4) or not np.all(np.isfinite(cost)):
        raise ValueError(f"Q must be a finite matrix of shape (4, 4), got shape {cost.shape}: {Q!r}")
    if not np.allclose(cost, cost.T):
        raise ValueError(f"Q must be symmetric, got {Q!r}; use (Q + Q.T) / 2")
    lowest = np.linalg.eigvalsh(cost)[0]
    if lowest < -1e-9 * np.abs(cost).max():
        raise ValueError(f"Q must be positive semidefinite, its lowest eigenvalue is {lowest:.3g}")
    return cost


def check_force_cost(R: npt.ArrayLike | None) -> FloatArray:
    """The force cost as a positive matrix ``(1, 1)``, or a ValueError; None is 1."""
    cost = real_array("R", 1.0 if R is None else R)
    if cost.shape not in ((), (1, 1)):
        raise ValueError(f"R must be a number or of shape (1, 1), got shape {cost.shape}")
    return np.array([[check_positive("R", cost.item())]])


def check_positive(name: str, value: float) -> float:
    """A positive and finite number, or a TypeError or ValueError."""
    found = number(name, value)
    if not (np.isfinite(found) and found > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return found
