"""The prior: entries of its means and covariances, and that a fresh head is the pre-trained layer."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import STRUCTURES, dense, randn, smallest_eigenvalue
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.covariance.registry import STRUCTURES as REGISTRY
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.prior import layer_shapes, prior_layers, prior_means
from kbt_rl.inference.types import HeadSpec, HeadState


def prior(
    layers: int, structure: str, *, width: int | None = None, hidden: float = 1e-3, last: float = 2.0, rho: float = 0.0
) -> tuple[Tensor, HeadSpec]:
    """Full prior covariance of a head with 2 features and 3 outputs."""
    spec = HeadSpec(layer_shapes(2, 3, layers, width), structure)
    layers_prior = prior_layers(spec.shapes, hidden_variance=hidden, last_variance=last, rho=rho)
    cov = REGISTRY[structure].from_prior(layers_prior)
    return dense(HeadState(spec, torch.zeros(sum(spec.sizes), dtype=torch.float64), cov)), spec


# Shapes and means


@pytest.mark.parametrize(
    ("layers", "width", "expected"),
    [
        (1, None, [(3, 3)]),
        (1, 7, [(3, 3)]),
        (2, None, [(4, 3), (3, 5)]),
        (2, 7, [(7, 3), (3, 8)]),
        (4, 5, [(5, 3), (5, 6), (5, 6), (3, 6)]),
    ],
)
def test_layer_shapes_count_the_bias(layers: int, width: int | None, expected: list[tuple[int, int]]) -> None:
    shapes = layer_shapes(2, 3, layers, width)
    assert [tuple(shape) for shape in shapes] == expected
    assert [shape.size for shape in shapes] == [n * k for n, k in expected]


def test_means_of_one_layer_are_the_pretrained_layer() -> None:
    weight, bias = randn(3, 2, seed=0), randn(3, seed=1)
    (mean,) = prior_means(weight, bias, layer_shapes(2, 3, 1, None))
    assert torch.equal(mean, torch.cat([weight, bias[:, None]], dim=1))


def test_means_hold_a_positive_and_a_negative_copy_around_the_spare_units() -> None:
    """Eqs. (34) to (36) for two features, one spare unit, four layers."""
    weight = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    means = prior_means(weight, torch.tensor([7.0], dtype=torch.float64), layer_shapes(2, 1, 4, 5))
    first = [[1, 0, 0], [0, 1, 0], [0, 0, 0], [-1, 0, 0], [0, -1, 0]]
    middle = [[1, 0, 0, -1, 0, 0], [0, 1, 0, 0, -1, 0], [0] * 6, [-1, 0, 0, 1, 0, 0], [0, -1, 0, 0, 1, 0]]
    for mean, expected in zip(means, (first, middle, middle, [[2, 3, 0, -2, -3, 7]]), strict=True):
        assert torch.equal(mean, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("outputs", [1, 9])
def test_means_take_their_columns_from_the_width_of_the_layer_below(outputs: int) -> None:
    """Eqs. (35) and (36) print the layer's own width; for one output (36) would have a negative number of rows."""
    shapes = layer_shapes(2, outputs, 3, 6)
    means = prior_means(randn(outputs, 2, seed=2), randn(outputs, seed=3), shapes)
    assert [tuple(mean.shape) for mean in means] == [tuple(shape) for shape in shapes]
    assert [mean.shape[1] - 1 for mean in means[1:]] == [mean.shape[0] for mean in means[:-1]]


# Covariances


@pytest.mark.parametrize(
    ("structure", "layers"), [*itertools.product(STRUCTURES, (1, 2, 4)), ("shared", 1), ("rotated", 1)]
)
def test_untied_prior_is_one_variance_for_hidden_layers_and_one_for_the_last(structure: str, layers: int) -> None:
    cov, spec = prior(layers, structure, width=6)
    last = spec.sizes[-1]
    hidden = torch.full((sum(spec.sizes) - last,), 1e-3, dtype=torch.float64)
    expected = torch.cat([hidden, torch.full((last,), 2.0, dtype=torch.float64)])
    torch.testing.assert_close(cov, torch.diag(expected), rtol=1e-15, atol=0.0)  # squares of the roots


@pytest.mark.parametrize("structure", ["joint", "layer", "neuron"])
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("width", [4, 7])
def test_tied_prior_correlates_the_pairs_of_the_last_layer_and_nothing_else(
    structure: str, layers: int, width: int
) -> None:
    rho, last = 0.9, 2.0
    cov, spec = prior(layers, structure, width=width, last=last, rho=rho)
    untied, _ = prior(layers, structure, width=width, last=last)
    change = cov - untied
    first, k = sum(spec.sizes[:-1]), width + 1
    for output in range(3):
        for feature in range(2):
            positive = first + output * k + feature
            negative = first + output * k + width - 2 + feature
            for i, j in ((positive, negative), (negative, positive)):
                assert float(change[i, j]) == pytest.approx(-rho * last, rel=1e-15)
                change[i, j] = 0.0
            pair = cov[[positive, negative]][:, [positive, negative]]
            half = torch.tensor([0.5, -0.5], dtype=torch.float64)
            assert float(half @ pair @ half) == pytest.approx(last * (1.0 + rho) / 2.0)
            assert float(half.abs() @ pair @ half.abs()) == pytest.approx(last * (1.0 - rho) / 2.0)
    assert float(change.abs().max()) < 1e-15
    assert smallest_eigenvalue(cov) > 0.0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_single_layer_has_no_pairs_to_tie(structure: str) -> None:
    assert torch.equal(prior(1, structure, rho=0.9)[0], prior(1, structure)[0])


def test_diagonal_cannot_store_a_tied_prior() -> None:
    with pytest.raises(ValueError, match=r"cannot store the correlated weights.*rho=0.*structure='neuron'"):
        prior(2, "diagonal", rho=0.5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_prior_blocks_share_no_memory(structure: str) -> None:
    """Buffers are overwritten in place, so an entry must not stand for several weights."""
    layers = prior_layers(layer_shapes(2, 3, 3, None), hidden_variance=1.0, last_variance=1.0, rho=0.0)
    for block in REGISTRY[structure].from_prior(layers):
        before = block.clone()
        block.view(-1)[0] += 1.0
        assert int((block != before).sum()) == 1


# A fresh head


@st.composite
def heads(draw: st.DrawFn) -> tuple[nn.Linear, BayesianHead]:
    features, outputs = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    structure = draw(st.sampled_from(("auto", *STRUCTURES)))
    rules = ("measure", "replace", "fisher", "laplace", "taylor", "replace_softmax")
    variances = st.floats(-12.0, 1.0).map(lambda power: 10.0**power) | st.just(0.0)
    config = HeadConfig(
        layers=draw(st.integers(1, 4)),
        width=2 * features + draw(st.integers(0, 3)),
        structure=structure,
        hidden_variance=draw(variances),
        last_variance=draw(variances),
        rho=None if structure == "diagonal" else draw(st.none() | st.floats(0.0, 0.999)),
        feature_variance=draw(st.just(0.0) | st.floats(0.0, 1.0)),
        relu_order=draw(st.integers(1, 5)),
        rule=draw(st.sampled_from(rules)),
    )
    seed = draw(st.integers(0, 2**20))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        linear = nn.Linear(features, outputs, bias=draw(st.booleans()), dtype=torch.float64)
    centre = 3.0 * randn(features, seed=seed + 1) if draw(st.booleans()) else None
    scale = randn(features, seed=seed + 2).exp() if draw(st.booleans()) else None
    return linear, BayesianHead.from_linear(linear, config, feature_mean=centre, feature_scale=scale)


@given(heads(), st.integers(0, 2**20))
@settings(max_examples=200)
def test_a_fresh_head_is_the_pretrained_layer_for_every_prior_variance(
    drawn: tuple[nn.Linear, BayesianHead], seed: int
) -> None:
    linear, head = drawn
    features = torch.cat([randn(3, linear.in_features, seed=seed), torch.zeros(1, linear.in_features).double()])
    with torch.no_grad():
        expected = linear(features)
        logits = head.predict_logits(features)
        torch.testing.assert_close(logits.mean, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(head(features), expected, rtol=1e-10, atol=1e-10)
        if head.rule.link == "softmax":
            expected = torch.softmax(expected, dim=-1)
        torch.testing.assert_close(head.predict(features).mean, expected, rtol=1e-10, atol=1e-10)
    assert bool(torch.isfinite(logits.cov).all())
    assert float(logits.cov.diagonal(dim1=-2, dim2=-1).min()) >= 0.0


CLASSES_AND_FEATURES = [(2, 16), (10, 64), (96, 64), (1000, 64)]


def log_losses(classes: int, features: int, changed: float, labels: int = 600) -> tuple[float, float]:
    """Nats a label of a head that learns and of the layer that it started from, each label predicted before it is seen.

    A share ``changed`` of the variance of the weights is drawn anew before the first label.
    """
    rng = np.random.default_rng(0)
    before, other = rng.normal(size=(2, classes, features)) * 4.0 / features**0.5
    now, bias = (1.0 - changed) ** 0.5 * before + changed**0.5 * other, rng.normal(size=classes)

    def log_probabilities(weights: npt.NDArray[np.float64], row: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        logits = weights @ row + bias
        return np.asarray(logits - np.logaddexp.reduce(logits))

    head = BayesianHead(features, classes, HeadConfig(rule="laplace", layers=1))
    head.reset(torch.from_numpy(before), torch.from_numpy(bias))
    learning = static = 0.0
    for _ in range(labels):
        row = rng.normal(size=features)
        label = rng.choice(classes, p=np.exp(log_probabilities(now, row)))
        static -= log_probabilities(before, row)[label]
        learning -= head.update(row[None], np.array([label])).log_density
    return learning / labels, static / labels


@pytest.mark.parametrize("changed", [0.3, 1.0])
@pytest.mark.parametrize(("classes", "features"), CLASSES_AND_FEATURES)
def test_the_default_softmax_prior_is_better_than_not_learning_in_a_changed_world(
    classes: int, features: int, changed: float
) -> None:
    learning, static = log_losses(classes, features, changed)
    assert learning < static


@pytest.mark.parametrize(("classes", "features"), CLASSES_AND_FEATURES)
def test_the_default_softmax_prior_costs_little_where_nothing_has_changed(classes: int, features: int) -> None:
    """Not nothing: the prior is what makes a head learn where the world has changed."""
    learning, static = log_losses(classes, features, 0.0)
    assert static < learning < static + 0.1
