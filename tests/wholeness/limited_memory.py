"""Change heads and a learner while the address space is limited more and more; run by ``test_memory``.

The arguments are what is tried, one of ``HEADS``, ``update``, ``load``, ``save`` or ``all``, and a folder; each in a
process of its own, so that none lives on memory that another has left. Prints how many attempts have failed and
succeeded, and how many have failed half way.
"""

from __future__ import annotations

import copy
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from kbt_rl import KBT, DecisionTransformerConfig, HeadConfig, Sample
from kbt_rl.inference.head import BayesianHead

MEBIBYTE = 2**20


def address_space() -> int:
    """Bytes in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def learner(seed: int, width: int) -> KBT:
    """With a posterior of 37 MB for the width 128 and of 121 MB for 192: for so much the allocator asks the system."""
    settings = {
        "transformer": DecisionTransformerConfig(width=width, layers=1),
        "head": HeadConfig(layers=2, structure="neuron"),
    }
    return KBT(env=gym.make("kbt_rl/InvertedPendulum-v0"), policy_kwargs=settings, seed=seed)


# Rows, features and head. Roots of 18 MB; covariances of the second layer of hidden units in all rows, 34 MB each.
HEADS = {
    "one row": (1, 1500, HeadConfig(structure="joint")),
    "rows": (4, 63, HeadConfig(layers=3, structure="diagonal", width=512)),
    "blocks": (40, 31, HeadConfig(layers=3, structure="diagonal", width=64)),
}


def state(model: KBT) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.policy.state_dict().items()}


def attempts(work: Callable[[], object], now: Callable[[], Any], steps: list[int]) -> dict[str, int]:
    """Try with more and more spare memory, in MiB, until it works."""
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    record, before = {"failed": 0, "succeeded": 0, "broken": 0}, now()
    for spare in steps:
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + spare * MEBIBYTE, unlimited[1]))
        try:
            work()
            failed = False
        except (MemoryError, RuntimeError, OSError, ValueError):  # zipfile makes one of another's
            failed = True
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
        if not failed:
            record["succeeded"] += 1
            break
        record["failed"] += 1
        record["broken"] += now() != before
    return record


def of_head(way: str) -> dict[str, int]:
    rows, features, config = HEADS[way]
    torch.manual_seed(0)
    head = BayesianHead.from_linear(torch.nn.Linear(features, 1), config)
    first, second = ((torch.randn(rows, features), torch.randn(rows, 1)) for _ in range(2))
    head.update(*first)  # caches and the allocator's own memory
    steps = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048]
    kept = copy.deepcopy(head.state_dict())

    def whole() -> bool:
        """Without copies, whose memory an update could use."""
        return all(torch.equal(value, kept[name]) for name, value in head.state_dict().items())

    return attempts(lambda: head.update(*second), whole, steps)


def main(way: str, folder: Path) -> dict[str, int]:
    torch.set_num_threads(1)
    if way in HEADS:
        return of_head(way)
    width = 128 if way == "save" else 192
    model, other = learner(0, width), learner(1, width)
    sample = Sample(np.zeros((3, 4), np.float32), np.ones((3, 1)))
    model.update(sample)  # caches and the allocator's own memory
    parameters, path = copy.deepcopy(other.get_parameters()), folder / "model.zip"
    model.save(path)
    works: dict[str, tuple[Callable[[], object], Callable[[], Any]]] = {
        "update": (lambda: model.update(sample), lambda: state(model)),
        "load": (lambda: model.set_parameters(parameters), lambda: state(model)),
        "save": (lambda: other.save(path), lambda: (path.read_bytes(), sorted(folder.iterdir()))),
    }
    steps = list(range(0, 200)) if way == "all" else [0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512, 1024]
    records = [attempts(*works[name], steps) for name in (works if way == "all" else [way])]
    return {name: sum(record[name] for record in records) for name in records[0]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
