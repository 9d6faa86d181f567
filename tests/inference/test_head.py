"""The head's promises: exact linear regression, units, dtypes, classes, saving, blocks of rows."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STRUCTURES, dense, linear, randn, random_cov, smallest_eigenvalue
from torch import Tensor, nn
from torch.nn import functional

from kbt_rl.inference import each_output, network
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.prediction import Prediction

FEATURES, OUTPUTS = 3, 2
KINDS = (*((structure, layers) for structure in STRUCTURES for layers in (1, 2, 3)), ("shared", 1), ("rotated", 1))
KIND = pytest.mark.parametrize(("structure", "layers"), KINDS)


def make_head(outputs: int = OUTPUTS, **config: Any) -> BayesianHead:
    config = {"layers": 2, "noise_variance": 0.1, "hidden_variance": 1e-2, "last_variance": 1.0, **config}
    config = {"structure": "layer", **config}
    basis = torch.linalg.qr(randn(FEATURES, FEATURES, seed=99)).Q if config["structure"] == "rotated" else None
    return BayesianHead.from_linear(linear(FEATURES, outputs), HeadConfig(**config), feature_basis=basis)


def labelled(rows: int, seed: int = 10, outputs: int = OUTPUTS, link: str = "identity") -> tuple[Tensor, Tensor]:
    target = randn(rows, outputs, seed=seed + 1)
    return randn(rows, FEATURES, seed=seed), torch.softmax(target, dim=-1) if link == "softmax" else target


def posterior(head: BayesianHead) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in head.state_dict().values())


def assert_identical(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


# One layer is exact Bayesian linear regression


def regression(
    layer: nn.Linear, variance: float, noise: Tensor, features: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Posterior of ``vec([W b])``, neuron by neuron, from the normal equations of all samples at once."""
    rows = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
    prior_mean = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().flatten()
    information = torch.linalg.inv(noise)
    precision = (
        torch.kron(information.contiguous(), rows.mT @ rows)
        + torch.eye(len(prior_mean), dtype=torch.float64) / variance
    )
    cov = torch.linalg.inv(precision)
    return cov @ ((information @ target.mT @ rows).flatten() + prior_mean / variance), cov


@pytest.mark.parametrize("structure", ["joint", "layer"])
@pytest.mark.parametrize(
    "blocks", [[1] * 40, [40], [13, 1, 20, 6]], ids=["one by one", "one call of 40", "uneven blocks"]
)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("centred", [False, True])
def test_one_layer_is_bayesian_linear_regression(structure: str, blocks: list[int], seed: int, centred: bool) -> None:
    variance, noise, layer = 2.0, 0.3 * random_cov(OUTPUTS, seed=3), linear(FEATURES, OUTPUTS)
    features, target = labelled(40)
    centre, scale = randn(FEATURES, seed=4), randn(FEATURES, seed=5).exp()
    config = HeadConfig(layers=1, structure=structure, last_variance=variance)
    given = {"feature_mean": centre, "feature_scale": scale} if centred else {}
    head = BayesianHead.from_linear(layer, config, **given)
    head.set_noise(noise)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    for rows in order.split(blocks):
        head.update(features[rows], target[rows])

    if centred:  # the same regression on standardised features
        seen = (features - centre) / scale
        same_map = copy.deepcopy(layer)
        with torch.no_grad():
            same_map.bias.copy_(layer(centre))
            same_map.weight.copy_(layer.weight * scale)
    else:
        seen, same_map = features, layer
    mean, cov = regression(same_map, variance, noise, seen, target)
    torch.testing.assert_close(head.state.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(head.covariance(), cov, rtol=1e-10, atol=1e-10 * float(cov.max()))

    fresh = randn(5, FEATURES, seed=6)
    predicted = head.predict(fresh)
    inputs = torch.cat([(fresh - centre) / scale if centred else fresh, fresh.new_ones(5, 1)], dim=1)
    design = torch.stack([torch.kron(torch.eye(OUTPUTS, dtype=torch.float64), row) for row in inputs])
    torch.testing.assert_close(predicted.mean, design @ mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(predicted.epistemic, design @ cov @ design.mT, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(predicted.aleatoric, noise.expand(5, -1, -1), rtol=1e-14, atol=0.0)
    assert int(head.labels_seen) == 40


@pytest.mark.parametrize("structure", [*STRUCTURES, "shared"])
def test_one_output_needs_no_more_than_its_own_block(structure: str) -> None:
    """With one output, ``neuron`` stores all that regression has; ``diagonal`` does not."""
    layer, noise = linear(FEATURES, 1), torch.full((1, 1), 0.1, dtype=torch.float64)
    features, target = labelled(30, outputs=1)
    config = HeadConfig(layers=1, structure=structure, noise_variance=0.1, last_variance=1.0)
    head = BayesianHead.from_linear(layer, config)
    for row in range(30):
        head.update(features[row : row + 1], target[row : row + 1])
    mean, cov = regression(layer, 1.0, noise, features, target)
    exact = bool(torch.allclose(head.state.mean, mean, rtol=1e-10, atol=1e-10))
    assert exact == (structure != "diagonal")
    assert torch.allclose(head.covariance(), cov, rtol=1e-9, atol=1e-12) == (structure != "diagonal")


# Units


@pytest.mark.parametrize("rule", ["measure", "replace"])
def test_target_scale_is_a_change_of_units(rule: str) -> None:
    """Scaled targets with scaled variances give the scaled posterior; the noise is set in target units."""
    scale = torch.tensor([10.0, 0.5], dtype=torch.float64)
    noise = 0.2 * random_cov(OUTPUTS, seed=7)
    layer, in_units = linear(FEATURES, OUTPUTS), linear(FEATURES, OUTPUTS)
    with torch.no_grad():
        layer.weight.mul_(scale[:, None])
        layer.bias.mul_(scale)
    config = HeadConfig(layers=2, structure="joint", hidden_variance=1e-2, rule=rule)
    scaled = BayesianHead.from_linear(layer, config, target_scale=scale)
    plain = BayesianHead.from_linear(in_units, config)
    scaled.set_noise(noise * scale[:, None] * scale)
    plain.set_noise(noise)
    features, target = labelled(4)
    scaled.update(features, target * scale)
    plain.update(features, target)
    theirs, ours = plain.predict(features), scaled.predict(features)
    square = scale[:, None] * scale
    torch.testing.assert_close(ours.mean, theirs.mean * scale, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scaled(features), ours.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.epistemic, theirs.epistemic * square, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.aleatoric, theirs.aleatoric * square, rtol=1e-12, atol=0.0)


# Prediction


@KIND
@pytest.mark.parametrize("rule", ["measure", "fisher"])
def test_prediction_of_a_batch_equals_the_loop_over_its_rows(structure: str, layers: int, rule: str) -> None:
    head = make_head(3, structure=structure, layers=layers, rule=rule)
    head.update(*labelled(4, outputs=3, link=head.rule.link))
    features = randn(150, FEATURES, seed=20)  # more than one chunk
    batch = head.predict(features)
    for row in (0, 77, 127, 128, 149):
        for together, alone in zip(batch, head.predict(features[row : row + 1]), strict=True):
            torch.testing.assert_close(together[row], alone[0], rtol=1e-11, atol=1e-13)
    outputs = head(features) if rule == "measure" else torch.softmax(head(features), dim=-1)
    torch.testing.assert_close(outputs, batch.mean, rtol=1e-12, atol=1e-13)
    for cov, variance in ((batch.epistemic, batch.epistemic_variance), (batch.aleatoric, batch.aleatoric_variance)):
        assert smallest_eigenvalue(cov[0]) > -1e-14
        torch.testing.assert_close(variance, cov.diagonal(dim1=-2, dim2=-1), rtol=1e-11, atol=1e-15)
    logits = head.predict_logits(features)
    torch.testing.assert_close(logits.mean, head(features), rtol=1e-12, atol=1e-13)
    own = logits.cov.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(head.epistemic_variance(features), own, rtol=1e-12, atol=0.0)


def test_softmax_prediction_is_a_distribution_with_multinomial_noise() -> None:
    head = make_head(3, rule="fisher")
    mean, epistemic, aleatoric = head.predict(randn(4, FEATURES, seed=21))
    torch.testing.assert_close(mean.sum(-1), torch.ones(4, dtype=torch.float64), rtol=1e-14, atol=0.0)
    expected = torch.stack([torch.diag(p) - torch.outer(p, p) for p in mean])
    torch.testing.assert_close(aleatoric, expected, rtol=1e-13, atol=1e-16)
    assert float(epistemic.sum(-1).abs().max()) < 1e-15


@pytest.mark.parametrize("structure", ["layer", "neuron"])
def test_moderated_probabilities_are_less_sure_where_the_weights_are(structure: str) -> None:
    head, features = make_head(3, rule="fisher", layers=1, structure=structure), 5.0 * randn(4, FEATURES, seed=21)
    logits = head.predict_logits(features)
    plain, found = head.predict(features), head.predict(features, moderated=True)
    spread = (plain.mean * logits.cov.diagonal(dim1=-2, dim2=-1)).sum(-1, keepdim=True)
    expected = torch.softmax(logits.mean / (1.0 + torch.pi / 8.0 * spread).sqrt(), dim=-1)
    torch.testing.assert_close(found.mean, expected, rtol=1e-12, atol=0.0)
    assert bool((found.mean.max(-1).values < plain.mean.max(-1).values).all())
    own = found.epistemic.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found.epistemic_variance, own, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("rule", ["measure", "laplace"])
@KIND
def test_leading_dimensions_lists_and_no_rows(structure: str, layers: int, rule: str) -> None:
    head, features = make_head(structure=structure, layers=layers, rule=rule), randn(2, 5, FEATURES, seed=23)
    head.update(*labelled(4, link=head.rule.link))
    flat = head(features.view(10, FEATURES))
    torch.testing.assert_close(head(features), flat.view(2, 5, OUTPUTS), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(head(features[0, 0]), flat[0], rtol=1e-12, atol=1e-14)
    for given in (features[0].numpy(), features[0].tolist()):
        torch.testing.assert_close(head(given), flat[:5], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(head.predict(given).epistemic, head.predict(features[0]).epistemic)
    assert head(features[:, :0]).shape == (2, 0, OUTPUTS)
    none: Prediction = head.predict(features[0, :0])
    assert [tuple(part.shape) for part in none] == [(0, OUTPUTS), (0, OUTPUTS, OUTPUTS), (0, OUTPUTS, OUTPUTS)]
    assert none.epistemic_variance.shape == none.aleatoric_variance.shape == (0, OUTPUTS)


def test_predictions_and_updates_carry_no_graph() -> None:
    head = make_head()
    features = randn(2, FEATURES, seed=22).requires_grad_()
    assert not any(value.requires_grad for value in (*head.predict(features), head(features)))
    head.update(features, torch.zeros(2, OUTPUTS, requires_grad=True))
    assert not any(value.requires_grad for value in head.state_dict().values())


# Classes


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rule", ["laplace", "fisher", "taylor"])
def test_whole_numbers_are_classes(rule: str, layers: int) -> None:
    """As one-hot rows; -100 has no label, as in PyTorch's cross-entropy."""
    whole, one_hot = (make_head(4, rule=rule, layers=layers, structure="auto") for _ in range(2))
    features, classes = randn(5, FEATURES, seed=24), torch.tensor([2, 0, -100, 3, 3])
    info = whole.update(features, classes)
    kept = classes != -100
    expected = one_hot.update(features[kept], functional.one_hot(classes[kept], 4).double())
    assert_identical(posterior(whole), posterior(one_hot))
    assert info == expected
    for given in (classes.numpy().astype(np.int8), classes.to(torch.int32)):
        again = make_head(4, rule=rule, layers=layers, structure="auto")
        again.update(features, given)
        assert_identical(posterior(again), posterior(one_hot))
    assert whole.update(features[:2], torch.tensor([-100, -100])).labels == 0
    assert_identical(posterior(whole), posterior(one_hot))


@pytest.mark.parametrize("wrong", [[4, 0], [0, -1], [-101, 2]])
def test_a_class_that_there_is_not_is_refused(wrong: list[int]) -> None:
    head = make_head(4, rule="laplace", layers=1, structure="auto")
    before = posterior(head)
    bad = next(value for value in wrong if not 0 <= value < 4)
    with pytest.raises(ValueError, match=f"holds the class {bad}; expected 0 to 3, or -100"):
        head.update(randn(2, FEATURES, seed=1), torch.tensor(wrong))
    assert_identical(posterior(head), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["laplace", "fisher", "taylor"])
def test_a_head_in_place_of_the_last_layer_has_the_same_cross_entropy(rule: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Flatten(2), nn.Linear(5, 7)).to(dtype)
    tokens = torch.randint(7, (4, 9), generator=torch.Generator().manual_seed(1))
    expected = functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    model[2] = BayesianHead.from_linear(model[2], HeadConfig(rule=rule))
    logits = model(tokens)
    assert logits.dtype == dtype
    torch.testing.assert_close(functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()), expected)


@pytest.mark.parametrize("structure", ["neuron", "diagonal", "shared", "rotated"])
@pytest.mark.parametrize("rule", ["laplace", "fisher"])
@pytest.mark.parametrize("sure", [0.0, 30.0])
def test_one_row_of_independent_classes_is_the_joint_update(structure: str, rule: str, sure: float) -> None:
    """``each_output.increment`` against the full covariance of all classes: mean step, covariance blocks, record."""
    head = make_head(5, layers=1, structure=structure, rule=rule)
    with torch.no_grad():
        head.mean[FEATURES] += sure  # the bias of the first class
    features, classes = randn(1, FEATURES, seed=25), torch.tensor([3])
    full = BayesianHead(
        FEATURES, 5, HeadConfig(layers=1, structure="joint", rule=rule, last_variance=1.0, noise_variance=0.1)
    )
    rows = features if structure != "rotated" else features @ head.get_buffer("feature_basis")
    full.load_state_dict({**full.state_dict(), "mean": head.mean})
    before, joint = full.covariance(), full.increment(rows, functional.one_hot(classes, 5).double())
    step = head.increment(features, classes)
    torch.testing.assert_close(step.mean_step, joint.mean_step, rtol=1e-8, atol=1e-10)
    for name in ("innovation", "nis", "epistemic_variance", "predictive_variance", "labels", "log_density"):
        assert getattr(step.info, name) == pytest.approx(getattr(joint.info, name), rel=1e-8), name
    head.update(features, classes)
    full.apply_increment(joint)
    expected, found = full.covariance(), head.covariance()
    size = FEATURES + 1
    for own in (slice(size * k, size * k + size) for k in range(5)):
        ours, theirs = found[own, own], expected[own, own]
        if structure in ("diagonal", "rotated"):
            ours, theirs = ours.diagonal(), theirs.diagonal()
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    assert not torch.equal(expected, before)


def test_only_classes_that_may_be_meant_move_their_covariance() -> None:
    full, few = (make_head(9, layers=1, structure="neuron", rule="laplace", active_probability=p) for p in (0.0, 0.1))
    features = 3.0 * randn(1, FEATURES, seed=26)
    probabilities = few.predict(features).mean[0]
    label = int(probabilities.argmin())
    before = few.variances().view(9, -1)
    infos = [head.update(features, torch.tensor([label])) for head in (full, few)]
    torch.testing.assert_close(few.mean, full.mean, rtol=1e-12, atol=1e-14)
    assert infos[0] == pytest.approx(infos[1])
    moved = (few.variances().view(9, -1) != before).any(-1)
    assert moved.tolist() == [bool(p > 0.1) or k == label for k, p in enumerate(probabilities)]
    torch.testing.assert_close(few.variances().view(9, -1)[moved], full.variances().view(9, -1)[moved])


def test_rotated_is_diagonal_in_the_basis_of_the_features() -> None:
    basis = torch.linalg.qr(randn(FEATURES, FEATURES, seed=27)).Q
    layer, turned = linear(FEATURES, OUTPUTS), linear(FEATURES, OUTPUTS)
    with torch.no_grad():
        turned.weight.copy_(layer.weight @ basis)
    settings: dict[str, Any] = {"layers": 1, "noise_variance": 0.1, "last_variance": 1.0}
    rotated = BayesianHead.from_linear(layer, HeadConfig(structure="rotated", **settings), feature_basis=basis)
    plain = BayesianHead.from_linear(turned, HeadConfig(structure="diagonal", **settings))
    features, target = labelled(9)
    infos = [head.update(rows, target) for head, rows in ((rotated, features), (plain, features @ basis))]
    assert infos[0] == pytest.approx(infos[1], nan_ok=True)
    torch.testing.assert_close(rotated.mean, plain.mean, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(rotated(features), plain(features @ basis), rtol=1e-11, atol=1e-12)


# Updates


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rule", ["measure", "fisher"])
def test_seventy_rows_are_blocks_of_thirty_two(structure: str, rule: str) -> None:
    together, blocks = (make_head(structure=structure, rule=rule) for _ in range(2))
    features, target = labelled(70, link=together.rule.link)
    info = together.update(features, target)
    parts = [blocks.update(features[rows], target[rows]) for rows in (slice(32), slice(32, 64), slice(64, 70))]
    assert int(together.labels_seen) == 70
    for mine, other in zip(posterior(together), posterior(blocks), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)
    assert info.labels == sum(part.labels for part in parts) == 140
    for name in ("nis", "log_density"):
        assert getattr(info, name) == pytest.approx(sum(getattr(part, name) for part in parts))
    for name in ("epistemic_variance", "predictive_variance"):
        mean = sum(getattr(part, name) * part.labels for part in parts) / 140
        assert getattr(info, name) == pytest.approx(mean)
    square = sum(part.innovation**2 * part.labels for part in parts) / 140
    assert info.innovation == pytest.approx(square**0.5)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("noise", ["fixed", "learned"])
def test_an_increment_is_the_update_in_two_halves(structure: str, noise: str) -> None:
    ours, theirs = (make_head(structure=structure, noise=noise) for _ in range(2))
    before, data = posterior(ours), labelled(3)
    step = ours.increment(*data)
    assert_identical(posterior(ours), before)
    ours.apply_increment(step)
    theirs.update(*data)
    assert_identical(posterior(ours), posterior(theirs))
    assert int(ours.labels_seen) == 3
    with pytest.raises(ValueError, match="it is of another head"):
        ours.apply_increment(make_head(3).increment(*labelled(1, outputs=3)))


def test_an_update_pulls_the_prediction_to_the_target_and_shrinks_its_variance() -> None:
    head = make_head(noise_variance=1e-8, hidden_variance=1e-4)
    features, target = labelled(1)
    before = head.predict(features)
    info = head.update(features, target)
    after = head.predict(features)
    assert info.innovation == pytest.approx(float((target - before.mean).square().mean().sqrt()))
    assert float((after.mean - target).norm()) < 0.05 * float((before.mean - target).norm())
    assert float(after.epistemic.diagonal(dim1=-2, dim2=-1).max()) < 0.05 * float(before.epistemic.max())


@pytest.mark.parametrize("rows", [1, 3])
def test_the_record_of_outputs_of_different_size_is_in_their_own_units(rows: int) -> None:
    scale = torch.tensor([1.0, 100.0], dtype=torch.float64)
    head = BayesianHead.from_linear(
        nn.Linear(FEATURES, 2), HeadConfig(layers=2, noise_variance=0.1), target_scale=scale
    )
    features, target = randn(rows, FEATURES, seed=1), randn(rows, 2, seed=2) * scale
    expected = head.predict(features)
    info, unit = head.update(features, target), head.mean_square_scale
    variances = (part.diagonal(dim1=-2, dim2=-1) for part in (expected.epistemic, expected.aleatoric))
    epistemic, aleatoric = (float(part.mean()) for part in variances)
    assert info.innovation * unit**0.5 == pytest.approx(float((target - expected.mean).square().mean().sqrt()))
    assert info.epistemic_variance * unit == pytest.approx(epistemic)
    assert info.predictive_variance * unit == pytest.approx(epistemic + aleatoric)


@pytest.mark.parametrize("noise", ["fixed", "learned"])
def test_a_noise_that_was_set_keeps_its_units_when_the_targets_get_others(noise: str) -> None:
    head, probe = make_head(2, noise=noise), randn(1, FEATURES, seed=3)
    cov = torch.tensor([[0.02, 0.01], [0.01, 0.03]], dtype=torch.float64)
    scale = torch.tensor([2.0, 5.0], dtype=torch.float64)
    weight, bias = randn(2, FEATURES, seed=4), randn(2, seed=5)
    head.reset(weight, bias, target_scale=scale)
    relative = head.noise_cov / head.noise_cov[0, 0]
    torch.testing.assert_close(relative, torch.eye(2, dtype=torch.float64))  # not set: in units of the scale
    head.set_noise(cov)
    head.reset(weight, bias, target_scale=3.0 * scale)
    torch.testing.assert_close(head.predict(probe).aleatoric[0], cov)


def test_reset_returns_to_the_prior_and_keeps_the_noise() -> None:
    layer, head = linear(FEATURES, OUTPUTS), make_head()
    fresh = posterior(head)
    head.update(*labelled(5))
    head.reset(layer.weight, layer.bias)
    assert_identical(posterior(head), fresh)


# Module promises


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to": lambda module: module.to(torch.float32),
    "float": lambda module: module.float(),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("child", [False, True])
def test_no_cast_of_the_model_reaches_the_posterior(cast: str, child: bool) -> None:
    head = make_head()
    head.update(*labelled(3))
    before = posterior(head)
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "nested": nn.Sequential(head)}) if child else head
    CASTS[cast](model)
    assert_identical(posterior(head), before)
    assert head.mean.dtype == torch.float64
    if child:
        assert model["encoder"].weight.dtype != torch.float64
    head.update(*labelled(1, seed=30))


def test_the_head_has_no_parameters_for_a_gradient_step() -> None:
    assert list(make_head().parameters()) == []


SAVED: dict[str, dict[str, Any]] = {
    **{name: {"structure": name} for name in STRUCTURES},
    "shared": {"structure": "shared", "layers": 1},
    "rotated": {"structure": "rotated", "layers": 1},
    "learned noise": {"noise": "learned"},
    "learned noise, variational": {"noise": "learned", "noise_statistic": "variational"},
    "learned noise, robust": {"noise": "learned", "robust_dof": 3.0},
    "learned noise, shared": {"noise": "learned", "structure": "shared", "layers": 1},
}


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("through", ["state_dict", "pickle", "deepcopy"])
def test_a_saved_posterior_comes_back_bit_by_bit_and_learns_on_alike(kind: str, rows: int, through: str) -> None:
    head = make_head(**SAVED[kind])
    structure = head.spec.structure
    if "noise" not in kind:
        head.set_noise(0.2 * random_cov(OUTPUTS, seed=31) if structure in STRUCTURES else 0.2)
    if structure == "shared":  # outputs in two groups, which a new head does not have
        head.update(randn(1, FEATURES, seed=30), torch.tensor([[1.0, torch.nan]]))
    head.update(*labelled(5))
    if through == "deepcopy":
        back = copy.deepcopy(head)
    elif through == "pickle":
        back = pickle.loads(pickle.dumps(head))
    else:
        file = io.BytesIO()
        torch.save(head.state_dict(), file)
        file.seek(0)
        back = BayesianHead(FEATURES, OUTPUTS, head.config)
        back.load_state_dict(torch.load(file, weights_only=True))
    assert_identical(posterior(back), posterior(head))
    for learner in (head, back):
        learner.update(*labelled(rows, seed=32))
    assert_identical(posterior(back), posterior(head))
    assert int(head.labels_seen) == 5 + rows + (structure == "shared")


def test_feature_and_target_scaling_are_part_of_what_is_saved() -> None:
    scales = {
        "feature_mean": randn(FEATURES, seed=33),
        "feature_scale": randn(FEATURES, seed=34).exp(),
        "target_scale": randn(OUTPUTS, seed=35).exp(),
    }
    head = BayesianHead.from_linear(linear(FEATURES, OUTPUTS), **scales)
    back = BayesianHead(FEATURES, OUTPUTS)
    back.load_state_dict(head.state_dict())
    features = randn(3, FEATURES, seed=36)
    assert torch.equal(back(features), head(features))


def test_a_head_says_what_it_is() -> None:
    head = make_head(structure="neuron")
    head.update(*labelled(3))
    for part in ("in_features=3, out_features=2, layers=2", "structure='neuron'", "rule='measure'", "labels_seen=3"):
        assert part in repr(head)


CHANGES: dict[str, Callable[[BayesianHead], object]] = {
    "update": lambda head: head.update(*labelled(1, seed=50)),
    "update of several rows": lambda head: head.update(*labelled(3, seed=50)),
    "update in blocks": lambda head: head.update(*labelled(40, seed=50)),
    "apply_increment": lambda head: head.apply_increment(head.increment(*labelled(1, seed=50))),
    "reset": lambda head: head.reset(torch.ones(OUTPUTS, FEATURES), torch.ones(OUTPUTS)),
    "load_state_dict": lambda head: head.load_state_dict(other_than(head).state_dict()),
    "loading by assignment": lambda head: head.load_state_dict(other_than(head).state_dict(), assign=True),
    "a hand on the mean": lambda head: head.mean.add_(1.0),
}


def other_than(head: BayesianHead) -> BayesianHead:
    other = BayesianHead.from_linear(linear(FEATURES, OUTPUTS, seed=60), head.config)
    other.update(*labelled(2, seed=61))
    return other


@pytest.mark.parametrize("structure", [*STRUCTURES, "shared"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_mean_follows_every_change_of_the_posterior(structure: str, change: str) -> None:
    head, features = (
        make_head(structure=structure, layers=1 if structure == "shared" else 2),
        randn(4, FEATURES, seed=44),
    )
    head.update(*labelled(5))
    before = head(features)
    head.predict(features)
    CHANGES[change](head)
    after = head(features)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, head.predict(features).mean, rtol=1e-12, atol=1e-13)
    copied = BayesianHead(FEATURES, OUTPUTS, head.config)
    copied.load_state_dict(head.state_dict())
    torch.testing.assert_close(after, copied(features), rtol=1e-12, atol=1e-13)
    for learner in (head, copied):
        learner.update(*labelled(1, seed=51))
    torch.testing.assert_close(head.mean, copied.mean, rtol=1e-12, atol=1e-13)


@KIND
@pytest.mark.parametrize("rule", ["measure", "laplace"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_head_is_the_definition_in_its_own_units(structure: str, layers: int, rule: str, outputs: int) -> None:
    """One row after another, by machine code where there is some, against ``network`` on the state."""
    if rule == "laplace" and outputs == 1:
        outputs = 2
    head = make_head(outputs, structure=structure, layers=layers, rule=rule)
    state, noise = head.state.clone(), head.noise_cov.clone()
    turn = head.get_buffer("feature_basis") if structure == "rotated" else torch.eye(FEATURES, dtype=torch.float64)
    features, target = labelled(12, outputs=outputs, link=head.rule.link)
    each = layers == 1 and structure in ("neuron", "diagonal", "shared", "rotated")
    for row, label in zip(features.split(1), target.split(1), strict=True):
        if each:
            step = each_output.increment(state, row @ turn, label, head.rule, noise.diagonal())
        else:
            step = network.increment(state, row @ turn, label, head.rule, noise)
        info, state = head.update(row, label), network.apply(state, step)
        assert info == pytest.approx(step.info, rel=1e-9, abs=1e-12, nan_ok=True)
    torch.testing.assert_close(head.mean, state.mean, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(head.covariance(), dense(state), rtol=1e-9, atol=1e-11)
    if not each:
        logits = network.predict_logits(state, features)
        torch.testing.assert_close(head.predict_logits(features).mean, logits.mean, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(head.predict_logits(features).cov, logits.cov, rtol=1e-9, atol=1e-12)


def test_forgetting_by_itself_is_forgetting_by_hand() -> None:
    for name, rate in (("process_noise", 1e-2), ("towards_prior", 0.1), ("fading", 0.9)):
        alone, by_hand = make_head(forgetting=name, forgetting_rate=rate), make_head()
        for seed in range(3):
            alone.update(*labelled(2, seed=seed))
            by_hand.update(*labelled(2, seed=seed))
            by_hand.loosen(name, rate)
        assert_identical(posterior(alone), posterior(by_hand))
