"""Bad input is refused with what came and what was expected, and the posterior stays as it was, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STRUCTURES, randn
from torch import Tensor, nn

from kbt_rl.inference import update as functional
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.record import Increment
from kbt_rl.inference.state import HeadState

NAN, INF = float("nan"), float("inf")


def make_head(outputs: int = 2, **config: Any) -> BayesianHead:
    config = {"noise_variance": 0.1, "hidden_variance": 1e-2, "structure": "layer", **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(3, outputs, dtype=torch.float64)
    return BayesianHead.from_linear(linear, HeadConfig(**config))


def snapshot(head: BayesianHead) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


def assert_untouched(head: BayesianHead, before: dict[str, Tensor]) -> None:
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name]), name


def with_value(rows: int, columns: int, value: float) -> Tensor:
    """Random numbers with ``value`` as the very last entry."""
    numbers = randn(rows, columns, seed=1)
    numbers[-1, -1] = value
    return numbers


BAD_DATA = {
    "one row without its dimension": (randn(3, seed=0), randn(1, 2, seed=0), r"features have shape \(3,\); .* 3\)"),
    "three dimensions": (randn(1, 1, 3, seed=0), randn(1, 2, seed=0), r"features have shape \(1, 1, 3\)"),
    "too many features": (randn(1, 4, seed=0), randn(1, 2, seed=0), r"shape \(1, 4\); expected \(rows >= 1, 3\)"),
    "one feature, which would broadcast": (randn(2, 1, seed=0), randn(2, 2, seed=0), r"features have shape \(2, 1\)"),
    "no rows": (randn(0, 3, seed=0), randn(0, 2, seed=0), r"features have shape \(0, 3\); expected \(rows >= 1"),
    "target without its row": (randn(1, 3, seed=0), randn(2, seed=0), r"target has shape \(2,\); expected \(1, 2\)"),
    "too few targets": (randn(2, 3, seed=0), randn(1, 2, seed=0), r"target has shape \(1, 2\); expected \(2, 2\)"),
    "too few outputs": (randn(2, 3, seed=0), randn(2, 1, seed=0), r"target has shape \(2, 1\); expected \(2, 2\)"),
    "too few targets of many rows": (
        randn(40, 3, seed=0),
        randn(39, 2, seed=0),
        r"shape \(39, 2\); expected \(40, 2\)",
    ),
    "feature is NaN": (with_value(3, 3, NAN), randn(3, 2, seed=0), "NaN or infinity"),
    "feature is infinite": (with_value(3, 3, -INF), randn(3, 2, seed=0), "NaN or infinity"),
    "features are infinite both ways": (torch.tensor([[INF, -INF, 0.0]]), randn(1, 2, seed=0), "NaN or infinity"),
    "target is NaN": (randn(3, 3, seed=0), with_value(3, 2, NAN), "NaN or infinity"),
    "target is infinite": (randn(3, 3, seed=0), with_value(3, 2, INF), "NaN or infinity"),
    "last of 70 features is NaN": (with_value(70, 3, NAN), randn(70, 2, seed=0), "NaN or infinity"),
    "last of 70 targets is NaN": (randn(70, 3, seed=0), with_value(70, 2, NAN), "NaN or infinity"),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_before_anything_changes(structure: str, case: str) -> None:
    features, target, message = BAD_DATA[case]
    head = make_head(structure=structure)
    head.update(randn(2, 3, seed=2), randn(2, 2, seed=3))
    before = snapshot(head)
    for call in (head.update, head.increment):
        with pytest.raises(ValueError, match=message):
            call(features, target)
    assert_untouched(head, before)


@pytest.mark.parametrize(
    "row",
    [[0.5, 0.5, 0.1], [0.0, 0.0, 0.0], [1.5, -0.5, 0.0], [2.0, 0.0, 0.0], [1.0, 1.0, 0.0]],
    ids=["above 1", "nothing", "negative", "not normalised", "two classes"],
)
@pytest.mark.parametrize("rule", ["fisher", "taylor", "replace_softmax"])
@pytest.mark.parametrize("rows", [1, 40])
def test_softmax_targets_must_be_distributions(row: list[float], rule: str, rows: int) -> None:
    head = make_head(3, rule=rule)
    before = snapshot(head)
    target = torch.eye(3, dtype=torch.float64)[torch.arange(rows) % 3]
    target[-1] = torch.tensor(row, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"softmax link.*one-hot or a distribution: >= 0, sum 1"):
        head.update(randn(rows, 3, seed=4), target)
    assert_untouched(head, before)


def test_softmax_targets_in_float32_are_distributions() -> None:
    make_head(3, rule="fisher").update(randn(2, 3, seed=5), torch.softmax(randn(2, 3, seed=6).float(), dim=-1))


def test_an_increment_takes_at_most_thirty_two_rows() -> None:
    head = make_head()
    before = snapshot(head)
    head.increment(randn(32, 3, seed=7), randn(32, 2, seed=8))
    with pytest.raises(ValueError, match=r"33 rows in one joint update; at most 32 \(update\(\) splits"):
        head.increment(randn(33, 3, seed=7), randn(33, 2, seed=8))
    assert_untouched(head, before)


# Updates that fail on the way


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rows", [2, 64])
def test_replace_with_a_singular_prediction_leaves_the_posterior_alone(structure: str, rows: int) -> None:
    head = make_head(structure=structure, rule="replace", hidden_variance=0.0, last_variance=0.0)
    before = snapshot(head)
    with pytest.raises(NotPositiveDefiniteError, match=r"'replace' inverts.*posterior is unchanged.*Raise the noise"):
        head.update(randn(rows, 3, seed=9), randn(rows, 2, seed=10))
    assert_untouched(head, before)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("rule", "noise"), [("replace", 0.1), ("measure", 0.0)])
def test_repeated_rows_without_noise_are_refused_however_they_round(seed: int, rule: str, noise: float) -> None:
    head = make_head(1, rule=rule, layers=1, noise_variance=noise)
    before = snapshot(head)
    with pytest.raises(NotPositiveDefiniteError, match="repeated rows without noise are singular"):
        head.update(randn(1, 3, seed=seed).expand(2, 3), torch.zeros(2, 1))
    assert_untouched(head, before)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_later_block_that_fails_takes_the_earlier_ones_with_it(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, original, blocks = make_head(structure=structure), functional.increment, []
    before = snapshot(head)

    def second_fails(state: HeadState, features: Tensor, *rest: Any) -> Increment:
        blocks.append(len(features))
        if len(blocks) == 2:
            raise UpdateError("the second block is not finite")
        return original(state, features, *rest)

    monkeypatch.setattr(functional, "increment", second_fails)
    with pytest.raises(UpdateError, match="second block"):
        head.update(randn(40, 3, seed=12), randn(40, 2, seed=13))
    assert blocks == [32, 8]
    assert_untouched(head, before)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("huge", ["features", "target"])
def test_an_update_that_is_not_finite_is_refused(structure: str, huge: str) -> None:
    head = make_head(structure=structure)
    features, target = randn(1, 3, seed=12), randn(1, 2, seed=13)
    before = snapshot(head)
    if huge == "features":
        features = features * 1e200
    else:
        target = target * 1e200
    with pytest.raises(UpdateError, match="posterior is unchanged"):
        head.update(features, target)
    assert_untouched(head, before)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_contradicting_rows_without_noise_never_leave_a_negative_variance(structure: str) -> None:
    head = make_head(1, structure=structure, noise_variance=0.0, hidden_variance=1e-8)
    features = randn(4, 3, seed=14)
    for count in range(60):
        before = snapshot(head)
        row = features[count % 4 : count % 4 + 1]
        try:
            head.update(row, row[:, :1] * count)
        except UpdateError:
            assert_untouched(head, before)
    assert float(head.state.variances().min()) >= 0.0
    assert bool(torch.isfinite(head.mean).all())


# Noise


BAD_NOISE: dict[str, tuple[Any, str]] = {
    "negative": (-1.0, "eigenvalue -1; variances are not negative"),
    "NaN": (NAN, "noise covariance"),
    "infinite": (INF, "noise covariance"),
    "vector": (torch.ones(2), r"shape \(2,\); expected a number or \(2, 2\)"),
    "too large": (torch.eye(3), r"shape \(3, 3\); expected a number or \(2, 2\)"),
    "asymmetric": (torch.tensor([[1.0, 0.2], [0.1, 1.0]]), "not symmetric"),
    "indefinite": (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue -1"),
    "negative entry": (torch.tensor([[1.0, 0.0], [0.0, -0.1]]), "eigenvalue -0.1"),
    "infinite entry": (torch.tensor([[INF, 0.0], [0.0, 1.0]]), "noise covariance"),
    "NaN entry": (torch.tensor([[NAN, 0.0], [0.0, 1.0]]), "noise covariance"),
}


@pytest.mark.parametrize("case", BAD_NOISE)
def test_bad_noise_is_refused_and_the_old_noise_stays(case: str) -> None:
    noise, message = BAD_NOISE[case]
    head = make_head()
    before = snapshot(head)
    with pytest.raises(ValueError, match=message):
        head.set_noise(noise)
    assert_untouched(head, before)


def test_singular_noise_is_a_covariance() -> None:
    head = make_head()
    root = torch.tensor([[0.1], [0.3]], dtype=torch.float64)
    head.set_noise(root @ root.mT)
    head.update(randn(1, 3, seed=15), randn(1, 2, seed=16))
    head.set_noise(0.0)
    assert torch.equal(head.noise_cov, torch.zeros(2, 2, dtype=torch.float64))


# Prior and configuration


BAD_CONFIG: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"layers": 0}, "has 0 layers; it needs at least 1"),
    "negative layers": ({"layers": -1}, "has -1 layers"),
    "too narrow": ({"width": 5}, "width is 5; .* 3 features and need at least 6 units"),
    "unknown structure": ({"structure": "full"}, "structure is 'full'; choose one of auto, joint, layer, neuron, diag"),
    "unknown rule": (
        {"rule": "bayes"},
        "rule is 'bayes'; choose one of measure, replace, fisher, laplace, taylor, replace_soft",
    ),
    "diagonal and tied": ({"structure": "diagonal", "rho": 0.5}, "cannot store the correlated weights"),
    "rho of 1": ({"rho": 1.0}, r"rho is 1.0; it must lie in \[0, 1\)"),
    "negative rho": ({"rho": -0.1}, "rho is -0.1"),
    "rho is NaN": ({"rho": NAN}, "rho is nan"),
    "relu_order of 0": ({"relu_order": 0}, "relu_order is 0; the series needs at least 1 term"),
    **{
        f"{name} of {value}": ({name: value}, f"{name} is {value}; a variance is finite and not negative")
        for name in ("noise_variance", "hidden_variance", "last_variance", "feature_variance")
        for value in (-1.0, NAN, INF)
    },
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_configuration_is_refused(case: str) -> None:
    config, message = BAD_CONFIG[case]
    with pytest.raises(ValueError, match=message):
        BayesianHead(3, 2, HeadConfig(**config))


def test_a_single_layer_has_no_width_to_be_too_narrow() -> None:
    assert BayesianHead(3, 2, HeadConfig(layers=1, width=1)).spec.shapes == ((2, 4),)


BAD_SCALES: dict[str, tuple[dict[str, Tensor], str]] = {
    "zero feature_scale": ({"feature_scale": torch.tensor([1.0, 0.0, 1.0])}, "feature_scale must be positive"),
    "negative feature_scale": ({"feature_scale": -torch.ones(3)}, "feature_scale must be positive"),
    "feature_scale with NaN": ({"feature_scale": torch.tensor([1.0, NAN, 1.0])}, "feature_scale holds NaN or infinity"),
    "short feature_scale": ({"feature_scale": torch.ones(1)}, r"feature_scale has shape \(1,\); expected \(3,\)"),
    "zero target_scale": ({"target_scale": torch.zeros(2)}, "target_scale must be positive"),
    "long target_scale": ({"target_scale": torch.ones(3)}, r"target_scale has shape \(3,\); expected \(2,\)"),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_bad_scales_are_refused_and_what_was_learned_stays(case: str) -> None:
    scales, message = BAD_SCALES[case]
    head = make_head()
    head.update(randn(2, 3, seed=17), randn(2, 2, seed=18))
    before = snapshot(head)
    with pytest.raises(ValueError, match=message):
        head.reset(torch.ones(2, 3), torch.zeros(2), **scales)
    assert_untouched(head, before)


def test_probabilities_have_no_scale() -> None:
    head = make_head(rule="fisher")
    with pytest.raises(ValueError, match="targets are probabilities; leave target_scale at 1"):
        head.reset(torch.ones(2, 3), torch.zeros(2), target_scale=torch.full((2,), 2.0))


@pytest.mark.parametrize("call", ["predict", "predict_logits", "forward"])
def test_features_of_another_width_are_not_predicted(call: str) -> None:
    head = make_head()
    function: Callable[[Tensor], Any] = getattr(head, call)
    with pytest.raises((ValueError, RuntimeError)):
        function(randn(2, 4, seed=19))


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("dtype", ["complex128", "U8", "object"])
@pytest.mark.parametrize("which", ["features", "target"])
def test_what_is_no_real_number_is_refused_by_its_dtype(outputs: int, dtype: str, which: str) -> None:
    head = make_head(outputs)
    before = snapshot(head)
    given: dict[str, Any] = {"features": np.ones((1, 3)), "target": np.ones((1, outputs))}
    given[which] = given[which].astype(dtype)
    with pytest.raises(TypeError, match=r"features or target hold .*; expected real numbers"):
        head.update(**given)
    assert_untouched(head, before)


def test_complex_tensors_are_refused() -> None:
    head = make_head()
    before = snapshot(head)
    for given in (torch.ones(1, 3, dtype=torch.complex64), torch.ones(1, 3, dtype=torch.complex64, requires_grad=True)):
        with pytest.raises(TypeError, match="hold complex64; expected real numbers"):
            head.update(given, torch.zeros(1, 2))
    assert_untouched(head, before)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("which", ["features", "target"])
def test_a_mask_is_never_lost(outputs: int, which: str) -> None:
    head = make_head(outputs)
    before = snapshot(head)
    given: dict[str, Any] = {"features": np.ones((1, 3)), "target": np.ones((1, outputs))}
    given[which] = np.ma.masked_array(given[which], mask=True)
    with pytest.raises(TypeError, match=r"masked array.*use NaN for no label"):
        head.update(**given)
    assert_untouched(head, before)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [np.float16, np.longdouble, np.int32, np.bool_])
def test_numbers_of_any_length_are_learned_as_in_float64(outputs: int, rows: int, dtype: Any) -> None:
    features, target = np.eye(3)[:rows].astype(dtype), np.ones((rows, outputs), dtype)
    head, other = make_head(outputs), make_head(outputs)
    head.update(features, target)
    other.update(features.astype(np.float64), target.astype(np.float64))
    for name, value in head.named_buffers():
        assert torch.equal(value, other.get_buffer(name)), name
