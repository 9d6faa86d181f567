"""The pendulum's equations of motion by component, for numbers and arrays alike.

Plain arithmetic on positions and velocities; :mod:`kbt_rl.envs.plant` puts whole states around it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

# A number or an array of them, real or complex.
Values: TypeAlias = Any
_SUBSTEPS = 2


def accelerations(
    theta: Values, theta_dot: Values, force: Values,
    cart_mass: Values, pole_mass: Values, pole_half_length: Values, gravity: Values,
) -> tuple[Values, Values]:  # fmt: skip
    """Second derivatives of cart position (m/s^2) and pole angle (rad/s^2); see :func:`kbt_rl.envs.plant.dynamics`.

    Florian (2007), Eqs. (23), (24) without friction. They depend on neither the position nor its velocity.
    """
    sin, cos = np.sin(theta), np.cos(theta)
    total_mass = cart_mass + pole_mass
    share = pole_mass / total_mass
    lever = share * pole_half_length
    push = force / total_mass + lever * (theta_dot * theta_dot) * sin
    theta_acc = (gravity * sin - cos * push) / (pole_half_length * (4.0 / 3.0 - share * (cos * cos)))  # of a rod
    return push - lever * theta_acc * cos, theta_acc


def rk4(
    x: Values, x_dot: Values, theta: Values, theta_dot: Values, force: Values,
    cart_mass: Values, pole_mass: Values, pole_half_length: Values, gravity: Values, dt: float,
) -> tuple[Values, Values, Values, Values]:  # fmt: skip
    """The four components after ``dt`` seconds; see :func:`kbt_rl.envs.plant.rk4_step`."""
    h = dt / _SUBSTEPS
    for _ in range(_SUBSTEPS):
        acc_1, turn_1 = accelerations(theta, theta_dot, force, cart_mass, pole_mass, pole_half_length, gravity)
        x_dot_2, theta_dot_2 = x_dot + h / 2 * acc_1, theta_dot + h / 2 * turn_1
        acc_2, turn_2 = accelerations(
            theta + h / 2 * theta_dot, theta_dot_2, force, cart_mass, pole_mass, pole_half_length, gravity
        )
        x_dot_3, theta_dot_3 = x_dot + h / 2 * acc_2, theta_dot + h / 2 * turn_2
        acc_3, turn_3 = accelerations(
            theta + h / 2 * theta_dot_2, theta_dot_3, force, cart_mass, pole_mass, pole_half_length, gravity
        )
        x_dot_4, theta_dot_4 = x_dot + h * acc_3, theta_dot + h * turn_3
        acc_4, turn_4 = accelerations(
            theta + h * theta_dot_3, theta_dot_4, force, cart_mass, pole_mass, pole_half_length, gravity
        )
        x = x + h / 6 * (x_dot + 2 * (x_dot_2 + x_dot_3) + x_dot_4)
        theta = theta + h / 6 * (theta_dot + 2 * (theta_dot_2 + theta_dot_3) + theta_dot_4)
        x_dot = x_dot + h / 6 * (acc_1 + 2 * (acc_2 + acc_3) + acc_4)
        theta_dot = theta_dot + h / 6 * (turn_1 + 2 * (turn_2 + turn_3) + turn_4)
    return x, x_dot, theta, theta_dot
