"""The choice of a prior by its evidence on labelled samples."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import marginal_likelihood
from learners import changed, expert, kbt, states, weights

from kbt_rl import KBT, Sample
from kbt_rl.agents.prior_choice import candidate_head, choose_prior, prior_grid
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead


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
    grid = prior_grid(HeadConfig(layers=2), hidden=(1e-5, 1e-3), last=(1.0,), rhos=(0.9,))
    both, first, second = (choose_prior(model, *given, candidates=grid) for given in ((one, other), (one,), (other,)))
    for together, a, b in zip(both.scores, first.scores, second.scores, strict=True):
        assert together.log_density == pytest.approx(a.log_density + b.log_density, rel=1e-12)
        assert together.per_label == pytest.approx(together.log_density / 13)


def test_the_score_is_what_a_model_with_that_prior_tells_of_its_updates() -> None:
    config, samples = (
        HeadConfig(layers=2, hidden_variance=1e-3, last_variance=10.0, rho=0.9, structure="layer"),
        stream(12),
    )
    model = kbt(policy_kwargs={"head": config})
    (score,) = choose_prior(kbt(), samples, candidates=[config]).scores
    told = [getattr(model.update(sample), "log_density") for sample in samples]  # noqa: B009
    assert score.log_density == pytest.approx(sum(told), rel=1e-9)
    assert score[:4] == (1e-3, 10.0, 0.9, 1e-3)


def test_the_model_stays_as_it_is() -> None:
    model = kbt()
    before, rng = weights(model), model.stream_rng.bit_generator.state
    choose_prior(
        model, stream(5), candidates=prior_grid(HeadConfig(layers=2), hidden=(1e-5, 1e-3), last=(1.0,), rhos=(0.0,))
    )
    assert not changed(before, weights(model))
    assert model.labels_used == 0
    assert model.stream_rng.bit_generator.state == rng


def test_missing_labels_and_masks_do_not_count() -> None:
    model, samples = kbt(), stream(6)
    grid = prior_grid(HeadConfig(layers=2), hidden=(1e-4,), last=(1.0,), rhos=(0.99,))
    without = choose_prior(model, samples[:4], candidates=grid)
    gap = Sample(samples[4].context, np.full((1, 1), np.nan))
    hidden = samples[5]._replace(mask=np.array([False]))
    assert choose_prior(model, [*samples[:2], gap, *samples[2:4], hidden], candidates=grid) == without
    with pytest.raises(ValueError, match="no sample has a label"):
        choose_prior(model, [gap, hidden], candidates=grid)


def test_noise_that_was_set_holds_unless_a_candidate_states_its_own() -> None:
    model = kbt()
    model.policy.head.set_noise(4e-2)
    same, own = (
        candidate_head(model.policy, replace(model.policy.head_config, rho=0.5, **noise))
        for noise in ({}, {"noise_variance": 0.5})
    )
    torch.testing.assert_close(same.noise_cov, model.policy.head.noise_cov, rtol=1e-12, atol=0.0)
    assert float(own.noise_cov) == 0.5


def test_the_grid_varies_only_what_the_head_has() -> None:
    grid = prior_grid(HeadConfig(layers=2))
    assert len(grid) == len(set(grid)) == 7 * 5 * 5
    assert len(prior_grid(HeadConfig(layers=2, structure="diagonal"))) == 35
    assert len(prior_grid(HeadConfig(layers=1))) == 5
    assert {config.noise_variance for config in prior_grid(noise=(0.1, 0.2))} == {0.1, 0.2}
    assert {config.structure for config in prior_grid(HeadConfig(structure="neuron"))} == {"neuron"}


def test_a_candidate_that_fails_scores_minus_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = kbt(), stream(4)
    grid = prior_grid(HeadConfig(layers=2), hidden=(1e-5, 1e-4), last=(1.0,), rhos=(0.99,))
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
        expected += float(torch.log_softmax(other.policy.head(features), dim=-1)[0, int(sample.target[0])])
        other.update(sample)
    assert max(score.log_density for score in choice.scores) == pytest.approx(expected, rel=1e-6)
