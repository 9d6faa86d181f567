"""Save a model over and over in processes that are killed, and look at what is left; run by ``test_crash_safety``.

The arguments are a folder, the number of kills, and ``safe``, or ``plain`` for SB3's own way. The processes are forked
from this one, which has imported everything. Prints one JSON record.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
import zipfile
from pathlib import Path

import gymnasium as gym
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from kbt_rl import KBT, DecisionTransformerConfig, HeadConfig


def set_version(model: KBT, version: int) -> None:
    model.labels_used = version
    model.policy.head.mean.fill_(float(version))


def save_for_ever(model: KBT, path: Path, plain: bool) -> None:
    """One version after another; each carries its number twice, in SB3's data and in the posterior."""
    for version in itertools.count(1):
        set_version(model, version)
        if plain:
            BaseAlgorithm.save(model, path)
        else:
            model.save(path)


def is_whole(path: Path) -> bool:
    """Whether the file loads and is one version through and through."""
    try:
        loaded = KBT.load(path)
    except (AssertionError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile):
        return False
    mean = loaded.policy.head.mean
    return bool((mean == float(loaded.labels_used)).all())


def main(folder: Path, kills: int, plain: bool) -> dict[str, int]:
    torch.set_num_threads(1)
    settings = {"head": HeadConfig(layers=1), "transformer": DecisionTransformerConfig(width=4, layers=1)}
    model = KBT(env=gym.make("kbt_rl/InvertedPendulum-v0"), policy_kwargs=settings, seed=0)
    path, rng = folder / "model.zip", random.Random(0)
    set_version(model, 0)
    model.save(path)
    broken = interrupted = litter = 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(model, path, plain)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.01, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the saving process ended by itself"
        broken += not is_whole(path)
        others = [name for name in os.listdir(folder) if name != "model.zip"]
        interrupted += bool(others)
        litter = max(litter, len(others))
    model.save(path)
    return {
        "kills": kills,
        "broken": broken,
        "interrupted": interrupted,
        "litter": litter,
        "left": len(os.listdir(folder)) - 1,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "plain")))
