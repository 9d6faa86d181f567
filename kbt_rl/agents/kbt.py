"""KBT: one closed-form Bayesian update of the policy's last layers per labelled sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from torch import Tensor

from kbt_rl.agents.behaviour_cloning import Array
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.sample import LearnerInfo
from kbt_rl.models.context import ContextWindow


@dataclass(frozen=True)
class KBTInfo(LearnerInfo):
    """What a Kalman update saw, in action units; variances are averages over rows and outputs before the update.

    With discrete actions the innovation is that of the probabilities and the variances are those of the logits;
    ``predictive_variance`` then adds the noise variance, which only the rules ``taylor`` and ``replace_softmax`` use.

    Attributes:
        nis: Normalised innovation squared, chi-square with ``labels * action size`` degrees of freedom if calibrated
            (one less a label with discrete actions, whose probabilities sum to 1).
        epistemic_variance: From the weights.
        predictive_variance: From the weights and the label noise.
        smallest_variance: Smallest variance of a weight after the update, in the head's own units.
        label_weight: What the labels counted for where wild ones are expected (``HeadConfig.robust_dof``).
        log_density: Logarithm of the predictive density of the labels before the update, all entries of all rows
            jointly, in nats, with labels in action units. With discrete actions the log probability of the labels. Its
            mean over a stream, with the sign changed and over the labels, is the negative log predictive density.
    """

    nis: float = float("nan")
    epistemic_variance: float = float("nan")
    predictive_variance: float = float("nan")
    smallest_variance: float = float("nan")
    label_weight: float = 1.0
    log_density: float = float("nan")


class KBT(OnlineAlgorithm):
    """Kalman Bayesian Transformer as an SB3 algorithm (arXiv:2509.10695, Algorithm 2, changed as the README lists).

    The encoder is frozen after ``pretrain``; the posterior over the last layers moves with each ``update``. No sample
    is stored. ``learn`` rolls the mean policy out while a ``KalmanAdapter`` callback provides the samples.

    Args:
        policy: ``"DecisionTransformerPolicy"`` or a subclass of it.
        env: Environment to learn in; a Gymnasium env, a ``VecEnv`` or an id.
        n_steps: Environment steps between two writes of the log.
        policy_kwargs: For example ``dict(head=HeadConfig(structure="neuron"))``.
        stats_window_size: Episodes that rollout statistics average over.
        tensorboard_log: Folder of the TensorBoard logs; None for none.
        verbose: 0 silent, 1 training output.
        seed: Seed of the initial weights, the label stream and the environment.
        device: The CPU by default: one update is bound by latency.
    """

    policy: DecisionTransformerPolicy
    info_type = KBTInfo

    def __init__(
        self,
        policy: str | type[BasePolicy] = "DecisionTransformerPolicy",
        env: GymEnv | str | None = None,
        n_steps: int = 10,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: str = "cpu",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy, env, n_steps, policy_kwargs, stats_window_size, tensorboard_log, verbose, seed, device,
            _init_setup_model,
        )  # fmt: skip

    def _setup_model(self) -> None:
        super()._setup_model()
        if not isinstance(self.policy, DecisionTransformerPolicy):
            raise TypeError(
                f"KBT needs a DecisionTransformerPolicy, whose head is Bayesian; got {type(self.policy).__name__}"
            )

    def _after_pretraining(self) -> None:
        """Start from the prior: a head that reproduces the pre-trained layer."""
        self.policy.reset_head()

    def _update(self, context: ContextWindow, target: Array, features: Tensor | None) -> KBTInfo:
        if features is None:
            features = self.policy.encode(context)
        head = self.policy.head
        info = head.update(features, target)
        unit = head.mean_square_scale
        return KBTInfo(
            labels=len(target),
            innovation=info.innovation * unit**0.5,
            nis=info.nis,
            epistemic_variance=info.epistemic_variance * unit,
            predictive_variance=info.predictive_variance * unit,
            smallest_variance=info.smallest_variance,
            label_weight=info.label_weight,
            log_density=info.log_density - len(target) * head.log_scale,
        )
