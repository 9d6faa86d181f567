"""One posterior for each sub-environment: they act and learn as so many separate learners."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from learners import LONGER, NOMINAL, SHIFTED, changed, expert, kbt, policy, states, weights
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from kbt_rl import KBT, Fallback, HeadConfig, KalmanAdapter, Sample
from kbt_rl.agents.bayesian import KBTInfo
from kbt_rl.callbacks import Forgetting, QueryRule, RecordedStream, UncertainStream, VarianceGate, VisitedStream
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead

Array = npt.NDArray[Any]
ENVS = 3
CONFIGS = pytest.mark.parametrize(
    "head",
    [
        HeadConfig(),
        HeadConfig(layers=2, noise="learned", structure="neuron"),
        HeadConfig(robust_dof=4.0),
        HeadConfig(layers=3, structure="diagonal"),
    ],
    ids=["shared", "neuron, learned noise", "robust", "three layers"],
)


def fleet(head: HeadConfig | None = None, **settings: Any) -> KBT:
    """``ENVS`` environments with a posterior each."""
    return kbt(n_envs=ENVS, per_env=True, policy_kwargs={"head": head or HeadConfig()}, **settings)


def separate(head: HeadConfig | None = None) -> list[KBT]:
    return [kbt(policy_kwargs={"head": head or HeadConfig()}) for _ in range(ENVS)]


def labels(observations: Array, missing: Sequence[int] = ()) -> Array:
    target = expert().label(observations)
    target[list(missing)] = np.nan
    return target


def samples(model: KBT, count: int = 8) -> list[Sample]:
    """Encoded together, since the encoder rounds differently with another number of rows; some rows have no label."""
    drawn = []
    for index in range(count):
        observations = states(ENVS, seed=100 + index)
        context = model.policy.start(observations)
        missing = {0: [], 1: [1], 2: [0, 2]}[index % 3]
        drawn.append(Sample(context, labels(observations, missing), None, model.policy.encode(context)))
    return drawn


def row(sample: Sample, index: int) -> Sample:
    assert sample.features is not None
    picked = slice(index, index + 1)
    return Sample(sample.context.rows(picked), sample.target[picked], None, sample.features[picked])  # type: ignore[union-attr]


def assert_heads_equal(heads: Sequence[BayesianHead], others: Sequence[BayesianHead]) -> None:
    for head, other in zip(heads, others, strict=True):
        root = other.variances().sqrt()
        torch.testing.assert_close(head.mean, other.mean, rtol=1e-12, atol=1e-12)
        difference = (head.covariance() - other.covariance()) / (root.unsqueeze(-1) * root)
        assert float(difference.abs().max()) < 1e-12
        torch.testing.assert_close(head.noise_cov, other.noise_cov, rtol=1e-12, atol=0.0)
        assert int(head.labels_seen) == int(other.labels_seen)


# ---------------------------------------------------------------------- the same as separate learners


@CONFIGS
def test_they_learn_and_act_as_separate_learners(head: HeadConfig) -> None:
    model, single = fleet(head), separate(head)
    for sample in samples(model):
        info = model.update(sample)
        present = np.flatnonzero(~np.isnan(sample.target[:, 0]))
        theirs = [single[index].update(row(sample, index)) for index in present]
        assert isinstance(info, KBTInfo)
        assert info.labels == len(present)
        merged = np.array([[one.nis, one.epistemic_variance, one.predictive_variance] for one in theirs])  # type: ignore[attr-defined]
        np.testing.assert_allclose(info.nis, merged[:, 0].sum(), rtol=1e-9)
        np.testing.assert_allclose(info.epistemic_variance, merged[:, 1].mean(), rtol=1e-9)
        np.testing.assert_allclose(info.predictive_variance, merged[:, 2].mean(), rtol=1e-9)
        np.testing.assert_allclose(info.innovation**2, np.mean([one.innovation**2 for one in theirs]), rtol=1e-9)
    assert_heads_equal(model.policy.heads, [one.policy.head for one in single])
    assert len({float(one.mean.sum()) for one in model.policy.heads}) == ENVS
    assert model.labels_used == sum(one.labels_used for one in single) == 17
    observations = states(ENVS, seed=9)
    actions, moments = model.predict(observations, deterministic=True)[0], model.policy.predict_moments(observations)
    for index, one in enumerate(single):
        np.testing.assert_allclose(
            actions[index], one.predict(observations[index], deterministic=True)[0], rtol=1e-4, atol=1e-6
        )
        for part, other in zip(moments, one.policy.predict_moments(observations[index]), strict=True):
            np.testing.assert_allclose(part[index], other[0], rtol=1e-3, atol=1e-7)


class EveryOther(QueryRule):
    """Alternate rows of alternate steps."""

    def wants(self, model: Any, features: torch.Tensor) -> Array:
        return (np.arange(len(features)) + int(model.num_timesteps // ENVS)) % 2 == 0


@pytest.mark.parametrize("stream", ["iid", "visited", "uncertain", "recorded"])
@pytest.mark.parametrize("limits", [{}, {"query": EveryOther(), "budget": 11, "delay": 2}], ids=["all", "few, late"])
def test_each_env_of_a_rollout_teaches_its_own_posterior(
    stream: str, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every sample of a rollout is learned once more, row by row, by separate heads."""
    model, seen = fleet(), []
    update = model.update

    def recorded(sample: Sample) -> Any:
        context, features = sample.context, sample.features
        if features is None:  # as many rows as will be learned again
            sample = sample._replace(features=model.policy.encode(context))  # type: ignore[arg-type]
        seen.append(sample)
        return update(sample)

    monkeypatch.setattr(model, "update", recorded)
    source: Any = stream
    if stream == "recorded":
        source = RecordedStream(states(30), labels(states(30), missing=[4, 5, 11]))
    if stream == "uncertain":
        source = UncertainStream(pool=4)
    expert_of = None if stream == "recorded" else expert()
    model.learn(12 * ENVS, callback=KalmanAdapter(expert_of, source, **limits))
    single = separate()
    for sample in seen:
        for index in range(ENVS):
            wanted = sample.mask is None or sample.mask[index]
            if wanted and not np.isnan(sample.target[index]).any():
                single[index].update(row(sample, index))
    assert_heads_equal(model.policy.heads, [one.policy.head for one in single])
    assert model.labels_used == sum(one.labels_used for one in single) > 5


@pytest.mark.filterwarnings("ignore:nothing was learned")
def test_a_rollout_acts_on_the_posterior_of_each_env() -> None:
    model = fleet()
    for sample in samples(model):
        model.update(sample)
    env = make_vec_env(SHIFTED, n_envs=ENVS)
    env.seed(0)
    observations: Any = env.reset()
    model.learn(ENVS)
    features = model.policy.encode(model.policy.start(observations))
    means = np.concatenate([head(features[i : i + 1]).numpy() for i, head in enumerate(model.policy.heads)])
    expected = env.step(model.policy.clip(means))[0]
    np.testing.assert_array_equal(model._last_obs, expected)  # SB3 keeps it there


def test_one_posterior_is_shared_by_default() -> None:
    model = kbt(n_envs=ENVS)
    assert (model.per_env, model.posteriors, len(model.policy.heads)) == (False, 1, 1)
    assert model.policy.head is model.policy.heads[0]
    model.update(Sample(states(7), labels(states(7))))
    assert model.predict(states(5))[0].shape == (5, 1)


def test_one_env_has_one_posterior_either_way() -> None:
    model, plain = kbt(per_env=True), kbt()
    for learner in (model, plain):
        learner.learn(10, callback=KalmanAdapter(expert()))
    assert not changed(weights(plain), weights(model))


def test_the_uncertain_stream_asks_each_posterior_about_its_own_pool() -> None:
    model = fleet()
    for sample in samples(model):
        model.update(sample)
    stream = UncertainStream(pool=8)
    stream.check(model)
    before = copy.deepcopy(model.stream_rng)
    batch = stream.next(model, {})
    # The same numbers as the stream has drawn, of which it shows the chosen ones only.
    pools = stream._draw(_with_rng(model, before), 8 * ENVS).reshape(ENVS, 8, 4)
    for index, head in enumerate(model.policy.heads):
        features = model.policy.encode(model.policy.start(pools[index]))
        best = int(head.predict_logits(features).cov[:, 0, 0].argmax())
        np.testing.assert_array_equal(batch.context.newest[index], pools[index][best])


def _with_rng(model: KBT, rng: np.random.Generator) -> KBT:
    other = copy.copy(model)
    other.stream_rng = rng
    return other


def fleet_with_one_taught() -> KBT:
    """Only the second posterior has had labels."""
    model = fleet()
    taught = states(30)
    for index in range(30):
        observations = np.repeat(taught[index : index + 1], ENVS, axis=0)
        model.update(Sample(observations, labels(observations, missing=[0, 2])))
    return model


def test_the_variance_gate_looks_at_each_posterior() -> None:
    model = fleet_with_one_taught()
    features = model.policy.encode(model.policy.start(np.repeat(states(1, seed=7), ENVS, axis=0)))
    variances = np.array([float(head.predict_logits(features[:1]).cov) for head in model.policy.heads])
    assert variances[0] > 10 * variances[1]
    gate = VarianceGate(float(np.sqrt(variances[0] * variances[1])) / HeadConfig().noise_variance)
    assert gate.wants(model, features).tolist() == [True, False, True]
    first = model.policy.heads[0]
    first.set_noise(1e6)  # nothing is large beside it
    model.policy.heads[0] = first
    assert gate.wants(model, features).tolist() == [False, False, True]


def test_a_fallback_looks_at_each_posterior() -> None:
    model = fleet_with_one_taught()
    model.set_fallback(Fallback(lambda observations: np.full((len(observations), 1), -1.0), 0.05))
    actions = model.predict(np.repeat(states(1, seed=7), ENVS, axis=0), deterministic=True)[0]
    assert (actions[:, 0] == -1.0).tolist() == [True, False, True]


@pytest.mark.parametrize("sampling", ["epistemic", "predictive"])
def test_samples_are_drawn_from_each_posterior(sampling: Any) -> None:
    subject = policy(posteriors=2, sampling=sampling, head=HeadConfig(noise_variance=0.5))
    rows = np.repeat(states(1), 2, axis=0)
    features = subject.encode(subject.start(rows))
    second = subject.heads[1]
    for _ in range(20):
        second.update(features[1:], second(features[1:]))
    subject.heads[1] = second
    torch.manual_seed(0)
    drawn = np.stack([subject.predict(rows)[0] for _ in range(500)])[..., 0]
    moments = subject.predict_moments(rows)
    variance = moments.epistemic[:, 0, 0] + (moments.aleatoric[:, 0, 0] if sampling == "predictive" else 0.0)
    np.testing.assert_array_less(np.abs(drawn.var(axis=0) / variance - 1.0), 6 * np.sqrt(2 / 500))
    assert moments.epistemic[0, 0, 0] > 3 * moments.epistemic[1, 0, 0]


# ---------------------------------------------------------------------- evaluation, files, deployment


def test_evaluate_policy_with_as_many_envs() -> None:
    model = fleet()
    rewards = evaluate_policy(model, make_vec_env(SHIFTED, n_envs=ENVS, seed=0), n_eval_episodes=ENVS)[0]
    assert np.isfinite(rewards)
    with pytest.raises(ValueError, match="has 3 posteriors, one for each environment"):
        evaluate_policy(model, make_vec_env(SHIFTED, n_envs=2), n_eval_episodes=2)
    watch = EvalCallback(make_vec_env(SHIFTED, n_envs=ENVS), eval_freq=5, n_eval_episodes=3, verbose=0)
    model.learn(6 * ENVS, callback=[KalmanAdapter(expert()), watch])
    assert np.isfinite(watch.last_mean_reward)


def test_a_file_keeps_every_bit_of_every_posterior(tmp_path: Path) -> None:
    model, whole = fleet(HeadConfig(noise="learned")), fleet(HeadConfig(noise="learned"))
    whole.learn(10 * ENVS, callback=KalmanAdapter(expert()))
    model.learn(6 * ENVS, callback=KalmanAdapter(expert()))
    model.save(tmp_path / "fleet")
    loaded = KBT.load(tmp_path / "fleet", env=make_vec_env(SHIFTED, n_envs=ENVS))
    assert (loaded.per_env, loaded.posteriors) == (True, ENVS)
    assert not changed(weights(model), weights(loaded))
    loaded.learn(4 * ENVS, callback=KalmanAdapter(expert()), reset_num_timesteps=False)
    assert not changed(weights(whole), weights(loaded))
    assert len(KBT.load(tmp_path / "fleet").policy.heads) == ENVS
    with pytest.raises(ValueError, match="has 2 sub-environments and this model 3 posteriors"):
        KBT.load(tmp_path / "fleet", env=make_vec_env(SHIFTED, n_envs=2))
    model.policy.save(str(tmp_path / "policy"))
    read = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    assert not changed(weights(model), weights(read))


@pytest.mark.parametrize("index", range(ENVS))
def test_one_posterior_can_be_taken_out(index: int, tmp_path: Path) -> None:
    model = fleet(HeadConfig(structure="layer"))
    for sample in samples(model):
        model.update(sample)
    fallback = Fallback(expert(), 0.5)
    model.set_fallback(fallback)
    alone = model.policy.select(index)
    observations = states(20, seed=3)
    features = model.policy.encode(model.policy.start(observations))
    assert torch.equal(alone.head(features), model.policy.heads[index](features))
    assert alone.fallback is fallback
    before = weights(alone)
    model.update(samples(model)[0])
    assert not changed(before, weights(alone))  # it shares nothing with the fleet
    deployed = kbt(policy_kwargs={"head": HeadConfig(structure="layer")})
    deployed.policy.load_state_dict(alone.state_dict())
    assert deployed.update(Sample(observations, labels(observations))).labels == 20
    alone.save(str(tmp_path / "alone"))
    assert not changed(before, weights(type(alone).load(str(tmp_path / "alone"), device="cpu")))


def test_a_policy_with_one_posterior_selects_it() -> None:
    subject = policy()
    assert not changed(weights(subject), weights(subject.select(0)))
    for index in (1, -1):
        with pytest.raises(IndexError, match=r"posterior -?1 was asked for; there are 1"):
            subject.select(index)


def test_pretraining_resets_all() -> None:
    model = fleet()
    prior = weights(model)
    for sample in samples(model):
        model.update(sample)
    assert changed(prior, weights(model))
    model.start_from(kbt())
    assert not changed(prior, weights(model))


def test_a_longer_context() -> None:
    env = make_vec_env(SHIFTED, n_envs=ENVS)
    model = KBT(env=env, seed=0, per_env=True, policy_kwargs={"transformer": LONGER})
    model.learn(6 * ENVS, callback=KalmanAdapter(expert(), VisitedStream()))
    assert [int(head.labels_seen) for head in model.policy.heads] == [6] * ENVS


# ---------------------------------------------------------------------- rollback


def test_each_posterior_takes_back_its_own() -> None:
    head = replace(HeadConfig(), history=5)
    model, single = fleet(head), separate(head)
    for sample in samples(model):
        model.update(sample)
        for index in np.flatnonzero(~np.isnan(sample.target[:, 0])):
            single[index].update(row(sample, int(index)))
    assert model.rollback(2) == sum(one.rollback(2) for one in single) == 2 * ENVS
    assert model.rollback(1, env=1) == single[1].rollback(1) == 1
    for mine, other in zip(model.policy.heads, single, strict=True):
        torch.testing.assert_close(mine.state.mean, other.policy.head.state.mean, rtol=1e-10, atol=1e-10)
        assert int(mine.labels_seen) == int(other.policy.head.labels_seen)
    assert model.labels_used == sum(one.labels_used for one in single)


def test_all_take_back_or_none() -> None:
    model = fleet(HeadConfig(history=5))
    for missing in ([], [2], [2]):
        model.update(Sample(states(ENVS), labels(states(ENVS), missing)))
    before, used = weights(model), model.labels_used
    with pytest.raises(ValueError, match=r"rollback\(2\) while 1 updates are kept"):
        model.rollback(2)
    assert not changed(before, weights(model))
    assert model.labels_used == used
    with pytest.raises(IndexError, match="posterior 3 was to forget; there are 3"):
        model.rollback(1, env=3)


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_another_number_of_rows_is_refused(rows: int) -> None:
    model = fleet()
    before = weights(model)
    message = f"has 3 posteriors, one for each environment, and needs 3 rows in their order; got {rows}.*select"
    for ask in (
        lambda: model.predict(states(rows)),
        lambda: model.predict(states(rows), deterministic=True),
        lambda: model.policy.predict_moments(states(rows)),
        lambda: model.update(Sample(states(rows), labels(states(rows)))),
        lambda: model.update(Sample(states(rows), np.full((rows, 1), np.nan))),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    assert not changed(before, weights(model))
    assert model.labels_used == 0


def test_another_number_of_envs_is_refused() -> None:
    model = fleet()
    env = model.get_env()
    with pytest.raises(ValueError, match="has 2 sub-environments and this model 3 posteriors, one for each"):
        model.set_env(make_vec_env(SHIFTED, n_envs=2))
    assert model.get_env() is env
    assert model.n_envs == ENVS
    model.set_env(make_vec_env(NOMINAL, n_envs=ENVS))


def test_there_is_no_head_among_several() -> None:
    subject = fleet().policy
    with pytest.raises(AttributeError, match=r"has 3 posteriors, one for each environment: ask policy.heads\[i\]"):
        subject.head  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        subject.nothing  # noqa: B018
    assert len(copy.deepcopy(subject).heads) == ENVS


def test_an_update_that_fails_for_one_changes_none() -> None:
    model = fleet(HeadConfig(layers=1, noise_variance=0.0))
    model.policy.heads.get_buffer("cov_0")[2] = 0.0  # certain of everything: without noise a label contradicts it
    before = weights(model)
    with pytest.raises(UpdateError):
        model.update(samples(model)[0])
    assert not changed(before, weights(model))
    assert model.labels_used == 0
    model.update(Sample(states(ENVS), labels(states(ENVS), missing=[2])))
    assert model.labels_used == 2


def test_a_strategy_watches_one_posterior() -> None:
    model = fleet()
    with pytest.raises(ValueError, match="has 3 posteriors and Forgetting watches one"):
        model.learn(ENVS, callback=KalmanAdapter(expert(), strategy=Forgetting()))


def test_a_recording_has_a_row_for_each_posterior() -> None:
    stream = RecordedStream(states(10), labels(states(10)))
    with pytest.raises(ValueError, match="has 10 rows, which are 3 a step"):
        fleet().learn(ENVS, callback=KalmanAdapter(None, stream))


@pytest.mark.parametrize("posteriors", [0, 1.5, True])
def test_a_number_of_posteriors_is_whole(posteriors: Any) -> None:
    with pytest.raises(ValueError, match=r"posteriors is .*; a whole number, at least 1"):
        policy(posteriors=posteriors)


def test_the_number_of_posteriors_is_that_of_the_envs() -> None:
    with pytest.raises(ValueError, match="KBT has one for each environment with per_env=True"):
        kbt(policy_kwargs={"posteriors": 2})
