"""The SB3 policy whose last layer is a Gaussian posterior: means, samples, uncertainty, and a fallback beside it."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from kbt_rl.agents import posteriors as several
from kbt_rl.agents.fallback import Choice, Fallback, usable
from kbt_rl.agents.moments import ActionMoments
from kbt_rl.agents.transformer_policy import TransformerPolicy, drawn
from kbt_rl.arguments import MOST, choice, instance, whole
from kbt_rl.inference.batch import HeadBatch
from kbt_rl.inference.checks import as_array
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.models.context import ContextWindow
from kbt_rl.models.decision_transformer import DecisionTransformer, DecisionTransformerConfig

Sampling = Literal["epistemic", "predictive"]
Skip = Literal["observation", "none"]
Array = npt.NDArray[Any]

# An expert's forces have next to no noise. Of 1e-4 to 1e-7 (``python -m studies default_head``) the smaller was better
# for 20 labels; from 30 on 1e-6 leaves a regret below 1e-5, and it takes label noise less at its word than 1e-7. Noisy
# labels need ``head.set_noise`` or ``noise="learned"``.
CONTINUOUS_HEAD = HeadConfig(noise_variance=1e-6)
# Labels of discrete actions say less than forces do, so that a stiffer prior learns too slowly; with so wide a prior
# the one step of the rule "fisher" overshoots.
DISCRETE_HEAD = HeadConfig(rule="laplace", last_variance=100.0)


class DecisionTransformerPolicy(TransformerPolicy):
    """A decision transformer whose last linear layer is a Gaussian posterior (the paper's ``T2``).

    ``predict(..., deterministic=True)`` returns the mean; else a sample of the epistemic distribution, or of the
    predictive one (label noise included) with ``sampling="predictive"``. Of discrete actions these are the most
    probable one at the mean logits; the most probable one at sampled logits; one drawn at sampled logits. With
    ``set_fallback`` another controller acts in the rows of which the posterior knows too little.

    With several ``posteriors`` there is one for each sub-environment of a vector environment, all on the same encoder
    and from the same prior: row ``i`` of whatever is asked of the policy belongs to posterior ``i``.

    Args:
        observation_space: A flat, finite ``Box``.
        action_space: A flat ``Box``, or ``Discrete``, whose actions the transformer gives logits of.
        lr_schedule: Ignored; SB3 passes it to every policy.
        transformer: Size and context.
        observation_scale: What observations are divided by, ``(observation size,)``; 1 if None.
        skip: What the head sees besides the last hidden layer: the scaled ``observation``, whose weights have the prior
            mean 0, so that nothing changes before the first label; or ``none``.
        head: Depth, prior and output rule; variances are in units of the squared rms of the pre-training labels, or of
            the logits for discrete actions. ``CONTINUOUS_HEAD`` or ``DISCRETE_HEAD`` (rule ``laplace``) if None.
        sampling: What ``deterministic=False`` samples from.
        posteriors: How many; usually by ``KBT(per_env=True)``.

    Attributes:
        head: The posterior, if there is one; else ``heads`` has them all.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box | spaces.Discrete,
        lr_schedule: Schedule | None = None,
        *,
        transformer: DecisionTransformerConfig | None = None,
        observation_scale: npt.ArrayLike | None = None,
        skip: Skip = "observation",
        head: HeadConfig | None = None,
        sampling: Sampling = "epistemic",
        posteriors: int = 1,
        **unknown: Any,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            transformer=transformer,
            observation_scale=observation_scale,
            **unknown,
        )
        choice("sampling", sampling, ("epistemic", "predictive"))
        choice("skip", skip, ("observation", "none"))
        if head is not None:
            instance("head", head, HeadConfig)
        self.skip = skip
        default = CONTINUOUS_HEAD if self.actions.link == "identity" else DISCRETE_HEAD
        self.head_config, self.sampling = (default if head is None else head), sampling
        self._check_link(self.head_config)
        if isinstance(posteriors, bool) or not isinstance(posteriors, int) or not 1 <= posteriors < 2**31:
            raise ValueError(f"posteriors is {posteriors!r}; a whole number, at least 1")
        sizes = self.feature_size, self.action_size
        if posteriors == 1:
            self.head = BayesianHead(*sizes, self.head_config)
        else:
            self.head_of_env = HeadBatch([BayesianHead(*sizes, self.head_config)] * posteriors)
        self.reset_head()

    @property
    def heads(self) -> several.Heads:
        """All posteriors: one, or one for each environment."""
        alone = self._modules.get("head")  # asked for with every update, and cheaper so than as an attribute
        if alone is not None:
            return (alone,)  # type: ignore[return-value]
        return self.head_of_env

    def __getattr__(self, name: str) -> Any:
        if name == "head" and "head_of_env" in self.__dict__.get("_modules", {}):
            raise AttributeError(
                f"this policy has {len(self.heads)} posteriors, one for each environment: ask policy.heads[i], or take "
                "one out by policy.select(i)"
            )
        return super().__getattr__(name)

    def select(self, index: int) -> DecisionTransformerPolicy:
        """A policy of its own with one of the posteriors and a copy of the encoder, for deployment.

        The fallback comes along. To learn on with it, give its weights to a ``KBT`` with one posterior:
        ``model.policy.load_state_dict(policy.select(i).state_dict())``.

        Raises:
            IndexError: There is no such posterior.
        """
        heads, index = self.heads, whole("index", index, -MOST, "the number of a posterior, from 0")
        if not 0 <= index < len(heads):
            raise IndexError(f"posterior {index} was asked for; there are {len(heads)}, from 0")
        alone = type(self)(**{**self._get_constructor_parameters(), "posteriors": 1}).to(self.device)
        alone.transformer.load_state_dict(self.transformer.state_dict())
        alone.head.load_state_dict(heads[index].state_dict())
        alone.fallback = self.fallback
        return alone

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"skip": self.skip, "head": self.head_config, "sampling": self.sampling, "posteriors": len(self.heads)}
        return {**super()._get_constructor_parameters(), **own}

    def reset_head(self) -> None:
        """Start every posterior anew: the prior reproduces the transformer's last layer, on centred features."""
        self.load_state_dict(self.start_state(self.transformer))

    def start_state(self, transformer: DecisionTransformer) -> dict[str, Any]:
        """See ``TransformerPolicy``; the posteriors reproduce the transformer's last layer."""
        heads = self.heads
        several_heads = isinstance(heads, HeadBatch)
        head = copy.deepcopy(self.head) if not isinstance(heads, HeadBatch) else heads[0]
        self._to_prior(head, transformer)
        lead, prefix = ([len(heads)], "head_of_env.") if several_heads else ([], "head.")
        state = {prefix + name: value.expand((*lead, *value.shape)) for name, value in head.named_buffers()}
        return super().start_state(transformer) | state

    def prior_head(self, config: HeadConfig) -> BayesianHead:
        """A head of another configuration that starts as this policy's does.

        Raises:
            ValueError: Its rule has another link than the actions.
        """
        self._check_link(config)
        head = BayesianHead(self.feature_size, self.action_size, config).to(self.device)
        self._to_prior(head, self.transformer)
        return head

    def _check_link(self, config: HeadConfig) -> None:
        if config.link != self.actions.link:
            kind, rule = ("continuous", "measure") if self.actions.link == "identity" else ("discrete", "laplace")
            raise ValueError(
                f"rule {config.rule!r} has a {config.link} link and the action space is {kind}; use {rule!r}"
            )

    def _to_prior(self, head: BayesianHead, transformer: DecisionTransformer) -> None:
        linear, scale = transformer.linear, transformer.action_scale
        more = self.feature_size - self.transformer_config.width
        head.reset(
            torch.nn.functional.pad(linear.weight * scale.unsqueeze(-1), (0, more)),
            linear.bias * scale,
            feature_mean=torch.nn.functional.pad(transformer.feature_mean, (0, more)),
            target_scale=scale,
        )

    @property
    def feature_size(self) -> int:
        """See ``TransformerPolicy``; with what the head sees besides."""
        return super().feature_size + (self.observation_size if self.skip == "observation" else 0)

    def encode(self, context: ContextWindow) -> Tensor:
        """See ``TransformerPolicy``; with what the head sees besides."""
        hidden = super().encode(context)
        if self.skip == "none":
            return hidden
        with torch.inference_mode():
            newest = torch.from_numpy(context.newest).to(hidden) / self.transformer.observation_scale
            return torch.cat([hidden, newest], dim=-1)

    def act(self, features: Tensor) -> Array:
        """Posterior mean of the action, ``(n, action size)``, unclipped float64; probabilities of discrete ones."""
        with torch.inference_mode():
            mean: Array = several.mean(self.heads, features).cpu().numpy()
            return mean

    def sample_actions(self, features: Tensor) -> Array:
        """One sample a row from the epistemic or the predictive distribution, unclipped."""
        if self.actions.link == "softmax":
            logits = several.logits(self.heads, features)
            sampled = torch.softmax(_gaussian_sample(logits.mean, logits.cov), dim=-1)
            return drawn(sampled) if self.sampling == "predictive" else sampled.cpu().numpy()
        prediction = several.predict(self.heads, features)
        cov = prediction.epistemic
        if self.sampling == "predictive":
            cov = cov + prediction.aleatoric
        actions: Array = _gaussian_sample(prediction.mean, cov).cpu().numpy()
        return actions

    def set_fallback(self, fallback: Fallback | None) -> None:
        """Let a controller act, in rollouts and in ``predict``, wherever the policy is too uncertain; None for nobody.

        Where it takes over, the context remembers its action, and ``deterministic`` does not matter. A controller is
        any object, so neither ``save`` nor ``load`` takes it along: set it again on what was loaded.

        Raises:
            TypeError: The controller is neither a policy nor callable.
            ValueError: It was made for other spaces.
        """
        self.fallback = usable(fallback, self.observation_space, self.action_space)

    def choose(self, context: ContextWindow, features: Tensor, deterministic: bool = True) -> Choice:
        """See ``TransformerPolicy.choose``; with the fallback controller in the rows where it takes over."""
        if self.fallback is None:
            return super().choose(context, features, deterministic)
        taken_over = self.fallback.exceeded(self.epistemic_std(features))
        means = self.act(features) if deterministic else self.sample_actions(features)
        if taken_over.any():
            spaces_of_both = self.observation_space, self.action_space
            means[taken_over] = self.fallback.means(context.newest, taken_over, *spaces_of_both)
        return Choice(self.clip(means), taken_over)

    def epistemic_std(self, features: Tensor) -> Array:
        """Largest epistemic standard deviation over the outputs for each encoded context, ``(n,)``.

        In action units; with discrete actions that of the logits.
        """
        deviation = several.epistemic_variance(self.heads, features).sqrt()
        deviations: Array = (deviation * self.transformer.action_scale).amax(-1).cpu().numpy()
        return deviations

    def predict_moments(self, observation: Array | ContextWindow) -> ActionMoments:
        """What the policy expects the expert to do, and how sure it is.

        Args:
            observation: ``(n, observation size)`` or ``(observation size,)``, or the context that ``predict`` returned.

        Returns:
            Mean, epistemic and aleatoric covariance in action units, with a leading axis of ``n`` also for one row.
        """
        if isinstance(observation, ContextWindow):
            context = observation
            self.check_context(context)
            self.check_observations(context.newest)
        else:
            context = self.start(np.atleast_2d(as_array(observation, "observations")))
        prediction = several.predict(self.heads, self.encode(context))
        return ActionMoments(*(part.cpu().numpy() for part in prediction))


def _gaussian_sample(mean: Tensor, cov: Tensor) -> Tensor:
    """One sample of each row's distribution: mean ``(n, a)``, covariance ``(n, a, a)``."""
    values, vectors = torch.linalg.eigh(cov)
    # Rounding leaves eigenvalues of a singular covariance a little below 0; they have no spread to sample.
    root = vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)
    noise = torch.randn(mean.shape, dtype=torch.float64).to(root.device)
    sample: Tensor = mean + (root @ noise.unsqueeze(-1)).squeeze(-1)
    return sample
