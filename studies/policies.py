"""Trained policies of SB3 in worlds that change: returns against labels, beside what else learns from a label.

Each policy was trained by SB3 before the change; its teacher knows the world after it. The learner acts, and every 5th
step the teacher says what it would have done. After some labels the learner is scored alone on 10 episodes. The share
of the gap is (return - not learning) / (teacher - not learning), from the same starts: 0 is not learning, 1 the
teacher. This library's method has nothing that is chosen for a task; the others have the best of five settings for
each, found by ``python -m studies tune-rivals`` on streams below 100.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from studies.plots import Picture
from studies.suite.methods import FIXED, KBT, NONE, TEACHER, build, tuned
from studies.suite.report import Summary, coverage, never_worse, picture, shares, tables
from studies.suite.setting import Setting, SuiteTrial, returns, samples
from studies.suite.tasks import SUITE
from studies.table import Row, Table, Text
from studies.trial import Fixed, Size

QUICK_TASKS = ("InvertedPendulum", "Pendulum, PPO", "Pendulum, SAC")
QUICK_RIVALS = ("warm start, memory 50", "RLS")


def plan(size: Size) -> list[SuiteTrial]:
    """Every method on 20 streams of each task, the slowest tasks first."""
    size = size._replace(policies=1)
    small: dict[str, Any] = {"checkpoints": (50, 100, 200), "episodes": 5} if size.quick else {}
    trials = []
    for task in QUICK_TASKS if size.quick else SUITE:
        rivals = [one for one in tuned(task) if not size.quick or one.name in QUICK_RIVALS]
        methods = [NONE, TEACHER, KBT, *(() if size.quick else FIXED), *rivals]
        trials += size.trials(SuiteTrial, methods, streams=20, study="policies", task=task, **small)
    return trials


def run(trial: SuiteTrial, setting: Setting) -> Iterator[Row]:
    """Mean return at each checkpoint; labels that were inside of the interval, and those that were refused."""
    learner, envs = build(trial.method, setting), [setting.task.env() for _ in range(trial.episodes)]
    if isinstance(learner, Fixed):
        value = returns(learner.policy, envs, trial.stream_seed).mean()
        for labels in trial.checkpoints:
            yield trial.row(labels, "return", value)
        return
    stream, used = samples(learner.policy, setting, trial.stream_seed, trial.every), 0
    for labels in trial.checkpoints:
        for _ in range(labels - used):
            learner.update(next(stream))
        yield trial.row(labels, "return", returns(learner.policy, envs, trial.stream_seed).mean())
        inside = np.array(getattr(learner, "inside", [])[used:])
        if not np.isnan(inside).all():
            yield trial.row(labels, "coverage", float(np.nanmean(inside)))
        yield trial.row(labels, "failed", getattr(learner, "failed", 0))
        used = labels


def report(table: Table) -> Iterator[Text | Picture | Summary]:
    """A table a task and one over all, coverage, the lowest shares, the picture, and ``table.csv``."""
    share = shares(table)
    yield from tables(share)
    yield never_worse(share)
    yield coverage(table)
    yield Summary(share)
    yield picture(share, (KBT.name, *QUICK_RIVALS))
