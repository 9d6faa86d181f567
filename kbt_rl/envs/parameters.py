"""What can be changed of a simulated world, by name: classic control and MuJoCo.

A change must reach everything that was derived from a parameter when the environment was made. CartPole keeps products
of masses and lengths, MuJoCo the inertia of bodies and constants of the whole model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium.envs.classic_control import (
    AcrobotEnv,
    CartPoleEnv,
    Continuous_MountainCarEnv,
    MountainCarEnv,
    PendulumEnv,
)

from kbt_rl.arguments import number, shown


class Parameter(NamedTuple):
    """One parameter of a world.

    Attributes:
        nominal: Its value in the environment as it was made.
        low: Smallest value that makes sense.
        high: Largest.
    """

    nominal: float
    low: float
    high: float


class World(ABC):
    """The parameters of a simulated world, and how they are set."""

    parameters: dict[str, Parameter]

    @abstractmethod
    def set(self, values: Mapping[str, float]) -> None:
        """Let parameters have these values from now on, in units of ``nominal``; the state of the episode stays."""


_CLASSIC: tuple[tuple[type[Any], tuple[str, ...]], ...] = (
    (CartPoleEnv, ("gravity", "masscart", "masspole", "length", "force_mag")),
    (PendulumEnv, ("g", "m", "l")),
    (AcrobotEnv, ("LINK_LENGTH_1", "LINK_MASS_1", "LINK_MASS_2", "LINK_COM_POS_1", "LINK_COM_POS_2", "LINK_MOI")),
    (MountainCarEnv, ("gravity", "force")),
    (Continuous_MountainCarEnv, ("power",)),
)
_WEIGHTLESS = ("gravity", "g")  # what may be 0


class ClassicWorld(World):
    """Gymnasium's classic control: attributes of the environment."""

    def __init__(self, env: Any, names: tuple[str, ...]) -> None:
        self._env = env
        self.parameters = {}
        for name in names:
            value = float(getattr(env, name))
            self.parameters[name] = Parameter(value, 0.0 if name in _WEIGHTLESS else 1e-3 * value, 1e3 * value)

    def set(self, values: Mapping[str, float]) -> None:
        """See ``World``."""
        for name, value in values.items():
            setattr(self._env, name, value)
        if isinstance(self._env, CartPoleEnv):
            self._env.total_mass = self._env.masspole + self._env.masscart
            self._env.polemass_length = self._env.masspole * self._env.length


class MujocoWorld(World):
    """A MuJoCo model: factors of what it was made with, so that 1 is nominal.

    ``mass.BODY`` with the inertia, ``gear.ACTUATOR``, ``damping.JOINT``, ``friction.GEOM``; ``mass``, ``gear``,
    ``damping`` and ``friction`` of all of them together, on top; and ``gravity``. What has no name has its number. In a
    contact MuJoCo takes the larger friction of the two geoms.
    """

    def __init__(self, env: Any) -> None:
        self._model = model = env.model
        self._nominal = {
            name: np.array(getattr(model, name))
            for name in ("body_mass", "body_inertia", "actuator_gear", "dof_damping", "geom_friction")
        }
        self._gravity = np.array(model.opt.gravity)
        massive = [index for index in range(1, model.nbody) if model.body_mass[index] > 0.0]
        damped = [index for index in range(model.njnt) if (self._of_joint("dof_damping", index) > 0.0).any()]
        self._parts = {
            "mass": {_name(model.body(index), index): index for index in massive},
            "gear": {_name(model.actuator(index), index): index for index in range(model.nu)},
            "damping": {_name(model.joint(index), index): index for index in damped},
            "friction": {_name(model.geom(index), index): index for index in range(model.ngeom)},
        }
        self.parameters = {"gravity": Parameter(1.0, 0.0, 100.0)}
        for kind, parts in self._parts.items():
            bounds = (-100.0, 100.0) if kind == "gear" else (1e-3, 1e3)  # a motor may be mounted the wrong way round
            if parts:
                self.parameters |= {kind: Parameter(1.0, *bounds)}
                self.parameters |= {f"{kind}.{part}": Parameter(1.0, *bounds) for part in parts}
        self._factors = dict.fromkeys(self.parameters, 1.0)

    def set(self, values: Mapping[str, float]) -> None:
        """See ``World``."""
        import mujoco

        self._factors |= values
        model, nominal = self._model, self._nominal
        for part, index in self._parts["mass"].items():
            factor = self._factor("mass", part)
            model.body_mass[index] = factor * nominal["body_mass"][index]
            model.body_inertia[index] = factor * nominal["body_inertia"][index]
        for part, index in self._parts["gear"].items():
            model.actuator_gear[index] = self._factor("gear", part) * nominal["actuator_gear"][index]
        for part, index in self._parts["damping"].items():
            model.dof_damping[self._dofs(index)] = self._factor("damping", part) * self._of_joint("dof_damping", index)
        for part, index in self._parts["friction"].items():
            model.geom_friction[index] = self._factor("friction", part) * nominal["geom_friction"][index]
        model.opt.gravity[:] = self._factors["gravity"] * self._gravity
        mujoco.mj_setConst(model, mujoco.MjData(model))  # on data of its own: it resets the state

    def _factor(self, kind: str, part: str) -> float:
        return self._factors[kind] * self._factors[f"{kind}.{part}"]

    def _dofs(self, joint: int) -> slice:
        start = int(self._model.jnt_dofadr[joint])
        after = [int(other) for other in self._model.jnt_dofadr if other > start]
        return slice(start, min(after) if after else self._model.nv)

    def _of_joint(self, name: str, joint: int) -> Any:
        return self._nominal[name][self._dofs(joint)]


def _name(part: Any, index: int) -> str:
    return str(part.name) or str(index)


def world_of(env: Any) -> World:
    """The world of an environment without its wrappers.

    Raises:
        TypeError: It is none that is known.
    """
    for kind, names in _CLASSIC:
        if isinstance(env, kind):
            return ClassicWorld(env, names)
    if hasattr(env, "model") and hasattr(getattr(env, "model", None), "body_mass"):
        return MujocoWorld(env)
    raise TypeError(
        f"{type(env).__name__} is neither one of Gymnasium's classic control nor a MuJoCo environment; for a world of "
        "your own derive from kbt_rl.envs.parameters.World and pass it as world="
    )


def known(world: World, names: Iterable[str]) -> None:
    """Raise TypeError for a name that is no parameter."""
    for name in names:
        if name not in world.parameters:
            raise TypeError(f"this world has no parameter {name!r}; it has {', '.join(world.parameters)}")


def checked(world: World, values: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Values of known parameters inside their bounds.

    Raises:
        TypeError: A name is unknown, or a value no number.
        ValueError: A value is out of bounds.
    """
    if not isinstance(values, Mapping):
        names = ", ".join(world.parameters)
        raise TypeError(f"the values are {shown(values)}; expected a dict of parameters, of which there are {names}")
    known(world, values)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise TypeError(f"{name} is {value!r}; expected a number")
        value = number(name, value)
        low, high = bounds.get(name, world.parameters[name][1:])
        if not low <= value <= high or not math.isfinite(value):
            raise ValueError(f"{name} is {value}, outside of its bounds [{low:g}, {high:g}]")
    return {name: float(value) for name, value in values.items()}
