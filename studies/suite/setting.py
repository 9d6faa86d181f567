"""Where a learner of the suite starts, how it earns labels on its own path, and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from kbt_rl.agents.online_policy import Labeller
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.teachers import Teacher, labeller_for
from kbt_rl.networks.sb3 import SB3Network
from studies.episodes import Policy
from studies.suite.stored import Stored, load
from studies.suite.tasks import SUITE, SuiteTask
from studies.trial import Trial

NOMINAL_STATES = 1_000
Array = npt.NDArray[Any]


class Setting(NamedTuple):
    """A task, and who was trained for it.

    Attributes:
        task: Of the suite.
        nominal: Trained before the change, a copy of its own for each trial.
        teacher: Knows the world after it: trained in it, or a function of observations.
        states: Observations of the nominal policy before the change, ``(n, o)``.
    """

    task: SuiteTask
    nominal: Stored
    teacher: Stored | Callable[[Array], Array]
    states: Array

    @classmethod
    def of(cls, name: str) -> Setting:
        """That of a task by its name."""
        task = SUITE[name]
        teacher = task.expert or load(task.policies["teacher"], task)
        return cls(task, load(task.policies["nominal"], task), teacher, _states(name))

    @property
    def labeller(self) -> Labeller:
        """How the teacher is asked: for what its last layer says where both policies have the same kind of layer."""
        teacher = self.teacher
        asked = Teacher(teacher.policy, teacher.statistics) if isinstance(teacher, Stored) else teacher
        return labeller_for(SB3Network(self.nominal.policy), asked)

    @property
    def taught(self) -> Policy:
        """The teacher as a policy."""
        return self.teacher.acting if isinstance(self.teacher, Stored) else Function(self.teacher)


class Function:
    """A function of observations as a policy."""

    def __init__(self, function: Callable[[Array], Array]) -> None:
        self._function = function

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """See SB3."""
        return self._function(observation), None


@lru_cache(maxsize=16)
def _states(name: str) -> Array:
    """The nominal policy's observations in the world as it was; trials of a task share them."""
    task = SUITE[name]
    walked = walk(load(task.policies["nominal"], task).acting, task.env(shifted=False), seed=0, every=1)
    return np.concatenate([next(walked) for _ in range(NOMINAL_STATES)])


@dataclass(frozen=True, kw_only=True)
class SuiteTrial(Trial):
    """A trial on a task of the suite.

    Attributes:
        checkpoints: Labels after which to score; it learns the last number of labels.
        episodes: Behind each score.
        every: Steps of the learner's own path from one label to the next.
    """

    checkpoints: tuple[int, ...] = (20, 50, 100, 200, 500, 1000)
    episodes: int = 10
    every: int = 5

    def setting(self, content: bytes | None) -> Setting:
        """See ``Trial``."""
        return Setting.of(self.task)


def walk(policy: Policy, env: gym.Env[Any, Any], seed: int, every: int) -> Iterator[Array]:
    """Every so many steps the observation that a policy acts on, ``(1, o)``; it may learn before the next step."""
    observation, step = env.reset(seed=seed)[0], 0
    while True:
        action, _ = policy.predict(observation[np.newaxis], deterministic=True)
        if step % every == 0:
            yield observation[np.newaxis]
        observation, _, terminated, truncated, _ = env.step(action[0])
        step += 1
        if terminated or truncated:
            observation, _ = env.reset()


def samples(policy: Policy, setting: Setting, seed: int, every: int) -> Iterator[Sample]:
    """Labelled observations of a policy's own path in the world after the change."""
    labeller = setting.labeller
    for observation in walk(policy, setting.task.env(), seed, every):
        yield Sample(observation, labeller.ask(observation), kind=labeller.kind)


def returns(policy: Policy, envs: Sequence[gym.Env[Any, Any]], seed: int) -> Array:
    """Return of one episode in each environment, side by side, ``(n,)``; the same starts for the same seed."""
    observations = np.stack([env.reset(seed=100 * seed + place)[0] for place, env in enumerate(envs)])
    total, running = np.zeros(len(envs)), list(range(len(envs)))
    while running:
        actions, _ = policy.predict(observations[running], deterministic=True)
        left = []
        for place, action in zip(running, actions, strict=True):
            observations[place], reward, terminated, truncated, _ = envs[place].step(action)
            total[place] += reward
            if not (terminated or truncated):
                left.append(place)
        running = left
    return total
