"""How far an adapter has come with a model: saved with the model, so that a loaded one goes on from there."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.sample import Sample


@dataclass
class Progress:
    """What an adapter has asked for and not yet learned.

    Attributes:
        asked: Labels that were asked for.
        saved: Rows that the query rule or the budget left out.
        repairs: Times that an update repaired a covariance.
        step: Steps of rollouts.
        on_the_way: Samples and the steps in which they arrive, in this order.
        owner: The adapter whose progress this is; None in what was read from a file, for the next one like it.
        lesson: What the model had started from when the samples were asked for; None as ``owner``.
        run: The run in which it was last used, by its start.
    """

    asked: int = 0
    saved: int = 0
    repairs: int = 0
    step: int = 0
    on_the_way: deque[tuple[int, Sample]] = field(default_factory=deque)
    owner: Any = None
    lesson: object = None
    run: float = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owner": None, "lesson": None}


def progress_of(adapter: Any, kind: str, model: OnlineAlgorithm, mine: Progress | None) -> Progress:
    """The progress that an adapter starts a run with, which is kept with the model from now on.

    Its own, if it has served this policy before; else that of an adapter of its kind in the file that the model was
    loaded from, of several the first that no other has taken; else none. What adapters had in earlier runs of this
    process is theirs, and no longer saved with the model.

    Args:
        adapter: Who asks.
        kind: What such an adapter is called in the file.
        model: The learner.
        mine: What the adapter had of the same policy, if it has.
    """
    run, kept = model.start_time, model.adapter_state
    for name in [name for name, found in kept.items() if found.owner not in (None, adapter) and found.run != run]:
        del kept[name]
    same = {name: found for name, found in kept.items() if name.partition(" #")[0] == kind}
    own = [found for found in kept.values() if found.owner is adapter]
    saved = [found for found in same.values() if found.owner is None]
    if own or (saved and mine is None):
        progress: Progress = (own or saved)[0]
    else:
        progress = Progress() if mine is None else mine
        number = next(number for number in itertools.count(1) if f"{kind} #{number}" not in same)
        kept[f"{kind} #{number}"] = progress
    progress.owner, progress.run = adapter, run
    if progress.lesson is not None and progress.lesson is not model.lesson:
        progress.on_the_way.clear()  # asked for features of another encoder
    progress.lesson = model.lesson
    return progress
