"""Update a wide head while the address space is limited more and more; run by ``test_transactions``.

The argument is the way of updating, each in a process of its own, so that none lives on memory that another has left.
Prints how many updates have failed and succeeded, and how many have failed half way.
"""

from __future__ import annotations

import copy
import json
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead

MEBIBYTE = 2**20


def address_space() -> int:
    """Bytes in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# Machine code with vectors of 4 MB, and with a matrix of 16 MB; successive blocks on a copy of the posterior.
WAYS = {
    "one row": (1, 255, HeadConfig(structure="diagonal", width=2048)),
    "rows": (4, 255, HeadConfig(structure="diagonal", width=2048)),
    "blocks": (40, 127, HeadConfig(structure="diagonal", width=512)),
}


def main(way: str) -> dict[str, int]:
    torch.set_num_threads(1)
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    rows, features, config = WAYS[way]
    torch.manual_seed(0)
    head = BayesianHead.from_linear(nn.Linear(features, 1), config)
    head.update(torch.randn(rows, features), torch.randn(rows, 1))  # caches and the allocator's own memory
    record = {"failed": 0, "succeeded": 0, "broken": 0}
    sample = torch.randn(rows, features), torch.randn(rows, 1)
    before = copy.deepcopy(head.state_dict())
    for spare in [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048]:
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + spare * MEBIBYTE, unlimited[1]))
        try:
            head.update(*sample)
            failed = False
        except (MemoryError, RuntimeError):
            failed = True
        finally:
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
        if not failed:
            record["succeeded"] += 1
            break
        record["failed"] += 1
        state = head.state_dict()
        record["broken"] += not all(torch.equal(state[name], value) for name, value in before.items())
    return record


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
