"""What a user chooses of the Bayesian head: depth, storage, output rule and prior."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kbt_rl.inference.output import RULES, Link
from kbt_rl.inference.prior import layer_shapes
from kbt_rl.inference.structures import STRUCTURES
from kbt_rl.inference.update import HeadSpec

# A joint covariance of 4,000 weights takes 70 MB.
_MAX_JOINT_WEIGHTS = 4_000


@dataclass(frozen=True)
class HeadConfig:
    """Depth, storage, output rule and prior of the head. Variances are in units of ``target_scale`` squared.

    Attributes:
        layers: Number of linear layers, ReLU between them; 1 is exact Bayesian linear regression.
        width: Hidden units, at least twice the features, which is the default.
        structure: ``joint``, ``layer``, ``neuron``, ``diagonal``, or ``auto``: joint up to 4,000 weights, layer above.
        rule: ``measure`` or ``replace`` (identity link), ``fisher``, ``laplace``, ``taylor`` or ``replace_softmax``
            (softmax link).
        noise_variance: Variance of the label noise; for ``replace`` the paper's Sigma_data.
        hidden_variance: Prior variance of the hidden layers' weights.
        last_variance: Prior variance of the last layer's weights.
        rho: Minus the prior correlation of the last-layer weights of a pair; 0 is the paper's independent prior. None
            is 0.99, or 0 for the diagonal structure, which cannot store it.
        feature_variance: Variance of each feature (Algorithm 2, line 13), 0 for exact features.
        relu_order: Terms of the ReLU's covariance series; the paper prints 2.
    """

    layers: int = 2
    width: int | None = None
    structure: str = "auto"
    rule: str = "measure"
    noise_variance: float = 1e-3
    hidden_variance: float = 1e-5
    last_variance: float = 1.0
    rho: float | None = None
    feature_variance: float = 0.0
    relu_order: int = 2

    def __post_init__(self) -> None:
        _check_choice("structure", self.structure, ("auto", *STRUCTURES))
        _check_choice("rule", self.rule, tuple(RULES))
        for name in ("noise_variance", "hidden_variance", "last_variance", "feature_variance"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}; a variance is finite and not negative")
        if self.rho is not None and not 0.0 <= self.rho < 1.0:
            raise ValueError(f"rho is {self.rho}; it must lie in [0, 1), and 0 is the paper's independent prior")
        if self.relu_order < 1:
            raise ValueError(f"relu_order is {self.relu_order}; the series needs at least 1 term")

    @classmethod
    def paper(cls, epsilon: float, **changes: Any) -> HeadConfig:
        """The paper's prior: one variance ``epsilon`` for all weights, and for the features as well."""
        base = cls(structure="layer", hidden_variance=epsilon, last_variance=epsilon, feature_variance=epsilon, rho=0.0)
        return replace(base, **changes)

    @property
    def link(self) -> Link:
        """Link of the output rule."""
        return RULES[self.rule].link

    def resolve(self, features: int, outputs: int) -> tuple[HeadSpec, float]:
        """The head's fixed part and ``rho``, with ``auto`` and None decided."""
        shapes = layer_shapes(features, outputs, self.layers, self.width)
        structure = self.structure
        if structure == "auto":
            structure = "joint" if sum(shape.size for shape in shapes) <= _MAX_JOINT_WEIGHTS else "layer"
        rho = self.rho if self.rho is not None else (0.0 if structure == "diagonal" else 0.99)
        return HeadSpec(shapes, structure, self.feature_variance, self.relu_order), rho


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
