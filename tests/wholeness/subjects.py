"""What changes as a whole or not at all: heads, batches, policies and learners, each with a change of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from conftest import randn
from learners import SHIFTED, expert, kbt, states, warm_start
from torch import nn

from kbt_rl import KBT, HeadConfig, Sample, WarmStart
from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.linearised import LinearisedHead
from kbt_rl.inference.model_average import ModelAverage
from wholeness.attacks import bits

FEATURES = 3
HEADS = 3


@dataclass(frozen=True)
class Change:
    """A subject and a change of it.

    Attributes:
        make: A subject as it is before.
        change: The change.
        state: All that the change may touch.
    """

    make: Callable[[], Any]
    change: Callable[[Any], object]
    state: Callable[[Any], Any] = bits


# ---------------------------------------------------------------------- heads and batches


def rows(count: int, outputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(count, FEATURES, seed=seed), randn(count, outputs, seed=seed + 100)


@cache
def _head(outputs: int, learned: int, missing: bool, settings: tuple[tuple[str, Any], ...]) -> BayesianHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(FEATURES, outputs)
    config = HeadConfig(**{"noise_variance": 0.1, "hidden_variance": 1e-2, **dict(settings)})
    head = BayesianHead.from_linear(linear, config)
    for seed in range(learned):
        features, labels = rows(1, outputs, seed)
        if missing:
            labels[0, 0] = torch.nan
        head.update(features, labels)
    return head


def head(outputs: int = 2, learned: int = 1, *, missing: bool = False, **settings: Any) -> BayesianHead:
    """A head that has learned a few labels, of which those of the first output may be missing."""
    return copy.deepcopy(_head(outputs, learned, missing, tuple(sorted(settings.items()))))


def module(learned: int = 1, **settings: Any) -> LinearisedHead:
    """Every layer of a small network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 2))
    subject = LinearisedHead(network, 2, HeadConfig(noise_variance=0.1, hidden_variance=0.1, **settings))
    for seed in range(learned):
        subject.update(*rows(1, 2, seed))
    return subject


def average(learned: int = 1, *, undoable: int = 0, history: int = 3) -> ModelAverage:
    """A layer under several label noises; machine code learns where there is no history."""
    subject = copy.deepcopy(_average(learned, history))
    for seed in range(undoable):  # a copy has a history of its own
        subject.update(*rows(1, 2, seed))
    return subject


@cache
def _average(learned: int, history: int) -> ModelAverage:
    subject = ModelAverage(FEATURES, 2, history=history)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(FEATURES, 2)
    subject.reset(linear.weight.detach(), linear.bias.detach())
    for seed in range(learned):
        subject.update(*rows(1, 2, seed))
    return subject


@cache
def _batch(learned: int, settings: tuple[tuple[str, Any], ...]) -> HeadBatch:
    batch = HeadBatch([head(1, 0, **dict(settings))] * HEADS)
    for seed in range(learned):
        batch.update(*rows(HEADS, 1, seed))
    return batch


def batch(learned: int = 1, **settings: Any) -> HeadBatch:
    return copy.deepcopy(_batch(learned, tuple(sorted(settings.items()))))


def update(count: int, outputs: int = 2, **options: Any) -> Callable[[Any], object]:
    return lambda subject: subject.update(*rows(count, outputs, 50), **options)


def load(source: Callable[[], nn.Module]) -> Callable[[Any], object]:
    return lambda subject: subject.load_state_dict(source().state_dict())


def rolled_back(subject: Any) -> object:
    """A change and back again, so that what is whole is either."""
    return subject.rollback(1)


def with_history(learned: int = 2) -> BayesianHead:
    subject = head(2, 0, history=4, layers=2)
    for seed in range(learned):
        subject.update(*rows(2, 2, seed))
    return subject


def batch_with_history() -> HeadBatch:
    subject = batch(0, history=4, noise="learned", layers=3)
    for seed in range(2):
        subject.update(*rows(HEADS, 1, seed))
    return subject


DEEP = {"layers": 3, "noise": "learned"}

HEAD_CHANGES: dict[str, Change] = {
    **{
        f"update, {name}": Change(lambda name=name: head(structure=name), update(1))  # type: ignore[misc]
        for name in ("shared", "neuron", "diagonal", "joint")
    },
    "update, two layers, rows": Change(lambda: head(layers=2), update(5)),
    "update, learned noise": Change(lambda: head(noise="learned", structure="joint"), update(5)),
    "update, successive blocks": Change(lambda: head(layers=2, structure="layer"), update(35)),
    "update, three layers": Change(lambda: head(1, layers=3, structure="layer"), update(1, 1)),
    "update, forgetting": Change(lambda: head(forgetting="process_noise", forgetting_rate=1e-3), update(1)),
    "update, with history": Change(with_history, update(2)),
    "update, every layer of a module": Change(module, update(3)),
    "update, several noises": Change(average, update(3)),
    "update, several noises, one label": Change(lambda: average(history=0), update(1)),
    "rollback, several noises": Change(lambda: average(undoable=2), rolled_back),
    "reset, several noises": Change(average, lambda subject: subject.reset(torch.ones(2, FEATURES), torch.ones(2))),
    "reopen, several noises": Change(average, lambda subject: subject.reopen(0.5)),
    "load, several noises": Change(average, load(lambda: average(3))),
    "rollback": Change(with_history, rolled_back),
    "reset": Change(head, lambda subject: subject.reset(torch.ones(2, FEATURES), torch.ones(2))),
    "reopen": Change(lambda: head(noise="learned", structure="joint"), lambda subject: subject.reopen(0.5)),
    "forget": Change(head, lambda subject: subject.forget(0.9)),
    "process noise": Change(lambda: head(layers=2), lambda subject: subject.add_process_noise(0.1)),
    "set noise": Change(lambda: head(noise="learned"), lambda subject: subject.set_noise(0.3)),
    "load": Change(head, load(lambda: head(learned=3))),
    "load, other groups": Change(head, load(lambda: head(learned=3, missing=True))),
    "load, in another module": Change(lambda: nn.Sequential(head()), load(lambda: nn.Sequential(head(learned=3)))),
    "update of a batch": Change(batch, update(HEADS, 1)),
    "update of a batch, together": Change(lambda: batch(**DEEP), update(HEADS, 1, together=True)),
    "update of a batch, with history": Change(batch_with_history, update(HEADS, 1, together=True)),
    "rollback of a batch": Change(batch_with_history, rolled_back),
    "load of a batch": Change(batch, load(lambda: batch(4))),
    "a head of a batch": Change(batch, lambda subject: subject.__setitem__(1, head(1, 3))),
}


# ---------------------------------------------------------------------- policies and learners


def learned(model: Any) -> Any:
    """After a few labels."""
    model.update(Sample(states(model.n_envs, seed=1), expert().label(states(model.n_envs, seed=1))))
    return model


@cache
def _envs() -> KBT:
    head_config = HeadConfig(layers=3, structure="neuron", noise="learned", history=3)
    return learned(kbt(n_envs=3, per_env=True, policy_kwargs={"head": head_config}))  # type: ignore[no-any-return]


@cache
def _alone() -> KBT:
    return learned(kbt(policy_kwargs={"head": HeadConfig(history=3)}))  # type: ignore[no-any-return]


@cache
def _retrained() -> WarmStart:
    return learned(warm_start(memory=3, epochs=2))  # type: ignore[no-any-return]


def sample(model: Any, count: int) -> Sample:
    return Sample(states(count, seed=2), expert().label(states(count, seed=2)))


def model_state(model: Any) -> Any:
    """Weights and buffers, and what is counted or kept beside them."""
    seen = getattr(model, "_stored", ())
    return bits(model.policy), model.labels_used, len(seen), model.pretrain_info, model.max_force


def of_policy(model: Any) -> Any:
    """A change of the policy alone."""
    return bits(model.policy)


def fresh(model: Callable[[], Any]) -> Callable[[], Any]:
    """A copy of a learner without its environment."""

    def make() -> Any:
        source = model()
        duplicate = copy.copy(source)
        duplicate.policy = copy.deepcopy(source.policy)
        _copy_history(source.policy, duplicate.policy)
        return duplicate

    return make


def _copy_history(source: Any, duplicate: Any) -> None:
    """Also what could be rolled back, which copies do not have and which there is no public way to give them."""
    for mine, theirs in zip(source.modules(), duplicate.modules(), strict=True):
        if getattr(mine, "_history", None) is not None:
            theirs._history._records = copy.deepcopy(mine._history._records)
            theirs._history._seen = [(buffer, buffer._version) for buffer in theirs._buffers.values()]


@cache
def others_state() -> dict[str, dict[str, Any]]:
    """The parameters of another learner."""
    model = kbt(policy_kwargs={"head": HeadConfig(history=3)})
    for seed in range(3):
        model.update(Sample(states(2, seed=seed), np.ones((2, 1))))
    return copy.deepcopy(model.get_parameters())


@cache
def _untrained() -> KBT:
    return KBT(env=gym.make(SHIFTED), seed=5, policy_kwargs={"head": HeadConfig(history=3)})


MODEL_CHANGES: dict[str, Change] = {
    "update": Change(fresh(_alone), lambda model: model.update(sample(model, 2)), model_state),
    "update, an environment each": Change(fresh(_envs), lambda model: model.update(sample(model, 3)), model_state),
    "rollback": Change(fresh(_alone), lambda model: model.rollback(1), model_state),
    "rollback, an environment each": Change(fresh(_envs), lambda model: model.rollback(1), model_state),
    "load": Change(fresh(_alone), lambda model: model.policy.load_state_dict(others_state()["policy"]), of_policy),
    "set parameters": Change(fresh(_alone), lambda model: model.set_parameters(others_state()), model_state),
    "start from another": Change(fresh(_alone), lambda model: model.start_from(_untrained()), model_state),
    "update of a warm start": Change(fresh(_retrained), lambda model: model.update(sample(model, 2)), model_state),
}
