"""What a user chooses of the Bayesian head: depth, storage, output rule and prior."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kbt_rl.inference.noise import NOISES, STATISTICS
from kbt_rl.inference.output import RULES, Link
from kbt_rl.inference.prior import layer_shapes
from kbt_rl.inference.state import HeadSpec
from kbt_rl.inference.structures import STRUCTURES

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
        noise_variance: Variance of the label noise; for ``replace`` the paper's Sigma_data. With ``noise="learned"``
            see ``noise_start`` instead.
        hidden_variance: Prior variance of the hidden layers' weights.
        last_variance: Prior variance of the last layer's weights.
        rho: Minus the prior correlation of the last-layer weights of a pair; 0 is the paper's independent prior. None
            is 0.99, or 0 for the diagonal structure, which cannot store it.
        feature_variance: Variance of each feature (Algorithm 2, line 13), 0 for exact features.
        relu_order: Terms of the ReLU's covariance series; the paper prints 2.
        noise: ``fixed``, or ``learned``: the noise covariance is estimated from the labels (rule ``measure`` only).
        noise_start: Noise variance that learning starts from. Too large costs a few labels; too small makes the first
            labels count for more than they are worth, which no later label can take back.
        noise_labels: How many labels' worth of trust the start gets.
        noise_memory: Labels over which the learned noise averages; infinite for a noise that never changes.
        noise_floor: Smallest noise variance that is learned. Where the world may change again, some 0.01: what the
            features cannot express of one world is then not learned as if it were exact, at the cost of the next.
        noise_statistic: ``innovation`` or ``variational``: how the noise is learned, see ``inference.noise``.
        robust_dof: Degrees of freedom of Student's t noise, 2 to 10 say, so that wild labels count for little; None for
            Gaussian noise. The noise covariance is then that of ordinary labels (rule ``measure`` only).
        history: Updates to keep for ``BayesianHead.rollback``, 0 for none. One of a single row takes as much memory as
            the weight means times two more than the outputs. An update then takes up to twice the time.
        dtype: ``float64``, or ``float32``: means and covariance are stored in half the memory, the arithmetic of a
            single row stays in float64. Pays where the covariance exceeds the cache; a small head is slower with it.
            For one or two layers with exact features; see ``inference.resolution`` for what it cannot resolve.
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
    noise: str = "fixed"
    noise_start: float = 0.1
    noise_labels: float = 1.0
    noise_memory: float = 500.0
    noise_floor: float = 1e-6
    noise_statistic: str = "innovation"
    robust_dof: float | None = None
    history: int = 0
    dtype: str = "float64"

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
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 0:
            raise ValueError(f"history is {self.history!r}; a number of updates to keep, 0 for none")
        _check_choice("dtype", self.dtype, ("float64", "float32"))
        if self.dtype == "float32" and (self.layers > 2 or self.feature_variance != 0.0):
            raise ValueError(
                f"dtype is 'float32' with layers={self.layers} and feature_variance={self.feature_variance}; what it "
                "can resolve is checked for one or two layers with exact features (0.0) only; use 'float64'"
            )
        self._check_noise()

    def _check_noise(self) -> None:
        _check_choice("noise", self.noise, NOISES)
        _check_choice("noise_statistic", self.noise_statistic, STATISTICS)
        for name in ("noise_start", "noise_labels", "noise_floor"):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        if self.noise_floor > self.noise_start:
            raise ValueError(f"noise_floor is {self.noise_floor}, above noise_start {self.noise_start}")
        if not self.noise_memory >= max(1.0, self.noise_labels):
            raise ValueError(f"noise_memory is {self.noise_memory}; at least 1 and noise_labels, {self.noise_labels}")
        if self.robust_dof is not None and not 0.0 < self.robust_dof < float("inf"):
            raise ValueError(
                f"robust_dof is {self.robust_dof}; it must be positive and finite, None for Gaussian noise"
            )
        if self.plain_noise:
            return
        if self.rule != "measure":
            raise ValueError(
                f"noise={self.noise!r} with robust_dof={self.robust_dof} needs the rule 'measure', which has a noise "
                f"to learn or to weigh labels by; got {self.rule!r}"
            )
        if self.noise == "fixed" and self.noise_variance == 0.0:
            raise ValueError("noise_variance is 0; robust_dof compares errors with the noise, which must be positive")

    @classmethod
    def paper(cls, epsilon: float, **changes: Any) -> HeadConfig:
        """The paper's prior: one variance ``epsilon`` for all weights, and for the features as well."""
        base = cls(structure="layer", hidden_variance=epsilon, last_variance=epsilon, feature_variance=epsilon, rho=0.0)
        return replace(base, **changes)

    @property
    def plain_noise(self) -> bool:
        """Whether the noise is known and Gaussian."""
        return self.noise == "fixed" and self.robust_dof is None

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
