"""Swing a hanging pole up and hold it there: the project's own plant, whose expert is far from linear.

Where the pole is down the expert pumps energy into it, sign by sign with its swing; near the top it is the
linear-quadratic regulator of that plant. No linear law of the state does either half well.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from kbt_rl.agents.lqr_gain import lqr_gain
from kbt_rl.envs.motion import accelerations
from kbt_rl.envs.plant import DT, InvertedPendulumParams, rk4_step

Array = npt.NDArray[Any]
TRACK = 4.0  # half its length, m
NOMINAL = InvertedPendulumParams(cart_mass=1.0, pole_mass=0.1, pole_half_length=0.5, max_force=30.0)
LONG_POLE = InvertedPendulumParams(cart_mass=1.0, pole_mass=0.5, pole_half_length=1.0, max_force=30.0)
#: Observations are divided by this.
_UNITS = np.array([2.0, 4.0, 1.0, 1.0, 8.0])
# Of the expert: how hard it pumps, how it keeps the cart on the track, and from where the regulator catches the pole.
_PUMP, _SPRING, _BRAKE, _MOST = 1.0, 2.0, 3.0, 20.0
_CATCH_ANGLE, _CATCH_RATE = 0.7, 4.0


class SwingUp(gym.Env[npt.NDArray[np.float32], npt.NDArray[np.float32]]):
    """A pole that hangs from a cart on a track of 8 m, at 50 Hz.

    An observation is the cart's position and velocity, cosine and sine of the pole's angle from upright, and its
    velocity, each over its usual size; an action the force as a share of the largest. The reward of a step is 1 where
    the pole stands at the centre of the track, and 0 where it hangs; the episode ends where the track does.

    Args:
        params: Of the plant.
    """

    def __init__(self, params: InvertedPendulumParams = NOMINAL) -> None:
        self.params = params
        self.observation_space = spaces.Box(-np.inf, np.inf, (5,), dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)
        self._state = np.zeros(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See ``gymnasium.Env``; the pole hangs nearly still."""
        super().reset(seed=seed)
        self._state = np.array([0.0, 0.0, np.pi, 0.0]) + self.np_random.uniform(-0.3, 0.3, 4)
        return observe(self._state), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """See ``gymnasium.Env``."""
        force = self.params.max_force * float(np.clip(np.asarray(action).reshape(()), -1.0, 1.0))
        self._state = rk4_step(self._state, force, self.params, DT)
        x, _, theta, _ = self._state
        reward = 0.5 * (1.0 + np.cos(theta)) * np.exp(-((x / 2.0) ** 2))
        return observe(self._state), float(reward), bool(abs(x) > TRACK), False, {}


def observe(state: Array) -> npt.NDArray[np.float32]:
    """Observations of states ``(..., 4)``, ``(..., 5)``."""
    x, x_dot, theta, theta_dot = (state[..., i] for i in range(4))
    seen = np.stack([x, x_dot, np.cos(theta), np.sin(theta), theta_dot], axis=-1) / _UNITS
    rounded: npt.NDArray[np.float32] = seen.astype(np.float32)
    return rounded


class SwingUpExpert:
    """Energy shaping below, the linear-quadratic regulator near the top.

    The pole's energy about its hinge, per mass and in units of the half length, is ``E = 2/3 l w^2 + g (cos t - 1)``,
    0 for one that comes to rest upright. A cart accelerated by ``a`` changes it by ``-a w cos t``, so that
    ``a = k E w cos t`` brings it to 0 from either side (K. J. Astrom, K. Furuta, Swinging up a pendulum by energy
    control, 2000). The force that gives the cart this acceleration follows from the equations of motion.

    Args:
        params: Of the plant.
    """

    def __init__(self, params: InvertedPendulumParams) -> None:
        self.params = params
        self._gain = lqr_gain(params, np.diag([4.0, 2.0, 40.0, 4.0]), 0.05)[0]

    def __call__(self, observations: Array) -> Array:
        """Actions for observations ``(n, 5)``, ``(n, 1)``, not clipped where the regulator wants more."""
        x, x_dot, cos, sin, theta_dot = (np.asarray(observations, dtype=np.float64) * _UNITS).T
        theta, plant = np.arctan2(sin, cos), self.params
        state = np.stack([x, x_dot, theta, theta_dot], axis=-1)
        energy = 2.0 / 3.0 * plant.pole_half_length * theta_dot**2 + plant.gravity * (cos - 1.0)
        wanted = _PUMP * energy * theta_dot * cos - _SPRING * x - _BRAKE * x_dot
        wanted = np.clip(wanted, -_MOST, _MOST)
        constants = plant.cart_mass, plant.pole_mass, plant.pole_half_length, plant.gravity
        free, _ = accelerations(theta, theta_dot, 0.0, *constants)
        pushed, _ = accelerations(theta, theta_dot, 1.0, *constants)
        force = (wanted - free) / (pushed - free)
        near = (np.abs(theta) < _CATCH_ANGLE) & (np.abs(theta_dot) < _CATCH_RATE)
        force = np.where(near, -state @ self._gain, force)
        actions: Array = np.clip(force / plant.max_force, -1.0, 1.0)[:, np.newaxis]
        return actions
