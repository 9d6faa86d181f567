"""The head's promises: exact linear regression, dtype, saving, blocks of rows, acting views, interrupts."""

from __future__ import annotations

import copy
import io
import pickle
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import STRUCTURES, randn, random_cov, random_state, smallest_eigenvalue
from torch import Tensor, nn

from kbt_rl.inference import joint
from kbt_rl.inference import update as functional
from kbt_rl.inference.acting import ActingView, acting_view, stack_views, view_mean
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.structures import LAYERWISE
from kbt_rl.inference.update import predict_logits

FEATURES, OUTPUTS = 3, 2
SOFTMAX_RULES = ("fisher", "taylor", "replace_softmax")


def linear(seed: int = 0, features: int = FEATURES, outputs: int = OUTPUTS) -> nn.Linear:
    layer = nn.Linear(features, outputs, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(randn(outputs, features, seed=seed))
        layer.bias.copy_(randn(outputs, seed=seed + 1))
    return layer


def make_head(outputs: int = OUTPUTS, **config: Any) -> BayesianHead:
    config = {"noise_variance": 0.1, "hidden_variance": 1e-2, "structure": "layer", **config}
    return BayesianHead.from_linear(linear(outputs=outputs), HeadConfig(**config))


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
    variance, noise, layer = 2.0, 0.3 * random_cov(OUTPUTS, seed=3), linear()
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
    torch.testing.assert_close(head.state.dense_cov(), cov, rtol=1e-10, atol=1e-10 * float(cov.max()))

    fresh = randn(5, FEATURES, seed=6)
    predicted = head.predict(fresh)
    inputs = torch.cat([(fresh - centre) / scale if centred else fresh, fresh.new_ones(5, 1)], dim=1)
    design = torch.stack([torch.kron(torch.eye(OUTPUTS, dtype=torch.float64), row) for row in inputs])
    torch.testing.assert_close(predicted.mean, design @ mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(predicted.epistemic, design @ cov @ design.mT, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(predicted.aleatoric, noise.expand(5, -1, -1), rtol=1e-14, atol=0.0)
    assert int(head.labels_seen) == 40


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_output_needs_no_more_than_its_own_block(structure: str) -> None:
    """With one output, ``neuron`` stores all that regression has; ``diagonal`` does not."""
    layer, noise = linear(outputs=1), torch.full((1, 1), 0.1, dtype=torch.float64)
    features, target = labelled(30, outputs=1)
    config = HeadConfig(layers=1, structure=structure, noise_variance=0.1)
    head = BayesianHead.from_linear(layer, config)
    for row in range(30):
        head.update(features[row : row + 1], target[row : row + 1])
    mean, cov = regression(layer, 1.0, noise, features, target)
    exact = bool(torch.allclose(head.state.mean, mean, rtol=1e-10, atol=1e-10))
    assert exact == (structure != "diagonal")
    assert torch.allclose(head.state.dense_cov(), cov, rtol=1e-9, atol=1e-12) == (structure != "diagonal")


# Units


@pytest.mark.parametrize("rule", ["measure", "replace"])
def test_target_scale_is_a_change_of_units(rule: str) -> None:
    """Scaled targets with scaled variances give the scaled posterior; the noise is set in target units."""
    scale = torch.tensor([10.0, 0.5], dtype=torch.float64)
    noise = 0.2 * random_cov(OUTPUTS, seed=7)
    layer, in_units = linear(), linear()
    with torch.no_grad():
        layer.weight.mul_(scale[:, None])
        layer.bias.mul_(scale)
    config = HeadConfig(structure="joint", hidden_variance=1e-2, rule=rule)
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


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("rule", ["measure", "fisher"])
def test_prediction_of_a_batch_equals_the_loop_over_its_rows(structure: str, layers: int, rule: str) -> None:
    head = make_head(3, structure=structure, layers=layers, rule=rule)
    head.update(*labelled(4, outputs=3, link=head.rule.link))
    features = randn(150, FEATURES, seed=20)  # more than one chunk
    batch = head.predict(features)
    for row in (0, 77, 127, 128, 149):
        for together, alone in zip(batch, head.predict(features[row : row + 1]), strict=True):
            torch.testing.assert_close(together[row], alone[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(head(features), batch.mean, rtol=1e-12, atol=1e-13)
    for cov in (batch.epistemic[0], batch.aleatoric[0]):
        assert smallest_eigenvalue(cov) > -1e-14


def test_softmax_prediction_is_a_distribution_with_multinomial_noise() -> None:
    head = make_head(3, rule="fisher")
    mean, epistemic, aleatoric = head.predict(randn(4, FEATURES, seed=21))
    torch.testing.assert_close(mean.sum(-1), torch.ones(4, dtype=torch.float64), rtol=1e-14, atol=0.0)
    expected = torch.stack([torch.diag(p) - torch.outer(p, p) for p in mean])
    torch.testing.assert_close(aleatoric, expected, rtol=1e-13, atol=1e-16)
    assert float(epistemic.sum(-1).abs().max()) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_low_precision_features_and_targets_are_read_in_float64(dtype: torch.dtype) -> None:
    ours, theirs = make_head(), make_head()
    features, target = (value.to(dtype) for value in labelled(3))
    ours.update(features, target)
    theirs.update(features.double(), target.double())
    assert_identical(posterior(ours), posterior(theirs))
    assert ours.predict(features).mean.dtype == torch.float64


def test_predictions_and_updates_carry_no_graph() -> None:
    head = make_head()
    features = randn(2, FEATURES, seed=22).requires_grad_()
    assert not any(value.requires_grad for value in head.predict(features))
    head.update(features, torch.zeros(2, OUTPUTS, requires_grad=True))
    assert not any(value.requires_grad for value in head.state_dict().values())


# Updates


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rule", ["measure", "fisher"])
def test_seventy_rows_are_blocks_of_thirty_two(structure: str, rule: str) -> None:
    together, blocks = (make_head(structure=structure, rule=rule) for _ in range(2))
    features, target = labelled(70, link=together.rule.link)
    together.update(features, target)
    for rows in (slice(0, 32), slice(32, 64), slice(64, 70)):
        blocks.update(features[rows], target[rows])
    assert int(together.labels_seen) == 70
    for mine, other in zip(posterior(together), posterior(blocks), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_increment_is_the_update_in_two_halves(structure: str) -> None:
    ours, theirs = make_head(structure=structure), make_head(structure=structure)
    before, data = posterior(ours), labelled(3)
    step = ours.increment(*data)
    assert_identical(posterior(ours), before)
    ours.apply_increment(step)
    theirs.update(*data)
    assert_identical(posterior(ours), posterior(theirs))
    assert int(ours.labels_seen) == 3


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
    head = BayesianHead.from_linear(nn.Linear(FEATURES, 2), HeadConfig(noise_variance=0.1), target_scale=scale)
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
    layer, head = linear(), make_head()
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


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("through", ["state_dict", "pickle", "deepcopy"])
def test_a_saved_posterior_comes_back_bit_by_bit_and_learns_on_alike(structure: str, through: str) -> None:
    head = make_head(structure=structure)
    head.set_noise(0.2 * random_cov(OUTPUTS, seed=31))
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
        learner.update(*labelled(2, seed=32))
    assert_identical(posterior(back), posterior(head))
    assert int(head.labels_seen) == 7


def test_feature_and_target_scaling_are_part_of_what_is_saved() -> None:
    scales = {
        "feature_mean": randn(FEATURES, seed=33),
        "feature_scale": randn(FEATURES, seed=34).exp(),
        "target_scale": randn(OUTPUTS, seed=35).exp(),
    }
    head = BayesianHead.from_linear(linear(), HeadConfig(), **scales)
    back = BayesianHead(FEATURES, OUTPUTS)
    back.load_state_dict(head.state_dict())
    features = randn(3, FEATURES, seed=36)
    assert torch.equal(back(features), head(features))


@pytest.mark.parametrize("child", [False, True])
def test_a_posterior_that_was_cast_is_refused(child: bool) -> None:
    head = make_head()
    head.update(*labelled(3))
    before = posterior(head)
    model = nn.Sequential(head) if child else head
    cast = {name: value.float() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"is torch\.float32 in the file and torch\.float64 in the head"):
        model.load_state_dict(cast)
    assert_identical(posterior(head), before)


# Configuration


@pytest.mark.parametrize(
    ("features", "outputs", "structure"), [(4, 1, "joint"), (43, 1, "joint"), (44, 1, "layer"), (43, 3, "layer")]
)
def test_auto_structure_is_joint_up_to_four_thousand_weights(features: int, outputs: int, structure: str) -> None:
    spec, _ = HeadConfig().resolve(features, outputs)
    assert (sum(spec.sizes) <= 4_000) == (structure == "joint")
    assert spec.structure == structure


@pytest.mark.parametrize(("structure", "expected"), [("joint", 0.99), ("neuron", 0.99), ("diagonal", 0.0)])
def test_default_rho_is_tied_where_the_structure_can_store_it(structure: str, expected: float) -> None:
    assert HeadConfig(structure=structure).resolve(2, 1)[1] == expected
    assert HeadConfig(structure=structure, rho=0.0).resolve(2, 1)[1] == 0.0


def test_the_papers_prior_has_one_epsilon_for_weights_and_features() -> None:
    config = HeadConfig.paper(1e-3, layers=3, rule="replace")
    head = BayesianHead(FEATURES, OUTPUTS, config)
    expected = 1e-3 * torch.eye(len(head.mean), dtype=torch.float64)
    assert torch.equal(head.state.dense_cov(), expected)
    assert head.spec.feature_variance == 1e-3
    assert (head.config.rule, head.config.layers, head.spec.structure) == ("replace", 3, "layer")


# Acting views


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("feature_variance", [0.0, 0.3])
def test_an_acting_view_predicts_the_mean_of_the_full_posterior(
    structure: str, layers: int, feature_variance: float
) -> None:
    state = random_state(layers, structure, variance=0.5, feature_variance=feature_variance)
    features = randn(7, FEATURES, seed=40)
    expected = predict_logits(state, features).mean
    torch.testing.assert_close(view_mean(acting_view(state), features), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("feature_variance", [0.0, 0.3])
def test_stacked_views_act_like_each_alone(structure: str, layers: int, feature_variance: float) -> None:
    states = [random_state(layers, structure, feature_variance=feature_variance, seed=seed) for seed in range(0, 9, 3)]
    views = [acting_view(state) for state in states]
    features = randn(3, 5, FEATURES, seed=41)
    own_rows = view_mean(stack_views(views), features)
    same_rows = view_mean(stack_views(views), features[0])
    assert own_rows.shape == same_rows.shape == (3, 5, OUTPUTS)
    for i, view in enumerate(views):
        torch.testing.assert_close(own_rows[i], view_mean(view, features[i]), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(same_rows[i], view_mean(view, features[0]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", [1, 2])
def test_a_view_stays_as_it_is_while_the_posterior_moves_on(structure: str, layers: int) -> None:
    head = make_head(structure=structure, layers=layers)
    view, features = head.view(), randn(4, FEATURES, seed=42)
    before = view_mean(view, features)
    head.update(*labelled(8))
    assert torch.equal(view_mean(view, features), before)
    assert not torch.allclose(view_mean(head.view(), features), before)


def test_a_view_shares_no_memory_with_the_posterior() -> None:
    for structure in STRUCTURES:
        state = random_state(2, structure, feature_variance=0.1)
        view: ActingView = acting_view(state)
        parts = [*view.weights, *(part for part in view[1:] if part is not None)]
        kept = [part.clone() for part in parts]
        for tensor in (state.mean, *state.cov):
            tensor.fill_(7.0)
        assert all(torch.equal(part, old) for part, old in zip(parts, kept, strict=True))


def test_views_stop_at_two_layers_and_the_mean_does_not() -> None:
    with pytest.raises(ValueError, match="at most two layers; this one has 3"):
        acting_view(random_state(3))
    head, features = make_head(layers=3), randn(2, FEATURES, seed=43)
    head.update(*labelled(4))
    torch.testing.assert_close(head(features), head.predict(features).mean, rtol=1e-13, atol=0.0)


CHANGES: dict[str, Callable[[BayesianHead], object]] = {
    "update": lambda head: head.update(*labelled(3, seed=50)),
    "update in blocks": lambda head: head.update(*labelled(40, seed=50)),
    "apply_increment": lambda head: head.apply_increment(head.increment(*labelled(3, seed=50))),
    "reset": lambda head: head.reset(torch.ones(OUTPUTS, FEATURES), torch.ones(OUTPUTS)),
    "load_state_dict": lambda head: head.load_state_dict(make_head(structure=head.spec.structure).state_dict()),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("change", CHANGES)
def test_the_mean_follows_every_change_of_the_posterior(structure: str, change: str) -> None:
    head, features = make_head(structure=structure), randn(4, FEATURES, seed=44)
    head.update(*labelled(5))
    before = head(features)
    CHANGES[change](head)
    after = head(features)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, head.predict(features).mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(after, view_mean(head.view(), features), rtol=1e-12, atol=1e-13)


# Interrupts


def interrupt_during_downdate(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGINT in front of the first change of a covariance."""
    owner: Any = joint if structure == "joint" else LAYERWISE[structure]
    original, calls = owner.downdate_, []

    def downdate_(*args: Any, **kwargs: Any) -> None:
        if not calls:
            calls.append(1)
            signal.raise_signal(signal.SIGINT)
        original(*args, **kwargs)

    monkeypatch.setattr(owner, "downdate_", downdate_)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rows", [20, 40])
def test_an_interrupt_waits_until_the_posterior_is_whole(
    structure: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty rows are applied in full; of forty, which are computed on a copy, nothing is."""
    head, undisturbed = make_head(structure=structure), make_head(structure=structure)
    before, data = posterior(head), labelled(rows)
    undisturbed.update(*data)
    interrupt_during_downdate(structure, monkeypatch)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        head.update(*data)
    assert signal.getsignal(signal.SIGINT) is handler
    whole = posterior(undisturbed) if rows == 20 else before
    assert_identical(posterior(head)[:-1], whole[:-1])


class InterruptedByCopy(Tensor):
    """A buffer that receives SIGINT as soon as it has been overwritten."""

    watched: Tensor | None = None

    def copy_(self, *args: Any, **kwargs: Any) -> Tensor:
        result = super().copy_(*args, **kwargs)
        if self is InterruptedByCopy.watched:
            signal.raise_signal(signal.SIGINT)
        return result


def test_an_interrupt_waits_until_the_copy_of_several_blocks_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    head, undisturbed, data = make_head(), make_head(), labelled(40)
    undisturbed.update(*data)
    head.mean = head.mean.as_subclass(InterruptedByCopy)
    monkeypatch.setattr(InterruptedByCopy, "watched", head.mean)
    with pytest.raises(KeyboardInterrupt):
        head.update(*data)
    assert_identical(posterior(head)[:-1], posterior(undisturbed)[:-1])


def test_updates_from_another_thread_do_not_touch_signals() -> None:
    from concurrent.futures import ThreadPoolExecutor

    head, other = make_head(), make_head()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(head.update, *labelled(2)).result()
    other.update(*labelled(2))
    assert_identical(posterior(head), posterior(other))


def test_the_functional_and_the_module_interface_agree() -> None:
    head = make_head()
    state, (features, target) = head.state.clone(), labelled(3)
    head.update(features, target)
    functional.apply(state, functional.increment(state, features, target, head.rule, head.noise_cov))
    assert torch.equal(state.mean, head.mean)
    assert all(torch.equal(mine, other) for mine, other in zip(state.cov, head.state.cov, strict=True))


def test_the_record_of_several_blocks_covers_all_of_them() -> None:
    features, target = randn(70, 3, seed=5), randn(70, 2, seed=6)
    whole, blocks = make_head(), make_head()
    info = whole.update(features, target)
    parts = [blocks.update(features[rows], target[rows]) for rows in (slice(32), slice(32, 64), slice(64, 70))]
    assert info.labels == sum(part.labels for part in parts) == 140
    assert info.nis == pytest.approx(sum(part.nis for part in parts))
    mean = sum(part.epistemic_variance * part.labels for part in parts) / 140
    assert info.epistemic_variance == pytest.approx(mean)
    assert info.smallest_variance == parts[-1].smallest_variance
