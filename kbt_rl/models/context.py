"""The context window of a decision transformer as plain arrays that travel with the caller.

SB3 hands a recurrent policy's memory around by the ``state`` argument of ``predict``: a tuple of arrays whose first
axis is the environment. A window is such a tuple, so nothing is kept on the policy and evaluations can interleave with
training. The newest time step is last; rows younger than the window are padded on the left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class ContextWindow(NamedTuple):
    """The last ``K`` steps of ``n`` episodes.

    Attributes:
        observations: ``(n, K, observation size)``, the newest last.
        actions: ``(n, K, action size)``; the newest action is 0 until it is chosen.
        timesteps: Step of the newest observation in its episode, ``(n,)``, 0 at its start.
    """

    observations: FloatArray
    actions: FloatArray
    timesteps: npt.NDArray[np.int64]

    @property
    def newest(self) -> FloatArray:
        """The newest observations, ``(n, observation size)``."""
        return self.observations[:, -1]

    @property
    def episodes(self) -> int:
        """``n``."""
        return len(self.timesteps)

    def rows(self, picked: slice | npt.NDArray[Any]) -> ContextWindow:
        """The windows of some episodes."""
        return ContextWindow(self.observations[picked], self.actions[picked], self.timesteps[picked])


def start_window(observations: npt.NDArray[Any], context_length: int, action_size: int) -> ContextWindow:
    """Windows of episodes that start with ``observations``, ``(n, observation size)``."""
    n, size = observations.shape
    padded = np.zeros((n, context_length, size), dtype=np.float32)
    padded[:, -1] = observations
    actions = np.zeros((n, context_length, action_size), dtype=np.float32)
    return ContextWindow(padded, actions, np.zeros(n, dtype=np.int64))


def advance_window(
    window: ContextWindow, observations: npt.NDArray[Any], episode_start: npt.NDArray[np.bool_]
) -> ContextWindow:
    """Append new observations ``(n, observation size)``; rows where ``episode_start`` is set begin anew.

    Setting the flag of a row again and again is harmless: its window then holds the newest observation only.
    """
    if len(observations) != len(window.timesteps):
        raise ValueError(
            f"the context holds {len(window.timesteps)} environments and {len(observations)} observations came; pass "
            "state=None at the start, or the state that the last predict returned"
        )
    if episode_start.shape != window.timesteps.shape:
        raise ValueError(
            f"episode_start has shape {episode_start.shape}; expected {window.timesteps.shape}, one flag an environment"
        )
    if window.observations.shape[1] == 1:  # the context is the observation alone
        shifted = observations[:, None].astype(np.float32)
        actions = np.zeros_like(window.actions)
    else:
        shifted = np.concatenate([window.observations[:, 1:], observations[:, None]], axis=1, dtype=np.float32)
        actions = np.concatenate([window.actions[:, 1:], np.zeros_like(window.actions[:, :1])], axis=1)
        shifted[episode_start, :-1] = 0.0
        actions[episode_start] = 0.0
    return ContextWindow(shifted, actions, np.where(episode_start, 0, window.timesteps + 1))


def with_action(window: ContextWindow, actions: npt.NDArray[Any]) -> ContextWindow:
    """The same window with the newest actions ``(n, action size)`` filled in."""
    filled = window.actions.copy()
    filled[:, -1] = actions
    return window._replace(actions=filled)
