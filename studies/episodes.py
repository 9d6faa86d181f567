"""Closed-loop episodes: any policy acts by ``predict`` in the vector environment; there is no other simulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from gymnasium.vector import VectorEnv

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Observations = npt.NDArray[np.float32]
#: The cost of one episode is capped at so many times the expert's, which a fall always reaches.
COST_CAP = 100.0


class Policy(Protocol):
    """What acts: SB3's signature."""

    def predict(
        self,
        observation: Any,
        state: tuple[Any, ...] | None = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Any, tuple[Any, ...] | None]:
        """Actions for observations ``(n, o)``, and what to pass as ``state`` with the next ones."""


class Outcome(NamedTuple):
    """Of each episode: success, cost (``(s's + u^2) dt`` summed, infinite after a fall), and steps until its end."""

    success: BoolArray
    cost: FloatArray
    steps: npt.NDArray[np.int64]


class Episodes:
    """One episode in each row of a vector environment, stepped together; a row that has ended stays ended.

    Args:
        envs: A vector environment with ``is_success`` and ``cost`` in its infos that restarts an ended row by itself.
        starts: First states, one a row.

    Attributes:
        observations: What each policy sees next, ``(n, o)``.
        begins: Whether it is the first observation of an episode, ``(n,)``.
        running: Rows that have not ended yet, ``(n,)``.
        fallen: Rows that ended by a fall, ``(n,)``.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any], starts: FloatArray) -> None:
        self._envs, count = envs, len(starts)
        self.observations: Observations = envs.reset(seed=0, options={"state": starts})[0]
        self.begins, self.running = np.ones(count, dtype=bool), np.ones(count, dtype=bool)
        self.success, self.fallen = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        self.cost, self.steps = np.zeros(count), np.zeros(count, dtype=np.int64)

    def step(self, actions: npt.NDArray[Any]) -> None:
        """Take one step in all rows."""
        self.observations, _, terminated, truncated, infos = self._envs.step(actions)
        self.cost += np.where(self.running, infos["cost"], 0.0)
        self.steps += self.running
        self.fallen |= self.running & terminated
        self.success |= self.running & truncated & ~terminated & infos["is_success"]
        self.begins = terminated | truncated  # the next observation is the first of another episode
        self.running = self.running & ~self.begins

    def outcome(self) -> Outcome:
        """What has come of them so far."""
        return Outcome(self.success.copy(), np.where(self.fallen, np.inf, self.cost), self.steps.copy())


def evaluate(policies: Sequence[Policy], envs: VectorEnv[Any, Any, Any], starts: FloatArray) -> Outcome:
    """One episode of each policy from each start, side by side in one vector environment.

    Args:
        policies: Each acts by ``predict`` in rows of its own, with the context of its own episodes.
        envs: With ``policies x starts`` rows.
        starts: ``(n, s)``, the same for all policies, or ``(policies, n, s)``.

    Returns:
        Arrays of shape ``(policies, n)``.
    """
    each = np.broadcast_to(starts, (len(policies), *starts.shape[-2:]))
    count = each.shape[1]
    episodes = Episodes(envs, each.reshape(-1, each.shape[-1]))
    states: list[tuple[Any, ...] | None] = [None] * len(policies)
    actions: npt.NDArray[Any] = np.zeros_like(envs.action_space.sample())
    while episodes.running.any():
        for index, policy in enumerate(policies):
            rows = slice(index * count, (index + 1) * count)
            if episodes.running[rows].any():
                actions[rows], states[index] = policy.predict(
                    episodes.observations[rows], states[index], episodes.begins[rows], deterministic=True
                )
        episodes.step(actions)
    success, cost, steps = episodes.outcome()
    shape = (len(policies), count)
    return Outcome(success.reshape(shape), cost.reshape(shape), steps.reshape(shape))


def walk(policy: Policy, envs: VectorEnv[Any, Any, Any], seed: int, every: int) -> Iterator[tuple[Observations, int]]:
    """Every so many steps the state that a policy has come to, ``(1, o)``, and its falls so far.

    The policy may learn in between. A new episode begins after a fall or when the time is up.

    Args:
        policy: Who acts.
        envs: A vector environment of one row that restarts in the step that ends an episode.
        seed: Of the starts.
        every: Steps between two states.
    """
    observations, begins, falls = envs.reset(seed=seed)[0], np.ones(1, dtype=bool), 0
    state: tuple[Any, ...] | None = None
    while True:
        for _ in range(every):
            actions, state = policy.predict(observations, state, begins, deterministic=True)
            observations, _, terminated, truncated, _ = envs.step(actions)
            begins = terminated | truncated
            falls += int(terminated[0])
        yield observations, falls


def regret(cost: FloatArray, expert_cost: FloatArray) -> FloatArray:
    """``sum J(policy) / sum J(expert) - 1`` over the last axis, each cost capped at 100 times the expert's."""
    capped = np.minimum(cost, COST_CAP * expert_cost)
    result: FloatArray = capped.sum(axis=-1) / expert_cost.sum() - 1.0
    return result
