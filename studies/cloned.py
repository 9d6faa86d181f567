"""Trials that start from a policy which was cloned from the nominal plant's expert."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.warm_start import WarmStart
from studies.pendulum import Pendulum
from studies.tasks import TASKS
from studies.trial import Trial, digest

PRETRAINING = PretrainConfig()
QUICK_PRETRAINING = PretrainConfig(steps=1_500)


class Setting(NamedTuple):
    """Where a learner starts: the task, and the policy that was pre-trained for it."""

    task: Pendulum
    pretrained: WarmStart


class Clone(NamedTuple):
    """A policy that is cloned once for many trials."""

    task: str
    seed: int
    pretraining: PretrainConfig

    @property
    def name(self) -> str:
        """See ``Source``."""
        return f"cloned-{self.task.replace(' ', '-')}-{self.seed}-{digest(self.pretraining)}.zip"

    def make(self) -> bytes:
        """The file that ``WarmStart.save`` writes."""
        task, file = TASKS[self.task], io.BytesIO()
        cloner = WarmStart(env=task.env(), seed=self.seed)
        cloner.pretrain(task.nominal_expert(), self.pretraining, progress_bar=False)
        cloner.save(file)
        return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class ClonedTrial(Trial):
    """A trial on the pendulum.

    Attributes:
        task: A name of ``tasks.TASKS``.
        pretraining: How the policy was cloned.
    """

    task: str = "shifted"
    pretraining: PretrainConfig = PRETRAINING

    @classmethod
    def usual(cls, *, quick: bool) -> dict[str, Any]:
        """See ``Trial``."""
        return {"pretraining": QUICK_PRETRAINING if quick else PRETRAINING}

    @property
    def source(self) -> Clone:
        """See ``Trial``."""
        return Clone(self.task, self.policy_seed, self.pretraining)

    def setting(self, content: bytes | None) -> Setting:
        """See ``Trial``."""
        assert content is not None
        return Setting(TASKS[self.task], WarmStart.load(io.BytesIO(content)))
