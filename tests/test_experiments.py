"""Trials, batches and plans of the experiments: repeatable, resumable, and the same alone or side by side."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MACHINE_CODE
from rich.console import Console
from scipy import special

from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.lqr import lqr_gain
from kbt_rl.agents.sample import Sample
from kbt_rl.envs.plant import NOMINAL, SHIFTED
from kbt_rl.experiments import learners, runner, simulation, single, trials
from kbt_rl.experiments.config import (
    FIRST_REPORTED_SEED,
    KBT_METHOD,
    Method,
    Trial,
    batches,
    figure3_methods,
    printed_method,
    reproduction_plan,
    timing_plan,
    tuned,
    warm_start_method,
)
from kbt_rl.experiments.one_token import StackedTransformers
from kbt_rl.experiments.runner import perform, read_results, result_path, run_all
from kbt_rl.experiments.simulation import Outcome, PlantBatch, expert_force, regret, simulate, starts
from kbt_rl.experiments.timing import _Timed, encode_by_pytorch
from kbt_rl.experiments.tune import score, tuning_plan
from kbt_rl.models.decision_transformer import DecisionTransformer, DecisionTransformerConfig

TINY = PretrainConfig(samples=500, steps=60, batch_size=32)
BASE = Trial("adapt", KBT_METHOD, 0, 0, samples=12, starts=3, checkpoints=(0, 6, 12), pretraining=TINY)


@pytest.fixture(scope="module")
def pretrained() -> KBT:
    return learners.pretrain(0, TINY)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


def test_reported_and_tuning_seeds_do_not_meet() -> None:
    reported = reproduction_plan(full=True)
    assert min(min(trial.pretrain_seed, trial.stream_seed) for trial in reported) >= FIRST_REPORTED_SEED
    tuning = tuning_plan(3, 2)
    assert max(max(trial.pretrain_seed, trial.stream_seed) for trial in tuning) < 100
    with pytest.raises(ValueError, match="seeds 0 to 99"):
        tuning_plan(3, 2, seed=98)


def test_every_trial_of_a_plan_has_an_id_of_its_own() -> None:
    plan = reproduction_plan(full=True)
    ids = {trial.id for trial in [*plan, *timing_plan(plan, quick=False)]}
    assert len(ids) == len(plan) + 1
    assert dataclasses.replace(BASE).id == BASE.id
    assert dataclasses.replace(BASE, samples=13).id != BASE.id


def test_the_full_plan_has_thirty_streams_and_three_policies() -> None:
    kbt = [trial for trial in reproduction_plan(full=True) if trial.kind == "adapt" and trial.method == KBT_METHOD]
    assert len({trial.stream_seed for trial in kbt}) == 30
    assert len({trial.pretrain_seed for trial in kbt}) == 3


def test_the_baselines_come_with_tuned_settings() -> None:
    best = tuned()
    methods = {method.name: method.settings for method in figure3_methods()}
    assert methods["warm start 25"] == {"memory": 25, "learning_rate": best["learning_rate"]["25"]}
    assert methods["KBT as printed"] == {"epsilon": best["epsilon"]}


def test_simulation_agrees_with_the_environment() -> None:
    env = gym.make("kbt_rl/ShiftedInvertedPendulum-v0")
    force = expert_force(SHIFTED)
    initial = starts(3, 2)
    outcome = simulate(force, initial, SHIFTED)
    for row, state in enumerate(initial):
        observation, _ = env.reset(options={"state": state.tolist()})
        cost, done = 0.0, False
        while not done:
            action = np.float32(force(observation[None]) / SHIFTED.max_force)
            observation, _, terminated, truncated, info = env.step(action)
            cost, done = cost + info["cost"], terminated or truncated
        assert bool(outcome.success[row]) == info["is_success"]
        assert outcome.cost[row] == pytest.approx(cost, rel=1e-5)


@MACHINE_CODE
def test_machine_code_moves_many_plants_as_arrays_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some episodes succeed, some fall, one policy gives no number."""
    masses = np.array([[NOMINAL.pole_mass], [SHIFTED.pole_mass], [SHIFTED.pole_mass], [SHIFTED.pole_mass]])
    lengths = np.array(
        [[NOMINAL.pole_half_length], [SHIFTED.pole_half_length], [SHIFTED.pole_half_length], [SHIFTED.pole_half_length]]
    )
    plants = PlantBatch(np.ones((4, 1)), masses, lengths, np.array(9.8))
    gains = np.stack([lqr_gain(NOMINAL)[0], lqr_gain(SHIFTED)[0], np.full(4, np.nan), lqr_gain(NOMINAL)[0]])

    def force(states: Any) -> Any:
        return -(states.astype(np.float64) @ gains[..., None])[..., 0]

    initial = np.broadcast_to(2.0 * starts(2, 20), (4, 20, 4))
    by_code = simulate(force, initial, plants)
    monkeypatch.setattr(simulation, "_machine_code", lambda: None)
    by_arrays = simulate(force, initial, plants)
    assert np.array_equal(by_code.success, by_arrays.success)
    assert by_code.success[:2].any(axis=1).all()
    assert np.isinf(by_code.cost[2:]).all()
    np.testing.assert_allclose(by_code.cost, by_arrays.cost, rtol=1e-9)


def test_a_fall_costs_the_cap_and_the_expert_regrets_nothing() -> None:
    initial = starts(1, 4)
    expert = simulate(expert_force(SHIFTED), initial, SHIFTED)
    assert expert.success.all()
    assert regret(expert.cost, expert.cost) == 0.0
    fallen: Outcome = simulate(expert_force(NOMINAL), initial, SHIFTED)
    assert not fallen.success.any()
    assert regret(fallen.cost, expert.cost) == pytest.approx(99.0)
    half = np.where(np.arange(4) < 2, np.inf, expert.cost)
    assert regret(half, expert.cost) == pytest.approx(99.0 * expert.cost[:2].sum() / expert.cost.sum())


@pytest.mark.parametrize("method", [KBT_METHOD, Method("L = 1", "kbt", {"layers": 1}), warm_start_method(3, 1e-2)])
def test_snapshots_act_like_the_learner_at_that_time(method: Method, pretrained: KBT) -> None:
    learner = learners.build(method, pretrained)
    stream = learners.LabelStream(BASE)
    probe = stream.states(5)
    snapshots, wanted = [], []
    for _ in range(3):
        states = stream.states(3)
        learner.update(Sample(states, stream.label(states)))
        snapshots.append(learners.snapshot(learner))
        wanted.append(SHIFTED.max_force * learner.policy.act(learner.policy.encode(learner.policy.start(probe)))[:, 0])
    force = learners.batch_force(learner, snapshots)(np.broadcast_to(probe, (3, *probe.shape)))
    np.testing.assert_allclose(force, np.stack(wanted), rtol=1e-4, atol=1e-3)
    assert np.abs(force[0] - force[2]).max() > 1e-3


@pytest.mark.parametrize("norm_first", [True, False])
def test_stacked_transformers_are_the_network_for_one_state(norm_first: bool) -> None:
    config = DecisionTransformerConfig(width=8, layers=3, heads=4, feedforward=5, norm_first=norm_first)
    networks = [DecisionTransformer(4, 2, config).eval() for _ in range(3)]
    for network in networks:
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter)
        network.observation_scale.uniform_(0.5, 2.0)
        network.action_scale.uniform_(0.5, 2.0)
    observations = torch.randn(3, 5, 4)
    stacked = StackedTransformers([network.state_dict() for network in networks], config)(observations)
    for each, network, rows in zip(stacked, networks, observations, strict=True):
        wanted = network(rows.unsqueeze(1), torch.zeros(5, 1, 2), torch.zeros(5, dtype=torch.long))[:, 0]
        torch.testing.assert_close(each, wanted, rtol=1e-4, atol=1e-4)


def test_stacked_transformers_refuse_longer_contexts(pretrained: KBT) -> None:
    with pytest.raises(ValueError, match="one state"):
        StackedTransformers([{}], DecisionTransformerConfig(context_length=2))


def test_every_learner_starts_as_the_pretrained_policy(pretrained: KBT) -> None:
    probe = learners.LabelStream(BASE).states(6)
    wanted = pretrained.policy.act(learners.features_of(pretrained.policy, probe))
    for method in (KBT_METHOD, printed_method(1e-3), warm_start_method(10, 1e-3), Method("pre", "pretrained")):
        policy = learners.build(method, pretrained).policy
        np.testing.assert_allclose(policy.act(learners.features_of(policy, probe)), wanted, rtol=1e-5, atol=1e-7)


def test_a_trial_is_a_pure_function(out: Path) -> None:
    first = trials.run_trial(BASE, out / "models")
    torch.manual_seed(99)
    assert trials.run_trial(BASE, out / "models") == first
    assert len(first["success"]) == len(first["regret"]) == len(BASE.checkpoints)


def test_the_pretrained_policy_read_back_gives_the_same_trial(out: Path) -> None:
    assert trials.run_trial(BASE) == trials.run_trial(BASE, out / "models")


def test_a_kept_clone_makes_the_same_model(tmp_path: Path) -> None:
    made, read = (learners.pretrain(0, TINY, tmp_path / "models" / "clone.zip") for _ in range(2))
    weights = read.policy.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in made.policy.state_dict().items())
    assert made.stream_rng.random() == read.stream_rng.random()
    assert made.pretrain_info == read.pretrain_info


def test_cloning_waits_for_no_machine_code() -> None:
    script = (
        "import sys; from kbt_rl.agents.behaviour_cloning import PretrainConfig\n"
        "from kbt_rl.experiments.learners import clone\n"
        "clone(0, PretrainConfig(samples=50, steps=2)); print('numba' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_heads_of_one_depth_are_compiled_by_one_process() -> None:
    groups = runner._by_depth(figure3_methods())
    assert [[method.name for method in group] for group in groups] == [
        ["KBT", "KBT as printed", "pre-trained"], ["linear layer (L = 1)"],
    ]  # fmt: skip


@pytest.mark.parametrize("method", figure3_methods(), ids=lambda method: method.name)
def test_every_method_of_figure_3_gives_a_record(method: Method, out: Path) -> None:
    record = trials.run_trial(dataclasses.replace(BASE, method=method), out / "models")
    assert len(record["success"]) == len(record["regret"]) == 3
    assert all(0.0 <= rate <= 1.0 for rate in record["success"])
    assert record["expert_success"] == 1.0
    json.dumps(record)


def test_a_printed_posterior_that_breaks_counts_as_failure_from_there(monkeypatch: Any, pretrained: KBT) -> None:
    learner = learners.build(printed_method(1e-2), pretrained)
    monkeypatch.setattr("kbt_rl.experiments.printed._proper", lambda weights, cov: learner.labels_used < 7)
    monkeypatch.setattr(trials, "build", lambda method, pretrained: learner)
    record = trials._adapt(dataclasses.replace(BASE, method=printed_method(1e-2)), pretrained)
    assert record["failed_after"] == 7
    assert record["success"][-1] == 0.0
    assert record["regret"][-1] == 99.0


@pytest.mark.parametrize("rule", ["measure", "replace"])
def test_uncertainty_trial_tells_variance_error_and_coverage(rule: str, out: Path) -> None:
    trial = dataclasses.replace(
        BASE, kind="uncertainty", method=Method(rule, "kbt", {"rule": rule}), noise_variance=20.0, samples=700
    )
    record = trials.run_trial(trial, out / "models")
    assert record["noise_floor"] == pytest.approx(20.0)
    assert record["final_variance"] == pytest.approx(20.0, rel=0.3)
    assert len(record["iterations"]) == len(record["predicted_variance"])
    assert 0.5 < record["coverage"] <= 1.0


def test_a_block_of_warm_start_is_spread_over_its_samples(pretrained: KBT) -> None:
    timed = _Timed(learners.build(warm_start_method(10, 1e-3), pretrained), block=10)
    timed.update, timed.encode = ([0.0] * 9 + [1.0]) * 3, [0.25] * 30
    assert timed.record() == pytest.approx({"update_s": 0.1, "encoder_s": 0.25, "sample_to_posterior_s": 0.35})


def test_the_encoder_that_is_timed_beside_ours_computes_the_same(pretrained: KBT) -> None:
    policy = pretrained.policy
    context = policy.start(np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32))
    torch.testing.assert_close(encode_by_pytorch(policy, context)[:, 0], policy.encode(context))


def test_methods_take_turns(out: Path) -> None:
    methods = (KBT_METHOD, warm_start_method(10, 1e-3), printed_method(0.1))
    trial = dataclasses.replace(BASE, kind="timing", methods=methods, samples=40)
    record = trials.run_trial(trial, out / "models")["methods"]
    assert list(record) == [method.name for method in methods]
    for times in record.values():
        assert times["sample_to_posterior_s"] == times["update_s"] + times["encoder_s"] > 0


def test_visited_labels_follow_the_learners_own_path(out: Path) -> None:
    base = dataclasses.replace(BASE, kind="correlated", stream="visited", samples=60, checkpoints=(0, 60))
    untrained = dataclasses.replace(base, method=warm_start_method(100, 1e-3))  # its memory never fills
    assert trials.run_trial(untrained, out / "models")["falls"] >= 1  # the pre-trained policy falls on this plant
    assert trials.run_trial(base, out / "models")["falls"] == 0


def test_a_finished_trial_is_not_run_again(out: Path, monkeypatch: Any) -> None:
    perform([BASE], out)
    assert result_path(BASE, out).exists()
    monkeypatch.setattr("kbt_rl.experiments.runner.run_trials", lambda *_: pytest.fail("ran again"))
    perform([BASE], out)
    (result,) = read_results([BASE, dataclasses.replace(BASE, samples=99)], out)
    assert result["trial"]["samples"] == 12
    assert result["versions"]["torch"] == torch.__version__


def test_warm_starts_that_differ_in_their_seeds_make_a_batch() -> None:
    plan = [
        dataclasses.replace(BASE, method=method, stream_seed=seed, kind=kind)
        for method in (KBT_METHOD, warm_start_method(5, 1e-3), warm_start_method(10, 1e-3))
        for kind in ("adapt", "correlated")
        for seed in (0, 1)
    ]
    found = batches(plan)
    assert [trial for batch in found for trial in batch] == plan
    assert [len(batch) for batch in found] == [1, 1, 1, 1, 2, 2, 2, 2]


def test_warm_starts_on_either_stream_make_a_batch() -> None:
    correlated = [batch for batch in batches(reproduction_plan()) if batch[0].kind == "correlated"]
    assert [len(batch) for batch in correlated] == [1] * 30 + [10]
    assert {trial.stream for trial in correlated[-1]} == {"iid", "visited"}


def test_learners_that_are_trained_together_become_what_they_become_alone(out: Path, monkeypatch: Any) -> None:
    base = dataclasses.replace(BASE, method=warm_start_method(5, 1e-3), checkpoints=(0, 4, 5, 12))
    plan = [dataclasses.replace(base, pretrain_seed=p, stream_seed=s) for p, s in ((0, 0), (1, 0), (1, 1))]
    plan[2] = dataclasses.replace(plan[2], kind="correlated", stream="visited")
    seen: list[list[dict[str, torch.Tensor]]] = []
    evaluate = learners.batch_force
    monkeypatch.setattr(learners, "batch_force", lambda one, views: seen.append(views) or evaluate(one, views))
    records = [trials.run_trial(trial, out / "models") for trial in plan], trials.run_trials(plan, out / "models")
    assert [len(views) for views in seen] == [3] * 6  # of each: at the start, after 5 and after 10 labels
    for alone, together in zip(seen[:3], seen[3:], strict=True):
        for expected, found, before in zip(alone[1:], together[1:], together[:-1], strict=True):
            for name, weight in expected.items():  # but for queries and keys, which a lone token makes no use of
                used = slice(2 * 16, None) if "in_proj" in name else ...
                torch.testing.assert_close(found[name][used], weight[used], rtol=1e-3, atol=1e-4)
            assert float((found["linear.weight"] - before["linear.weight"]).abs().max()) > 1e-2
    for name in ("success", "falls"):
        assert [record.get(name) for record in records[0]] == [record.get(name) for record in records[1]]
    assert [("falls" in record) for record in records[1]] == [False, False, True]
    assert not torch.equal(seen[4][2]["linear.weight"], seen[5][2]["linear.weight"])


def test_a_batch_that_lacks_a_result_is_run_as_a_whole(out: Path) -> None:
    base = dataclasses.replace(BASE, method=warm_start_method(5, 1e-3))
    plan = [dataclasses.replace(base, stream_seed=seed) for seed in (0, 1)]
    perform(plan, out)
    whole = read_results(plan, out)
    result_path(plan[1], out).unlink()
    perform(plan, out)
    assert read_results(plan, out) == whole
    console = Console(quiet=True)
    with pytest.raises(RuntimeError, match="2 of the trials failed"):
        run_all([dataclasses.replace(trial, method=warm_start_method(5, -1.0)) for trial in plan], out, 2, console)


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    plan = [dataclasses.replace(BASE, stream_seed=seed) for seed in range(4)]
    script = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from kbt_rl.agents.behaviour_cloning import PretrainConfig\n"
        "from kbt_rl.experiments.config import KBT_METHOD, Trial\n"
        "from kbt_rl.experiments.runner import run_all\n"
        f"plan = [Trial('adapt', KBT_METHOD, 0, s, samples=12, starts=3, checkpoints=(0, 6, 12), pretraining={TINY!r})"
        " for s in range(4)]\n"
        "run_all(plan, Path(sys.argv[1]), 1, Console())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("trials/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = len(read_results(plan, tmp_path / "killed"))
    assert 1 <= before <= 4
    run_all(plan, tmp_path / "killed", 1, Console(quiet=True))
    run_all(plan, tmp_path / "whole", 1, Console(quiet=True))
    assert read_results(plan, tmp_path / "killed") == read_results(plan, tmp_path / "whole")


@pytest.mark.slow
def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    plan = [dataclasses.replace(BASE, stream_seed=seed) for seed in range(3)]
    run_all(plan, tmp_path / "two", 2, Console(quiet=True))
    run_all(plan, tmp_path / "one", 1, Console(quiet=True))
    records = [[result["record"] for result in read_results(plan, tmp_path / name)] for name in ("one", "two")]
    assert records[0] == records[1]


def test_tuning_prefers_success_and_settles_ties_by_regret() -> None:
    def result(rate: float, success: float, regret: float) -> dict[str, Any]:
        method = dataclasses.asdict(warm_start_method(10, rate))
        return {"trial": {"method": method}, "record": {"success": [success], "regret": [regret]}}

    table = score([result(1e-3, 0.5, 1.0), result(1e-2, 0.9, 0.5), result(1e-2, 0.9, 0.7), result(3e-2, 0.898, 0.1)])
    from kbt_rl.experiments.tune import _best

    assert _best(table["warm start 10"], "learning_rate") == 3e-2
    assert _best(table["warm start 10"][:2], "learning_rate") == 1e-2


# ---------------------------------------------------------------------- moments of the softmax


def test_white_noise_has_its_mean_and_covariance_exactly() -> None:
    noise = single._white_noise(256, seed=3)
    np.testing.assert_allclose(noise.mean(axis=0), 0.0, atol=1e-14)
    np.testing.assert_allclose(noise.T @ noise / 256, np.eye(5), atol=1e-13)
    assert not np.array_equal(noise, single._white_noise(256, seed=4))


def test_sampled_softmax_agrees_with_quadrature() -> None:
    mean, sd = np.random.default_rng(2).standard_normal(5), 0.1
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    grid = np.stack(np.meshgrid(*[nodes] * 5, indexing="ij"), axis=-1).reshape(-1, 5)
    mass = np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * 5, indexing="ij"), axis=-1), axis=-1).ravel()
    values = special.softmax(mean + sd * grid, axis=1)
    expected = mass @ values
    cov = (values - expected).T @ (mass[:, None] * (values - expected))
    found = single._sampled_softmax(mean, sd, single._white_noise(2**12, seed=5))
    np.testing.assert_allclose(found[0], expected, atol=2e-6)
    assert np.linalg.norm(found[1] - cov) < 1e-3 * np.linalg.norm(cov)  # 4,096 plain samples are off by 3e-2
