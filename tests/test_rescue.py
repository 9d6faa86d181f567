"""The rescue: fleets act and learn as their members would alone, labels stop, and the rival is a Kalman filter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.sample import Sample
from kbt_rl.envs.plant import SHIFTED
from kbt_rl.experiments.config import KBT_METHOD, Method, warm_start_method
from kbt_rl.experiments.ekf import EKFHead
from kbt_rl.experiments.fleet import HeadFleet, HoldLabel, make_fleet
from kbt_rl.experiments.label_rules import RuleTrial, run_rule
from kbt_rl.experiments.learners import build, pretrain
from kbt_rl.experiments.rescue import Labelling, RescueTrial, rescue, run_rescue
from kbt_rl.experiments.simulation import expert_force, starts
from kbt_rl.inference.config import HeadConfig

HOLD, EKF = Method("hold", "hold"), Method("EKF", "ekf")
METHODS = [KBT_METHOD, EKF, warm_start_method(3, 1e-3), HOLD, Method("pre", "pretrained"), Method("expert", "expert")]


@pytest.fixture(scope="module")
def model() -> KBT:
    return pretrain(0, PretrainConfig(samples=2_000, steps=400))


def head(kind: type[Any] = EKFHead) -> Any:
    torch.manual_seed(0)
    return kind.from_linear(nn.Linear(3, 1), HeadConfig(noise_variance=0.1, hidden_variance=1e-2, rho=0.5))


def test_the_rival_is_a_kalman_filter_with_the_gradient_of_the_network_at_its_mean() -> None:
    """Against autograd and the information form."""
    filtered = head()
    mean, cov = filtered.mean.clone(), filtered.state.dense_cov()
    for seed in range(3):
        row = torch.randn(1, 3, generator=torch.Generator().manual_seed(seed)).double()
        weights = mean.clone().requires_grad_()
        shapes = filtered.spec.shapes
        first, last = weights[: shapes[0].size].view(shapes[0]), weights[shapes[0].size :].view(shapes[1])
        one = torch.ones(1, 1, dtype=torch.float64)
        hidden = torch.relu(torch.cat([row, one], dim=1) @ first.mT)
        output = (torch.cat([hidden, one], dim=1) @ last.mT).squeeze()
        (gradient,) = torch.autograd.grad(output, weights)
        information = torch.linalg.inv(cov) + torch.outer(gradient, gradient) / 0.1
        cov = torch.linalg.inv(information)
        mean = mean + cov @ gradient * (1.0 - float(output.detach())) / 0.1
        filtered.update(row, torch.ones(1, 1))
    torch.testing.assert_close(filtered.mean, mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(torch.from_numpy(filtered._full), cov, rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        first, last = filtered.state.weights
        inputs = torch.tensor([[0.3, -0.2, 0.5, 1.0]], dtype=torch.float64)
        hidden = torch.cat([torch.relu(inputs @ first.mT), torch.ones(1, 1, dtype=torch.float64)], dim=1)
        torch.testing.assert_close(filtered(inputs[:, :3]), hidden @ last.mT)


def test_the_rivals_uncertainty_is_that_of_its_own_covariance() -> None:
    filtered, rows = head(), torch.tensor([[0.3, -0.2, 0.5], [1.0, 0.4, -0.6]], dtype=torch.float64)
    prior = filtered.predict(rows).epistemic[:, 0, 0]
    for _ in range(20):
        filtered.update(rows[:1], torch.ones(1, 1))
    jacobian, output = filtered._linearised(rows[0].numpy())
    found = filtered.predict(rows)
    assert float(found.mean[0]) == pytest.approx(output)
    assert float(found.epistemic[0]) == pytest.approx(jacobian @ filtered._full @ jacobian)
    assert float(found.epistemic[0]) < 0.01 * float(prior[0])
    torch.testing.assert_close(filtered.predict_logits(rows).cov, found.epistemic)


def test_the_rival_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="one row"):
        head().update(torch.zeros(2, 3), torch.zeros(2, 1))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_fleet_starts_as_the_pretrained_policy_or_the_expert(method: Method, model: KBT) -> None:
    fleet, states = make_fleet(method, model, 3, SHIFTED), starts(5, 12).reshape(3, 4, 4)
    law = expert_force(SHIFTED)
    wanted = law(states) if method.kind == "expert" else make_fleet(METHODS[4], model, 3, SHIFTED).force(states)
    np.testing.assert_allclose(fleet.force(states), wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(fleet.force(states[:, 0]), wanted[:, 0], rtol=1e-4, atol=1e-3)


def test_members_learn_each_from_its_own_labels(model: KBT) -> None:
    fleet, alone = make_fleet(KBT_METHOD, model, 2, SHIFTED), build(KBT_METHOD, model)
    states = starts(6, 6).reshape(3, 2, 4).astype(np.float32).astype(np.float64)
    labels = expert_force(SHIFTED)(states)
    labels[1, 0] = np.nan  # no label for the first member
    for state, label in zip(states, labels, strict=True):
        fleet.learn(state, label)
    for step in (0, 2):
        alone.update(Sample(states[step, 0].astype(np.float32), labels[step, :1] / SHIFTED.max_force))
    probe = starts(7, 2)
    policy = alone.policy
    wanted = SHIFTED.max_force * policy.act(policy.encode(policy.start(probe[:1].astype(np.float32))))[0, 0]
    assert fleet.force(probe)[0] == pytest.approx(wanted, rel=1e-5)
    assert isinstance(fleet, HeadFleet)
    deviation = SHIFTED.max_force * policy.predict_moments(probe[:1].astype(np.float32)).epistemic[0, 0, 0] ** 0.5
    assert fleet.uncertainty(probe)[0] == pytest.approx(deviation, rel=1e-5)


def test_the_held_label_is_the_newest(model: KBT) -> None:
    fleet = make_fleet(HOLD, model, 2, SHIFTED)
    assert isinstance(fleet, HoldLabel)
    fleet.learn(np.zeros((2, 4)), np.array([3.0, -4.0]))
    fleet.learn(np.zeros((2, 4)), np.array([np.nan, 5.0]))
    np.testing.assert_array_equal(fleet.force(np.ones((2, 4))), [3.0, 5.0])
    np.testing.assert_array_equal(fleet.force(np.ones((2, 3, 4))), [[3.0] * 3, [5.0] * 3])


def test_until_its_first_label_a_holder_acts_as_the_pretrained_policy(model: KBT) -> None:
    fleet, states = make_fleet(HOLD, model, 2, SHIFTED), starts(5, 6).reshape(2, 3, 4)
    alone = make_fleet(METHODS[4], model, 2, SHIFTED).force(states)
    fleet.learn(states[:, 0], np.array([np.nan, 5.0]))
    np.testing.assert_array_equal(fleet.force(states), [alone[0], [5.0] * 3])
    np.testing.assert_allclose(fleet.force(states[:, 0]), [alone[0, 0], 5.0], rtol=1e-6)


@pytest.mark.parametrize("delay", [1, 3])
def test_labels_arrive_after_the_policy_has_acted_and_stop(delay: int, model: KBT) -> None:
    class Spy:
        """Notes when it acts and learns."""

        def __init__(self) -> None:
            self.log: list[str] = []

        def force(self, states: Any) -> Any:
            self.log.append("act")
            return np.zeros(len(states))

        def learn(self, states: Any, forces: Any) -> None:
            self.log.append("learn")

        def uncertainty(self, states: Any) -> Any:
            return np.zeros(len(states))

    spy = Spy()
    rescue(spy, starts(0, 2), Labelling("visited", budget=3, every=2, delay=delay), seed=0)
    acts = [spy.log[:i].count("act") for i, what in enumerate(spy.log) if what == "learn"]
    assert acts == [delay, 2 + delay, 4 + delay]
    assert spy.log.count("act") == 500


def test_a_watched_rescue_tells_uncertainty_and_innovations(model: KBT) -> None:
    fleet = make_fleet(KBT_METHOD, model, 1, SHIFTED)
    trace = rescue(fleet, starts(3, 1), Labelling("iid", 8), seed=3, watch=True)
    assert trace.states.shape == (501, 1, 4)
    assert np.isfinite(trace.deviation).all()
    assert np.isfinite(trace.innovation).sum() == 8
    assert trace.deviation[20, 0] < 0.5 * trace.deviation[0, 0]


def test_a_few_labels_save_what_falls_without_them(model: KBT) -> None:
    def shares(method: Method) -> tuple[float, float]:
        record = run_rescue(RescueTrial(method, Labelling("iid", 20), 0, 4, starts=5), model)
        return record["no_fall"], record["success"]

    assert shares(Method("pre", "pretrained"))[0] == 0.0
    assert shares(HOLD)[0] == 0.0
    assert shares(Method("expert", "expert")) == (1.0, 1.0)
    assert shares(KBT_METHOD)[0] == 1.0


@pytest.mark.parametrize(("rule", "value", "labels"), [("every", 50, 10), ("pool", 100, 5)])
def test_rules_use_the_labels_they_say(rule: Any, value: float, labels: int, model: KBT) -> None:
    record = run_rule(RuleTrial(rule, value, KBT_METHOD, 0, 5, learners=2, starts=2, pool=4), model)
    assert record["labels"] == [labels]
    assert len(record["scores"][0]) == 2
    assert all(0.0 <= score <= 1.0 for score in record["scores"][0])


def test_a_budget_ends_a_rule(model: KBT) -> None:
    record = run_rule(RuleTrial("every", 10, KBT_METHOD, 0, 5, learners=2, starts=1, budget=7), model)
    assert record["labels"] == [7]


@pytest.mark.parametrize("name", ["every", "delay", "pool"])
def test_a_labelling_needs_positive_steps(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        Labelling("iid", 5, **{name: 0})
