"""The Gymnasium environment of the studies: balance a pole on a cart whose dynamics can change at any time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from kbt_rl.arguments import shown, whole
from kbt_rl.envs.plant import (
    DT,
    LABEL_BOX,
    NOMINAL,
    OBSERVATION_BOX,
    START_BOX,
    FloatArray,
    InvertedPendulumParams,
    Observation,
    has_ended,
    is_settled,
    observe,
    rk4_step,
    stage_cost,
)

if TYPE_CHECKING:
    from kbt_rl.envs.rendering import Window


def symmetric_box(bounds: tuple[float, ...]) -> spaces.Box:
    """The float32 space of all points within plus or minus ``bounds``."""
    high = np.array(bounds, dtype=np.float32)
    return spaces.Box(-high, high, dtype=np.float32)


def check_action(action: npt.ArrayLike, shape: tuple[int, ...]) -> FloatArray:
    """Return ``action`` clipped to [-1, 1] as float64.

    Raises:
        TypeError: It holds no real numbers, or masked ones.
        ValueError: It is not finite or not of ``shape``.
    """
    values = real_array("the action", action)
    if values.shape != shape:
        raise ValueError(f"the action must have shape {shape}, got {values.shape}")
    if not np.all(np.isfinite(values)):
        raise ValueError(f"the action must be finite, got {action!r}")
    return np.clip(values, -1.0, 1.0)


def real_array(name: str, values: npt.ArrayLike) -> FloatArray:
    """Values as float64.

    Raises:
        TypeError: They are complex or objects, or some are masked.
        ValueError: They are text, or their rows differ in length.
    """
    try:
        array = np.asanyarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is no array: its rows differ in length") from error
    if array.dtype.kind in "US":
        raise ValueError(f"{name} is {shown(values)}; could not convert it to real numbers")
    if isinstance(array, np.ma.MaskedArray) or array.dtype.kind not in "fiub":
        kind = "a masked array" if isinstance(array, np.ma.MaskedArray) else array.dtype
        raise TypeError(f"{name} is {kind}; expected an array of real numbers")
    return np.asarray(array, dtype=np.float64)


def check_seed(value: int | None) -> int | None:
    """A seed of Gymnasium's generators.

    Raises:
        TypeError: It is no number.
        ValueError: It is not whole, or negative.
    """
    return None if value is None else whole("seed", value, 0, "a whole number, not negative, or None", most=2**128)


def check_start(options: dict[str, Any] | None, shape: tuple[int, ...]) -> FloatArray | None:
    """Return the start state that the options of ``reset`` ask for as a new array of ``shape``, or None.

    Raises:
        ValueError: An option is unknown, or the state does not broadcast to ``shape``, has fallen or is out of bounds.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options is {shown(options)}; expected a dict such as {{'state': [0.0, 0.0, 0.1, 0.0]}}")
    options = dict(options or {})
    if unknown := sorted(map(str, options.keys() - {"state"})):
        raise ValueError(f"unknown reset options {unknown}; the only one is 'state', [x, x_dot, theta, theta_dot]")
    if "state" not in options:
        return None
    state = real_array("options['state']", options["state"]).copy()
    if state.shape not in (shape, shape[-1:]):
        raise ValueError(f"options['state'] must have shape {shape} (or {shape[-1:]}), got {state.shape}")
    if np.any(has_ended(state)):
        raise ValueError(f"options['state'] must be upright and within +-{OBSERVATION_BOX} to start from, got {state}")
    return np.array(np.broadcast_to(state, shape))


class InvertedPendulumEnv(gym.Env[npt.NDArray[Any], npt.NDArray[Any]]):
    r"""Balance a pole on a cart, with dynamics that can be changed at any time.

    ## Description
    A uniform rod is hinged on a cart that a horizontal force moves along a frictionless track. The task is to keep the
    rod upright and to bring cart and rod to rest at the origin. Two ids share this class: `kbt_rl/InvertedPendulum-v0`,
    with masses of 1 and 0.1 kg and a rod 1 m long, and `kbt_rl/ShiftedInvertedPendulum-v0`, with 1 and 1 kg and 10 m.
    A linear controller made for the first fails on the second.

    ## Action Space
    `Box(-1, 1, (1,), float32)`: the force on the cart as a fraction of `max_force`. The actuator saturates: actions
    outside are clipped. An action that is not finite or has another shape is a ValueError.

    ## Observation Space
    `Box((4,), float32)`, the same for all parameters. The physics is in float64, the observation is its rounding.

    | index | observation                 | bound         | unit  |
    | ----- | --------------------------- | ------------- | ----- |
    | 0     | cart position               | +- 10,000     | m     |
    | 1     | cart velocity               | +- 2,000      | m/s   |
    | 2     | pole angle, 0 is upright    | +- 2 pi       | rad   |
    | 3     | pole angular velocity       | +- 100        | rad/s |

    ## Rewards
    `1 / (1 + s's + u^2)`, in (0, 1], with the state `s` in which the action is taken and the force `u` in newtons.

    ## Info
    `reset` and `step` give `is_success` (never fell and settled now: |x| < 1, |x_dot| < 0.5, |theta| < 0.05,
    |theta_dot| < 0.1), `cost` (`(s's + u^2) dt` of the step, 0 after a reset) and `dynamics` (the current `cart_mass`,
    `pole_mass` and `pole_half_length`).

    ## Starting State
    Uniform within +-(1 m, 0.5 m/s, 0.2 rad, 0.2 rad/s), or `reset(options={"state": [x, x_dot, theta, theta_dot]})`.

    ## Episode End
    1. Termination: the pole falls below horizontal, |theta| > pi / 2, or the state leaves the observation space; the
       last observation is then clipped to it. The cart's position ends no episode within these bounds.
    2. Truncation: after 500 steps, that is 10 s at 50 Hz (by `gymnasium.make`).

    ## Arguments
    `cart_mass`, `pole_mass` (kg), `pole_half_length` (m) and `max_force` (N) describe the plant; `render_mode` is None,
    `"human"` or `"rgb_array"`. `set_dynamics` changes the plant while the environment is in use, through wrappers by
    `env.get_wrapper_attr("set_dynamics")(pole_mass=1.0)` and in a Stable-Baselines3 VecEnv by
    `env.env_method("set_dynamics", pole_mass=1.0)`.

    ## Vectorized environment
    `gymnasium.make_vec(id, num_envs)` gives an `InvertedPendulumVectorEnv`, which steps thousands at once.

    ## Version History
    * v0: Initial version.
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": round(1 / DT)}  # noqa: RUF012
    label_space: ClassVar[spaces.Box] = symmetric_box(LABEL_BOX)
    #: Tells it from other environments, through wrappers and workers too, whose ``params`` are something else.
    is_inverted_pendulum: ClassVar[bool] = True

    def __init__(
        self,
        cart_mass: float = NOMINAL.cart_mass,
        pole_mass: float = NOMINAL.pole_mass,
        pole_half_length: float = NOMINAL.pole_half_length,
        max_force: float = NOMINAL.max_force,
        render_mode: str | None = None,
    ) -> None:
        check_render_mode(render_mode, self.metadata)
        self._params = InvertedPendulumParams(cart_mass, pole_mass, pole_half_length, max_force=max_force)
        self.render_mode = render_mode
        self.observation_space = symmetric_box(OBSERVATION_BOX)
        self.action_space = symmetric_box((1.0,))
        self._state: FloatArray | None = None
        self._force = 0.0
        self._time = 0.0
        self._fallen = False
        self._window: Window | None = None

    @property
    def params(self) -> InvertedPendulumParams:
        """The current plant."""
        return self._params

    @property
    def state(self) -> FloatArray:
        """A copy of the current state in full precision, ``(4,)``."""
        return np.array(self._current_state())

    def set_dynamics(
        self,
        *,
        cart_mass: float | None = None,
        pole_mass: float | None = None,
        pole_half_length: float | None = None,
    ) -> None:
        """Change the plant (kg, kg, m) from the next step on, until called again; what is left out keeps its value."""
        changes = {"cart_mass": cart_mass, "pole_mass": pole_mass, "pole_half_length": pole_half_length}
        self._params = replace(self._params, **{name: value for name, value in changes.items() if value is not None})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode at a random state, or at ``options["state"]``."""
        start = check_start(options, (4,))
        super().reset(seed=check_seed(seed))
        self._state = sample_start(self.np_random) if start is None else start
        self._force, self._time, self._fallen = 0.0, 0.0, False
        self._render_human()
        return observe(self._state), self._info(cost=0.0)

    def step(self, action: npt.ArrayLike) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Hold a force for 0.02 s. Steps after the end of an episode stay terminated and unsuccessful."""
        state = self._current_state()
        self._force = self._force_of(action)
        cost = float(stage_cost(state, self._force))
        self._state = rk4_step(state, self._force, self._params)
        self._time += DT
        self._fallen |= bool(has_ended(self._state))
        self._render_human()
        return observe(self._state), 1.0 / (1.0 + cost), self._fallen, False, self._info(cost=cost * DT)

    def render(self) -> npt.NDArray[np.uint8] | None:
        """Draw the current state: an ``(H, W, 3)`` array in mode ``rgb_array``, a window and None in mode ``human``."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a mode: pass render_mode='human' or 'rgb_array' to gymnasium.make")
            return None
        from kbt_rl.envs.rendering import Window, draw

        frame = draw(self._current_state(), self._force, self._params, time=self._time, fallen=self._fallen)
        if self.render_mode == "rgb_array":
            return frame
        self._window = self._window or Window("Inverted pendulum", fps=self.metadata["render_fps"])
        self._window.show(frame)
        return None

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            self._window.close()
            self._window = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_window": None}  # a copy opens its own window

    def _current_state(self) -> FloatArray:
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before step(), render() or reading the state")
        return self._state

    def _force_of(self, action: npt.ArrayLike) -> float:
        """The force in newtons that an action stands for."""
        return self._params.max_force * check_action(action, (1,)).item()

    def _info(self, cost: float) -> dict[str, Any]:
        success = not self._fallen and bool(is_settled(self._current_state()))
        return {"is_success": success, "cost": cost, "dynamics": self._params.dynamics}

    def _render_human(self) -> None:
        if self.render_mode == "human":
            self.render()


def sample_start(rng: np.random.Generator) -> FloatArray:
    """A start state, ``(4,)``, uniform within plus or minus :data:`START_BOX`."""
    return rng.uniform(-np.array(START_BOX), np.array(START_BOX))


def check_render_mode(render_mode: str | None, metadata: dict[str, Any]) -> None:
    """Raise ValueError unless ``render_mode`` is None or among ``metadata["render_modes"]``."""
    if render_mode is not None and not (isinstance(render_mode, str) and render_mode in metadata["render_modes"]):
        raise ValueError(f"render_mode must be None or one of {metadata['render_modes']}, got {shown(render_mode)}")
