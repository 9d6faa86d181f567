"""Save a model over and over in processes that are killed, and look at what is left; run by ``test_files``.

The arguments are a folder, the number of kills, and what is saved: ``zip``, ``policy`` or ``safetensors``, or ``plain``
for SB3's own way. The processes are forked from this one, which has imported everything.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.base_class import BaseAlgorithm

from kbt_rl import KBT, DecisionTransformerConfig, DecisionTransformerPolicy
from kbt_rl.agents.export import load_safetensors, save_safetensors

SAVES: dict[str, Callable[[KBT, Path], object]] = {
    "zip": lambda model, path: model.save(path),
    "policy": lambda model, path: model.policy.save(path),
    "safetensors": save_safetensors,
    "plain": lambda model, path: BaseAlgorithm.save(model, path),
}
LOADS: dict[str, Callable[[Path], Any]] = {
    "zip": lambda path: KBT.load(path).policy,
    "policy": lambda path: DecisionTransformerPolicy.load(path, "cpu"),
    "safetensors": load_safetensors,
    "plain": lambda path: KBT.load(path).policy,
}


def set_version(model: KBT, version: int) -> None:
    """Written twice into the file, far from each other."""
    model.policy.head.mean.fill_(float(version))
    model.policy.transformer.feature_mean.fill_(float(version))


def save_for_ever(model: KBT, path: Path, way: str) -> None:
    for version in itertools.count(1):
        set_version(model, version)
        SAVES[way](model, path)


def is_whole(path: Path, way: str) -> bool:
    """Whether the file loads and is one version through and through."""
    try:
        policy = LOADS[way](path)
    except Exception:  # whatever a torn file makes of a loader
        return False
    return bool((policy.head.mean == policy.transformer.feature_mean[0]).all())


def main(folder: Path, kills: int, way: str) -> dict[str, int]:
    torch.set_num_threads(1)
    settings = {"transformer": DecisionTransformerConfig(width=4, layers=1)}
    model = KBT(env=gym.make("kbt_rl/InvertedPendulum-v0"), policy_kwargs=settings, seed=0)
    path, rng = folder / "model.safetensors", random.Random(0)
    set_version(model, 0)
    SAVES[way](model, path)
    broken = interrupted = litter = 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(model, path, way)
            finally:
                os._exit(1)
        while way != "plain" and len(os.listdir(folder)) == 1:
            pass  # until the child begins to write
        time.sleep(rng.uniform(0.01, 0.05) if way == "plain" else rng.choice([0.0, 0.0005, 0.001, 0.003, 0.01]))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the saving process ended by itself"
        broken += not is_whole(path, way)
        others = [name for name in os.listdir(folder) if name != path.name]
        interrupted += bool(others)
        litter = max(litter, len(others))
    SAVES[way](model, path)
    left = len(os.listdir(folder)) - 1
    return {"kills": kills, "broken": broken, "interrupted": interrupted, "litter": litter, "left": left}


if __name__ == "__main__":
    print(*(f"{name}={value}" for name, value in main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]).items()))
