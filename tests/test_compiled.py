"""The machine code against the PyTorch definition, and the way without it."""

from __future__ import annotations

import copy
import pickle
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MACHINE_CODE, STRUCTURES, randn, random_state
from scipy.special import ndtr
from torch import Tensor, nn

from kbt_rl.inference import compiled, update
from kbt_rl.inference.acting import acting_view, view_mean
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import NotPositiveDefiniteError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.moments import Gaussian, relu_moments
from kbt_rl.inference.output import RULES
from kbt_rl.inference.record import Increment, UpdateInfo
from kbt_rl.inference.state import HeadState

pytestmark = MACHINE_CODE

RULES_BY_OUTPUTS = [
    (1, "measure"),
    (1, "replace"),
    (3, "measure"),
    (3, "replace"),
    (3, "fisher"),
    (3, "taylor"),
    (3, "laplace"),
]


@pytest.fixture(params=[64, 8], ids=["one block row", "several block rows"])
def _block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from kbt_rl.inference import triangle

    monkeypatch.setattr(triangle, "_ROW_WEIGHTS", request.param)
    triangle._bounds.cache_clear()
    yield
    triangle._bounds.cache_clear()


def general(state: HeadState) -> HeadState:
    """The same posterior, without an engine."""
    plain = state.clone()
    plain.__dict__["engine"] = None
    return plain


def noise(outputs: int) -> Tensor:
    return 0.1 * torch.eye(outputs, dtype=torch.float64) + 0.02


def target_of(rule: str, outputs: int, seed: int, rows: int = 1) -> Tensor:
    target = randn(rows, outputs, seed=seed)
    return torch.softmax(target, dim=-1) if RULES[rule].link == "softmax" else target


def assert_same(fast: Increment, plain: Increment) -> None:
    scale = float(plain.mean_step.abs().max())
    torch.testing.assert_close(fast.mean_step, plain.mean_step, rtol=1e-10, atol=1e-12 * scale)
    ours, theirs = ((step.cov_factor * step.signs) @ step.cov_factor.mT for step in (fast, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11 * float(theirs.abs().max()))
    for name in UpdateInfo._fields:
        assert getattr(fast.info, name) == pytest.approx(getattr(plain.info, name), rel=1e-9, abs=1e-15), name


def assert_same_step(state: HeadState, plain: HeadState, given: tuple[Any, ...]) -> None:
    """Both find the same increment and then take it."""
    fast_step, plain_step = update.increment(state, *given), update.increment(plain, *given)
    assert_same(fast_step, plain_step)
    update.apply(state, fast_step)
    update.apply(plain, plain_step)


def assert_same_posterior(state: HeadState, plain: HeadState, variance: float) -> None:
    torch.testing.assert_close(state.mean, plain.mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state.dense_cov(), plain.dense_cov(), rtol=1e-9, atol=1e-11 * variance)


@pytest.mark.usefixtures("_block_rows")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("outputs", "rule"), RULES_BY_OUTPUTS)
@pytest.mark.parametrize("variance", [0.1, 1e-8])
def test_the_increment_and_the_posterior_equal_the_definition(
    structure: str, layers: int, outputs: int, rule: str, variance: float
) -> None:
    state = random_state(layers, structure, features=5, width=7, outputs=outputs, variance=variance)
    plain = general(state)
    assert state.engine is not None
    assert state.engine.propagates
    for seed in range(4):
        given = randn(1, 5, seed=10 + seed), target_of(rule, outputs, 20 + seed), RULES[rule], noise(outputs)
        assert_same_step(state, plain, given)
    assert_same_posterior(state, plain, variance)


@pytest.mark.usefixtures("_block_rows")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    ("outputs", "rule", "rows"),
    # ``replace``, without noise, needs fewer rows than there are weights, and none twice.
    [(1, "measure", 2), (1, "measure", 13), (1, "replace", 3), (3, "measure", 5), (3, "fisher", 2), (3, "fisher", 5)],
)
def test_joint_updates_of_several_rows_equal_the_definition(
    structure: str, layers: int, outputs: int, rule: str, rows: int
) -> None:
    state = random_state(layers, structure, features=5, width=7, outputs=outputs)
    plain = general(state)
    assert state.engine is not None
    for seed in range(3):
        features = randn(rows, 5, seed=10 + seed)
        if rule != "replace":
            features[1] = features[0]
        given = features, target_of(rule, outputs, 20 + seed, rows), RULES[rule], noise(outputs)
        ours, (theirs, cross_cov) = state.engine.propagate(features.numpy()), update.propagate(plain, features)
        expected = theirs.mean, theirs.cov, cross_cov.mT, plain.variances()
        for found, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-10, atol=1e-13)
        fast_step, plain_step = update.increment(state, *given), update.increment(plain, *given)
        assert_same(fast_step, plain_step)
        update.apply(state, fast_step)
        update.apply(plain, plain_step)
    torch.testing.assert_close(state.mean, plain.mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state.dense_cov(), plain.dense_cov(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"noise": "learned"}, {"robust_dof": 4.0}], ids=str)
def test_blocks_of_rows_of_every_head_equal_the_definition(
    structure: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty rows are a block of 32, moved by a matrix product, and one of 8."""
    config = HeadConfig(structure=structure, noise_variance=0.05, hidden_variance=0.01, **options)
    fast = BayesianHead.from_linear(nn.Linear(5, 2), config)
    plain = copy.deepcopy(fast)
    features, target = randn(40, 5, seed=3), randn(40, 2, seed=4)
    scale = float(fast.state.variances().max())  # rounding is relative to what the labels take away
    ours = fast.update(features, target)
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    theirs = plain.update(features, target)
    assert plain.state.engine is None
    digits = 1e-4 if fast.mean.dtype == torch.float32 else 1e-9
    for name in UpdateInfo._fields:
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=digits, abs=1e-15), name
    torch.testing.assert_close(fast.mean, plain.mean, rtol=digits, atol=1e-2 * digits)
    torch.testing.assert_close(fast.state.dense_cov(), plain.state.dense_cov(), rtol=digits, atol=1e-2 * digits * scale)


def test_more_labels_than_machine_code_takes_go_the_general_way() -> None:
    state = random_state(2, "neuron", features=5, width=7, outputs=3)
    assert state.engine is not None
    for rows in (30, 60):
        assert state.engine.takes(rows, 3) == (rows == 30)
        given = randn(rows, 5, seed=1), target_of("measure", 3, 2, rows), RULES["measure"], noise(3)
        assert_same(update.increment(state, *given), update.increment(general(state), *given))


@pytest.mark.parametrize("structure", ["joint", "layer", "neuron"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_default_head_without_hidden_variance(structure: str, rows: int) -> None:
    """A variance of exactly 0 takes the deterministic limit of the ReLU."""
    config = HeadConfig(structure=structure, hidden_variance=0.0)
    state = BayesianHead.from_linear(nn.Linear(5, 1), config).state
    given = randn(rows, 5, seed=1), randn(rows, 1, seed=2), RULES["measure"], noise(1)
    assert_same(update.increment(state, *given), update.increment(general(state), *given))


def test_the_moments_of_one_unit_from_the_far_left_to_the_far_right() -> None:
    """The machine code has an exp and a normal distribution function of its own, here against SciPy's."""
    from kbt_rl.inference.kernels.relu import relu_unit

    ratios = np.concatenate([np.linspace(-37.0, 9.0, 4001), np.linspace(-6.0, 6.0, 4001), [0.0, -0.0, 1e-300]])
    found = np.array([relu_unit.py_func(ratio, 1.0) for ratio in ratios])
    mean, variance, slope, density = found.T
    expected = np.exp(-0.5 * ratios**2) / np.sqrt(2.0 * np.pi)
    # A few units in the last place, and rounding of the exponent, some 700 at the far end; SciPy loses more.
    bound = 8e-16 * (4.0 + 0.5 * ratios**2)
    assert (abs(slope / ndtr(ratios) - 1.0) <= bound).all()
    assert (abs(density / expected - 1.0) <= bound).all()
    general_way = relu_moments(Gaussian(torch.from_numpy(ratios)[:, None], torch.ones(len(ratios), 1, 1).double()))
    np.testing.assert_allclose(mean, general_way.output.mean.numpy()[:, 0], rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(variance, general_way.output.cov.numpy()[:, 0, 0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("mean", "slope"), [(-1e300, 0.0), (-40.0, 0.0), (1e300, 1.0), (40.0, 1.0), (np.nan, np.nan)])
def test_the_moments_of_one_unit_beyond_float64(mean: float, slope: float) -> None:
    from kbt_rl.inference.kernels.relu import relu_unit

    for variance in (1.0, 0.0):
        found = relu_unit.py_func(mean, variance)
        np.testing.assert_equal(found[0], max(mean, 0.0) if mean == mean else np.nan)
        np.testing.assert_equal(found[2], slope)
        np.testing.assert_equal(found[3], 0.0 if mean == mean else np.nan)


@pytest.mark.parametrize("options", [{"relu_order": 3}, {"feature_variance": 0.1}])
def test_heads_without_machine_code_for_the_forward_pass_take_the_general_way(options: dict[str, Any]) -> None:
    state = random_state(2, "joint", **options)
    assert state.engine is not None
    assert not state.engine.propagates
    given = randn(1, 3, seed=1), randn(1, 2, seed=2), RULES["measure"], noise(2)
    plain = general(state)
    steps = update.increment(state, *given), update.increment(plain, *given)
    for posterior, step in zip((state, plain), steps, strict=True):
        update.apply(posterior, step)
    torch.testing.assert_close(state.dense_cov(), plain.dense_cov(), rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("_block_rows")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [3, 4])
@pytest.mark.parametrize(("outputs", "rule"), [(1, "measure"), (1, "replace"), (3, "measure"), (3, "fisher")])
@pytest.mark.parametrize("variance", [0.1, 1e-8])
def test_deeper_heads_equal_the_definition(
    structure: str, layers: int, outputs: int, rule: str, variance: float
) -> None:
    state = random_state(layers, structure, features=5, width=7, outputs=outputs, variance=variance)
    plain = general(state)
    assert state.engine is not None
    assert not state.engine.takes(2, outputs)
    for seed in range(3):
        features = randn(1, 5, seed=10 + seed)
        given = features, target_of(rule, outputs, 20 + seed), RULES[rule], noise(outputs)
        ours, (theirs, cross_cov) = state.engine.propagate(features.numpy()), update.propagate(plain, features)
        expected = theirs.mean, theirs.cov, cross_cov.mT, plain.variances()
        for found, wanted in zip(ours, expected, strict=True):
            scale = float(wanted.abs().max())
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-10, atol=1e-12 * scale)
        assert_same_step(state, plain, given)
    assert_same_posterior(state, plain, variance)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("hidden_variance", [0.0, 0.1])
@pytest.mark.parametrize(("outputs", "rule"), [(1, "measure"), (1, "replace"), (2, "measure")])
def test_streams_and_predictions_of_deeper_heads_are_those_without_numba(
    structure: str, hidden_variance: float, outputs: int, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"rule": rule, "structure": structure, "hidden_variance": hidden_variance}
    config = HeadConfig(**options, layers=3, noise_variance=0.05)
    scales = {"feature_mean": randn(5, seed=1), "feature_scale": randn(5, seed=2).abs() + 0.5}
    target_scale = torch.tensor([2.0, 3.0])[:outputs]
    fast = BayesianHead.from_linear(nn.Linear(5, outputs), config, **scales, target_scale=target_scale)
    plain, probe = copy.deepcopy(fast), randn(3, 5, seed=6)
    stream = list(zip(randn(20, 1, 5, seed=3), randn(20, 1, outputs, seed=4), strict=True))
    records = [fast.update(row, label) for row, label in stream]
    ours, acted = fast.predict(probe), fast(probe)
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    for (row, label), record in zip(stream, records, strict=True):
        assert record == pytest.approx(plain.update(row, label), rel=1e-7, abs=1e-12)
    assert plain.state.engine is None
    assert int(fast.labels_seen) == int(plain.labels_seen) == 20
    for found, wanted in zip(ours, plain.predict(probe), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(acted, plain(probe), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_numba_a_stream_ends_at_the_same_posterior(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = BayesianHead.from_linear(nn.Linear(5, 1), HeadConfig(structure=structure, noise_variance=0.05))
    plain = copy.deepcopy(fast)
    rows, labels = randn(50, 1, 5, seed=3), randn(50, 1, 1, seed=4)
    for row, label in zip(rows, labels, strict=True):
        fast.update(row, label)
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    for row, label in zip(rows, labels, strict=True):
        plain.update(row, label)
    assert plain.state.engine is None
    torch.testing.assert_close(fast.mean, plain.mean, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(fast.state.dense_cov(), plain.state.dense_cov(), rtol=1e-8, atol=1e-12)
    assert int(fast.labels_seen) == int(plain.labels_seen) == 50


@pytest.mark.usefixtures("_block_rows")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_acting_view_is_the_same(structure: str, outputs: int) -> None:
    state = random_state(2, structure, features=5, width=7, outputs=outputs)
    fast, plain = acting_view(state), acting_view(general(state))
    for ours, theirs in zip(fast.weights, plain.weights, strict=True):
        assert torch.equal(ours, theirs)
    assert fast.hidden_form is not None
    assert plain.hidden_form is not None
    assert torch.equal(fast.hidden_form, plain.hidden_form)
    assert (fast.coupling is None) == (plain.coupling is None) == (structure != "joint")
    if fast.coupling is not None:
        assert torch.equal(fast.coupling, plain.coupling)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("rows", [1, 5])
def test_acting_equals_the_mean_of_the_view_and_of_the_moments(structure: str, outputs: int, rows: int) -> None:
    config = HeadConfig(structure=structure, noise_variance=0.05, hidden_variance=0.1)
    scales = {"feature_mean": randn(5, seed=1), "feature_scale": randn(5, seed=2).abs() + 0.5}
    head = BayesianHead.from_linear(nn.Linear(5, outputs), config, **scales, target_scale=torch.full((outputs,), 3.0))
    for row, label in zip(randn(20, 1, 5, seed=3), randn(20, 1, outputs, seed=4), strict=True):
        head.update(row, label)
        features = randn(rows, 5, seed=6)
        view = view_mean(head.view(), head.standardise(features)) * head.target_scale
        torch.testing.assert_close(head(features), view, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(head(features.float()), view, rtol=1e-5, atol=1e-5)
    assert compiled.actor(head.view()) is not None
    torch.testing.assert_close(head(features), head.predict(features).mean, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("_block_rows")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("largest_form", [0, 10**6])
def test_predictions_equal_the_definition_after_each_update(
    structure: str, layers: int, outputs: int, rows: int, largest_form: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_LARGEST_FORM", largest_form)
    config = HeadConfig(structure=structure, layers=layers, noise_variance=0.05, hidden_variance=0.1)
    scales = {"feature_mean": randn(5, seed=1), "feature_scale": randn(5, seed=2).abs() + 0.5}
    target_scale = torch.linspace(2.0, 3.0, outputs, dtype=torch.float64)
    head = BayesianHead.from_linear(nn.Linear(5, outputs), config, **scales, target_scale=target_scale)
    features, square = randn(rows, 5, seed=6), target_scale.unsqueeze(-1) * target_scale
    for row, label in zip(randn(6, 1, 5, seed=3), randn(6, 1, outputs, seed=4), strict=True):
        head.update(row, label)
        expected = update.predict_logits(general(head.state), head.standardise(features))
        for _ in range(2):  # the second one by what the first has prepared
            logits, prediction = head.predict_logits(features), head.predict(features)
            torch.testing.assert_close(logits.mean, expected.mean, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(logits.cov, expected.cov, rtol=1e-9, atol=1e-13)
            torch.testing.assert_close(prediction.mean, expected.mean * target_scale, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(prediction.epistemic, expected.cov * square, rtol=1e-9, atol=1e-13)
            assert torch.equal(prediction.aleatoric[0], head.noise_cov * square)


def test_the_cache_notices_changes_in_any_file_of_the_package(tmp_path: Path) -> None:
    """numba's own notices those in a function's own file, not in those of what it calls."""
    from kbt_rl.inference import kernels as code
    from kbt_rl.inference.kernels import jit

    BayesianHead(3, 1).update(randn(1, 3, seed=1), randn(1, 1, seed=2))
    package = Path(jit.__file__).parent
    now = jit.fingerprint(package)
    files = [path.name for path in Path(code.learn.stats.cache_path).iterdir() if path.name.startswith("row.learn_")]
    assert any(f"_{now}-" in name for name in files)
    changed = shutil.copytree(package, tmp_path / "kernels")
    assert jit.fingerprint(changed) == now
    with (changed / "relu.py").open("a") as file:
        file.write("# changed\n")
    assert jit.fingerprint(changed) != now


@pytest.mark.parametrize("kind", ["strided", "read-only", "float32"])
def test_no_kind_of_array_is_compiled_anew(kind: str) -> None:
    from kbt_rl.inference import kernels as code
    from kbt_rl.inference.kernels import rows

    head = BayesianHead.from_linear(nn.Linear(5, 1), HeadConfig(noise_variance=0.1))
    head.prepare_rows()
    kernels = code.learn, code.predict, code.act, code.unit_moments, rows.propagate

    def use(features: Any, label: Any) -> None:
        head.update(features, label)
        head.update(np.concatenate([features, features]), np.concatenate([label, label]))
        head(torch.as_tensor(features))
        head.predict(torch.as_tensor(features))

    use(randn(1, 5, seed=1), randn(1, 1, seed=2))
    before = [len(kernel.signatures) for kernel in kernels]
    features, label = randn(1, 10, seed=1).numpy()[:, ::2], randn(1, 2, seed=2).numpy()[:, ::2]
    if kind == "read-only":
        features = features.copy()
        features.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch's, of the read-only array
        use(features.astype(np.float32) if kind == "float32" else features, label)
    assert [len(kernel.signatures) for kernel in kernels] == before


@pytest.mark.parametrize("change", ["reopen", "reset", "load"])
def test_a_prediction_notices_every_change_of_the_posterior(change: str) -> None:
    head = BayesianHead.from_linear(nn.Linear(5, 1), HeadConfig(noise_variance=0.1))
    fresh, probe = copy.deepcopy(head), randn(1, 5, seed=1)
    for row, label in zip(randn(6, 1, 5, seed=3), randn(6, 1, 1, seed=4), strict=True):
        head.update(row, label)
    learned = head.predict(probe).epistemic
    if change == "reopen":
        head.reopen()
    elif change == "reset":
        head.reset(randn(1, 5, seed=7), randn(1, seed=8))
    else:
        head.load_state_dict(fresh.state_dict())
    assert not torch.allclose(head.predict(probe).epistemic, learned, rtol=1e-3)
    expected = update.predict_logits(general(head.state), head.standardise(probe)).cov
    torch.testing.assert_close(head.predict(probe).epistemic, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_a_copy_moves_on_its_own(duplicate: Any) -> None:
    head = BayesianHead.from_linear(nn.Linear(5, 1))
    head.update(randn(1, 5, seed=5), randn(1, 1, seed=6))
    other = duplicate(head)
    before = head.mean.clone(), head.state.dense_cov()
    other.update(randn(1, 5, seed=7), randn(1, 1, seed=8))
    assert torch.equal(head.mean, before[0])
    assert torch.equal(head.state.dense_cov(), before[1])
    assert not torch.equal(other.mean, before[0])
    assert not torch.equal(other.state.dense_cov(), before[1])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_interrupt_leaves_the_posterior_of_before_or_after(structure: str) -> None:
    """A timer fires into a stream of updates; between two of them there is nothing."""
    head = BayesianHead.from_linear(nn.Linear(5, 1), HeadConfig(structure=structure, noise_variance=0.05))
    twin = copy.deepcopy(head)
    rows, labels = randn(4000, 1, 5, seed=9), randn(4000, 1, 1, seed=10)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def is_whole() -> bool:
        return torch.equal(head.mean, twin.mean) and torch.equal(head.state.dense_cov(), twin.state.dense_cov())

    before, caught, done = signal.signal(signal.SIGALRM, interrupt), 0, 0
    try:
        while caught < 30 and done < len(rows):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.00007 * caught)
                while done < len(rows):
                    head.update(rows[done], labels[done])
                    done += 1
                signal.setitimer(signal.ITIMER_REAL, 0.0)
            except KeyboardInterrupt:
                caught += 1
                for row, label in zip(
                    rows[int(twin.labels_seen) : done], labels[int(twin.labels_seen) : done], strict=True
                ):
                    twin.update(row, label)
                if not is_whole():  # the update that was interrupted had been applied
                    twin.update(rows[done], labels[done])
                    done += 1
                assert is_whole()
                torch.testing.assert_close(head(rows[0]), head.predict(rows[0]).mean, rtol=1e-10, atol=1e-12)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert caught >= 10


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("outputs", [1, 2])
def test_neurons_that_are_switched_off_leave_no_subnormal_numbers(structure: str, outputs: int) -> None:
    """An update on subnormal numbers takes many times as long, which a controller would not survive."""
    torch.manual_seed(0)
    config = HeadConfig(structure=structure, noise_variance=0.05, hidden_variance=1e-2, last_variance=1e-2)
    head = BayesianHead.from_linear(nn.Linear(5, outputs), config)
    first = head.spec.shapes[0]
    biases = head.mean[: first.size].view(first)[:, -1]
    biases[::2] = -torch.linspace(20.0, 36.0, len(biases[::2]), dtype=torch.float64) * 0.1  # of the biases' sd
    for label in randn(3, 1, outputs, seed=12):
        head.update(torch.zeros(1, 5), label)
    entries = torch.cat([block.flatten().abs() for block in head.state.cov])
    assert not ((entries > 0.0) & (entries < torch.finfo(torch.float64).tiny)).any()


def test_no_variance_at_all_is_refused_and_changes_nothing() -> None:
    config = HeadConfig(hidden_variance=0.0, last_variance=0.0, noise_variance=0.0)
    head = BayesianHead.from_linear(nn.Linear(3, 1), config)
    before = head.mean.clone()
    with pytest.raises(NotPositiveDefiniteError):
        head.update(torch.ones(1, 3), torch.ones(1, 1))
    assert torch.equal(head.mean, before)
