"""Every layer of any module: against the linearised Gaussian network, exact regression, and itself at full rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import randn, random_cov
from torch import Tensor, nn

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.linearised import LinearisedHead
from kbt_rl.inference.network import weights_of

FEATURES, OUTPUTS = 3, 2
HIDDEN, LAST, NOISE = 0.02, 1.5, 0.1


def network(outputs: int = OUTPUTS, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def weights_in(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def module_head(module: nn.Module | None = None, outputs: int = OUTPUTS, **config: Any) -> LinearisedHead:
    given = {name: config.pop(name) for name in ("parameters", "prior_variance") if name in config}
    module = network(outputs) if module is None else module
    return LinearisedHead(module, outputs, HeadConfig(**{"noise_variance": NOISE, **config}), **given)


def rows(count: int, seed: int, outputs: int = OUTPUTS) -> tuple[Tensor, Tensor]:
    return randn(count, FEATURES, seed=seed), randn(count, outputs, seed=seed + 50)


def assert_same(ours: BayesianHead, theirs: BayesianHead, tolerance: float = 1e-12) -> None:
    """Their predictions, to ``tolerance`` of the largest."""
    probe = randn(5, FEATURES, seed=99)
    for mine, other in zip(ours.predict(probe), theirs.predict(probe), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


# ---------------------------------------------------------------------- oracles


@pytest.mark.parametrize("structure", ["low_rank", "joint"])
def test_it_equals_the_linearised_propagation_of_a_joint_head(structure: str) -> None:
    """Of two layers with ReLU between; the low rank is that of all weights."""
    layer = nn.Linear(FEATURES, OUTPUTS, dtype=torch.float64)
    settings: dict[str, Any] = {"hidden_variance": HIDDEN, "last_variance": LAST, "noise_variance": NOISE, "rho": 0.0}
    config = HeadConfig(layers=2, structure="joint", propagation="linearised", **settings)
    head = BayesianHead.from_linear(layer, config)
    first, last = weights_of(head.state)
    module = nn.Sequential(nn.Linear(FEATURES, len(first)), nn.ReLU(), nn.Linear(len(first), OUTPUTS)).double()
    with torch.no_grad():
        for part, weight in ((module[0], first), (module[2], last)):
            part.weight.copy_(weight[:, :-1])
            part.bias.copy_(weight[:, -1])
    prior = {"0.*": HIDDEN, "2.*": LAST}
    ours = module_head(module, structure=structure, rank=weights_in(module), prior_variance=prior)
    assert_same(ours, head)
    for seed, count in enumerate([1, 3, 1, 2, 1, 1]):
        data = rows(count, seed)
        assert ours.update(*data) == pytest.approx(head.update(*data), rel=1e-10, nan_ok=True)
        assert_same(ours, head)


@pytest.mark.parametrize(("structure", "rank"), [("low_rank", 8), ("low_rank", 20), ("joint", 1)])
@pytest.mark.parametrize("blocks", [[1] * 12, [5, 1, 6]])
def test_of_one_linear_layer_it_is_bayesian_regression(structure: str, rank: int, blocks: list[int]) -> None:
    layer, noise = nn.Linear(FEATURES, OUTPUTS, dtype=torch.float64), 0.3 * random_cov(OUTPUTS, seed=1)
    head = module_head(layer, structure=structure, rank=rank, prior_variance={"bias": 0.5, "*": 2.0})
    head.set_noise(noise)
    (features, target), start = rows(12, seed=2), head.mean.clone()
    for data in zip(features.split(blocks), target.split(blocks), strict=True):
        head.update(*data)
    unit = torch.eye(OUTPUTS, dtype=torch.float64)  # the weights come before the biases
    design = torch.cat([torch.cat([torch.kron(unit, row), unit], dim=1) for row in features])
    prior = torch.cat([torch.full((6,), 2.0), torch.full((2,), 0.5)]).double()
    inverse = torch.block_diag(*[torch.linalg.inv(noise)] * 12)
    cov = torch.linalg.inv(design.mT @ inverse @ design + torch.diag(1.0 / prior))
    mean = start + cov @ design.mT @ inverse @ (target.flatten() - design @ start)
    torch.testing.assert_close(head.mean, mean, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(head.covariance(), cov, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head.variances(), cov.diagonal(), rtol=1e-10, atol=0.0)


def test_an_update_is_the_extended_kalman_filters() -> None:
    """Of a tanh network, with the gain written out."""
    module, noise = network(), 0.2 * random_cov(OUTPUTS, seed=5)
    head, names = module_head(module, structure="joint"), list(dict(module.named_parameters()))
    head.set_noise(noise)
    head.update(*rows(4, 1))
    features, target = rows(3, 2)

    def outputs(flat: Tensor) -> Tensor:
        parts = flat.split([value.numel() for value in module.parameters()])
        values = {n: part.view_as(p) for n, part, p in zip(names, parts, module.parameters(), strict=True)}
        return torch.func.functional_call(module, values, (features,)).flatten()

    mean, cov = head.mean.clone(), head.covariance()
    J = torch.func.jacrev(outputs)(mean).detach()
    gain = cov @ J.mT @ torch.linalg.inv(J @ cov @ J.mT + torch.block_diag(noise, noise, noise))
    error = target.flatten() - outputs(mean).detach()
    head.update(features, target)
    torch.testing.assert_close(head.mean - mean, gain @ error, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(head.covariance(), cov - gain @ J @ cov, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_a_lower_rank_never_claims_to_know_more_than_was_told(rank: int) -> None:
    """What is dropped of the directions stays on the diagonal, so that no single variance is larger than told."""
    exact, low = module_head(structure="joint"), module_head(rank=rank)
    for seed in range(30):
        features, target = rows(1, seed)
        low.update(features, target)
        exact.update(features, target)
    assert low.state.cov[1].shape == (weights_in(network()), rank)
    assert bool((low.variances() > 0.0).all())
    told = 1.0 / low.state.cov[0] - low.variances()
    assert bool((told >= 0.0).all())
    features, target = rows(30, 0)
    errors = [float((head(features) - target).square().mean()) for head in (low, exact)]
    assert errors[0] < 2.0 * errors[1]


# ---------------------------------------------------------------------- which parameters, and how far they may move


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        (None, ("0.weight", "0.bias", "2.weight", "2.bias")),
        (["2.weight"], ("2.weight",)),
        (["2.*", "0.bias"], ("0.bias", "2.weight", "2.bias")),
        (lambda name, value: value.ndim == 1, ("0.bias", "2.bias")),
    ],
)
def test_parameters_are_chosen_by_name_or_predicate(parameters: Any, names: tuple[str, ...]) -> None:
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    head = module_head(module, parameters=parameters)
    assert head.names == names
    torch.testing.assert_close(head(randn(4, FEATURES, seed=1)), module(randn(4, FEATURES, seed=1)).detach())
    head.update(*rows(3, 2))
    adapted = head.parameters_of_mean()
    assert tuple(adapted) == names
    assert all(not torch.equal(value, before[name]) for name, value in adapted.items())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())  # it is a copy
    module.load_state_dict(adapted, strict=False)
    torch.testing.assert_close(module(randn(4, FEATURES, seed=1)).detach(), head(randn(4, FEATURES, seed=1)))


def test_each_group_has_its_prior_variance() -> None:
    """The first pattern that fits counts, and what none fits has the configuration's."""
    prior = {"2.bias": 0.5, "2.*": 3.0, "0.weight": 1e-3}
    head = module_head(prior_variance=prior, hidden_variance=0.25)
    sizes = {"0.weight": (12, 1e-3), "0.bias": (4, 0.25), "2.weight": (8, 3.0), "2.bias": (2, 0.5)}
    expected = torch.cat([torch.full((count,), value).double() for count, value in sizes.values()])
    torch.testing.assert_close(head.variances(), expected, rtol=1e-7, atol=0.0)
    assert torch.equal(module_head(prior_variance=0.5).variances(), torch.full((26,), 0.5).double())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"parameters": ["3.*"]}, ValueError, "no parameter of the module is selected; it has 0.weight, 0.bias"),
        ({"prior_variance": 0.0}, ValueError, "the prior variance of 0.weight is 0.0; it must be positive"),
        ({"prior_variance": {"2.*": -1.0}}, ValueError, "the prior variance of 2.weight is -1.0"),
        ({"structure": "neuron"}, ValueError, "a module takes 'low_rank', 'diagonal' or 'joint'"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        module_head(**change)
    large = nn.Linear(300, 100)
    with pytest.raises(ValueError, match=r"joint covariance of 30,100 parameters would take 7\.25 GB; use 'low_rank'"):
        LinearisedHead(large, 100, HeadConfig(structure="joint"))
    with pytest.raises(ValueError, match="'low_rank' is for LinearisedHead"):
        BayesianHead(FEATURES, OUTPUTS, HeadConfig(structure="low_rank"))
    with pytest.raises(TypeError, match=r"use BayesianHead\.from_linear for one linear layer"):
        LinearisedHead.from_linear(nn.Linear(FEATURES, OUTPUTS))


# ---------------------------------------------------------------------- as any head


@pytest.mark.parametrize("structure", ["low_rank", "diagonal", "joint"])
def test_it_learns_is_saved_and_takes_back_as_any_head(structure: Any) -> None:
    head, never = (module_head(structure=structure, history=5, prior_variance=0.1) for _ in range(2))
    for seed in range(3):
        head.update(*rows(2, seed))
    never.update(*rows(2, 0))
    back = module_head(network(seed=7), structure=structure, history=5, prior_variance=0.1)
    back.load_state_dict(head.state_dict())
    assert_same(back, head, 0.0)
    assert head.rollback(2) == 4
    assert int(head.labels_seen) == 2
    assert_same(head, never, 1e-11)
    head.reset()
    assert_same(head, module_head(structure=structure, prior_variance=0.1), 0.0)
    head.update(*rows(2, 0))
    assert_same(head, never)
    head.reopen()
    torch.testing.assert_close(head.variances(), torch.full((26,), 0.1, dtype=torch.float64), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_a_low_rank_is_loosened_as_a_joint_covariance(fraction: float) -> None:
    low, joint = module_head(rank=26), module_head(structure="joint")
    for head in (low, joint):
        head.update(*rows(4, 1))
        head.reopen(fraction)
        head.add_process_noise(0.1)
        head.forget(0.9)
        head.update(*rows(4, 2))
    torch.testing.assert_close(low.covariance(), joint.covariance(), rtol=1e-9, atol=1e-12)
    assert_same(low, joint, 1e-9)


def test_classes_are_learned_through_every_layer() -> None:
    head = module_head(outputs=3, rule="laplace", prior_variance=0.5)
    features, classes = randn(60, FEATURES, seed=1), torch.arange(60) % 3
    features[torch.arange(60), classes] += 3.0
    for row, label in zip(features.split(1), classes.split(1), strict=True):
        head.update(row, label)
    assert float((head.predict(features).mean.argmax(-1) == classes).double().mean()) > 0.95


def test_the_noise_is_learned() -> None:
    head = module_head(noise="learned", prior_variance=0.5)
    features = randn(400, FEATURES, seed=1)
    target = network(seed=3)(features).detach() + 0.5 * randn(400, OUTPUTS, seed=2)
    for data in zip(features.split(4), target.split(4), strict=True):
        head.update(*data)
    torch.testing.assert_close(head.noise_cov.diagonal(), torch.full((2,), 0.25).double(), rtol=0.3, atol=0.0)


def test_inputs_of_any_shape_reach_the_module_in_its_own_dtype() -> None:
    module = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, OUTPUTS))
    head = LinearisedHead(module, OUTPUTS, HeadConfig(noise_variance=NOISE))
    tokens = torch.tensor([[0, 1], [4, 2], [3, 3]])
    torch.testing.assert_close(head.predict(tokens).mean.float(), module(tokens).detach())
    assert head.update(tokens, randn(3, OUTPUTS, seed=1)).labels == 6
    half = module_head(network().float())
    torch.testing.assert_close(
        half(randn(4, FEATURES, seed=1)), network()(randn(4, FEATURES, seed=1)).detach(), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"the module returned \(3, 2\) for 3 rows; expected \(3, 1\)"):
        LinearisedHead(network(), 1).update(*rows(3, 1, 1))
