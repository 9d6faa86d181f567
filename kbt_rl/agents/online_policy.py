"""What the loop, the streams and the callbacks ask of a policy, whatever network it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kbt_rl.agents.fallback import Choice, Fallback
from kbt_rl.networks.links import LabelKind

Array = npt.NDArray[Any]


class Context(Protocol):
    """What a policy decides on: the newest observations of ``n`` episodes, and what it remembers of them."""

    @property
    def newest(self) -> Any:
        """The newest observations, ``(n, ...)``, or a dict of them."""

    @property
    def episodes(self) -> int:
        """How many episodes."""

    def rows(self, picked: Any) -> Context:
        """Those of some episodes."""


class OnlinePolicy(Protocol):
    """A policy that acts on contexts and can be taught; SB3's ``predict`` besides."""

    fallback: Fallback | None

    @property
    def feature_size(self) -> int:
        """Entries of what ``encode`` returns for a context."""

    @property
    def observation_size(self) -> int:
        """Entries of a flat observation."""

    @property
    def action_size(self) -> int:
        """Entries of a label."""

    def start(self, observations: Any) -> Any:
        """Contexts of episodes that start with ``observations``, ``(n, ...)``."""

    def advance(self, context: Any, observations: Any, episode_start: npt.NDArray[np.bool_]) -> Any:
        """Contexts one step on; rows where ``episode_start`` is set begin anew."""

    def with_action(self, context: Any, actions: Array) -> Any:
        """The same contexts with the actions that were chosen."""

    def encode(self, context: Any) -> Tensor:
        """Features of contexts, ``(n, feature_size)``."""

    def choose(self, context: Any, features: Tensor, deterministic: bool = True) -> Choice:
        """Actions in contexts that ``encode`` made ``features`` of, by whoever may act in each."""


class Labeller(NamedTuple):
    """How an expert is asked.

    Attributes:
        ask: From observations ``(n, ...)`` to labels with a row for each, NaN where it has none.
        kind: What the labels are.
        follow: Of an expert that has to see every observation: called at each step with those of all episodes
            ``(n, ...)`` and which of them begin one ``(n,)``, it returns the labels of all. It takes the place of
            ``ask``.
    """

    ask: Callable[[Any], Array]
    kind: LabelKind = "action"
    follow: Callable[[Any, npt.NDArray[np.bool_]], Array] | None = None
