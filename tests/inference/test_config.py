"""What a user chooses: defaults that depend on each other, and choices that are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kbt_rl.inference.config import MAX_JOINT_WEIGHTS, HeadConfig
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.likelihoods.registry import LIKELIHOODS

NAN, INF = float("nan"), float("inf")
SHAPES = (3, 2)  # features and outputs


def structure_of(features: int, outputs: int, **config: Any) -> str:
    return HeadConfig(**config).resolve(features, outputs)[0].structure


def test_the_default_is_one_layer_whose_outputs_share_a_covariance() -> None:
    assert HeadConfig().layers == 1
    assert structure_of(256, 100) == "shared"
    assert structure_of(4, 2, noise="learned") == "shared"


@pytest.mark.parametrize(
    ("config", "structure"),
    [
        ({"rule": "laplace"}, "neuron"),
        ({"rule": "fisher"}, "neuron"),
        ({"rule": "taylor"}, "joint"),
        ({"rule": "replace"}, "joint"),
        ({"robust_dof": 4.0}, "joint"),
        ({"feature_variance": 0.1}, "joint"),
        ({"layers": 2}, "joint"),
        ({"layers": 2, "rule": "laplace"}, "joint"),
    ],
)
def test_auto_takes_what_can_store_the_posterior(config: dict[str, Any], structure: str) -> None:
    assert structure_of(*SHAPES, **config) == structure


@pytest.mark.parametrize(("features", "outputs", "fits"), [(4, 1, True), (43, 1, True), (44, 1, False), (43, 3, False)])
def test_auto_is_joint_up_to_four_thousand_weights_and_then_says_what_else(
    features: int, outputs: int, fits: bool
) -> None:
    spec, _ = HeadConfig(layers=2, structure="joint").resolve(features, outputs)
    assert (sum(spec.sizes) <= MAX_JOINT_WEIGHTS) == fits
    if fits:
        assert structure_of(features, outputs, layers=2) == "joint"
        return
    with pytest.raises(
        ValueError, match=r"weights, whose joint covariance would take .* MB; choose layers=1.*'neuron'"
    ):
        HeadConfig(layers=2).resolve(features, outputs)


def test_auto_does_not_store_the_covariances_of_very_many_classes() -> None:
    with pytest.raises(ValueError, match=r"structure='neuron' \(.*GB\), structure='rotated' \(.*MB\)"):
        structure_of(768, 50_000, rule="laplace")


@pytest.mark.parametrize("structure", [*STRUCTURES])
def test_default_rho_is_tied_where_the_structure_can_store_it(structure: Any) -> None:
    expected = 0.0 if structure in ("diagonal", "rotated") else 0.99
    assert HeadConfig(structure=structure).resolve(2, 1)[1] == expected
    assert HeadConfig(structure=structure, rho=0.0).resolve(2, 1)[1] == 0.0


def test_the_papers_prior_has_one_epsilon_for_weights_and_features() -> None:
    config = HeadConfig.paper(1e-3, layers=3, rule="replace")
    head = BayesianHead(*SHAPES, config)
    expected = 1e-3 * torch.eye(len(head.mean), dtype=torch.float64)
    torch.testing.assert_close(head.covariance(), expected, rtol=1e-15, atol=0.0)
    assert head.spec.feature_variance == 1e-3
    assert (head.config.rule, head.config.layers, head.spec.structure) == ("replace", 3, "layer")
    assert HeadConfig.paper(1e-3).layers == 2


def test_a_single_layer_has_no_width_to_be_too_narrow() -> None:
    assert BayesianHead(*SHAPES, HeadConfig(layers=1, width=1)).spec.shapes == ((2, 4),)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"layers": 0}, "layers is 0; a whole number, at least 1"),
    "negative layers": ({"layers": -1}, "layers is -1"),
    "half a layer": ({"layers": 1.5}, "layers is 1.5; a whole number"),
    "a flag for a number": ({"layers": True}, "layers is True; a whole number"),
    "too narrow": ({"layers": 2, "width": 5}, "width is 5; .* 3 features and need at least 6 units"),
    "no width": ({"width": 0}, "width is 0; a whole number"),
    "unknown structure": ({"structure": "full"}, "structure is 'full'; choose one of auto, joint, layer, neuron, diag"),
    "unknown rule": ({"rule": "bayes"}, f"rule is 'bayes'; choose one of {', '.join(LIKELIHOODS)}"),
    "unknown noise": ({"noise": "guessed"}, "noise is 'guessed'; choose one of fixed, learned"),
    "unknown statistic": ({"noise_statistic": "mean"}, "noise_statistic is 'mean'; choose one of innovation, variat"),
    "unknown forgetting": ({"forgetting": "all"}, "forgetting is 'all'; choose one of none, process_noise, towards_pr"),
    "diagonal and tied": ({"layers": 2, "structure": "diagonal", "rho": 0.5}, "cannot store the correlated weights"),
    "rho of 1": ({"rho": 1.0}, r"rho is 1.0; it must lie in \[0, 1\)"),
    "negative rho": ({"rho": -0.1}, "rho is -0.1"),
    "rho is NaN": ({"rho": NAN}, "rho is nan"),
    "relu_order of 0": ({"relu_order": 0}, "relu_order is 0; a whole number, at least 1"),
    "negative history": ({"history": -1}, "history is -1; a whole number, at least 0"),
    "half an update": ({"history": 1.5}, "history is 1.5; a whole number"),
    "active for sure": ({"active_probability": 1.0}, r"active_probability is 1.0; it must lie in \[0, 1\)"),
    "fading to nothing": ({"forgetting": "fading", "forgetting_rate": 0.0}, r"factor is 0.0; it lies in \(0, 1\]"),
    "beyond the prior": ({"forgetting": "towards_prior", "forgetting_rate": 1.1}, "rate towards the prior is 1.1"),
    "endless walk": ({"forgetting": "process_noise", "forgetting_rate": INF}, "process noise is inf"),
    "shared layers": ({"layers": 2, "structure": "shared"}, "'shared' is for one layer and exact features"),
    "shared and uncertain": ({"feature_variance": 0.1, "structure": "rotated"}, "'rotated' is for one layer and exact"),
    "shared as printed": ({"rule": "replace", "structure": "shared"}, "which the rule 'replace' cannot; .*'joint'"),
    "shared and taylor": ({"rule": "taylor", "structure": "shared"}, "which the rule 'taylor' cannot"),
    "shared and wild": ({"robust_dof": 4.0, "structure": "shared"}, "'shared' has Gaussian noise"),
    "nothing to learn": ({"noise": "learned", "rule": "replace"}, "needs the rule 'measure'"),
    "nothing to weigh": ({"robust_dof": 4.0, "rule": "fisher"}, "needs the rule 'measure'"),
    "no freedom": ({"robust_dof": 0.0}, "robust_dof is 0.0"),
    "no unit": ({"robust_dof": 4.0, "noise_variance": 0.0}, "noise_variance is 0"),
    "no start": ({"noise_start": 0.0}, "noise_start is 0.0"),
    "no trust": ({"noise_labels": NAN}, "noise_labels is nan"),
    "high floor": ({"noise_floor": 1.0}, "noise_floor is 1.0, above noise_start"),
    "short memory": ({"noise_memory": 0.5}, "noise_memory is 0.5"),
    "memory below trust": ({"noise_labels": 600.0}, "noise_memory is 500.0; at least 1 and noise_labels, 600.0"),
    **{
        f"{name} of {value}": ({name: value}, f"{name} is {value}; a variance is finite and not negative")
        for name in ("noise_variance", "hidden_variance", "last_variance", "feature_variance")
        for value in (-1.0, NAN, INF)
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        BayesianHead(*SHAPES, HeadConfig(**config))


NUMBERS = ("noise_variance", "hidden_variance", "last_variance", "feature_variance", "noise_start", "noise_labels")
NUMBERS += ("noise_floor", "noise_memory", "rho", "robust_dof", "active_probability", "forgetting_rate")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["0.1", True, [0.1], 1j])
def test_what_is_no_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} is .*; expected a number"):
        HeadConfig(**{name: value})


@pytest.mark.parametrize("sizes", [(0, 1), (3, 0), (3, -1), (3.0, 1), (True, 1), ("3", 1)])
def test_sizes_are_whole_numbers(sizes: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"(in|out)_features is .*; a whole number, at least 1"):
        BayesianHead(*sizes)


@pytest.mark.parametrize("structure", ["rotated", "diagonal"])
@pytest.mark.parametrize(
    "config", [{"noise": "learned"}, {"robust_dof": 4.0}, {"rule": "taylor"}, {"rule": "replace"}, {"rule": "laplace"}]
)
def test_every_noise_and_rule_goes_with_single_variances(structure: Any, config: dict[str, Any]) -> None:
    basis = torch.eye(3) if structure == "rotated" else None
    head = BayesianHead.from_linear(nn.Linear(*SHAPES), HeadConfig(structure=structure, **config), feature_basis=basis)
    before = head.variances()
    assert head.update(torch.ones(1, 3), torch.tensor([[0.7, 0.3]])).labels == 2
    assert not torch.equal(head.variances(), before)
    head.predict(torch.ones(1, 3)).epistemic_variance.sum()


def test_a_basis_is_for_rotated_features_only() -> None:
    with pytest.raises(ValueError, match="needs feature_basis, the eigenvectors of the features' covariance"):
        BayesianHead.from_linear(nn.Linear(*SHAPES), HeadConfig(structure="rotated"))
    with pytest.raises(ValueError, match="feature_basis is not orthogonal"):
        BayesianHead.from_linear(nn.Linear(*SHAPES), HeadConfig(structure="rotated"), feature_basis=2.0 * torch.eye(3))
    with pytest.raises(ValueError, match="feature_basis is for structure='rotated'; this head has 'shared'"):
        BayesianHead.from_linear(nn.Linear(*SHAPES), feature_basis=torch.eye(3))
