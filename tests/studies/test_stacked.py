"""Transformers stacked into one, and warm starts that are trained in one batch: each as alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from kbt_rl.agents.sample import Sample
from kbt_rl.agents.warm_start import WarmStart, WarmStartInfo
from kbt_rl.inference.errors import UpdateError
from kbt_rl.models.decision_transformer import DecisionTransformer, DecisionTransformerConfig
from studies import curve, reproduce, success, visited
from studies.methods import build, warm_start
from studies.pendulum import LabelStream
from studies.stacked import StackedTransformers, WarmStarts
from studies.table import Table
from studies.trial import Method, Size

STREAMS = 3


def transformers(actions: int = 1, **config: Any) -> list[DecisionTransformer]:
    """Of float64, with norms and scales that do something."""
    torch.manual_seed(0)
    made = [DecisionTransformer(4, actions, DecisionTransformerConfig(**config)).double() for _ in range(STREAMS)]
    for each in made:
        for parameter in (*each.parameters(), each.observation_scale, each.action_scale):
            parameter.data += 0.1 * torch.rand_like(parameter)
    return made


def alone(transformer: DecisionTransformer, states: torch.Tensor) -> torch.Tensor:
    zeros = states.new_zeros(len(states), 1, transformer.linear.out_features)
    actions: torch.Tensor = transformer(states.unsqueeze(1), zeros, torch.zeros(len(states), dtype=torch.int64))
    return actions[:, -1]


CONFIGS = pytest.mark.parametrize(
    "config", [{}, {"norm_first": False}, {"layers": 3, "heads": 1, "width": 4, "feedforward": 5, "actions": 2}]
)


@CONFIGS
def test_each_of_a_stack_acts_and_has_gradients_as_alone(config: dict[str, Any]) -> None:
    each = transformers(**config)
    stacked, states = StackedTransformers(each), torch.randn(STREAMS, 7, 4, dtype=torch.float64)
    found = stacked(states)
    wanted = torch.stack([alone(transformer, rows) for transformer, rows in zip(each, states, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    found.square().sum().backward()
    wanted.square().sum().backward()
    with torch.no_grad():
        stacked.weights -= stacked.weights.grad
    for index, transformer in enumerate(each):
        stepped = copy.deepcopy(transformer)
        stacked.write(index, stepped)
        for parameter, new in zip(transformer.parameters(), stepped.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(new, parameter - parameter.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [{"context_length": 2}, {"target_return": 1.0}])
def test_transformers_of_more_tokens_are_not_stacked(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="see one state"):
        StackedTransformers(transformers(**config))


def learners(method: Method, task: str = "shifted") -> list[WarmStart]:
    built = [build(method, tiny.setting(task)) for _ in range(STREAMS)]
    return [learner for learner in built if isinstance(learner, WarmStart)]


def rounds(count: int, task: str = "shifted") -> list[list[Sample]]:
    """A labelled state for each learner, so many times."""
    streams = [LabelStream(tiny.setting(task).task, seed) for seed in range(STREAMS)]
    states = [stream.states(1) for _ in range(count) for stream in streams]
    samples = [Sample(state, streams[0].label(state)) for state in states]
    return [samples[i : i + STREAMS] for i in range(0, len(samples), STREAMS)]


@pytest.mark.parametrize("task", ["shifted", "five forces"])
def test_warm_starts_learn_in_one_batch_what_each_learns_alone(task: str) -> None:
    together, singles = learners(warm_start(4, 1e-3), task), learners(warm_start(4, 1e-3), task)
    for learner in (*together, *singles):
        learner.epochs = 10  # float32 amplifies the rounding of more
    batch = WarmStarts(together)
    for samples in rounds(9, task):
        infos = batch.update(samples)
        expected = [learner.update(sample) for learner, sample in zip(singles, samples, strict=True)]
        for found, wanted in zip(infos, expected, strict=True):
            assert isinstance(found, WarmStartInfo)
            assert isinstance(wanted, WarmStartInfo)
            assert (found.labels, found.memory, found.trainings) == (wanted.labels, wanted.memory, wanted.trainings)
    for found, wanted in zip(together, singles, strict=True):
        for mine, theirs in zip(found.policy.parameters(), wanted.policy.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_learner_whose_training_fails_does_not_take_others_with_it() -> None:
    together = learners(warm_start(1, 1e-3))
    (samples,) = rounds(1)
    before = copy.deepcopy(together[1].policy.state_dict())
    samples[1] = samples[1]._replace(target=np.full((1, 1), np.inf))
    first, lost, last = WarmStarts(together).update(samples)
    assert isinstance(lost, UpdateError)
    assert all(map(torch.equal, together[1].policy.state_dict().values(), before.values()))
    assert isinstance(first, WarmStartInfo)
    assert isinstance(last, WarmStartInfo)


@pytest.mark.parametrize("states", ["iid", "visited"])
def test_a_trial_of_several_streams_has_the_rows_of_single_ones(
    states: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    def few_epochs(*arguments: Any) -> Any:
        learner = build(*arguments)
        learner.epochs = 10  # type: ignore[attr-defined]
        return learner

    monkeypatch.setattr(curve, "build", few_epochs)
    whole = tiny.trial(states=states, method=warm_start(3, 1e-3), checkpoints=(0, 3, 5, 7), streams=STREAMS)
    found = list(curve.run(whole, tiny.setting()))
    singles = [replace(whole, stream_seed=seed, streams=1) for seed in range(STREAMS)]
    wanted = [row for single in singles for row in curve.run(single, tiny.setting())]
    assert [row[:-1] for row in found] == [row[:-1] for row in wanted]
    np.testing.assert_allclose([row.value for row in found], [row.value for row in wanted], rtol=1e-3)


def test_plans_hold_every_pair_of_seeds_once() -> None:
    for size in (Size(), Size(policies=3, streams=2), Size(quick=True)):
        for plan in (success.plan(size), visited.plan(size)):
            seeds: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
            for trial in plan:
                of = seeds.setdefault((trial.method.name, trial.states), [])
                of += [(trial.policy_seed, trial.stream_seed + index) for index in range(trial.streams)]
            assert len({tuple(sorted(pairs)) for pairs in seeds.values()}) == 1
            assert all(len(set(pairs)) == len(pairs) for pairs in seeds.values())


def test_rows_are_ordered_as_if_each_stream_were_a_trial() -> None:
    trials = reproduce.plan(Size())
    table = Table(
        replace(trial, stream_seed=trial.stream_seed + index).row(0, "success", 0.0)
        for trial in trials if isinstance(trial, curve.CurveTrial) and trial.study == "success"
        for index in range(trial.streams)
    )  # fmt: skip
    pairs = [[(row.policy_seed, row.stream_seed) for row in rows] for rows in table.by_stream().by("method").values()]
    assert all(found == Size().pairs() for found in pairs)
    assert list(table.by_stream().by("method")) == list(table.by("method"))
