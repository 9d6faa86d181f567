"""Closed-loop episodes by ``predict``: against the single environment, with contexts of their own, in company."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny

from kbt_rl.agents.lqr import LQRExpert
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.envs import NOMINAL, SHIFTED
from kbt_rl.models.decision_transformer import DecisionTransformerConfig
from studies.episodes import evaluate, regret, walk
from studies.pendulum import LabelStream, Pendulum
from studies.tasks import TASKS

TASK = Pendulum()
STARTS = TASK.starts(3, 4)


def test_episodes_are_those_of_the_single_environment() -> None:
    outcome = evaluate([TASK.expert()], TASK.envs(4), STARTS)
    for row, start in enumerate(STARTS):
        env = TASK.env(SHIFTED)
        observation, _ = env.reset(options={"state": start})
        cost, info = 0.0, {}
        for _ in range(500):
            observation, _, terminated, _, info = env.step(TASK.expert().predict(observation)[0])
            assert not terminated
            cost += info["cost"]
        assert outcome.success[0, row] == info["is_success"]
        assert outcome.cost[0, row] == pytest.approx(cost)
    assert (outcome.steps == 500).all()


def test_policies_beside_each_other_do_what_each_does_alone() -> None:
    policies = [TASK.expert(), LQRExpert.for_env(TASK.env(NOMINAL)), TASK.expert()]
    together = evaluate(policies, TASK.envs(12), STARTS)
    for index, policy in enumerate(policies):
        alone = evaluate([policy], TASK.envs(4), STARTS)
        for whole, part in zip(together, alone, strict=True):
            np.testing.assert_array_equal(whole[index], part[0])
    assert together.success[0].all()
    assert np.isinf(together.cost[1]).all()
    assert (together.steps[1] < 500).all()


def test_each_policy_may_have_starts_of_its_own() -> None:
    each = np.stack([STARTS, 0.5 * STARTS])
    together = evaluate([TASK.expert()] * 2, TASK.envs(8), each)
    alone = evaluate([TASK.expert()], TASK.envs(4), each[1])
    np.testing.assert_array_equal(together.cost[1], alone.cost[0])


class Recorder:
    """The expert, and what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any]] = []

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        assert deterministic
        self.calls.append((observation.copy(), state, episode_start.copy()))
        return TASK.expert().predict(observation)[0], (len(self.calls),)


def test_a_policy_gets_back_its_own_state_and_is_told_of_new_episodes() -> None:
    recorder = Recorder()
    evaluate([TASK.expert(), recorder], TASK.envs(8), STARTS)
    assert [state for _, state, _ in recorder.calls[:3]] == [None, (1,), (2,)]
    assert recorder.calls[0][2].all()
    assert not recorder.calls[1][2].any()
    np.testing.assert_allclose(recorder.calls[0][0], STARTS, rtol=1e-6)


def test_a_longer_context_is_the_episodes_own() -> None:
    """A policy of three steps acts in company as it does in a loop of its own."""
    env = TASK.env()
    policy = TransformerPolicy(
        env.observation_space,
        env.action_space,
        transformer=DecisionTransformerConfig(context_length=3),  # type: ignore[arg-type]
    )
    found = evaluate([TASK.expert(), policy], TASK.envs(8), STARTS)
    observation, state, cost = TASK.env(SHIFTED).reset(options={"state": STARTS[0]})[0], None, 0.0
    single = TASK.env(SHIFTED)
    single.reset(options={"state": STARTS[0]})
    for step in range(int(found.steps[1, 0])):
        action, state = policy.predict(observation[None], state, np.array([step == 0]), deterministic=True)
        observation, _, _, _, info = single.step(action[0])
        cost += info["cost"]
    assert np.isinf(found.cost[1, 0]) or found.cost[1, 0] == pytest.approx(cost, rel=1e-4)
    assert found.steps[1, 0] < 500


def test_a_fall_costs_the_cap_and_the_expert_regrets_nothing() -> None:
    expert = evaluate([TASK.expert()], TASK.envs(4), STARTS).cost
    assert regret(expert, expert[0]) == 0.0
    assert regret(np.full((1, 4), np.inf), expert[0]) == pytest.approx(99.0)
    half = np.where(np.arange(4) < 2, np.inf, expert)
    assert regret(half, expert[0]) == pytest.approx(99.0 * expert[0, :2].sum() / expert.sum())


def test_a_walk_goes_on_after_falls_and_counts_them() -> None:
    path = walk(LQRExpert.for_env(TASK.env(NOMINAL)), TASK.envs(1, same_step=True), seed=1, every=5)
    seen = [next(path) for _ in range(150)]
    assert seen[-1][1] >= 1
    assert all(abs(state[0, 2]) <= np.pi / 2 for state, _ in seen)
    again = walk(LQRExpert.for_env(TASK.env(NOMINAL)), TASK.envs(1, same_step=True), seed=1, every=5)
    np.testing.assert_array_equal(next(again)[0], seen[0][0])


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_of_every_task_succeeds_and_the_nominal_one_does_not(task: str) -> None:
    expert, nominal = TASKS[task].score([TASKS[task].expert(), TASKS[task].nominal_expert()], seed=1, count=3)
    assert expert == (1.0, 0.0, 1.0)
    assert nominal.success == 0.0
    assert nominal.regret > 1.0


def test_labels_are_the_experts_with_the_noise_that_was_asked_for() -> None:
    clean, noisy = LabelStream(TASK, 5), LabelStream(TASK, 5, noise_variance=10.0)
    states = clean.states(4_000)
    np.testing.assert_array_equal(states, noisy.states(4_000))
    np.testing.assert_allclose(clean.label(states), TASK.expert().label(states))
    errors = TASK.max_force * (noisy.label(states) - clean.label(states))
    assert np.var(errors) == pytest.approx(10.0, rel=0.1)


def test_labels_of_discrete_actions_are_distributions_or_actions() -> None:
    task = TASKS["five forces"]
    soft, hard = LabelStream(task, 5), LabelStream(task, 5, actions_only=True)
    states = soft.states(10)
    np.testing.assert_allclose(soft.label(states).sum(axis=1), 1.0)
    assert set(np.unique(hard.label(states))) == {0.0, 1.0}
    assert tiny.setting("five forces").pretrained.policy.predict(states)[0].shape == (10,)
