"""The evidence of a prior against exact linear regression, and the choice of a prior by it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import STRUCTURES, randn, random_cov
from learners import TINY, changed, expert, kbt, pretrained, states, weights
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from kbt_rl import KBT, Sample
from kbt_rl.agents.prior_choice import candidate_head, choose_prior, prior_grid
from kbt_rl.commands.prior import Prior
from kbt_rl.experiments import learners as shared
from kbt_rl.experiments import prior_choice as study
from kbt_rl.experiments.prior_choice import PriorRow, ScoreRow, StudyConfig, differences, summarise
from kbt_rl.experiments.tables import read_rows
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.evidence import sequential_log_density
from kbt_rl.inference.head import BayesianHead

FEATURES = 3


def linear_head(outputs: int, last_variance: float, **config: Any) -> BayesianHead:
    layer = nn.Linear(FEATURES, outputs, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(outputs, FEATURES, seed=0))
        layer.bias.copy_(randn(outputs, seed=1))
    settings = HeadConfig(layers=1, last_variance=last_variance, **config)
    head = BayesianHead.from_linear(
        layer,
        settings,
        feature_mean=randn(FEATURES, seed=2),
        feature_scale=randn(FEATURES, seed=3).exp(),
        target_scale=randn(outputs, seed=4).exp(),
    )
    head.set_noise(0.2 * random_cov(outputs, seed=5))
    return head


def marginal_likelihood(head: BayesianHead, features: Tensor, targets: Tensor) -> float:
    """Log density of all targets of Bayesian linear regression, as one multivariate normal, in target units."""
    rows, outputs = targets.shape
    inputs = torch.cat([(features - head.feature_mean) / head.feature_scale, features.new_ones(rows, 1)], dim=1)
    identity = torch.eye(outputs, dtype=torch.float64)
    kernel = torch.kron(head.config.last_variance * inputs @ inputs.mT, identity)
    scale = head.target_scale.repeat(rows)
    cov = (kernel + torch.kron(torch.eye(rows, dtype=torch.float64), head.noise_cov)) * scale.unsqueeze(-1) * scale
    return float(MultivariateNormal(head(features).flatten(), cov).log_prob(targets.flatten()))


# ---------------------------------------------------------------------- the evidence of one layer is exact


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("structure", ["joint", "layer"])
@pytest.mark.parametrize("order", [None, 0, 1])
@pytest.mark.parametrize("block", [1, 7, 40])
def test_with_one_layer_it_is_the_marginal_likelihood(
    outputs: int, structure: str, order: int | None, block: int
) -> None:
    head = linear_head(outputs, 0.7, structure=structure)
    features, targets = randn(40, FEATURES, seed=6), 2.0 * randn(40, outputs, seed=7)
    expected = marginal_likelihood(head, features, targets)
    if order is not None:
        taken = torch.randperm(40, generator=torch.Generator().manual_seed(order))
        features, targets = features[taken], targets[taken]
    found = sequential_log_density(head, zip(features.split(block), targets.split(block), strict=True))
    assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_head_itself_stays_as_it_is(structure: str) -> None:
    head = BayesianHead.from_linear(nn.Linear(FEATURES, 1), HeadConfig(structure=structure, noise="learned"))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    batches = list(zip(randn(5, FEATURES, seed=0).split(1), randn(5, 1, seed=1).split(1), strict=True))
    assert sequential_log_density(head, batches) == sequential_log_density(head, batches) != 0.0
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert sequential_log_density(head, []) == 0.0


def test_it_is_the_sum_of_what_the_updates_tell() -> None:
    head = linear_head(2, 0.7)
    batches = list(zip(randn(6, FEATURES, seed=0).split(2), randn(6, 2, seed=1).split(2), strict=True))
    found = sequential_log_density(head, batches)
    told = [head.update(*batch).log_density for batch in batches]
    assert found == pytest.approx(sum(told) - 6 * head.log_scale, rel=1e-12)


# ---------------------------------------------------------------------- choosing


def stream(count: int, seed: int = 0, model: KBT | None = None) -> list[Sample]:
    """Labels of the shifted plant's expert."""
    observations = states(count, seed=seed)
    actions = expert().predict(observations)[0]
    return [Sample(observations[i : i + 1], actions[i : i + 1]) for i in range(count)]


def test_with_one_layer_the_choice_is_that_of_the_exact_evidence() -> None:
    model, samples = kbt(), stream(40)
    grid = prior_grid(HeadConfig(layers=1), last=(1e-4, 1e-2, 1.0, 100.0), noise=(1e-3, 1e-1))
    assert len(grid) == 8
    choice = choose_prior(model, samples, candidates=grid)
    features = torch.cat([model.policy.encode(model.policy.start(sample.context)) for sample in samples]).double()
    targets = torch.cat([torch.from_numpy(np.asarray(sample.target, dtype=np.float64)) for sample in samples])
    exact = [marginal_likelihood(candidate_head(model.policy, config), features, targets) for config in grid]
    np.testing.assert_allclose([score.log_density for score in choice.scores], exact, rtol=1e-6)
    assert choice.config == grid[int(np.argmax(exact))]
    assert len({round(value, 3) for value in exact}) == len(exact)
    assert choice.scores[0].per_label == pytest.approx(exact[0] / 40, rel=1e-6)


def test_streams_start_from_the_prior_and_add_up() -> None:
    model, one, other = kbt(), stream(8, seed=1), stream(5, seed=2)
    grid = prior_grid(hidden=(1e-5, 1e-3), last=(1.0,), rhos=(0.9,))
    both, first, second = (choose_prior(model, *given, candidates=grid) for given in ((one, other), (one,), (other,)))
    for together, a, b in zip(both.scores, first.scores, second.scores, strict=True):
        assert together.log_density == pytest.approx(a.log_density + b.log_density, rel=1e-12)
        assert together.per_label == pytest.approx(together.log_density / 13)


def test_the_score_is_what_a_model_with_that_prior_tells_of_its_updates() -> None:
    config, samples = HeadConfig(hidden_variance=1e-3, last_variance=10.0, rho=0.9, structure="layer"), stream(12)
    model = kbt(policy_kwargs={"head": config})
    (score,) = choose_prior(kbt(), samples, candidates=[config]).scores
    told = [getattr(model.update(sample), "log_density") for sample in samples]  # noqa: B009
    assert score.log_density == pytest.approx(sum(told), rel=1e-9)
    assert score[:4] == (1e-3, 10.0, 0.9, 1e-3)


def test_the_model_stays_as_it_is() -> None:
    model = kbt()
    before, rng = weights(model), model.stream_rng.bit_generator.state
    choose_prior(model, stream(5), candidates=prior_grid(hidden=(1e-5, 1e-3), last=(1.0,), rhos=(0.0,)))
    assert not changed(before, weights(model))
    assert model.labels_used == 0
    assert model.stream_rng.bit_generator.state == rng


def test_missing_labels_and_masks_do_not_count() -> None:
    model, samples = kbt(), stream(6)
    grid = prior_grid(hidden=(1e-4,), last=(1.0,), rhos=(0.99,))
    without = choose_prior(model, samples[:4], candidates=grid)
    gap = Sample(samples[4].context, np.full((1, 1), np.nan))
    hidden = samples[5]._replace(mask=np.array([False]))
    assert choose_prior(model, [*samples[:2], gap, *samples[2:4], hidden], candidates=grid) == without
    with pytest.raises(ValueError, match="no sample has a label"):
        choose_prior(model, [gap, hidden], candidates=grid)


def test_noise_that_was_set_holds_unless_a_candidate_states_its_own() -> None:
    model = kbt()
    model.policy.head.set_noise(4e-2)
    same, own = (candidate_head(model.policy, HeadConfig(rho=0.5, **noise)) for noise in ({}, {"noise_variance": 0.5}))
    torch.testing.assert_close(same.noise_cov, model.policy.head.noise_cov, rtol=1e-12, atol=0.0)
    assert float(own.noise_cov) == 0.5


def test_the_grid_varies_only_what_the_head_has() -> None:
    grid = prior_grid()
    assert len(grid) == len(set(grid)) == 7 * 5 * 5
    assert len(prior_grid(HeadConfig(structure="diagonal"))) == 35
    assert len(prior_grid(HeadConfig(layers=1))) == 5
    assert {config.noise_variance for config in prior_grid(noise=(0.1, 0.2))} == {0.1, 0.2}
    assert {config.structure for config in prior_grid(HeadConfig(structure="neuron"))} == {"neuron"}


def test_a_candidate_that_fails_scores_minus_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = kbt(), stream(4)
    grid = prior_grid(hidden=(1e-5, 1e-4), last=(1.0,), rhos=(0.99,))
    update = BayesianHead.update

    def failing(head: BayesianHead, *given: Any) -> Any:
        if head.config.hidden_variance == 1e-5:
            raise UpdateError("would make a weight variance negative")
        return update(head, *given)

    monkeypatch.setattr(BayesianHead, "update", failing)
    choice = choose_prior(model, samples, candidates=grid)
    assert choice.config == grid[1]
    assert [score.log_density == -math.inf for score in choice.scores] == [True, False]
    with pytest.raises(ValueError, match="all 1 candidates failed"):
        choose_prior(model, samples, candidates=grid[:1])


def test_bad_input_is_refused() -> None:
    model, samples = kbt(), stream(2)
    with pytest.raises(ValueError, match="no candidates"):
        choose_prior(model, samples, candidates=[])
    with pytest.raises(ValueError, match="no sample has a label"):
        choose_prior(model)
    with pytest.raises(ValueError, match=r"has shape \(1, 2\)"):
        choose_prior(model, [Sample(samples[0].context, np.zeros((1, 2)))])
    with pytest.raises(ValueError, match="softmax link"):
        choose_prior(model, samples, candidates=[HeadConfig(rule="fisher")])


def test_discrete_actions_are_scored_by_their_log_probability() -> None:
    model = KBT(env=gym.make("kbt_rl/DiscreteInvertedPendulum-v0"), seed=0)
    base = model.policy.head_config
    samples = [Sample(states(1, seed=seed), np.array([seed % 2])) for seed in range(6)]
    grid = prior_grid(base, hidden=(1e-5, 1e-3), last=(1.0,), rhos=(0.9,))
    choice = choose_prior(model, samples, candidates=grid)
    other = KBT(env=gym.make("kbt_rl/DiscreteInvertedPendulum-v0"), seed=0, policy_kwargs={"head": choice.config})
    expected = 0.0
    for sample in samples:
        features = other.policy.encode(other.policy.start(sample.context))
        expected += math.log(float(other.policy.head(features)[0, int(sample.target[0])]))
        other.update(sample)
    assert max(score.log_density for score in choice.scores) == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------------- the study


SMALL = StudyConfig(
    pretrain_seed=0,
    tuning_seeds=(0, 1),
    labels=8,
    plant_seeds=(3,),
    stream_seeds=(4,),
    checkpoints=(5, 10),
    starts=4,
    pretraining=TINY,
    hidden=(1e-5, 1e-1),
    last=(1.0,),
    rhos=(0.0, 0.99),
)


def test_plants_of_the_choice_are_not_those_of_the_judgement() -> None:
    config = StudyConfig(1000)
    chosen_on = {study.drawn_plant(seed) for seed in SMALL.tuning_seeds}
    judged_on = set(study.judged_plants(SMALL).values())
    assert len(chosen_on) == 2
    assert not chosen_on & judged_on
    assert max(config.tuning_seeds) < 100 <= 1000 <= min(config.plant_seeds)
    assert min(config.stream_seeds) >= 1000


def test_the_study_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "pretrain", lambda *_: pretrained())
    monkeypatch.setattr(study, "study_plan", lambda **_: [SMALL])
    console = Console(width=200, record=True)
    Prior(out=tmp_path, quick=True, seed=3).run(console)
    rows, scores = read_rows(tmp_path / "prior.csv", PriorRow), read_rows(tmp_path / "prior_scores.csv", ScoreRow)
    assert len(scores) == 4
    assert len(rows) == len(study.METHODS) * 2 * 2  # plants, checkpoints
    best, worst = max(scores, key=lambda row: row.log_density), min(scores, key=lambda row: row.log_density)
    by_method = {row.method: row for row in rows}
    assert by_method[study.CHOSEN].hidden_variance == best.hidden_variance
    assert by_method[study.WORST].hidden_variance == worst.hidden_variance
    assert by_method[study.DEFAULT].hidden_variance == HeadConfig().hidden_variance
    before = [row for row in rows if row.method == study.NO_LEARNING]
    assert len({(row.success, row.regret) for row in before if row.plant == "shifted"}) == 1
    assert json.loads((tmp_path / "prior.json").read_text())["studies"][0]["labels"] == 8
    with Image.open(tmp_path / "prior.png") as image:
        assert image.size[0] == 1300
    assert study.CHOSEN in console.export_text()


def test_trials_are_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "pretrain", lambda *_: pretrained())
    config = replace(SMALL, labels=3, checkpoints=(2,), starts=2, hidden=(1e-5,), rhos=(0.9, 0.99))
    first, second = (study.run_study(config) for _ in range(2))
    assert first == second


def test_summary_and_differences_are_over_the_same_trials() -> None:
    def row(method: str, seed: int, success: float, regret: float) -> PriorRow:
        return PriorRow(method, "shifted", 1, seed, 1e-5, 1.0, 0.99, 1e-3, 10, success, regret, 1.0)

    rows = [row(study.DEFAULT, seed, 0.5 + 0.1 * seed, 1.0) for seed in range(3)]
    rows += [row(study.CHOSEN, seed, 0.6 + 0.1 * seed, 0.5) for seed in range(3)]
    by_method = {each.method: each for each in summarise(rows)}
    assert by_method[study.DEFAULT].success == pytest.approx(0.6)
    assert by_method[study.CHOSEN].trials == 3
    (found,) = differences(rows)
    assert found.method == study.CHOSEN
    assert (found.success, found.success_lower, found.success_upper) == pytest.approx((0.1, 0.1, 0.1))
    assert found.regret == pytest.approx(-0.5)
    assert list(itertools.chain(found[:3])) == [study.CHOSEN, 10, 3]
