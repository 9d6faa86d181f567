"""Where labelled samples come from: one small interface, three sources.

A stream is asked once per step of the (vector) environment and answers with contexts to label. Its random state and its
position live in the model, so that a saved model continues the same stream.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from torch import Tensor

from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.online_policy import Context
from kbt_rl.arguments import instance, shown, whole
from kbt_rl.callbacks.queries import epistemic_variance
from kbt_rl.inference.checks import as_array
from kbt_rl.networks.links import LabelKind

Array = npt.NDArray[Any]


class StreamBatch(NamedTuple):
    """What a stream offers in one step.

    Attributes:
        context: States to label.
        features: Their features where the rollout has encoded them already.
        target: Labels, if the stream brings its own; else the expert is asked.
        mask: Rows to use, ``(n,)``; None for all.
        kind: What the labels are.
    """

    context: Context
    features: Tensor | None = None
    target: Array | None = None
    mask: npt.NDArray[np.bool_] | None = None
    kind: LabelKind = "action"


class SampleStream(ABC):
    """A source of samples."""

    #: Whether the stream brings its own labels, so that no expert is needed.
    labelled = False

    def check(self, model: OnlineAlgorithm) -> None:  # noqa: B027
        """Raise an error if this stream cannot serve the model; called before training starts."""

    @abstractmethod
    def next(self, model: OnlineAlgorithm, step: dict[str, Any]) -> StreamBatch | None:
        """Samples of this step, or None.

        Args:
            model: The learner; owns the stream's random generator and position.
            step: Locals of the rollout: ``context`` and ``features`` of the new observations, ``dones``, ...
        """


class IidStream(SampleStream):
    """I.i.d. states, uniform in a box: one per environment and step, as in the paper.

    Args:
        box: Where to draw; the model's label space if None.
    """

    def __init__(self, box: spaces.Box | None = None) -> None:
        if box is not None:
            instance("box", box, spaces.Box)
        self.box = box

    def check(self, model: OnlineAlgorithm) -> None:
        """The box must lie in the observation space."""
        box, space = self._box(model), model.observation_space
        assert isinstance(space, spaces.Box)
        if box.shape != space.shape or not ((box.low >= space.low) & (box.high <= space.high)).all():
            raise ValueError(f"labels would be asked in {box}, which is not inside the observation space {space}")

    def next(self, model: OnlineAlgorithm, step: dict[str, Any]) -> StreamBatch:
        """See ``SampleStream``."""
        return StreamBatch(model.policy.start(self._draw(model, model.n_envs)))

    def _draw(self, model: OnlineAlgorithm, count: int) -> Array:
        box = self._box(model)
        return model.stream_rng.uniform(box.low, box.high, (count, *box.shape)).astype(np.float32)

    def _box(self, model: OnlineAlgorithm) -> spaces.Box:
        box = model.label_space if self.box is None else self.box
        if box is None:
            raise ValueError(
                "the environment states no label_space and its observation space is unbounded; pass IidStream(box), or "
                "use the stream 'visited'"
            )
        return box


class VisitedStream(SampleStream):
    """The states that the rollout visits: correlated, and where the policy needs the labels.

    Args:
        every: Ask at every so many steps.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = whole("every", every, 1, "a label is asked for at every 1st, 2nd, ... step")

    def next(self, model: OnlineAlgorithm, step: dict[str, Any]) -> StreamBatch | None:
        """See ``SampleStream``."""
        position = model.stream_positions.get("visited", 0) + 1
        model.stream_positions["visited"] = position
        if position % self.every:
            return None
        return StreamBatch(step["context"], step["features"])


class UncertainStream(IidStream):
    """Of a pool of i.i.d. states, the one that the posterior knows least about: one per environment and step.

    Args:
        pool: States to choose from.
        box: Where to draw; the model's label space if None.
    """

    def __init__(self, pool: int = 32, box: spaces.Box | None = None) -> None:
        super().__init__(box)
        self.pool = whole("pool", pool, 1, "a whole number of states to choose from, at least 1")

    def check(self, model: OnlineAlgorithm) -> None:
        """Only a posterior knows what it does not know."""
        super().check(model)
        epistemic_variance(model, torch.zeros(model.n_envs, model.policy.feature_size))

    def next(self, model: OnlineAlgorithm, step: dict[str, Any]) -> StreamBatch:
        """See ``SampleStream``."""
        context = model.policy.start(self._draw(model, self.pool * model.n_envs))
        features = model.policy.encode(context)
        by_env = epistemic_variance(model, features, each=self.pool).reshape(model.n_envs, self.pool)
        chosen = by_env.argmax(axis=1) + self.pool * np.arange(model.n_envs)
        return StreamBatch(context.rows(chosen), features[chosen])


class RecordedStream(SampleStream):
    """A recording of observations and labels, played once from the start; it resumes where the model left off.

    Args:
        observations: ``(N, observation size)``.
        targets: ``(N, action size)``; NaN where there is no label.
    """

    labelled = True

    def __init__(self, observations: Array, targets: Array) -> None:
        self.observations = as_array(observations, "observations")
        self.targets = as_array(targets, "targets")
        counts = [len(array) if array.ndim else 0 for array in (self.observations, self.targets)]
        if counts[0] != counts[1] or not (self.observations.ndim and self.targets.ndim):
            raise ValueError(f"{counts[0]} observations and {counts[1]} targets; one of each a sample")
        if not np.isfinite(self.observations).all() or np.isinf(self.targets).any():
            raise ValueError(
                "the recording holds an observation that is NaN or infinite, or a target that is infinite; leave such "
                "rows out, and use NaN for a target that is missing"
            )
        digest = hashlib.sha256(self.observations.tobytes() + self.targets.tobytes()).hexdigest()
        self._key = f"recorded {digest[:16]}"  # another recording starts at its own beginning

    def check(self, model: OnlineAlgorithm) -> None:
        """Observations and targets must have the model's sizes."""
        sizes = (
            ("observations", self.observations, model.policy.observation_size),
            ("targets", self.targets, model.policy.action_size),
        )
        for name, array, size in sizes:
            if array.ndim != 2 or array.shape[1] != size:
                raise ValueError(f"the recorded {name} have shape {array.shape}; expected (N, {size})")
        if getattr(model, "per_env", False) and len(self.targets) % model.n_envs:
            raise ValueError(
                f"the recording has {len(self.targets)} rows, which are {model.n_envs} a step, one for each posterior; "
                "fill the last step up with targets of NaN"
            )

    def next(self, model: OnlineAlgorithm, step: dict[str, Any]) -> StreamBatch | None:
        """See ``SampleStream``; None once the recording has ended."""
        start = model.stream_positions.get(self._key, 0)
        if start >= len(self.observations):
            return None
        rows = slice(start, min(start + model.n_envs, len(self.observations)))
        model.stream_positions[self._key] = rows.stop
        return StreamBatch(model.policy.start(self.observations[rows]), target=self.targets[rows])


def as_stream(stream: str | SampleStream) -> SampleStream:
    """A stream by name: ``"iid"``, ``"visited"`` or ``"uncertain"``."""
    if isinstance(stream, SampleStream):
        return stream
    named: dict[str, Callable[[], SampleStream]] = {
        "iid": IidStream,
        "visited": VisitedStream,
        "uncertain": UncertainStream,
    }
    if not isinstance(stream, str) or stream not in named:
        raise ValueError(f"stream is {shown(stream)}; choose 'iid', 'visited', 'uncertain', or pass a SampleStream")
    return named[stream]()
