"""The tasks of the suite: an environment, what changes in it, and who was trained on either side of the change.

A new task is an entry here and two files that ``python -m studies.suite.train`` makes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
from gymnasium.wrappers import TimeLimit

from kbt_rl.envs.dynamics_shift import DynamicsShift
from studies.suite.swing_up import LONG_POLE, NOMINAL, SwingUp, SwingUpExpert

Role = Literal["nominal", "teacher"]


@dataclass(frozen=True)
class SuiteTask(ABC):
    """A world that changes under a trained policy.

    Attributes:
        policies: Files, without their endings, of the policy that was trained before the change and of its teacher.
        steps: Longest episode.
    """

    policies: Mapping[Role, str]
    steps: int

    @property
    def expert(self) -> Callable[[Any], Any] | None:
        """A function that knows the world after the change, where no trained policy is the teacher."""
        return None

    def env(self, *, shifted: bool = True, steps: int | None = None) -> gym.Env[Any, Any]:
        """The world after the change, or before it; with episodes of other lengths if asked for."""
        return TimeLimit(self.world(shifted), steps or self.steps)

    @abstractmethod
    def world(self, shifted: bool) -> gym.Env[Any, Any]:
        """The same without a time limit."""


@dataclass(frozen=True)
class GymTask(SuiteTask):
    """A world of Gymnasium.

    Attributes:
        env_id: Its id.
        shift: Parameters of ``DynamicsShift`` and their new values.
    """

    env_id: str
    shift: Mapping[str, float]

    def world(self, shifted: bool) -> gym.Env[Any, Any]:
        """See ``SuiteTask``."""
        env = gym.make(self.env_id, max_episode_steps=-1, disable_env_checker=True).unwrapped
        return DynamicsShift(env, self.shift) if shifted else env


class SwingUpTask(SuiteTask):
    """A pole that becomes longer and heavier; the expert is a function of the plant."""

    @property
    def expert(self) -> SwingUpExpert:
        """See ``SuiteTask``."""
        return SwingUpExpert(LONG_POLE)

    def world(self, shifted: bool) -> gym.Env[Any, Any]:
        """See ``SuiteTask``."""
        return SwingUp(LONG_POLE if shifted else NOMINAL)


def _own(name: str) -> dict[Role, str]:
    """A teacher that is the policy itself, trained on."""
    return {"nominal": f"{name}-nominal", "teacher": f"{name}-teacher"}


_M15 = {"m": 1.5}
_WEAK_SHINS = {"gear.bshin": 0.2, "gear.fshin": 0.2}
#: The tasks by name.
SUITE: dict[str, SuiteTask] = {
    "CartPole": GymTask(_own("cartpole"), 500, "CartPole-v1", {"length": 3.0}),
    "Pendulum, PPO": GymTask(_own("pendulum-ppo"), 200, "Pendulum-v1", _M15),
    "Pendulum, SAC": GymTask(_own("pendulum-sac"), 200, "Pendulum-v1", {"g": 15.0}),
    "Pendulum, SAC teaches PPO": GymTask(
        {"nominal": "pendulum-ppo-nominal", "teacher": "pendulum-heavy-sac"}, 200, "Pendulum-v1", _M15
    ),
    "InvertedPendulum": GymTask(_own("inverted-pendulum"), 1000, "InvertedPendulum-v5", {"gear": 5.0}),
    "InvertedDoublePendulum": GymTask(
        _own("inverted-double-pendulum"), 1000, "InvertedDoublePendulum-v5", {"mass.pole2": 10.0}
    ),
    "HalfCheetah, policy 0": GymTask(_own("half-cheetah-0"), 300, "HalfCheetah-v5", _WEAK_SHINS),
    "HalfCheetah, policy 1": GymTask(_own("half-cheetah-1"), 300, "HalfCheetah-v5", _WEAK_SHINS),
    "Swing-up": SwingUpTask({"nominal": "swing-up-nominal"}, 500),
    "Reacher": GymTask(_own("reacher"), 50, "Reacher-v5", {"gear.0": -1.0}),
}  # fmt: skip
