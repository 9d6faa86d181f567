"""The benchmarks' own arithmetic; nothing here looks at a clock's answer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("numba", reason='the micro-benchmarks need numba: pip install "kbt_rl[fast]"')

from benchmarks import accuracy, blocks, layers, page
from benchmarks.clock import in_turns
from benchmarks.machine import Limits
from benchmarks.peers import STRUCTURES, Head, RankOne
from benchmarks.rows import Case, Row, timed, update_case
from benchmarks.speed import INDEPENDENT, PAPER, encoder_weights, head_of
from benchmarks.work import Roofline, Work, network_work, prediction_work, training_work, update_work
from kbt_rl.agents.kbt import KBT
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead

ROOT = Path(__file__).resolve().parents[1]


def _roofline(limit_us: float) -> Roofline:
    """One whose moving takes so long, a third of it reading, and whose computing takes a tenth of that."""
    return Roofline(Work(1000, 1000, 1000, 1000), Limits(limit_us / 3e9, limit_us / 1.5e9, 1e10 / limit_us))


def _row(median_us: float, roofline: Roofline) -> Row:
    """An update of a joint head."""
    shape = (16, 32, 1, 577, 1000)
    return Row("width", "width 32, joint", "joint", *shape, median_us, median_us, 2000.0, roofline)


ONE_LAYER: dict[str, dict[str, Any]] = {
    "shared": {"layers": 1},
    "neuron": {"layers": 1, "outputs": 3},
    "diagonal": {"layers": 1, "outputs": 3},
}


@pytest.mark.parametrize(("structure", "sizes"), [*((name, {"width": 8}) for name in STRUCTURES), *ONE_LAYER.items()])
def test_the_least_storage_is_what_the_head_needs(structure: str, sizes: dict[str, Any]) -> None:
    """Distinct entries of the dense covariance that the structure keeps."""
    head = head_of(structure, features=4, rho=None if structure == "diagonal" else 0.5, **sizes)
    rng = np.random.default_rng(0)
    head.update(rng.standard_normal((20, 4)), rng.standard_normal((20, head.out_features)))
    kept = int(torch.triu(head.covariance()).count_nonzero())
    shapes = tuple((shape.n, shape.k) for shape in head.spec.shapes)
    assert update_work(structure, shapes).read_bytes == 8 * kept
    predicted = prediction_work(structure, shapes, variance=True)
    assert predicted.read_bytes == 8 * (kept + len(head.mean))
    assert predicted.flops == 2 * (kept + len(head.mean))


def test_the_limit_is_the_longer_of_moving_and_computing() -> None:
    work = update_work("diagonal", ((2, 3),))
    assert work == (48, 48, 48, 24, "float64")
    assert Roofline(work, Limits(1.0, 2.0, 1.0)).limit_us == 1e6 * 48 * 3.0
    assert Roofline(work, Limits(0.0, 0.0, 2.0)).limit_us == 1e6 * 12.0
    assert Roofline(work.of_heads(3), Limits(1.0, 2.0, 1.0)).limit_us == 1e6 * 48 * 3.0 * 3


def test_rows_and_outputs_need_more_arithmetic_but_a_block_of_rows_no_more_memory() -> None:
    shapes = ((4, 3), (2, 5))  # 12 weights of hidden units and 10 of two outputs
    one = update_work("joint", shapes)
    assert one == (8 * 253, 8 * 253, 8 * 253, 2 * 22**2 + 2 * 2 * 253, "float64")  # two labels in a row
    assert update_work("layer", shapes).flops == 2 * (12**2 + 10**2) + 2 * 2 * (78 + 55)
    assert update_work("neuron", shapes).flops == 2 * (4 * 9 + 2 * 25) + 2 * (4 * 6 + 2 * 15)
    full, longer = update_work("joint", shapes, rows=32), update_work("joint", shapes, rows=33)
    assert full[:3] == one[:3]
    assert (full.flops, longer.flops) == (32 * one.flops, 33 * one.flops)
    assert longer[:3] == (one.working_set, 2 * one.read_bytes, 2 * one.rewritten_bytes)


def test_the_encoder_counts_the_weights_that_one_token_meets() -> None:
    """Counted by PyTorch: products with weights, without the biases and the scales of the normalisation."""
    model = KBT(env="kbt_rl/InvertedPendulum-v0", seed=0)
    policy = model.policy
    with FlopCounterMode(display=False) as counter:
        policy.encode(policy.start(np.zeros((1, 4), np.float32)))
    transformer = policy.transformer
    layers = transformer.encoder.layers
    added = [transformer.embed_state.bias, *(p for n, p in layers.named_parameters() if "bias" in n or "norm" in n)]
    idle = 2 * sum(layer.self_attn.in_proj_bias.numel() // 3 for layer in layers)
    queried = sum(2 * layer.self_attn.in_proj_weight.numel() // 3 for layer in layers)  # projected and then dropped
    weights = encoder_weights(transformer)
    products = weights - (sum(part.numel() for part in added) - idle)
    assert counter.get_total_flops() == 2 * (products + queried)
    assert network_work(weights) == (4 * weights, 4 * weights, 0, 2 * weights, "float32")
    assert training_work(10, samples=20, epochs=100) == (160, 400, 800, 6000, "float32")


def test_calls_take_turns() -> None:
    order: list[str] = []
    found = in_turns({name: lambda n=name: order.append(n) for name in "ab"}, seconds=10.0, burst=3, warm_up=1)
    assert order[:8] == ["a", "b", "a", "a", "a", "b", "b", "b"]
    assert {name: timing.calls for name, timing in found.items()} == {"a": 20_001, "b": 20_001}


def test_a_call_that_takes_longer_than_its_time_is_called_twice() -> None:
    order: list[int] = []
    assert in_turns({"a": lambda: order.append(1)}, seconds=1e-9)["a"].calls == 1
    assert len(order) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("allocate", ["np.ones(10**6)", "torch.ones(10**6, dtype=torch.float64)"])
def test_the_growth_of_memory_is_what_a_call_allocates(allocate: str) -> None:
    """In a process of its own, as benchmarks run: threads that other tests have left use memory meanwhile."""
    script = f"""
import numpy as np
import torch
from benchmarks.memory import peak_growth
print(peak_growth(lambda: {allocate}, tries=8), peak_growth(lambda: None, tries=8))
"""
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    grown, nothing = map(float, said.stdout.split())
    assert grown == pytest.approx(8e6, rel=0.02)
    assert nothing < 1e5


def test_a_record_tells_what_was_timed() -> None:
    head = head_of("joint", features=4, width=8)
    update, other = timed("rows", [update_case("rows 3", head, 3), Case("other", lambda: None)], 1e-6, rounds=2)
    assert (update.group, update.name, update.structure, update.rows) == ("rows", "rows 3", "joint", 3)
    assert (update.features, update.width, update.weights) == (4, 8, len(head.mean))
    assert update.median_us > 0.0
    assert update.limit_us > 0.0
    assert (other.structure, other.weights, other.roofline) == ("", 0, None)
    assert math.isnan(other.limit_us)


def test_peers_agree_where_they_are_the_same_method() -> None:
    task = accuracy.toy(7, in_span=True, samples=60, held_out=20)
    head = Head(16, task.noise, HeadConfig(layers=1, last_variance=1.0))
    exact = RankOne(16, task.noise)
    for row, label in zip(task.features, task.labels, strict=True):
        head.update(row, float(label))
        exact.update(row, float(label))
    for ours, theirs in zip(head.predict(task.test_features), exact.predict(task.test_features), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_rivals_of_one_layer_learn_what_shared_learns() -> None:
    rng, outputs, seen = np.random.default_rng(0), 3, 30
    rows, labels = rng.standard_normal((seen, 5)), rng.standard_normal((seen, outputs))
    head = BayesianHead(5, outputs, HeadConfig(structure="shared", last_variance=1.0, noise_variance=layers.NOISE))
    recursive, solve = layers.recursive_least_squares(5, outputs), layers.batch_solve(5, outputs, seen)
    for row, label in zip(rows, labels, strict=True):
        head.update(row[None], label[None])
        mean = recursive(row, label)
        solved = solve(row, label)
    expected = head.mean.view(outputs, 6).numpy()
    np.testing.assert_allclose(mean, expected, rtol=1e-8)
    np.testing.assert_allclose(solved.T, expected, rtol=1e-8)  # it has seen these 30 and no others


@pytest.mark.parametrize(("depth", "tolerance"), [(1, 1e-9), (2, math.inf)])
def test_blocks_differ_from_a_joint_update_behind_a_relu_only(depth: int, tolerance: float) -> None:
    task = accuracy.toy(7, in_span=True, samples=40, held_out=20)
    joint, *rest = blocks.compare(task, 7, HeadConfig(layers=depth, hidden_variance=1e-3))
    assert (joint.mean_difference, joint.sd_ratio) == (0.0, 1.0)
    assert [row.block for row in rest] == list(blocks.BLOCKS)
    for row in rest:
        assert row.mean_difference <= tolerance
        assert (row.mean_difference > 1e-3) == (depth == 2)


def test_growth_is_fitted_by_a_constant_and_a_multiple_of_the_limit() -> None:
    def row(limit: float, median: float) -> Row:
        return _row(median, _roofline(limit))

    exact = page._growth([row(limit, 5.0 + 2.0 * limit) for limit in (1.0, 10.0, 100.0)])
    assert any("| joint | 577 to 577 | 5 | 2 |" in line for line in exact)
    off = page._growth([row(1.0, 10.0), row(10.0, 10.0), row(100.0, 1000.0)])
    assert float(off[-2].split("|")[-2].strip().removesuffix(" %")) > 30.0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (math.nan, "-"),
        (0.00321987, "0.00322"),
        (54.36, "54.4"),
        (999.9, "1000"),
        (22_149.0, "22,100"),
        (1.72e6, "1,720,000"),
    ],
)
def test_the_page_writes_three_digits_without_an_exponent(value: float, shown: str) -> None:
    assert page._number(value) == shown


def test_learners_take_turns_on_the_samples_in_their_order() -> None:
    task = accuracy.toy(8, in_span=False, samples=25, held_out=10)
    calls: list[tuple[str, float]] = []

    class Silent:
        def __init__(self, name: str) -> None:
            self.name = name

        def update(self, x: np.ndarray, y: float) -> None:
            calls.append((self.name, y))

        def predict(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            raise AssertionError

    taken = accuracy.learn(task, {name: Silent(name) for name in "ab"})
    assert [name for name, _ in calls] == [*"a" * 10, *"b" * 10, *"a" * 10, *"b" * 10, *"a" * 5, *"b" * 5]
    for name in "ab":
        assert [label for each, label in calls if each == name] == task.labels.tolist()
        assert taken[name] > 0.0


def test_the_choice_looks_at_the_samples_only() -> None:
    task = accuracy.toy(8, in_span=False, samples=40, held_out=10)
    candidates = (HeadConfig(layers=2, hidden_variance=1e-6), HeadConfig(layers=2, hidden_variance=1e-3))
    chosen = accuracy.choose(task, candidates)
    spoilt = task._replace(test_labels=np.full(10, math.nan), test_features=np.full((10, 16), math.nan))
    assert accuracy.choose(spoilt, candidates) == chosen
    assert accuracy.one_step_density(task, chosen) == max(accuracy.one_step_density(task, each) for each in candidates)


def test_the_page_tells_what_could_not_run(tmp_path: Path) -> None:
    rows = [_row(300.0, _roofline(200.0))._replace(p99_us=400.0)]
    rows.append(rows[0]._replace(median_us=600.0))
    rows += [
        rows[0]._replace(group=INDEPENDENT, name=name, rows=4, median_us=median)
        for name, median in (("loop", 800.0), ("one call", 100.0))
    ]
    rows.append(rows[0]._replace(group=PAPER, name="encoder", weights=0, roofline=None, allocated_bytes=math.nan))
    scores = [accuracy.Score("toy", "KBT joint", seed, 0.1, 0.95, 0.8, 12.5 + seed, "1e-5") for seed in (0, 1)]
    compared = [blocks.BlockRow("toy", seed, 128, 8, 0.125, 0.25, 0.5) for seed in (0, 1)]
    about = dict.fromkeys(("machine", "cores", "python", "torch", "numpy", "numba", "date"), "x")
    written = page.write(tmp_path, rows, scores, compared, {**about, "missing": {"TAGI": "no MPI"}})
    text = written.read_text(encoding="utf-8")
    assert "- TAGI: no MPI" in text
    assert "| joint | 16-32-1 | 4 | 200 | 25 | 8 |" in text
    assert "| width 32, joint | 577 | 1 | 300 | 400 | 1 | 2 | 200 | 1.5 |" in text
    assert "| width 32, joint | 577 | 1 | 600 | 400 | 2 | 2 | 200 | 3 |" in text
    assert "| encoder | - | - | 300 | 400 | 1 | - | - | - |" in text
    assert "| toy | 128 | 8 | 0.1250 (0.125 to 0.125) | 0.2500 (0.250 to 0.250) | 0.5000 (0.500 to 0.500) |" in text
    assert (
        "| KBT joint | 0.1000 (0.100 to 0.100) | 0.9500 (0.950 to 0.950) | 0.8000 (0.800 to 0.800) | 13 | 1e-5 |"
        in text
    )
    record = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert record["accuracy"][1]["seed"] == 1
    assert record["speed"][0]["roofline"]["work"] == Work(1000, 1000, 1000, 1000)._asdict()
    assert record["speed"][0]["limit_us"] == 200.0
    assert (tmp_path / "growth.png").stat().st_size > 1000
