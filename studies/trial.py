"""Methods and trials as plain values: a trial holds all that its result depends on and can be sent to any machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

from kbt_rl.agents.sample import Sample
from studies.episodes import Policy
from studies.table import Row

T = TypeVar("T", bound="Trial")
#: Stream and policy seeds from here on are reported; those below the other are for tuning.
FIRST_REPORTED_SEED, TUNING_SEEDS = 1000, 100


@dataclass(frozen=True)
class Method:
    """A learner and its settings.

    Attributes:
        name: What tables and figures call it.
        kind: A name of ``methods.KINDS``.
        settings: Arguments of the kind, as JSON can hold them.
    """

    name: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


class Learner(Protocol):
    """A policy that may learn. Its ``policy`` is one object that changes in place."""

    @property
    def policy(self) -> Policy:
        """What acts."""

    def update(self, sample: Sample) -> Any:
        """Learn from a labelled sample."""


class Fixed:
    """A policy that does not learn."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def update(self, sample: Sample) -> None:
        """Ignore the label."""


class Source(Protocol):
    """Something that several trials start from and that takes long to make: it is made once, and kept as a file."""

    @property
    def name(self) -> str:
        """Of its file; other for other contents."""

    def make(self) -> bytes:
        """Its content: a pure function of what it was made with."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of one method on one stream. A study adds fields of its own in a subclass.

    Attributes:
        study: The module that runs it.
        method: What learns, with its settings.
        policy_seed: Seed of the pre-trained policy.
        stream_seed: Seed of the labels and the starts.
        task: Name of the world that it learns in.
        alone: Whether nothing may run beside it, since it measures time.
    """

    study: str
    method: Method
    policy_seed: int
    stream_seed: int
    task: str
    alone: bool = False

    @classmethod
    def usual(cls, *, quick: bool) -> dict[str, Any]:
        """Fields that depend on how large a study is to be."""
        return {}

    @property
    def label(self) -> str:
        """Of the task in the result table."""
        return self.task

    @property
    def id(self) -> str:
        """Readable, and equal only for equal trials; names the result file."""
        name = f"{self.study} {self.method.name} {self.label}".lower()
        readable = re.sub(r"[^a-z0-9]+", "-", name).strip("-")[:70]
        return f"{readable}-p{self.policy_seed}-s{self.stream_seed}-{digest(self)}"

    @property
    def source(self) -> Source | None:
        """What has to be there before it can run; None for nothing."""
        return None

    def setting(self, content: bytes | None) -> Any:
        """What the study's ``run`` starts from, given the content of the source."""
        return None

    def row(self, labels: int, metric: str, value: float, *, task: str | None = None) -> Row:
        """A row of the result table; the task is the trial's own if left out."""
        seeds = (self.policy_seed, self.stream_seed)
        return Row(
            self.study, self.label if task is None else task, self.method.name, *seeds, labels, metric, float(value)
        )


def digest(value: Any) -> str:
    """Ten hexadecimal digits that are equal for equal dataclasses."""
    text = json.dumps([type(value).__qualname__, asdict(value)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


class Size(NamedTuple):
    """How large a study is to be.

    Attributes:
        quick: Whether only a look is wanted.
        seed: First policy and stream seed.
        streams: Label streams for each policy, if not as many as the study has.
        policies: Pre-trained policies, if not as many as the study has.
    """

    quick: bool = False
    seed: int = FIRST_REPORTED_SEED
    streams: int | None = None
    policies: int | None = None

    def tuning(self) -> Size:
        """The same from seed 0 on, unless another seed was asked for.

        Raises:
            ValueError: The seeds would be among those that are reported.
        """
        size = self._replace(seed=0) if self.seed == FIRST_REPORTED_SEED else self
        if max(max(pair) for pair in size.pairs(streams=2)) >= TUNING_SEEDS:
            raise ValueError("tuning uses seeds 0 to 99; pass a smaller --seed")
        return size

    def pairs(self, *, policies: int = 2, streams: int = 5) -> list[tuple[int, int]]:
        """Policy and stream seeds of the trials; with ``quick`` one pair unless more are asked for."""
        policies = (1 if self.quick else policies) if self.policies is None else self.policies
        streams = (1 if self.quick else streams) if self.streams is None else self.streams
        return [(self.seed + p, self.seed + s) for s in range(streams) for p in range(policies)]

    def trials(
        self, kind: type[T], methods: Iterable[Method], /, *, policies: int = 2, streams: int = 5, **fields: Any
    ) -> list[T]:
        """Trials of each method on each pair of seeds."""
        fields = {**kind.usual(quick=self.quick), **fields}
        pairs = self.pairs(policies=policies, streams=streams)
        return [kind(method=method, policy_seed=p, stream_seed=s, **fields) for method in methods for p, s in pairs]
