"""Bad input is refused with what came and what was expected, and every head stays as it was, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STRUCTURES, randn
from torch import Tensor, nn

from kbt_rl.inference import network
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.linearised import LinearisedHead
from kbt_rl.inference.types import HeadState, Increment

NAN, INF = float("nan"), float("inf")

# Outputs and configuration: every way in which an update is computed and taken over.
HEADS: dict[str, tuple[int, dict[str, Any]]] = {
    "shared": (2, {}),
    "shared, one output": (1, {}),
    "shared, learned noise": (2, {"noise": "learned"}),
    "one layer, joint": (2, {"structure": "joint"}),
    "one layer, diagonal": (2, {"structure": "diagonal"}),
    **{f"two layers, {name}": (1, {"layers": 2, "structure": name}) for name in STRUCTURES},
    **{f"two layers, two outputs, {name}": (2, {"layers": 2, "structure": name}) for name in STRUCTURES},
    "three layers": (1, {"layers": 3}),
    "learned noise": (2, {"layers": 2, "noise": "learned"}),
    "robust": (1, {"layers": 2, "robust_dof": 4.0}),
    "as printed": (1, {"rule": "replace"}),
    "history": (2, {"history": 3}),
    "forgetting": (2, {"forgetting": "process_noise", "forgetting_rate": 1e-3}),
    "classes": (3, {"rule": "laplace"}),
    "classes, diagonal": (3, {"rule": "fisher", "structure": "diagonal"}),
    "classes, shared": (3, {"rule": "fisher", "structure": "shared"}),
    "classes, two layers": (3, {"rule": "taylor", "layers": 2}),
    "module": (2, {"structure": "low_rank"}),
    "module, joint, history": (1, {"structure": "joint", "module": True, "history": 3}),
    "module, classes": (3, {"structure": "low_rank", "rule": "laplace"}),
}
# A module has shapes of inputs of its own, and says itself what does not fit.
OWN_SHAPES = ("three dimensions", "too many features", "one feature, which would broadcast")


def make_head(outputs: int = 2, **config: Any) -> BayesianHead:
    config = {"noise_variance": 0.1, "hidden_variance": 1e-2, **config}
    of_module = config.pop("module", config.get("structure") == "low_rank")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(3, outputs, dtype=torch.float64)
        network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double() if of_module else None
    if network is not None:
        return LinearisedHead(network, outputs, HeadConfig(**config))
    return BayesianHead.from_linear(linear, HeadConfig(**config))


def good(head: BayesianHead, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    target = randn(rows, head.out_features, seed=seed + 1)
    return randn(rows, 3, seed=seed), torch.softmax(target, dim=-1) if head.rule.link == "softmax" else target


def snapshot(head: BayesianHead) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


def assert_untouched(head: BayesianHead, before: dict[str, Tensor]) -> None:
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---------------------------------------------------------------------- what is given x who gets it

Spoil = Callable[[Tensor, Tensor], tuple[Any, Any]]


def entry(which: str, value: float) -> Spoil:
    """The very last entry replaced."""

    def spoil(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        (features if which == "features" else target)[-1, -1] = value
        return features, target

    return spoil


def masked(values: Tensor) -> Any:
    return np.ma.masked_array(values.numpy(), mask=True)


SHAPE, NUMBERS, KIND = r"(features have|target has) shape \(.*expected", "NaN or infinity", "expected real numbers"
BAD: dict[str, tuple[int, Spoil, type[Exception], str]] = {
    "one row without its dimension": (1, lambda f, t: (f[0], t), ValueError, SHAPE),
    "three dimensions": (1, lambda f, t: (f[None], t), ValueError, SHAPE),
    "too many features": (1, lambda f, t: (torch.cat([f, f], 1), t), ValueError, SHAPE),
    "one feature, which would broadcast": (2, lambda f, t: (f[:, :1], t), ValueError, SHAPE),
    "no rows": (1, lambda f, t: (f[:0], t[:0]), ValueError, r"shape \(0, 3\); expected \(rows >= 1, "),
    "target without its row": (1, lambda f, t: (f, t[0]), ValueError, SHAPE),
    "too few targets": (2, lambda f, t: (f, t[:1]), ValueError, SHAPE),
    "too many outputs": (2, lambda f, t: (f, torch.cat([t, t], 1)), ValueError, SHAPE),
    "too few targets of many rows": (40, lambda f, t: (f, t[:39]), ValueError, SHAPE),
    "feature is NaN": (1, entry("features", NAN), ValueError, NUMBERS),
    "feature of the last of three is infinite": (3, entry("features", -INF), ValueError, NUMBERS),
    "features are infinite both ways": (1, lambda f, t: (torch.tensor([[INF, -INF, 0.0]]), t), ValueError, NUMBERS),
    "last of 70 features is NaN": (70, entry("features", NAN), ValueError, NUMBERS),
    "target is infinite": (1, entry("target", INF), ValueError, f"{NUMBERS}|sum 1"),
    "last of 70 targets is infinite": (70, entry("target", -INF), ValueError, f"{NUMBERS}|sum 1"),
    "huge features": (1, lambda f, t: (f * 1e200, t), UpdateError, r"posterior is unchanged"),
    "complex features": (1, lambda f, t: (f.numpy() + 1j, t), TypeError, KIND),
    "complex target": (1, lambda f, t: (f, t.numpy() + 1j), TypeError, KIND),
    "complex tensor": (1, lambda f, t: (f.to(torch.complex64), t), TypeError, KIND),
    "complex tensor with gradient": (1, lambda f, t: (f.to(torch.complex64).requires_grad_(), t), TypeError, KIND),
    "text": (1, lambda f, t: (f.numpy().astype("U8"), t), TypeError, KIND),
    "objects": (1, lambda f, t: (f, t.numpy().astype(object)), TypeError, KIND),
    "masked features": (1, lambda f, t: (masked(f), t), TypeError, "masked array.*use NaN for no label"),
    "masked target": (1, lambda f, t: (f, masked(t)), TypeError, "masked array.*use NaN for no label"),
}


@pytest.mark.parametrize(
    ("kind", "case"), [(k, c) for k in HEADS for c in BAD if "module" not in k or c not in OWN_SHAPES]
)
def test_bad_data_is_refused_before_anything_changes(kind: str, case: str) -> None:
    (outputs, config), (rows, spoil, error, message) = HEADS[kind], BAD[case]
    head = make_head(outputs, **config)
    head.update(*good(head, 1, seed=2))
    before = snapshot(head)
    for call in (head.update, head.increment):
        features, target = spoil(*good(head, rows))
        with pytest.raises(error, match=message):
            call(features, target)
        assert_untouched(head, before)
    if head.config.history:
        assert head.undoable == 1
    head.update(*good(head, 1, seed=4))


@pytest.mark.parametrize("kind", [name for name in HEADS if "classes" not in name])
@pytest.mark.parametrize("size", [1e200, 1e26])
@pytest.mark.parametrize("rows", [1, 40])
def test_huge_targets_are_refused(kind: str, size: float, rows: int) -> None:
    outputs, config = HEADS[kind]
    head = make_head(outputs, **config)
    before, (features, target) = snapshot(head), good(head, rows)
    target[-1] = size
    with pytest.raises(UpdateError, match=r"posterior is unchanged"):
        head.update(features, target)
    assert_untouched(head, before)


@pytest.mark.parametrize("kind", [name for name in HEADS if "learned noise" in name or name == "robust"])
def test_labels_in_part_need_noise_that_is_known_or_exact(kind: str) -> None:
    _, config = HEADS[kind]
    head = make_head(2, **config)
    before, (features, target) = snapshot(head), good(head, 3)
    target[1, 0] = NAN
    if head.spec.structure == "shared":
        assert head.update(features, target).labels == 5
        return
    with pytest.raises(ValueError, match=r"NaN in some entries needs noise that is known and Gaussian, or .*'shared'"):
        head.update(features, target)
    assert_untouched(head, before)
    with pytest.raises(ValueError, match="a noise of each label is for heads whose noise is known and Gaussian"):
        head.update(features, target.nan_to_num(), torch.ones(3))
    assert_untouched(head, before)


@pytest.mark.parametrize("kind", HEADS)
def test_rows_without_a_label_are_left_out_whatever_their_features(kind: str) -> None:
    """Also a mask of NaN features, which would be refused in a row that has a label."""
    outputs, config = HEADS[kind]
    ours, theirs = make_head(outputs, **config), make_head(outputs, **config)
    features, target = good(ours, 3)
    left = torch.tensor([0, 2])
    features[1], target[1] = NAN, NAN
    expected = theirs.update(features[left], target[left])
    assert ours.update(features, target) == pytest.approx(expected, nan_ok=True)
    assert_untouched(ours, snapshot(theirs))
    before = snapshot(ours)
    info = ours.update(features[1:2], target[1:2])
    assert (info.labels, info.nis, info.log_density) == (0, 0.0, 0.0)
    assert_untouched(ours, before)


@pytest.mark.parametrize(
    "row",
    [[0.5, 0.5, 0.1], [0.0, 0.0, 0.0], [1.5, -0.5, 0.0], [2.0, 0.0, 0.0], [1.0, NAN, 0.0]],
    ids=["above 1", "nothing", "negative", "not normalised", "partly unknown"],
)
@pytest.mark.parametrize("kind", [name for name in HEADS if "classes" in name])
@pytest.mark.parametrize("rows", [1, 40])
def test_softmax_targets_must_be_distributions(row: list[float], kind: str, rows: int) -> None:
    outputs, config = HEADS[kind]
    head = make_head(outputs, **config)
    before, target = snapshot(head), torch.eye(3, dtype=torch.float64)[torch.arange(rows) % 3]
    target[-1] = torch.tensor(row, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"softmax link.*one-hot or a distribution: >= 0, sum 1"):
        head.update(randn(rows, 3, seed=4), target)
    assert_untouched(head, before)


@pytest.mark.parametrize("kind", [name for name in HEADS if "classes" in name])
@pytest.mark.parametrize("target", [torch.ones(1, requires_grad=True), torch.ones(1, dtype=torch.bfloat16)])
def test_numbers_in_the_place_of_classes_are_refused_by_their_shape(kind: str, target: torch.Tensor) -> None:
    """Found by the random streams of tests/inference/test_transactions.py: PyTorch's own error came through."""
    outputs, config = HEADS[kind]
    head = make_head(outputs, **config)
    before = snapshot(head)
    with pytest.raises(ValueError, match=r"target has shape \(1,\)"):
        head.update(randn(1, 3, seed=4), target)
    assert_untouched(head, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [3, 64])
def test_distributions_of_any_precision_are_accepted(dtype: torch.dtype, classes: int) -> None:
    head = make_head(classes, rule="laplace")
    target = torch.softmax(randn(2, classes, seed=6).float(), dim=-1).to(dtype)
    assert head.update(randn(2, 3, seed=5), target).labels == 2 * classes


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "dtype", [np.float16, np.longdouble, np.int32, np.bool_, torch.float16, torch.bfloat16, torch.float32]
)
def test_numbers_of_any_length_are_learned_as_in_float64(outputs: int, layers: int, rows: int, dtype: Any) -> None:
    given: list[Any] = [np.eye(3)[:rows], np.ones((rows, outputs))]
    if isinstance(dtype, torch.dtype):
        given = [torch.from_numpy(part).to(dtype) for part in given]
    else:
        given = [part.astype(dtype) for part in given]
    head, other = make_head(outputs, layers=layers), make_head(outputs, layers=layers)
    head.update(*given)
    other.update(np.eye(3)[:rows], np.ones((rows, outputs)))
    assert head.predict(given[0]).mean.dtype == torch.float64
    for name, value in snapshot(other).items():  # by machine code or without it
        torch.testing.assert_close(head.get_buffer(name), value, rtol=1e-12, atol=1e-14)


def test_arrays_that_cannot_be_written_or_are_not_contiguous_are_read() -> None:
    features, target = np.asfortranarray(randn(3, 3, seed=1).numpy()), randn(3, 2, seed=2).numpy()[::-1]
    features.flags.writeable = False
    for layers in (1, 2):
        head, other = make_head(layers=layers), make_head(layers=layers)
        for row in range(3):
            head.update(features[row : row + 1], target[row : row + 1])
            other.update(features[row : row + 1].copy(), target[row : row + 1].copy())
        assert_untouched(head, snapshot(other))


# ---------------------------------------------------------------------- updates that fail on the way


def test_an_increment_is_one_step() -> None:
    head, one_by_one = make_head(layers=2), make_head()
    before = snapshot(head)
    head.increment(randn(32, 3, seed=7), randn(32, 2, seed=8))
    for subject, rows, steps in ((head, 33, 2), (one_by_one, 2, 2)):
        with pytest.raises(ValueError, match=f"{rows} labelled rows make {steps} increments of this head"):
            subject.increment(randn(rows, 3, seed=7), randn(rows, 2, seed=8))
    assert_untouched(head, before)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rows", [2, 64])
def test_replace_with_a_singular_prediction_leaves_the_posterior_alone(structure: str, rows: int) -> None:
    head = make_head(layers=2, structure=structure, rule="replace", hidden_variance=0.0, last_variance=0.0)
    before = snapshot(head)
    with pytest.raises(NotPositiveDefiniteError, match=r"'replace' inverts.*raise the noise.*posterior is unchanged"):
        head.update(randn(rows, 3, seed=9), randn(rows, 2, seed=10))
    assert_untouched(head, before)


REPEATED = ["joint", "layer", "neuron", "shared", "diagonal", "two layers"]
REPEATED = [(rule, name) for rule in ("measure", "replace") for name in REPEATED]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("rule", "kind"), [case for case in REPEATED if case != ("replace", "shared")])
def test_repeated_rows_without_noise_are_refused_however_they_round(seed: int, rule: str, kind: str) -> None:
    config: dict[str, Any] = {"rule": rule, "noise_variance": 0.1 if rule == "replace" else 0.0}
    config |= {"layers": 2, "hidden_variance": 0.0} if kind == "two layers" else {"structure": kind}
    head = make_head(1, **config)
    before, row = snapshot(head), randn(1, 3, seed=seed)
    if (rule, kind) == ("measure", "diagonal"):  # which loses what the first label tells of single weights
        head.update(row.expand(2, 3), torch.zeros(2, 1))
        return
    with pytest.raises(UpdateError, match=r"[rR]aise the noise variance"):
        head.update(row.expand(2, 3), torch.zeros(2, 1))
    assert_untouched(head, before)
    if rule == "measure" and kind != "two layers":  # and one after another
        head.update(row, torch.zeros(1, 1))
        learned = snapshot(head)
        for label in (0.0, 1.0):
            with pytest.raises(UpdateError):
                head.update(row, torch.full((1, 1), label))
            assert_untouched(head, learned)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_later_block_that_fails_takes_the_earlier_ones_with_it(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, original, blocks = make_head(layers=2, structure=structure), network.increment, []
    before = snapshot(head)

    def second_fails(state: HeadState, features: Tensor, *rest: Any) -> Increment:
        blocks.append(len(features))
        if len(blocks) == 2:
            raise UpdateError("the second block is not finite")
        return original(state, features, *rest)

    monkeypatch.setattr(network, "increment", second_fails)
    with pytest.raises(UpdateError, match="second block"):
        head.update(randn(40, 3, seed=12), randn(40, 2, seed=13))
    assert blocks == [32, 8]
    assert_untouched(head, before)


@pytest.mark.parametrize("structure", [*STRUCTURES, "shared"])
def test_contradicting_rows_without_noise_never_leave_a_negative_variance(structure: str) -> None:
    layers = 1 if structure == "shared" else 2
    head = make_head(1, structure=structure, layers=layers, noise_variance=0.0, hidden_variance=1e-8)
    features = randn(4, 3, seed=14)
    for count in range(60):
        before = snapshot(head)
        row = features[count % 4 : count % 4 + 1]
        try:
            head.update(row, row[:, :1] * count)
        except UpdateError:
            assert_untouched(head, before)
    assert float(head.variances().min()) >= 0.0
    assert bool(torch.isfinite(head.mean).all())
    assert bool((head.epistemic_variance(features) >= 0.0).all())


# ---------------------------------------------------------------------- noise, scales, predictions


BAD_NOISE: dict[str, tuple[Any, str]] = {
    "negative": (-1.0, "eigenvalue -1; variances are not negative"),
    "NaN": (NAN, "noise covariance"),
    "infinite": (INF, "noise covariance"),
    "complex": (1j, "noise covariance is complex"),
    "vector": (torch.ones(2), r"shape \(2,\); expected a number or \(2, 2\)"),
    "too large": (torch.eye(3), r"shape \(3, 3\); expected a number or \(2, 2\)"),
    "asymmetric": (torch.tensor([[1.0, 0.2], [0.1, 1.0]]), "not symmetric"),
    "indefinite": (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue -1"),
    "negative entry": (torch.tensor([[1.0, 0.0], [0.0, -0.1]]), "eigenvalue -0.1"),
    "infinite entry": (torch.tensor([[INF, 0.0], [0.0, 1.0]]), "noise covariance"),
    "NaN entry": (torch.tensor([[NAN, 0.0], [0.0, 1.0]]), "noise covariance"),
}


@pytest.mark.parametrize("case", BAD_NOISE)
@pytest.mark.parametrize("config", [{}, {"noise": "learned"}, {"layers": 2}, {"layers": 2, "noise": "learned"}])
def test_bad_noise_is_refused_and_the_old_noise_stays(case: str, config: dict[str, Any]) -> None:
    noise, message = BAD_NOISE[case]
    head = make_head(**config)
    before = snapshot(head)
    with pytest.raises(ValueError, match=message):
        head.set_noise(noise)
    assert_untouched(head, before)


def test_singular_noise_is_a_covariance() -> None:
    head = make_head(layers=2)
    root = torch.tensor([[0.1], [0.3]], dtype=torch.float64)
    head.set_noise(root @ root.mT)
    head.update(randn(1, 3, seed=15), randn(1, 2, seed=16))
    head.set_noise(0.0)
    assert torch.equal(head.noise_cov, torch.zeros(2, 2, dtype=torch.float64))


BAD_SCALES: dict[str, tuple[dict[str, Any], str]] = {
    "zero feature_scale": ({"feature_scale": torch.tensor([1.0, 0.0, 1.0])}, "feature_scale must be positive"),
    "negative feature_scale": ({"feature_scale": -torch.ones(3)}, "feature_scale must be positive"),
    "feature_scale with NaN": ({"feature_scale": torch.tensor([1.0, NAN, 1.0])}, "feature_scale holds NaN or infinity"),
    "short feature_scale": ({"feature_scale": torch.ones(1)}, r"feature_scale has shape \(1,\); expected \(3,\)"),
    "zero target_scale": ({"target_scale": torch.zeros(2)}, "target_scale must be positive"),
    "long target_scale": ({"target_scale": torch.ones(3)}, r"target_scale has shape \(3,\); expected \(2,\)"),
    "a number": ({"target_scale": 2.0}, r"target_scale has shape \(\); expected \(2,\)"),
    "an array of another length": ({"feature_mean": np.zeros(4)}, r"feature_mean has shape \(4,\); expected \(3,\)"),
    "complex": ({"feature_mean": torch.zeros(3, dtype=torch.complex64)}, "feature_mean is complex"),
    "weight of another layer": ({"weight": torch.ones(2, 4)}, r"weight has shape \(2, 4\); expected \(2, 3\)"),
    "bias with NaN": ({"bias": torch.full((2,), NAN)}, "bias holds NaN or infinity"),
    "no finite units": (
        {"weight": 1e300 * torch.ones(2, 3).double(), "target_scale": torch.full((2,), 1e-30)},
        "not finite",
    ),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_bad_scales_are_refused_and_what_was_learned_stays(case: str) -> None:
    scales, message = BAD_SCALES[case]
    head = make_head()
    head.update(randn(2, 3, seed=17), randn(2, 2, seed=18))
    before = snapshot(head)
    with pytest.raises(ValueError, match=message):
        head.reset(**{"weight": torch.ones(2, 3), "bias": torch.zeros(2), **scales})
    assert_untouched(head, before)


def test_probabilities_have_no_scale() -> None:
    head = make_head(rule="fisher")
    with pytest.raises(ValueError, match="targets are probabilities; leave target_scale at 1"):
        head.reset(torch.ones(2, 3), torch.zeros(2), target_scale=torch.full((2,), 2.0))


BAD_FEATURES: dict[str, tuple[Any, type[Exception], str]] = {
    "another width": (randn(2, 4, seed=19), ValueError, r"features have shape \(2, 4\); expected \(rows, 3\)"),
    "a number": (torch.tensor(1.0), ValueError, r"features have shape \(\); expected \(rows, 3\)"),
    "complex": (np.ones((1, 3)) + 1j, TypeError, KIND),
    "text": ([["a", "b", "c"]], TypeError, KIND),
    "masked": (np.ma.masked_array(np.ones((1, 3)), mask=True), TypeError, "masked array"),
}


@pytest.mark.parametrize("call", ["predict", "predict_logits", "epistemic_variance", "forward"])
@pytest.mark.parametrize("case", BAD_FEATURES)
@pytest.mark.parametrize("kind", ["shared", "two layers, joint", "classes"])
def test_features_of_something_else_are_not_predicted(call: str, case: str, kind: str) -> None:
    (outputs, config), (features, error, message) = HEADS[kind], BAD_FEATURES[case]
    with pytest.raises(error, match=message):
        getattr(make_head(outputs, **config), call)(features)


@pytest.mark.parametrize("shape", [(3,), (1, 1, 3)])
def test_a_prediction_is_of_rows(shape: tuple[int, ...]) -> None:
    for kind in ("shared", "two layers, joint", "classes"):
        outputs, config = HEADS[kind]
        with pytest.raises(ValueError, match=r"features have shape .*; expected \(rows, 3\)"):
            make_head(outputs, **config).predict(torch.ones(shape))
