"""The context window against a plain list, and as SB3's ``state``."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
from learners import LONGER, Array, policy

from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.models.context import ContextWindow, advance_window, start_window, with_action
from kbt_rl.models.decision_transformer import DecisionTransformerConfig

OBS, ACT = 4, 2


@dataclass
class Episode:
    """One environment's history as lists."""

    observations: list[Array] = field(default_factory=list)
    actions: list[Array] = field(default_factory=list)

    def window(self, length: int) -> tuple[Array, Array, int]:
        """What a context of ``length`` must hold before the newest action is chosen."""
        observations, actions = np.zeros((length, OBS)), np.zeros((length, ACT))
        for age, observation in enumerate(reversed(self.observations[-length:])):
            observations[-1 - age] = observation
        for age, action in enumerate(reversed(self.actions[-(length - 1) :] if length > 1 else [])):
            actions[-2 - age] = action
        return observations, actions, len(self.observations) - 1


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_window_holds_the_last_steps_of_each_episode(length: int, n_envs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    episodes = [Episode() for _ in range(n_envs)]
    starts = np.ones(n_envs, dtype=bool)
    window: ContextWindow | None = None
    for _ in range(40):
        observations = rng.normal(size=(n_envs, OBS)).astype(np.float32)
        actions = rng.normal(size=(n_envs, ACT)).astype(np.float32)
        window = (
            start_window(observations, length, ACT) if window is None else advance_window(window, observations, starts)
        )
        for row in range(n_envs):
            if starts[row]:
                episodes[row] = Episode()
            episodes[row].observations.append(observations[row])
            expected = episodes[row].window(length)
            for found, wanted in zip((part[row] for part in window), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
            episodes[row].actions.append(actions[row])
        np.testing.assert_array_equal(window.newest, observations)
        window = with_action(window, actions)
        starts = rng.random(n_envs) < 0.25


@pytest.mark.parametrize("length", [1, 3])
def test_functions_leave_their_arguments_alone(length: int) -> None:
    observations = np.ones((2, OBS), dtype=np.float32)
    window = start_window(observations, length, ACT)
    before = copy.deepcopy(window)
    assert with_action(window, np.ones((2, ACT))).actions[:, -1].all()
    newer = with_action(advance_window(window, observations, np.array([True, False])), np.ones((2, ACT)))
    observations += 1.0
    np.testing.assert_array_equal(newer.newest, 1.0)
    for now, then in zip(window, before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_other_number_of_environments_is_refused() -> None:
    window = start_window(np.zeros((3, OBS)), 2, ACT)
    with pytest.raises(ValueError, match="holds 3 environments and 2 observations came"):
        advance_window(window, np.zeros((2, OBS)), np.zeros(2, dtype=bool))


@pytest.mark.parametrize("length", [1, 2])
def test_other_number_of_episode_starts_is_refused(length: int) -> None:
    window = start_window(np.zeros((1, OBS)), length, ACT)
    with pytest.raises(ValueError, match=r"episode_start has shape \(3,\); expected \(1,\)"):
        advance_window(window, np.zeros((1, OBS)), np.zeros(3, dtype=bool))


# ---------------------------------------------------------------------- as SB3's state


def observations(count: int, rows: int = 1, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, rows, OBS)).astype(np.float32)


def roll(subject: DecisionTransformerPolicy, path: Array) -> Array:
    """Deterministic actions along a path of observations ``(T, n, OBS)``."""
    state, actions = None, []
    for step in path:
        action, state = subject.predict(step, state, deterministic=True)
        actions.append(action)
    return np.stack(actions)


def test_single_observation_has_a_state_of_one_row() -> None:
    subject, path = policy(transformer=LONGER), observations(5)
    state, batched_state = None, None
    for step in path:
        action, state = subject.predict(step[0], state, deterministic=True)
        batched, batched_state = subject.predict(step, batched_state, deterministic=True)
        assert action.shape == (ACT,)
        np.testing.assert_array_equal(action, batched[0])
        for part, other in zip(state, batched_state, strict=True):
            np.testing.assert_array_equal(part, other)


def test_nothing_of_an_episode_is_kept_on_the_policy() -> None:
    subject = policy(transformer=LONGER)
    paths = observations(6, seed=1), observations(6, seed=2)
    separate = [roll(subject, path) for path in paths]
    states: list[tuple[Array, ...] | None] = [None, None]
    for t in range(6):
        for i, path in enumerate(paths):
            action, states[i] = subject.predict(path[t], states[i], deterministic=True)
            np.testing.assert_array_equal(action, separate[i][t])


def test_rows_are_independent_episodes() -> None:
    subject, path = policy(transformer=LONGER), observations(8, rows=3)
    starts = np.random.default_rng(3).random((8, 3)) < 0.3
    state = None
    alone: list[tuple[Array, ...] | None] = [None] * 3
    for t in range(8):
        actions, state = subject.predict(path[t], state, starts[t], deterministic=True)
        for row in range(3):
            begin = None if starts[t, row] else alone[row]
            action, alone[row] = subject.predict(path[t, row], begin, deterministic=True)
            np.testing.assert_allclose(actions[row], action, rtol=1e-5, atol=1e-6)


def test_episode_start_can_be_set_again_and_again() -> None:
    """``evaluate_policy`` does so for an environment that has met its quota."""
    subject, path = policy(transformer=LONGER), observations(5, rows=2)
    state = None
    for step in path:
        actions, state = subject.predict(step, state, np.array([True, False]), deterministic=True)
        fresh, fresh_state = subject.predict(step[:1], deterministic=True)
        np.testing.assert_allclose(actions[:1], fresh, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state[0][0], fresh_state[0][0])
    assert state[2].tolist() == [0, 4]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_state_of_another_policy_is_refused(length: int) -> None:
    other = policy(transformer=DecisionTransformerConfig(context_length=length))
    _, state = other.predict(observations(1)[0])
    with pytest.raises(ValueError, match="context's observations"):
        policy(transformer=LONGER).predict(observations(1)[0], state)


@pytest.mark.parametrize(
    ("state", "message"), [((np.zeros((1, 3, 4)),), "state has 1 arrays"), ("three rows", "holds 3 environments")]
)
def test_malformed_state_is_refused(state: object, message: str) -> None:
    subject = policy(transformer=LONGER)
    given = subject.predict(observations(1, rows=3)[0])[1] if state == "three rows" else state
    with pytest.raises(ValueError, match=message):
        subject.predict(observations(1)[0], given)
