"""Every layer of any differentiable module, by the extended Kalman filter.

The module is replaced by its value and its Jacobian at the mean of the parameters: ``f(theta, x) + J (w - theta)``.
From there on an update is the one of ``network``. Up to some thousands of parameters the covariance may be ``joint``;
``low_rank`` is for any number. A large model adapts those parameters that the user names: a few low-rank adapters, say.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kbt_rl.inference import checks, network
from kbt_rl.inference.config import MAX_JOINT_WEIGHTS, HeadConfig
from kbt_rl.inference.covariance.base import Cov
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.head import BayesianHead, HeadKind
from kbt_rl.inference.likelihoods.registry import LIKELIHOODS
from kbt_rl.inference.network import Forward
from kbt_rl.inference.noise.registry import NOISES, NoiseBelief
from kbt_rl.inference.posterior import Posterior
from kbt_rl.inference.transactions import signals_deferred
from kbt_rl.inference.types import Gaussian, HeadSpec, HeadState, LayerShape, Part, Rows, Tensors

Selection = Callable[[str, nn.Parameter], bool] | Iterable[str] | None


@dataclass(frozen=True, eq=False)
class ModuleKind(HeadKind):
    """The kind of a module: one row of parameters with a prior variance each."""

    variances: Tensor

    def prior_cov(self, buffers: Mapping[str, Any] | None = None) -> Cov:
        """See ``HeadKind``."""
        return STRUCTURES[self.spec.structure].from_variances(self.variances, self.config.rank)

    def in_units(self, buffers: Any, features: Rows) -> Tensor:
        """Inputs as they are: the module has its own units."""
        if isinstance(features, Tensor) and features.is_complex():
            raise TypeError(f"inputs hold {features.dtype}; expected real numbers")
        return features if isinstance(features, Tensor) else torch.as_tensor(checks.as_array(features))

    def rows(self, buffers: Any, features: Rows) -> Tensor:
        """See ``HeadKind``; the module checks their shape."""
        rows = self.in_units(buffers, features)
        if rows.ndim == 0 or len(rows) == 0:
            raise ValueError(f"inputs have shape {tuple(rows.shape)}; expected (rows >= 1, ...)")
        return rows

    @property
    def one_by_one(self) -> bool:
        """Rows are linearised at one mean and learned jointly."""
        return False

    def conditions_each(self, noise_cov: Tensor, belief: NoiseBelief | None) -> bool:
        """All outputs depend on the same parameters."""
        return False

    def tensors(self) -> Tensors:
        """See ``HeadKind``; without units of features."""
        tensors = super().tensors()
        del tensors["feature_mean"], tensors["feature_scale"]
        return tensors


class LinearisedHead(BayesianHead):
    """Gaussian posterior over named parameters of a module, which is copied; the others stay as they are.

    It learns and predicts as any head does: ``update``, ``predict``, ``rollback``, ``reopen``, ``state_dict``. Its
    features are the module's inputs ``(B, ...)``, its outputs the module's ``(B, o)``.

    Args:
        module: Differentiable, from ``(B, ...)`` to ``(B, o)``; rows must not depend on each other.
        out_features: ``o``.
        config: Rule, noise, history; ``structure`` is ``low_rank`` (with ``rank``), ``diagonal`` or ``joint``; ``auto``
            is ``low_rank``.
        parameters: Which: names or patterns (``"head.*"``), or a function of name and parameter; all by default.
        prior_variance: One for all, or by pattern of the name, of which the first that fits counts; those that none
            fits get ``config.hidden_variance``.
        target_scale: Scale of each target, ``(o,)``; variances of outputs and noise are in units of its square.

    Example:
        >>> head = LinearisedHead(network, 1, prior_variance={"last.*": 1.0, "*": 1e-4})
        >>> info = head.update(observations, actions)
    """

    def __init__(
        self,
        module: nn.Module,
        out_features: int,
        config: HeadConfig | None = None,
        *,
        parameters: Selection = None,
        prior_variance: float | Mapping[str, float] | None = None,
        target_scale: Tensor | None = None,
    ) -> None:
        config = HeadConfig() if config is None else config
        names = _selected(module, parameters)
        own = dict(module.named_parameters())
        priors = [own[name].new_full((own[name].numel(),), 1.0, dtype=torch.float64) for name in names]
        scales = [_variance(name, prior_variance, config) for name in names]
        variances = torch.cat([ones * scale for ones, scale in zip(priors, scales, strict=True)])
        Posterior.__init__(self, _kind(variances, out_features, config))
        self._engine = None
        self._loss, self._warned = 1.0, False
        self.names = tuple(names)
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self._places = _places(self.module, names)
        start = torch.cat([own[name].detach().flatten() for name in names]).double()
        scale = checks.positive("target_scale", target_scale, (out_features,), self.mean)
        self._take_over({"mean": start, "prior_mean": start.clone(), "target_scale": scale})

    @classmethod
    def from_linear(cls, *args: Any, **kwargs: Any) -> BayesianHead:
        """A linear layer has no other layers; ``BayesianHead.from_linear`` is exact."""
        raise TypeError(
            "LinearisedHead(module, ...) takes any module; use BayesianHead.from_linear for one linear layer"
        )

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Return to the module's own parameters and the prior; what was learned is forgotten."""
        new: Tensors = {"mean": self.prior_mean.clone(), "labels_seen": torch.zeros_like(self.labels_seen)}
        new |= dict(zip(self.kind.cov_names, self.kind.prior_cov(), strict=True))
        if self.learns_noise:
            new |= {"noise_cov": self.noise_start_cov.clone(), "noise_labels": self.kind.start_labels()}
        self._take_over(new)

    @torch.no_grad()
    def mean_outputs(self, features: Rows) -> Tensor:
        """The module at the mean of its parameters, float64."""
        with self._lock:
            inputs = self.kind.in_units(self._buffers, features)
            return self._call(self._parameters_of(self.mean), inputs).double()

    def parameters_of_mean(self) -> dict[str, Tensor]:
        """The adapted parameters by name, as copies, for ``module.load_state_dict(..., strict=False)``."""
        with self._lock:
            return {n: value.clone() for n, value in zip(self.names, self._parameters_of(self.mean), strict=True)}

    def _propagation(self) -> network.Propagation:
        return self._linearise

    def _logits(self, features: Rows) -> Gaussian:
        inputs = self.kind.in_units(self._buffers, features)
        parts = [self._linearise(self.state, row.unsqueeze(0)).gaussian for row in inputs]
        return Gaussian(torch.stack([part.mean for part in parts]), torch.stack([part.cov for part in parts]))

    def _linearise(self, state: HeadState, inputs: Tensor) -> Forward:
        """Mean ``(B o,)`` and Jacobian at the mean of the parameters, in units of ``target_scale``."""
        rows, o = len(inputs), self.out_features
        with torch.enable_grad():
            mean = state.mean.clone().requires_grad_()
            outputs = self._call(self._parameters_of(mean), inputs)
            if outputs.shape != (rows, o):
                raise ValueError(f"the module returned {tuple(outputs.shape)} for {rows} rows; expected {(rows, o)}")
            flat = outputs.flatten()
            gradients = [
                torch.autograd.grad(flat[index], mean, retain_graph=index + 1 < len(flat))[0]
                for index in range(len(flat))
            ]
        jacobian = torch.stack(gradients)
        scale = self.target_scale.repeat(rows)
        # As one neuron without hidden units, whose inputs for each output are that output's gradient.
        return network.exact(state, flat.detach().double() / scale, {0: Part(jacobian / scale.unsqueeze(-1), None)})

    def _parameters_of(self, mean: Tensor) -> list[Tensor]:
        own = self._own()
        if all(each.dtype == own[0].dtype and each.device == own[0].device for each in own):
            mean = mean.to(own[0])  # at once
        parts = mean.split([parameter.numel() for parameter in own])
        return [part.view_as(parameter).to(parameter) for part, parameter in zip(parts, own, strict=True)]

    def _call(self, values: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """The module with these parameters, as ``torch.func.functional_call``, in a fifth of its own time."""
        like = next(self.module.parameters())
        given = inputs.to(like.device, like.dtype) if inputs.is_floating_point() else inputs.to(like.device)
        own = self._own()
        with signals_deferred():  # the module gets its own parameters back whatever happens
            try:
                self._put(values)
                outputs: Tensor = self.module(given)
            finally:
                self._put(own)
        return outputs

    def _own(self) -> list[Tensor]:
        """The module's own parameters, which say dtype, device and shape."""
        return [uses[0].held[uses[0].name] for uses in self._places]

    def _put(self, values: Sequence[Tensor]) -> None:
        for uses, value in zip(self._places, values, strict=True):
            for held, name in uses:
                held[name] = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearisedHead:
        """Follow a change of device; the posterior keeps float64, the module follows."""
        super()._apply(fn, recurse)
        self.module._apply(fn)
        return self


def _kind(variances: Tensor, outputs: int, config: HeadConfig) -> ModuleKind:
    """The kind of a module with so many parameters."""
    count = len(variances)
    structure = "low_rank" if config.structure == "auto" else config.structure
    if structure not in ("low_rank", "diagonal", "joint"):
        raise ValueError(f"structure {structure!r} stores layers; a module takes 'low_rank', 'diagonal' or 'joint'")
    if structure == "joint" and count > 4 * MAX_JOINT_WEIGHTS:
        raise ValueError(
            f"the joint covariance of {count:,} parameters would take {8e-9 * count**2:.3g} GB; use 'low_rank'"
        )
    config = replace(config, structure=structure)
    deviation = float(variances.max().sqrt())
    spec = HeadSpec((LayerShape(1, count),), structure, largest_deviation=deviation)
    noise = NOISES[config.noise](config, outputs, False)
    names = tuple(f"cov_{index}" for index in range(STRUCTURES[structure].count(spec.shapes)))
    return ModuleKind(count, outputs, config, spec, 0.0, LIKELIHOODS[config.rule], noise, names, variances)


class _Use(NamedTuple):
    """Where a module looks for a parameter: ``held`` is the ``_parameters`` of a submodule."""

    held: dict[str, Any]
    name: str


def _places(module: nn.Module, names: Sequence[str]) -> list[list[_Use]]:
    """All uses of each parameter, of which tied ones have several."""
    uses: dict[int, list[_Use]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            uses.setdefault(id(parameter), []).append(_Use(part._parameters, name))
    own = dict(module.named_parameters())
    return [uses[id(own[name])] for name in names]


def _selected(module: nn.Module, parameters: Selection) -> list[str]:
    """Names of the parameters that are learned."""
    own = dict(module.named_parameters())
    if parameters is None:
        return list(own)
    if callable(parameters):
        found = [name for name, value in own.items() if parameters(name, value)]
    else:
        patterns = list(parameters)
        found = [name for name in own if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not found:
        raise ValueError(f"no parameter of the module is selected; it has {', '.join(own) or 'none'}")
    return found


def _variance(name: str, prior: float | Mapping[str, float] | None, config: HeadConfig) -> float:
    """Prior variance of a parameter."""
    if prior is None:
        return config.hidden_variance
    if not isinstance(prior, Mapping):
        value = prior
    else:
        value = next((v for pattern, v in prior.items() if fnmatch.fnmatchcase(name, pattern)), config.hidden_variance)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"the prior variance of {name} is {value}; it must be positive and finite")
    return float(value)
