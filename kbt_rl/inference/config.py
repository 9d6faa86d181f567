"""What a user chooses of the Bayesian head: depth, storage, output rule, prior, noise and forgetting."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from kbt_rl.arguments import MOST
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.forgetting import FORGETTING
from kbt_rl.inference.likelihoods.base import Link
from kbt_rl.inference.likelihoods.registry import LIKELIHOODS
from kbt_rl.inference.network import PROPAGATIONS
from kbt_rl.inference.noise.learned import STATISTICS
from kbt_rl.inference.noise.registry import NOISES
from kbt_rl.inference.prior import layer_shapes
from kbt_rl.inference.types import HeadSpec, LayerShape

StructureName = Literal["auto", "joint", "layer", "neuron", "diagonal", "shared", "rotated", "low_rank"]
PropagationName = Literal["moments", "linearised"]
RuleName = Literal["measure", "replace", "laplace", "fisher", "taylor", "replace_softmax"]
NoiseName = Literal["fixed", "learned"]
StatisticName = Literal["innovation", "variational"]
ForgettingName = Literal["none", "process_noise", "towards_prior", "fading"]

# The root of a joint covariance of 4,000 weights takes 128 MB.
MAX_JOINT_WEIGHTS = 4_000
# Classes with a covariance each, in numbers: 256 MB.
_MAX_CLASS_NUMBERS = 2**25
_ONE_LAYER_ONLY = ("shared", "rotated")


@dataclass(frozen=True)
class HeadConfig:
    """Depth, storage, output rule and prior of the head. Variances are in units of ``target_scale`` squared.

    Attributes:
        layers: Number of linear layers, ReLU between them; 1 is exact Bayesian linear regression (recursive least
            squares), 2 the paper's head.
        width: Hidden units, at least twice the features, which is the default.
        structure: How the covariance is stored. ``auto``: for one layer ``shared``, or ``neuron`` for classes; for more
            ``joint`` up to 4,000 weights. ``shared`` is exact for any number of outputs; ``joint`` keeps all
            covariances, ``layer`` drops those between layers, ``neuron`` those between neurons, ``diagonal`` all;
            ``rotated`` is ``diagonal`` in the eigenbasis of the features, for many classes; ``low_rank`` is for any
            module, see ``LinearisedHead``.
        propagation: ``moments`` of the Gaussian network, or ``linearised`` at its mean (extended Kalman filter).
        rank: Of the structure ``low_rank``.
        rule: ``measure`` or ``replace`` (identity link); ``laplace``, ``fisher``, ``taylor`` or ``replace_softmax``
            (softmax link).
        noise_variance: Variance of the label noise; for ``replace`` the paper's Sigma_data. With ``noise="learned"``
            see ``noise_start`` instead.
        hidden_variance: Prior variance of the hidden layers' weights.
        last_variance: Prior variance of the last layer's weights. None is 1 with the identity link. With the softmax
            link it then goes by the layer that the head starts from: 0.2 times the mean square of its weights, so that
            the prior is as wide as the pre-trained layer is large, whatever the scale of the features; 20 for a layer
            of zeros, which knows nothing.
        rho: Minus the prior correlation of the last-layer weights of a pair; 0 is the paper's independent prior. None
            is 0.99, or 0 for the diagonal structure, which cannot store it.
        feature_variance: Variance of each feature (Algorithm 2, line 13), 0 for exact features.
        relu_order: Terms of the ReLU's covariance series; the paper prints 2.
        noise: ``fixed``, or ``learned``: the noise covariance is estimated from the labels (rule ``measure`` only).
            With the structure ``shared`` that is exact: an inverse-Wishart distribution, and Student's t predictions.
        noise_start: Noise variance that learning starts from. Too large costs a few labels; too small makes the first
            labels count for more than they are worth, which no later label can take back.
        noise_labels: How many labels' worth of trust the start gets.
        noise_memory: Labels over which the learned noise averages; infinite for a noise that never changes.
        noise_floor: Smallest noise variance that is learned. Where the world may change again, some 0.01: what the
            features cannot express of one world is then not learned as if it were exact, at the cost of the next.
        noise_statistic: ``innovation`` or ``variational``: how the noise is learned where it is not exact, see
            ``inference.noise.learned``.
        robust_dof: Degrees of freedom of Student's t noise, 2 to 10 say, so that wild labels count for little; None for
            Gaussian noise. The noise covariance is then that of ordinary labels (rule ``measure`` only).
        forgetting: What happens after each update: ``none``, ``process_noise``, ``towards_prior`` or ``fading``.
        forgetting_rate: How much of it, see ``inference.forgetting``.
        active_probability: With the softmax link and independent classes, the probability up to which a class that is
            not the label's keeps its covariance as it is; some 0.01 saves time with many classes.
        history: Updates to keep for ``BayesianHead.rollback``, 0 for none. One of a single row takes as much memory as
            the weight means times two more than the outputs. An update then takes up to twice the time.
    """

    layers: int = 1
    width: int | None = None
    structure: StructureName = "auto"
    propagation: PropagationName = "moments"
    rank: int = 10
    rule: RuleName = "measure"
    noise_variance: float = 1e-3
    hidden_variance: float = 1e-5
    last_variance: float | None = None
    rho: float | None = None
    feature_variance: float = 0.0
    relu_order: int = 2
    noise: NoiseName = "fixed"
    noise_start: float = 0.1
    noise_labels: float = 1.0
    noise_memory: float = 500.0
    noise_floor: float = 1e-6
    noise_statistic: StatisticName = "innovation"
    robust_dof: float | None = None
    forgetting: ForgettingName = "none"
    forgetting_rate: float = 0.0
    active_probability: float = 0.0
    history: int = 0

    def __post_init__(self) -> None:
        _check_choice("structure", self.structure, ("auto", *STRUCTURES))
        _check_choice("propagation", self.propagation, tuple(PROPAGATIONS))
        _check_choice("rule", self.rule, tuple(LIKELIHOODS))
        _check_choice("noise", self.noise, tuple(NOISES))
        _check_choice("noise_statistic", self.noise_statistic, tuple(STATISTICS))
        _check_choice("forgetting", self.forgetting, ("none", *FORGETTING))
        for name in ("layers", "relu_order", "rank"):
            _check_whole(name, getattr(self, name), 1)
        _check_whole("history", self.history, 0)
        if self.width is not None:
            _check_whole("width", self.width, 1)
        optional = [name for name in ("rho", "robust_dof") if getattr(self, name) is not None]
        for name in ("active_probability", "forgetting_rate", "noise_memory", *optional):
            _check_number(name, getattr(self, name))
        given = () if self.last_variance is None else ("last_variance",)
        for name in ("noise_variance", "hidden_variance", "feature_variance", *given):
            _check_number(name, getattr(self, name))
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; a variance is finite and not negative")
        if self.rho is not None and not 0.0 <= self.rho < 1.0:
            raise ValueError(f"rho is {self.rho}; it must lie in [0, 1), and 0 is the paper's independent prior")
        if not 0.0 <= self.active_probability < 1.0:
            raise ValueError(f"active_probability is {self.active_probability}; it must lie in [0, 1)")
        if self.structure in _ONE_LAYER_ONLY and (self.layers > 1 or self.feature_variance != 0.0):
            raise ValueError(
                f"structure {self.structure!r} is for one layer and exact features; got layers={self.layers}, "
                f"feature_variance={self.feature_variance}"
            )
        if self.structure == "shared" and not LIKELIHOODS[self.rule].has_each:
            raise ValueError(
                f"structure 'shared' conditions each output on its own, which the rule {self.rule!r} cannot; use "
                "structure='joint'"
            )
        if self.propagation == "linearised" and self.feature_variance != 0.0:
            raise ValueError("propagation='linearised' takes exact features; set feature_variance to 0")
        if self.forgetting != "none":
            FORGETTING[self.forgetting].check(self.forgetting_rate)
        elif not math.isfinite(self.forgetting_rate):
            raise ValueError(f"forgetting_rate is {self.forgetting_rate}; expected a finite number")
        self._check_noise()

    def _check_noise(self) -> None:
        for name in ("noise_start", "noise_labels", "noise_floor"):
            _check_number(name, getattr(self, name))
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")
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
        if self.structure == "shared" and self.robust_dof is not None:
            raise ValueError("structure 'shared' has Gaussian noise; use structure='joint' or 'neuron' with robust_dof")

    @classmethod
    def paper(cls, epsilon: float, **changes: Any) -> HeadConfig:
        """The paper's head and prior: two layers, one variance ``epsilon`` for all weights and the features."""
        base = cls(
            layers=2,
            structure="layer",
            hidden_variance=epsilon,
            last_variance=epsilon,
            feature_variance=epsilon,
            rho=0.0,
        )
        return replace(base, **changes)

    @property
    def plain_noise(self) -> bool:
        """Whether the noise is known and Gaussian."""
        return self.noise == "fixed" and self.robust_dof is None

    @property
    def link(self) -> Link:
        """Link of the output rule."""
        return LIKELIHOODS[self.rule].link

    def resolve(self, features: int, outputs: int) -> tuple[HeadSpec, float]:
        """The head's fixed part and ``rho``, with ``auto`` and None decided.

        Raises:
            ValueError: The sizes do not fit, or ``auto`` finds no structure that fits into memory.
        """
        shapes = layer_shapes(features, outputs, self.layers, self.width)
        structure = self._automatic(shapes) if self.structure == "auto" else self.structure
        rho = self.rho if self.rho is not None else (0.0 if structure in ("diagonal", "rotated") else 0.99)
        in_noise_units = structure == "shared" and self.noise == "learned"
        last = 1.0 if self.last_variance is None else self.last_variance
        variance = last / (self.noise_start if in_noise_units else 1.0)
        deviation = max(variance, self.hidden_variance if self.layers > 1 else 0.0) ** 0.5
        spec = HeadSpec(shapes, structure, self.feature_variance, self.relu_order, deviation, in_noise_units)
        return spec, rho

    def _automatic(self, shapes: tuple[LayerShape, ...]) -> str:
        weights = sum(shape.size for shape in shapes)
        if self.layers == 1:
            exact = self.rule == "measure" and self.robust_dof is None and self.feature_variance == 0.0
            if exact:
                return "shared"
            if self.rule in ("laplace", "fisher") and STRUCTURES["neuron"].sizes(shapes) <= _MAX_CLASS_NUMBERS:
                return "neuron"
        if weights <= MAX_JOINT_WEIGHTS:
            return "joint"
        instead = ["neuron", "diagonal"] if self.layers > 1 else ["neuron", "rotated"]
        others = ", ".join(f"structure={name!r} ({_megabytes(STRUCTURES[name].sizes(shapes))})" for name in instead)
        one_layer = layer_shapes(shapes[0].k - 1, shapes[-1].n, 1, None)
        best = f"layers=1 ({_megabytes(STRUCTURES['shared'].sizes(one_layer))}), or " if self.layers > 1 else ""
        raise ValueError(
            f"this head has {weights:,} weights, whose joint covariance would take {_megabytes(weights**2)}; choose "
            f"{best}{others}"
        )


def _megabytes(numbers: int) -> str:
    size = 8 * numbers / 1e6
    return f"{size / 1e3:.3g} GB" if size >= 1e3 else f"{size:.3g} MB"


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _check_whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise ValueError(f"{name} is {value!r}; a whole number, at least {least}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number")
