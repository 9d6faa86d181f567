"""Which heads machine code serves, and how it is made ready."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np

from kbt_rl.inference.config import StructureName
from kbt_rl.inference.engines.average import AverageEngine
from kbt_rl.inference.engines.base import Engine
from kbt_rl.inference.engines.classes import ClassesEngine
from kbt_rl.inference.engines.outputs import OutputsEngine
from kbt_rl.inference.engines.small import BatchEngine, SmallEngine
from kbt_rl.inference.kind import Kind
from kbt_rl.inference.machine_code import kernels

ENGINES: tuple[type[Engine], ...] = (OutputsEngine, ClassesEngine, SmallEngine)


def engine_for(kind: Kind) -> Engine | None:
    """Machine code for a head, compiled if this machine does not have it yet; None where there is none."""
    # No generator that is left before its end: Python drops a signal whose handler raises while it closes one.
    serving = [engine for engine in ENGINES if engine.serves(kind)]
    if not serving or kernels() is None:
        return None
    _prepare(serving[0], kind)
    return serving[0](kind, kernels())


def batch_engine_for(kind: Kind) -> BatchEngine | None:
    """Machine code for many heads in one call, or None."""
    if not SmallEngine.serves(kind) or kernels() is None:
        return None
    _prepare(SmallEngine, kind)
    return BatchEngine(kind, kernels())


def average_engine_for(kind: Kind) -> AverageEngine | None:
    """Machine code for the head of a ``ModelAverage`` together with its evidence, or None."""
    if not AverageEngine.serves(kind) or kernels() is None:
        return None
    _prepare(AverageEngine, kind)
    return AverageEngine(kind, kernels())


_prepared: set[tuple[Any, ...]] = set()


def _prepare(engine: type[Engine], kind: Kind) -> None:
    """Load the machine code of heads of this kind, so that no update waits; the first time on a machine: compile it."""
    config = replace(kind.config, width=None, structure=cast(StructureName, kind.spec.structure))
    tiny = type(kind).of(1, 2 if kind.rule.link == "softmax" else 1, config)
    key = (engine, tiny.spec.structure, config.rule, config.noise, config.robust_dof is None)
    if key in _prepared:
        return
    _prepared.add(key)
    tried, row = engine(tiny, kernels()), np.zeros((1, 1))
    target, buffers = np.full((1, tiny.out_features), 1.0 / tiny.out_features), tiny.tensors()
    with _said_if_long():
        tried.run_once(buffers, row, target)


@contextmanager
def _said_if_long() -> Iterator[None]:
    """A line on stderr if what follows takes more than three seconds, as the first compilation on a machine does."""

    def say() -> None:
        print(
            "kbt_rl: preparing machine code for this kind of head; compiled the first time on a machine, some 10 s",
            file=sys.stderr,
        )

    timer = threading.Timer(3.0, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
