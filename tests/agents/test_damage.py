"""A damaged file is refused, or the damage changes nothing: for each kind of file that the library writes."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learners import kbt, states, warm_start

from kbt_rl import KBT, Sample, WarmStart
from kbt_rl.agents.export import load_safetensors, save_safetensors
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.transformer_policy import TransformerPolicy


@cache
def adapted() -> KBT:
    model = kbt()
    model.update(Sample(states(3), np.ones((3, 1))))
    return model


@cache
def retrained() -> WarmStart:
    model = warm_start()
    model.update(Sample(states(3), np.ones((3, 1))))
    return model


def save_policy(model: Callable[[], Any]) -> Callable[[Path], object]:
    return lambda path: model().policy.save(path)


KINDS: dict[str, tuple[Callable[[Path], object], Callable[[Path], Any]]] = {
    "zip of KBT": (lambda path: adapted().save(path), KBT.load),
    "zip of WarmStart": (lambda path: retrained().save(path), WarmStart.load),
    "Bayesian policy": (save_policy(adapted), lambda path: DecisionTransformerPolicy.load(path, "cpu")),
    "transformer policy": (save_policy(retrained), lambda path: TransformerPolicy.load(path, "cpu")),
    "safetensors": (lambda path: save_safetensors(adapted(), path), load_safetensors),
}


def everything(subject: Any) -> list[Any]:
    """All that a file says of a subject."""
    policy = subject.policy if isinstance(subject, OnlineAlgorithm) else subject
    found: list[Any] = [(name, value.numpy().tobytes()) for name, value in policy.state_dict().items()]
    # What SB3 saves of a policy beside its weights.
    found += [repr(value) for value in policy._get_constructor_parameters().values()]
    if isinstance(subject, OnlineAlgorithm):
        names = (
            "labels_used",
            "max_force",
            "forces",
            "label_space",
            "pretrain_info",
            "num_timesteps",
            "n_steps",
            "seed",
        )
        found += [repr(getattr(subject, name)) for name in names]
        found += [repr(subject.stream_rng.bit_generator.state), repr(getattr(subject, "_stored", None))]
    return found


def flipped(content: bytes, rng: random.Random) -> bytes:
    damaged, bit = bytearray(content), rng.randrange(8 * len(content))
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def overwritten(content: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(content)), rng.choice([1, 4, 512, 4096])
    return content[:start] + rng.randbytes(length) + content[start + length :]


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


DAMAGES = (flipped, flipped, flipped, overwritten, truncated)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [150, pytest.param(5_000, marks=pytest.mark.nightly)])
def test_damage_is_refused_or_changes_nothing(kind: str, count: int, tmp_path: Path) -> None:
    save, load = KINDS[kind]
    path, rng = tmp_path / "file.safetensors", random.Random(0)
    save(path)
    content, whole, refused = path.read_bytes(), everything(load(path)), 0
    for index in range(count):
        path.write_bytes(DAMAGES[index % len(DAMAGES)](content, rng))
        try:
            found = load(path)
        except (ValueError, RuntimeError):
            refused += 1
        else:
            assert everything(found) == whole
    assert refused > 0.99 * count
