"""A plant that changes by itself: at listed times, or by a random walk. Gymnasium wrappers over ``set_dynamics``.

Time is counted in steps and goes on over the ends of episodes. A reset with a seed begins a new run, so that equal
seeds give equal runs: the clock is at 0 again, and the plant is the one that was wrapped.

In several environments: ``gymnasium.make_vec(id, n, vectorization_mode="sync", wrappers=[wrap])`` with ``wrap = lambda
env: ScheduledShifts(env, shifts)``, or Stable-Baselines3's ``make_vec_env(id, n, wrapper_class=ScheduledShifts,
wrapper_kwargs={"shifts": shifts})``. The array form of the environment takes changes through its own ``set_dynamics``.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from kbt_rl.arguments import between, number, shown
from kbt_rl.envs.inverted_pendulum import check_seed
from kbt_rl.envs.plant import InvertedPendulumParams

Array = npt.NDArray[Any]
Env = gym.Env[Array, Array]
Bounds = Mapping[str, tuple[float, float]]

#: Where plants are drawn from in the studies: kg, kg, m.
PLANT_RANGES: dict[str, tuple[float, float]] = {
    "cart_mass": (0.5, 2.0),
    "pole_mass": (0.05, 1.5),
    "pole_half_length": (0.3, 6.0),
}


class _ChangingPlant(gym.Wrapper[Array, Array, Array, Array], RecordConstructorArgs):
    """What both wrappers share: the clock, and when it starts again."""

    def __init__(self, env: Env) -> None:
        gym.Wrapper.__init__(self, env)
        self.steps = 0
        self._wrapped: InvertedPendulumParams = env.get_wrapper_attr("params")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Start an episode; with a seed, a new run."""
        if seed is not None:
            self.steps = 0
            self._set(self._wrapped.dynamics)
            self._restart(seed)
        self._change()
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Array) -> tuple[Array, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the plant as it is at this time."""
        self._change()
        result = self.env.step(action)
        self.steps += 1
        return result

    def _set(self, dynamics: Mapping[str, float]) -> None:
        self.env.get_wrapper_attr("set_dynamics")(**dynamics)

    @abstractmethod
    def _restart(self, seed: int) -> None:
        """Begin a new run."""

    @abstractmethod
    def _change(self) -> None:
        """Give the plant the parameters of step ``self.steps``; may be called twice at the same step."""


class ScheduledShifts(_ChangingPlant):
    """Shifts at listed times, inside or between episodes.

    Args:
        env: An inverted pendulum, wrapped or not.
        shifts: Pairs of a time and the parameters of the plant from then on (``cart_mass``, ``pole_mass``,
            ``pole_half_length``; what is left out keeps its value). A shift at time ``t`` acts for the first time in
            the step after ``t`` steps; if an episode starts at that time, its ``info`` shows it.

    Raises:
        TypeError: A time is not a whole number, or a parameter is none of the plant's.
        ValueError: Times are negative or do not increase, or a parameter is not positive.
    """

    def __init__(self, env: Env, shifts: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        if isinstance(shifts, (str, bytes)) or not isinstance(shifts, Sequence):
            raise TypeError(f"shifts is {shown(shifts)}; expected pairs of a time and the parameters from then on")
        RecordConstructorArgs.__init__(self, shifts=shifts)
        super().__init__(env)
        self.shifts = tuple((_time(time), _checked(dynamics)) for time, dynamics in map(_pair, shifts))
        times = [time for time, _ in self.shifts]
        if any(later <= earlier for earlier, later in pairwise(times)):
            raise ValueError(f"the times of the shifts must increase, got {times}")
        self._next = 0

    def _restart(self, seed: int) -> None:
        self._next = 0

    def _change(self) -> None:
        while self._next < len(self.shifts) and self.shifts[self._next][0] <= self.steps:
            self._set(self.shifts[self._next][1])
            self._next += 1


class RandomWalkDrift(_ChangingPlant):
    """A slow drift: the logarithm of each parameter takes a Gaussian step at each time step, reflected at its bounds.

    The walk has a random generator of its own, seeded by the seed of a reset, so that the starts of episodes are those
    of the environment without drift.

    Args:
        env: An inverted pendulum, wrapped or not.
        rate: Standard deviation of a step of each logarithm: after ``n`` steps a parameter has typically changed by
            the factor ``exp(rate sqrt(n))``.
        bounds: Range of each parameter that drifts; those left out stay as they are. ``PLANT_RANGES`` by default.
        seed: Seed of the walk until a reset gives another; None for an arbitrary one.

    Raises:
        TypeError: A bound is of none of the plant's parameters.
        ValueError: A rate is negative, bounds are not an interval of positive numbers, or the plant is outside.
    """

    def __init__(self, env: Env, rate: float = 0.002, bounds: Bounds | None = None, seed: int | None = None) -> None:
        RecordConstructorArgs.__init__(self, rate=rate, bounds=bounds, seed=seed)
        super().__init__(env)
        self.rate = between("rate", rate, 0.0, expected="a standard deviation is finite and not negative")
        if bounds is not None and not isinstance(bounds, Mapping):
            raise TypeError(f"bounds is {shown(bounds)}; expected a dict of parameters and their intervals")
        self.bounds = dict(PLANT_RANGES if bounds is None else bounds)
        for name, (low, high) in self.bounds.items():
            _checked({name: low})
            number(f"the upper bound of {name}", high)
            value = self._wrapped.dynamics[name]
            if not low < high < math.inf:
                raise ValueError(f"the bounds of {name} are ({low}, {high}); expected an interval of positive numbers")
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, outside of its bounds ({low}, {high}); widen them")
        self._low, self._high = np.log(np.array(list(self.bounds.values())).reshape(-1, 2)).T
        self._walk_rng = np.random.default_rng(check_seed(seed))
        self._start()

    def _restart(self, seed: int) -> None:
        self._walk_rng = np.random.default_rng([seed, 11])
        self._start()

    def _start(self) -> None:
        self._log = np.log([self._wrapped.dynamics[name] for name in self.bounds])
        self._at = 0  # the time that the parameters are of

    def _change(self) -> None:
        if self._at == self.steps:
            return
        step = self.rate * self._walk_rng.standard_normal(len(self._log))
        self._log = reflected(self._log + step, self._low, self._high)
        self._at = self.steps
        self._set(dict(zip(self.bounds, np.exp(self._log).tolist(), strict=True)))


def reflected(value: Array, low: Array, high: Array) -> Array:
    """Values folded back into ``[low, high]`` as by mirrors at both ends, however far outside they are."""
    width = high - low
    distance = np.mod(value - low, 2.0 * width)
    return np.asarray(low + np.minimum(distance, 2.0 * width - distance))


def _pair(shift: Any) -> tuple[Any, Any]:
    if not (isinstance(shift, (tuple, list)) and len(shift) == 2):
        raise TypeError(f"a shift is {shown(shift)}; expected a pair of a time and the parameters from then on")
    return shift[0], shift[1]


def _time(time: int) -> int:
    try:
        whole = operator.index(time)
    except TypeError:
        raise TypeError(f"the time of a shift is a whole number of steps, got {time!r}") from None
    if whole < 0:
        raise ValueError(f"the time of a shift is {whole}; time starts at 0")
    return whole


def _checked(dynamics: Mapping[str, float]) -> dict[str, float]:
    """The parameters, if they are the plant's and valid."""
    known = InvertedPendulumParams().dynamics
    if not isinstance(dynamics, Mapping):
        raise TypeError(f"the plant is {shown(dynamics)}; expected a dict of parameters such as {{'pole_mass': 1.0}}")
    if unknown := sorted(map(str, set(dynamics) - set(known))):
        raise TypeError(f"the plant has no parameters {unknown}; it has {list(known)}")
    InvertedPendulumParams(**dynamics)
    return dict(dynamics)
