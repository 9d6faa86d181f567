"""The task of all studies: a pendulum whose policy was cloned on one plant and now stands on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from kbt_rl.agents.lqr import LQRExpert
from kbt_rl.envs.discrete import DiscreteInvertedPendulumEnv, DiscreteInvertedPendulumVectorEnv
from kbt_rl.envs.inverted_pendulum import InvertedPendulumEnv
from kbt_rl.envs.plant import LABEL_BOX, NOMINAL, SHIFTED, START_BOX, InvertedPendulumParams
from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv
from kbt_rl.envs.vector import InvertedPendulumVectorEnv
from studies.episodes import FloatArray, Outcome, Policy, evaluate, regret
from studies.frozen import SideBySide, go_side_by_side


class Score(NamedTuple):
    """Of a policy from many starts: shares that succeed and that never fall, and the regret against the expert."""

    success: float
    regret: float
    no_fall: float


@dataclass(frozen=True)
class Pendulum:
    """An inverted pendulum on a cart.

    Attributes:
        plant: The plant that the policies have to adapt to; they were cloned on the nominal one.
        forces: Force levels of discrete actions, N; None for a continuous force.
    """

    plant: InvertedPendulumParams = SHIFTED
    forces: tuple[float, ...] | None = None

    @property
    def max_force(self) -> float:
        """Newtons that an action of 1 stands for."""
        return self.plant.max_force

    def env(self, plant: InvertedPendulumParams | None = None) -> gym.Env[Any, Any]:
        """One pendulum, of the nominal plant if none is given."""
        dynamics: dict[str, Any] = {**(NOMINAL if plant is None else plant).dynamics}
        if self.forces is None:
            return InvertedPendulumEnv(**dynamics)
        return DiscreteInvertedPendulumEnv(self.forces, **dynamics)

    def envs(self, count: int, *, same_step: bool = False, **dynamics: Any) -> InvertedPendulumVectorEnv:
        """Many pendulums of the new plant.

        Args:
            count: How many.
            same_step: Whether an episode restarts in the step that ends the one before, rather than in the next.
            **dynamics: Parameters of the plants, one for all or one each, where they are others.
        """
        mode = AutoresetMode.SAME_STEP if same_step else AutoresetMode.NEXT_STEP
        options = {"autoreset_mode": mode, **self.plant.dynamics, **dynamics}
        if self.forces is None:
            return InvertedPendulumVectorEnv(count, **options)
        return DiscreteInvertedPendulumVectorEnv(count, forces=self.forces, **options)

    def sb3_envs(self, count: int) -> InvertedPendulumSB3VecEnv:
        """Many pendulums of the nominal plant, as an SB3 vector environment."""
        return InvertedPendulumSB3VecEnv("kbt_rl/InvertedPendulum-v0", count)

    def expert(self, *, actions_only: bool = False) -> LQRExpert:
        """The linear-quadratic expert of the new plant.

        Args:
            actions_only: With force levels, whether its labels are actions rather than distributions over them.
        """
        return LQRExpert.for_env(self.env(self.plant), temperature=0.0 if actions_only else None)

    def nominal_expert(self) -> LQRExpert:
        """The expert that the policies were cloned from."""
        return LQRExpert.for_env(self.env())

    def starts(self, seed: int, count: int) -> FloatArray:
        """Starts of episodes, uniform in the start box, ``(count, 4)``."""
        box = np.asarray(START_BOX)
        return np.random.default_rng([seed, 7]).uniform(-box, box, (count, 4))

    def score(self, policies: Sequence[Policy], seed: int, count: int) -> list[Score]:
        """Every policy alone, from the same starts as the expert."""
        envs, starts = self.envs(len(policies) * count), self.starts(seed, count)
        if go_side_by_side(policies):
            together = evaluate([SideBySide(policies)], envs, np.tile(starts, (len(policies), 1)))
            shape = len(policies), count
            outcome = Outcome(*(part.reshape(shape) for part in together))  # type: ignore[arg-type]
        else:
            outcome = evaluate(policies, envs, starts)
        expert = _expert_outcome(self, seed, count)
        rows = zip(
            outcome.success.mean(axis=1), regret(outcome.cost, expert.cost[0]), np.isfinite(outcome.cost).mean(axis=1),
            strict=True,
        )  # fmt: skip
        return [Score(*map(float, row)) for row in rows]


@lru_cache(maxsize=64)
def _expert_outcome(task: Pendulum, seed: int, count: int) -> Outcome:
    """What the expert makes of the starts, which the trials of a stream share."""
    return evaluate([task.expert()], task.envs(count), task.starts(seed, count))


class LabelStream:
    """States uniform in the label box with the expert's actions, noisy if asked for.

    Args:
        task: Whose expert.
        seed: Of the states and the noise.
        noise_variance: Of the labels, N^2.
        actions_only: See ``Pendulum.expert``.
    """

    def __init__(self, task: Pendulum, seed: int, noise_variance: float = 0.0, *, actions_only: bool = False) -> None:
        self._rng, self._deviation = np.random.default_rng([seed, 3]), noise_variance**0.5 / task.max_force
        self._expert = task.expert(actions_only=actions_only)

    def states(self, count: int) -> npt.NDArray[np.float32]:
        """``(count, 4)``."""
        return uniform_states(self._rng, (count,))

    def label(self, states: npt.NDArray[Any]) -> FloatArray:
        """Labels of the states, ``(n, a)``."""
        labels = self._expert.label(states)
        if not self._deviation:
            return labels
        noisy: FloatArray = labels + self._deviation * self._rng.standard_normal(labels.shape)
        return noisy


def uniform_states(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """States uniform in the label box, ``(*shape, 4)``."""
    box = np.asarray(LABEL_BOX)
    return rng.uniform(-box, box, (*shape, 4)).astype(np.float32)
