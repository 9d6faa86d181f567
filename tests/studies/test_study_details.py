"""What single studies do around a method: noise, plants, labels that arrive late, rules, clocks, TensorBoard runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import norm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kbt_rl.agents.kbt import KBT
from kbt_rl.envs import NOMINAL, SHIFTED
from kbt_rl.envs.schedule import PLANT_RANGES
from studies import changing, label_rules, no_oracle, rescue
from studies.calibration import LEVELS, best_nlpd, judge
from studies.changing import CUSUM, LEARNED, Adaptive, ChangingTrial, draw_plants, drifting_plants, labelled
from studies.episodes import evaluate
from studies.fleet import Fleet
from studies.methods import EXPERT, ONE_LAYER, PRETRAINED, build, kbt, warm_start
from studies.noise import WILD_NEWTONS, WILD_SHARE, draw_noise
from studies.pendulum import LabelStream, Pendulum
from studies.reproduce import Curves
from studies.rescue import RescueTrial
from studies.table import Row, Table
from studies.timing import UPDATE, WHOLE, _Timed, encode_by_pytorch
from studies.trust import TrustTrial, _held_out

SETTING = tiny.setting()
SMALL: dict[str, Any] = {"method": ONE_LAYER, "policy_seed": 0, "stream_seed": 0, "pretraining": tiny.PRETRAINING}


# ---------------------------------------------------------------------- noise and calibration


@pytest.mark.parametrize(("kind", "variance"), [("Gaussian", 10.0), ("Student's t", 20.0), ("5 % wild", 10.0)])
def test_noise_has_its_distribution(kind: Any, variance: float) -> None:
    noise = draw_noise(kind, variance, 200_000, np.random.default_rng(0))
    wild = np.abs(noise) > 0.8 * WILD_NEWTONS
    if kind == "5 % wild":
        assert wild.mean() == pytest.approx(WILD_SHARE, rel=0.05)
        noise = noise[~wild]
    assert noise.mean() == pytest.approx(0.0, abs=0.05)
    assert noise.var() == pytest.approx(variance, rel=0.15 if kind == "Student's t" else 0.02)


def test_a_stream_with_wild_labels_has_the_ordinary_noise_of_the_one_without() -> None:
    plain, wild = (draw_noise(kind, 10.0, 500, np.random.default_rng(3)) for kind in ("Gaussian", "5 % wild"))
    same = plain == wild
    assert 0.9 < same.mean() < 1.0


def test_judging_is_by_the_gaussian_that_the_head_predicts() -> None:
    learner = kbt(SETTING, {"layers": 1}, told=10.0)
    states = LabelStream(SETTING.task, 1).states(300)
    clean = 120.0 * SETTING.task.expert().label(states)[:, 0]
    noise = math.sqrt(10.0) * np.random.default_rng(0).standard_normal(300)
    found = judge(learner, states, clean, noise, 120.0)
    moments = learner.policy.predict_moments(states)
    mean, sd = 120.0 * moments.mean[:, 0], 120.0 * np.sqrt((moments.epistemic + moments.aleatoric)[:, 0, 0])
    assert found.nlpd == pytest.approx(-norm.logpdf(clean + noise, mean, sd).mean())
    inside = [np.mean(np.abs(clean + noise - mean) <= sd * norm.ppf(0.5 + level / 2)) for level in LEVELS]
    assert list(found.coverage.values()) == pytest.approx(inside)
    assert found.assumed_noise == pytest.approx(10.0)
    assert found.error == pytest.approx(np.sqrt(np.mean((mean - clean) ** 2)))
    assert best_nlpd(noise, 10.0) == pytest.approx(-norm.logpdf(noise, 0.0, math.sqrt(10.0)).mean())


def test_held_out_states_in_closed_loop_are_those_of_the_policy_alone() -> None:
    trial = TrustTrial(**SMALL, closed_loop=True, variance=10.0, episodes=3)
    learner = build(ONE_LAYER, SETTING)
    assert isinstance(learner, KBT)
    states = _held_out(trial, SETTING.task, learner)
    starts = SETTING.task.starts(900_000, 3)
    np.testing.assert_allclose(states[:3], starts, rtol=1e-6)
    steps = evaluate([learner.policy], SETTING.task.envs(3), starts).steps[0]
    assert len(states) == sum(-(-count // 5) for count in steps.tolist())


# ---------------------------------------------------------------------- a changing world


def test_each_plant_defeats_the_expert_of_the_one_before() -> None:
    draw = draw_plants(3, 2)
    assert draw_plants(3, 2) is draw
    starts = Pendulum().starts(3 + 50_000, 20)
    for before, plant in itertools.pairwise((NOMINAL, *draw)):
        task = Pendulum(plant)
        outcome = evaluate([Pendulum(before).expert(), task.expert()], task.envs(40), starts)
        assert outcome.success[0].mean() < 0.5
        assert outcome.success[1].mean() >= 0.95
        assert all(low <= plant.dynamics[name] <= high for name, (low, high) in PLANT_RANGES.items())


def test_the_drift_starts_at_the_shifted_plant_and_moves_by_its_rate() -> None:
    plants = list(itertools.islice(drifting_plants(0, 0.02), 400))
    assert plants[0].dynamics == pytest.approx(SHIFTED.dynamics)
    places = np.log([list(plant.dynamics.values()) for plant in plants])
    assert np.diff(places, axis=0).std() == pytest.approx(0.02, rel=0.15)


def test_labels_are_the_experts_forces_with_noise() -> None:
    policy = SETTING.pretrained.policy
    samples = labelled(policy, [NOMINAL, SHIFTED], (0, 22), 0.0)
    for plant, sample in zip((NOMINAL, SHIFTED), samples, strict=True):
        wanted = Pendulum(plant).expert().label(sample.context.newest)  # type: ignore[union-attr]
        np.testing.assert_allclose(sample.target, wanted)
        torch.testing.assert_close(sample.features, policy.encode(sample.context))  # type: ignore[arg-type]
    noisy = labelled(policy, [SHIFTED] * 2_000, (0, 22), 4.0)
    errors = [float(s.target[0, 0] - Pendulum().expert().label(s.context.newest)[0, 0]) for s in noisy]  # type: ignore[union-attr]
    assert 120.0**2 * np.var(errors) == pytest.approx(4.0, rel=0.1)


def test_the_misfit_is_noise_on_top_or_the_least_that_is_learned() -> None:
    known = Adaptive(ChangingTrial(study="change", **{**SMALL, "method": CUSUM}, noise_variance=0.5), SETTING)
    aleatoric = known.model.policy.predict_moments(np.zeros((1, 4))).aleatoric[0, 0, 0]
    assert 120.0**2 * aleatoric == pytest.approx(1.5)
    learned = Adaptive(ChangingTrial(study="change", **{**SMALL, "method": LEARNED}), SETTING)
    floor = learned.model.policy.head.config.noise_floor
    assert floor * learned.model.policy.head.mean_square_scale * 120.0**2 == pytest.approx(1.0)


def test_every_strategy_has_its_method_and_reacts() -> None:
    for name in changing.STRATEGIES:
        method = next(m for m in vars(changing).values() if getattr(m, "name", None) == name)
        learner = Adaptive(ChangingTrial(study="change", **{**SMALL, "method": method}), SETTING)
        for sample in labelled(SETTING.pretrained.policy, [NOMINAL] * 2 + [SHIFTED] * 2, (0, 22), 0.1):
            learner.update(sample)
        assert learner.model.labels_used == 4


# ---------------------------------------------------------------------- few labels, asked for in closed loop


class Watched(Fleet):
    """Remembers when it acted and what it learned."""

    def __init__(self, method: Any, count: int) -> None:
        super().__init__(method, SETTING, count)
        self.events: list[str] = []
        self.labels: list[Any] = []

    def predict(self, *arguments: Any, **options: Any) -> Any:
        self.events.append("act")
        return super().predict(*arguments, **options)

    def update(self, states: Any, labels: Any) -> None:
        self.events.append("learn")
        self.labels.append((states, labels))
        super().update(states, labels)


@pytest.mark.parametrize(("every", "wanted"), [(1, ["act", "learn"] * 3), (2, ["act", "learn", "act"] * 2)])
def test_labels_arrive_after_the_policy_has_acted_and_stop(every: int, wanted: list[str]) -> None:
    trial = RescueTrial(**SMALL, states="visited", budget=3, every=every, starts=2)
    fleet = Watched(ONE_LAYER, 2)
    seen = [step.observations for step in rescue.rescue(fleet, SETTING.task, trial)]
    assert fleet.events[: len(wanted)] == wanted
    assert fleet.events.count("learn") == 3
    np.testing.assert_array_equal(fleet.labels[0][0], seen[0])
    np.testing.assert_array_equal(fleet.labels[1][0], seen[every])
    np.testing.assert_allclose(fleet.labels[1][1], SETTING.task.expert().label(seen[every]))


def test_uncertain_states_are_the_most_uncertain_of_the_pool() -> None:
    trial = RescueTrial(**SMALL, states="uncertain", budget=1, starts=2)
    fleet = Fleet(ONE_LAYER, SETTING, 2)
    asked = rescue._asked(fleet, trial, np.zeros((2, 4), np.float32), np.random.default_rng(1))
    pool = np.random.default_rng(1).uniform(-1, 1, (2, rescue.POOL, 4)) * np.array([2.0, 2.0, 0.5, 1.0])
    chosen = fleet.variances(pool.astype(np.float32)).argmax(axis=1)
    np.testing.assert_allclose(asked, pool[np.arange(2), chosen], rtol=1e-6)


def test_rescue_methods_train_warm_start_at_least_once() -> None:
    memories = [
        method.settings["memory"]
        for labels in (8, 20, 50)
        for method in rescue.compared(labels)
        if method.kind == "warm start"
    ]
    assert memories == [8, 20, 20]


@pytest.mark.parametrize(
    ("rule", "value", "labels"), [("every", 5, 4), ("pool", 10, 2), ("gate", 0.0, 20), ("random", 1.0, 20)]
)
def test_rules_use_the_labels_they_say(rule: Any, value: float, labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_rules, "STEPS", 20)
    trial = label_rules.RuleTrial(**SMALL, rule=rule, value=value, learners=2, starts=2)
    rows = {row.metric: row.value for row in label_rules.run(trial, SETTING)}
    assert rows["labels used"] == labels


def test_without_labels_the_score_is_that_of_the_pretrained_policy() -> None:
    trial = no_oracle.NoOracleTrial(
        **{**SMALL, "method": PRETRAINED}, labels="none", learners=2, tests=3, episodes=(1,)
    )  # fmt: skip
    rows = Table(no_oracle.run(trial, SETTING))
    (score,) = {row.value for row in rows.where(metric=no_oracle.SCORE)}
    wanted = evaluate([SETTING.pretrained.policy], SETTING.task.envs(3), SETTING.task.starts(700_000, 3)).success.mean()
    assert score == wanted


def test_an_expert_that_acts_needs_no_score() -> None:
    trial = no_oracle.NoOracleTrial(**SMALL, labels="none", expert_acts=True, learners=2, episodes=(1,))
    rows = Table(no_oracle.run(trial, SETTING))
    assert not rows.where(metric=no_oracle.SCORE)
    assert len(rows.where(metric=no_oracle.STAYED)) == 2


# ---------------------------------------------------------------------- clocks and TensorBoard


def test_a_training_of_warm_start_is_spread_over_its_samples() -> None:
    timed = _Timed(warm_start(10), SETTING)
    timed._update, timed._encode = ([0.0] * 9 + [1.0]) * 3, [0.25] * 30
    assert timed.medians() == pytest.approx({UPDATE: 100.0, WHOLE: 350.0})


def test_the_encoder_that_is_timed_beside_ours_computes_the_same() -> None:
    policy = SETTING.pretrained.policy
    context = policy.start(LabelStream(SETTING.task, 1).states(5))
    torch.testing.assert_close(encode_by_pytorch(policy, context)[:, 0], policy.encode(context))


def test_every_method_has_a_tensorboard_run_with_its_curves(tmp_path: Path) -> None:
    rows = [
        Row("success", "shifted", method, 1000, stream, labels, metric, 0.5 + 0.1 * stream)
        for method in ("KBT, one layer", EXPERT.name)
        for stream in (0, 1)
        for labels in (0, 10)
        for metric in ("success", "regret")
    ]
    (tmp_path / "tensorboard" / "KBT_one_layer").mkdir(parents=True)
    stale = tmp_path / "tensorboard" / "KBT_one_layer" / "events.out.tfevents.old"
    other = tmp_path / "tensorboard" / "mine.txt"
    stale.write_text("")
    other.write_text("")
    assert Curves(Table(rows)).write(tmp_path) == tmp_path / "tensorboard"
    assert not stale.exists()
    assert other.exists()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "KBT_one_layer"))
    events.Reload()
    scalars = {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["eval/success_rate"] == [(0, 0.55), (10, 0.55)]
    assert scalars["eval/success_rate_lower"][0][1] == 0.5
    assert scalars["eval/regret"] == [(0, 0.55), (10, 0.55)]
    assert (tmp_path / "tensorboard" / "expert").is_dir()


def test_a_trial_may_be_replaced_field_by_field() -> None:
    assert replace(tiny.trial(), stream_seed=4).stream_seed == 4
