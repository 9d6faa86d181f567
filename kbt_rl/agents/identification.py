"""An expert for a plant that nobody knows: it identifies the plant's linear model online and solves the LQR for it.

This is a self-tuning regulator (K. J. Åström and B. Wittenmark, On self tuning regulators, Automatica 1973) by
certainty equivalence: the posterior mean of a Bayesian linear regression stands for the plant. It is asked like any
expert and fed with transitions by ``observe``, in a rollout by ``IdentificationCallback``.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from kbt_rl.agents.linear_model import LinearModelPosterior, continuous_model, pendulum_prior
from kbt_rl.agents.lqr import LQRExpert
from kbt_rl.agents.lqr_gain import check_force_cost, check_state_cost, stabilising_gain
from kbt_rl.arguments import number
from kbt_rl.envs.inverted_pendulum import real_array
from kbt_rl.envs.plant import DT, FloatArray

logger = logging.getLogger("kbt_rl")

#: Transitions that start or end outside plus or minus this state say little about the linear model and are left out.
LINEAR_REGION = (np.inf, np.inf, 0.5, 1.0)


class Solution(NamedTuple):
    """The gain in force and how it came about.

    Attributes:
        gain: ``(1, 4)``, newtons per unit of the state.
        rates: The model that the Riccati equation was last solved for, or tried to be, ``(4, 5)``.
        current: Whether the gain is that of ``rates`` and not an older one.
        fallbacks: Models so far that had no stabilising gain.
    """

    gain: FloatArray
    rates: FloatArray
    current: bool = True
    fallbacks: int = 0


class SelfTuningLQR(LQRExpert):
    """Linear state feedback whose gain follows the plant that the transitions show; usually made by :meth:`for_env`.

    The gain is solved for again when it is asked for and the model has moved since by more than ``tolerance``. Where
    the Riccati equation has no stabilising solution, the last valid gain stays in force: ``fallbacks`` counts it,
    ``gain_is_current`` is False until a solution is found, and the logger ``kbt_rl`` warns once each time it begins.

    Args:
        observation_space: ``Box`` of shape (4,).
        action_space: ``Box`` of shape (1,).
        posterior: Belief about the plant's rates, ``(4, 5)``: state, then force in newtons. It is copied.
        max_force: Newtons that an action of 1 stands for.
        dt: Time between two observations, s.
        Q: State cost, see :func:`~kbt_rl.agents.lqr.lqr_gain`.
        R: Force cost, see :func:`~kbt_rl.agents.lqr.lqr_gain`.
        region: Transitions are used that start and end within plus or minus this state, ``(4,)``.
        tolerance: Change of the model's entries, relative to the largest of their row, below which the gain stays.
        solution: What was solved before, as a saved expert has it; None to solve for the posterior now.

    Raises:
        ValueError: A bad argument, or no solution is given and the posterior's mean has none.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        posterior: LinearModelPosterior,
        max_force: float,
        *,
        dt: float = DT,
        Q: npt.ArrayLike | None = None,
        R: npt.ArrayLike | None = None,
        region: npt.ArrayLike = LINEAR_REGION,
        tolerance: float = 1e-3,
        solution: Solution | None = None,
    ) -> None:
        if not isinstance(posterior, LinearModelPosterior):
            raise TypeError(f"posterior must be a LinearModelPosterior, got {type(posterior).__name__}")
        if posterior.prior_mean.shape != (4, 5):
            raise ValueError(f"the posterior is over rates of shape {posterior.prior_mean.shape}; expected (4, 5)")
        if not (np.isfinite(number("dt", dt)) and dt > 0):
            raise ValueError(f"dt must be positive and finite, got {dt!r}")
        if not (np.isfinite(number("tolerance", tolerance)) and tolerance >= 0):
            raise ValueError(f"tolerance must be finite and not negative, got {tolerance!r}")
        self._state_cost, self._force_cost = check_state_cost(Q), check_force_cost(R)
        box = real_array("region", region)
        if box.shape != (4,) or not (box > 0).all():  # NaN fails the comparison too
            raise ValueError(f"region must be four positive numbers, inf for no bound; got {region!r}")
        if solution is None:
            mean = posterior.mean
            solution = Solution(riccati_gain(mean, dt, self._state_cost, self._force_cost), mean)
        super().__init__(observation_space, action_space, solution.gain, max_force)
        assert isinstance(action_space, spaces.Box)  # what the regulator takes no other than
        self._box = action_space
        self._posterior, self._solution = copy.deepcopy(posterior), solution
        self._region, self._dt, self._tolerance = box, float(dt), float(tolerance)

    @classmethod
    def for_env(
        cls,
        env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv,
        Q: npt.ArrayLike | None = None,
        R: npt.ArrayLike | None = None,
        *,
        spread: float = 20.0,
        model_error: float = 0.5,
        forgetting: float = 1.0,
        **options: Any,
    ) -> SelfTuningLQR:
        """Start from what is known of an environment, in general the nominal one; the environment itself is not kept.

        Args:
            env: An inverted pendulum, see :meth:`LQRExpert.for_env`.
            Q: State cost.
            R: Force cost.
            spread: See :func:`~kbt_rl.agents.linear_model.pendulum_prior`.
            model_error: See :func:`~kbt_rl.agents.linear_model.pendulum_prior`.
            forgetting: See :class:`~kbt_rl.agents.linear_model.LinearModelPosterior`.
            **options: Further arguments of the constructor.
        """
        known = LQRExpert.for_env(env, Q, R)
        assert known.params is not None  # for_env sets them where it does not track
        dt = options.get("dt", DT)
        prior = pendulum_prior(known.params, spread=spread, model_error=model_error, forgetting=forgetting, dt=dt)
        return cls(known.observation_space, known.action_space, prior, known.max_force, Q=Q, R=R, **options)

    @property
    def posterior(self) -> LinearModelPosterior:
        """A copy of the belief about the plant."""
        return copy.deepcopy(self._posterior)

    @property
    def transitions(self) -> int:
        """Transitions that the belief rests on; those outside the region do not count."""
        return self._posterior.transitions

    @property
    def model(self) -> tuple[FloatArray, FloatArray]:
        """Identified continuous-time ``A``, ``(4, 4)``, and ``B``, ``(4, 1)``, per newton.

        Raises:
            ValueError: The discrete-time model has no continuous form.
        """
        return continuous_model(self._posterior.mean, self._dt)

    @property
    def gain(self) -> FloatArray:
        """The gain in force, ``(1, 4)``: force = -gain @ state, in newtons. Never raises."""
        return np.array(self._gains_for(np.empty((0, 4))))

    @property
    def gain_is_current(self) -> bool:
        """Whether the gain in force is that of the identified model, not an older one."""
        self._solve()
        return self._solution.current

    @property
    def fallbacks(self) -> int:
        """Models so far that had no stabilising gain, so that the last valid one was kept."""
        return self._solution.fallbacks

    def observe(self, states: npt.ArrayLike, actions: npt.ArrayLike, next_states: npt.ArrayLike) -> int:
        """Learn from transitions of the plant; one that spans a reset is not a transition.

        Args:
            states: ``(n, 4)`` or ``(4,)``.
            actions: As they were applied, that is, inside the action space; ``(n, 1)`` or ``(1,)``.
            next_states: Of the same shape as ``states``; after an episode's end its terminal observation.

        Returns:
            How many of them lay inside the region and were used.

        Raises:
            ValueError: Wrong shape, not finite, or actions outside the action space; nothing has changed.
        """
        before, after = _rows("states", states, 4), _rows("next_states", next_states, 4)
        applied = _rows("actions", actions, 1)
        if not len(before) == len(applied) == len(after):
            raise ValueError(f"{len(before)} states, {len(applied)} actions and {len(after)} next states; one of each")
        if not ((applied >= self._box.low) & (applied <= self._box.high)).all():
            raise ValueError(
                f"actions reach from {applied.min()} to {applied.max()}, outside {self._box}; pass what was applied, "
                "after clipping"
            )
        inside = (np.maximum(np.abs(before), np.abs(after)) <= self._region).all(axis=1)
        inputs = np.hstack([before, self.max_force * applied])[inside]
        self._posterior.observe(inputs, (after - before)[inside] / self._dt)
        return int(inside.sum())

    def forget(self) -> None:
        """Return to the prior belief, for example when the plant is known to have changed; the gain follows."""
        self._posterior.forget_all()

    def _gains_for(self, states: FloatArray) -> FloatArray:
        self._solve()
        return self._solution.gain

    def _solve(self) -> None:
        """Bring the gain up to date with the model, or keep it and say so."""
        last, mean = self._solution, self._posterior.mean
        moved = np.abs(mean - last.rates) > self._tolerance * np.abs(mean).max(axis=1, keepdims=True)
        if not moved.any():
            return
        try:
            gain = riccati_gain(mean, self._dt, self._state_cost, self._force_cost)
        except ValueError as error:
            self._solution = Solution(last.gain, mean, False, last.fallbacks + 1)
            if last.current:
                logger.warning("%s; the last valid gain stays in force", error)
            return
        self._solution = Solution(gain, mean, True, last.fallbacks)
        if not last.current:
            logger.info("the identified model has a stabilising gain again, after %d transitions", self.transitions)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "posterior": self._posterior,
            "max_force": self.max_force,
            "dt": self._dt,
            "Q": self._state_cost,
            "R": self._force_cost,
            "region": self._region,
            "tolerance": self._tolerance,
            "solution": self._solution,
        }


def riccati_gain(rates: FloatArray, dt: float, state_cost: FloatArray, force_cost: FloatArray) -> FloatArray:
    """Gain of the continuous-time LQR, ``(1, 4)``, for a discrete-time model.

    The model is taken back to continuous time rather than the cost to discrete time, so that on the true model the gain
    is that of :func:`~kbt_rl.agents.lqr.lqr_gain`.

    Args:
        rates: ``[A_d - I, B_d] / dt``, ``(4, 5)``.
        dt: Time step of the model, s.
        state_cost: Q, ``(4, 4)``.
        force_cost: R, ``(1, 1)``.

    Raises:
        ValueError: No gain stabilises the model at a finite cost.
    """
    return stabilising_gain(*continuous_model(rates, dt), state_cost, force_cost, "the identified model")


def _rows(name: str, values: npt.ArrayLike, size: int) -> FloatArray:
    array = real_array(name, values)
    if array.ndim not in (1, 2) or array.shape[-1] != size:
        raise ValueError(f"{name} must have shape (n, {size}) or ({size},), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)]} among {array.shape}")
    return np.atleast_2d(array)
