"""KBT: one closed-form Bayesian update of the policy's last layers per labelled sample."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from kbt_rl.agents import posteriors as several
from kbt_rl.agents.behaviour_cloning import Array
from kbt_rl.agents.fallback import Fallback
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
        repairs: Times a covariance was repaired, see ``inference.UpdateInfo``.
        label_weight: What the labels counted for where wild ones are expected (``HeadConfig.robust_dof``).
        log_density: Logarithm of the predictive density of the labels before the update, all entries of all rows
            jointly, in nats, with labels in action units. With discrete actions the log probability of the labels. Its
            mean over a stream, with the sign changed and over the labels, is the negative log predictive density.
        dof: Degrees of freedom of the predictive Student's t distribution; infinite where it is Gaussian.
        log_ratio: With discrete actions, what ``LogLossCusum`` sums; NaN else.
    """

    nis: float = float("nan")
    epistemic_variance: float = float("nan")
    predictive_variance: float = float("nan")
    repairs: int = 0
    label_weight: float = 1.0
    log_density: float = float("nan")
    dof: float = float("inf")
    log_ratio: float = float("nan")


class KBT(OnlineAlgorithm):
    """Kalman Bayesian Transformer as an SB3 algorithm (arXiv:2509.10695; docs/equations.md says what differs).

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
        per_env: Whether each sub-environment of ``env`` has a posterior of its own, on the encoder that all share and
            from the same prior; else one posterior learns from all of them. With it every sample, observation and
            rollout has one row for each, in their order, and a row without a label leaves its posterior as it is.

    Attributes:
        posteriors: How many there are.
    """

    policy: DecisionTransformerPolicy
    info_type = KBTInfo
    fallback_limit: float | None = None  # as of the last save, so that loading can say what is missing

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
        per_env: bool = False,
        _init_setup_model: bool = True,
    ) -> None:
        self.per_env = per_env
        super().__init__(
            policy, env, n_steps, policy_kwargs, stats_window_size, tensorboard_log, verbose, seed, device,
            _init_setup_model=False,
        )  # fmt: skip
        self.posteriors: int = self.n_envs if per_env else 1
        if _init_setup_model:
            self._setup_model()

    def _policy_arguments(self) -> dict[str, Any]:
        arguments = super()._policy_arguments()
        if "posteriors" in arguments:
            raise ValueError("policy_kwargs state posteriors; KBT has one for each environment with per_env=True")
        return arguments if self.posteriors == 1 else {**arguments, "posteriors": self.posteriors}

    def _check_env(self, env: VecEnv) -> None:
        super()._check_env(env)
        if self.per_env and env.num_envs != self.posteriors:
            raise ValueError(
                f"the new environment has {env.num_envs} sub-environments and this model {self.posteriors} posteriors, "
                f"one for each; make it with {self.posteriors}, or take one posterior out by model.policy.select(i)"
            )

    def _check_rows(self, rows: int) -> None:
        if self.posteriors > 1:
            several.check_rows(self.policy.heads, rows)

    def _setup_model(self) -> None:
        super()._setup_model()
        if not isinstance(self.policy, DecisionTransformerPolicy):
            raise TypeError(
                f"KBT needs a DecisionTransformerPolicy, whose head is Bayesian; got {type(self.policy).__name__}"
            )

    @property
    def labels_used(self) -> int:
        """Labelled rows that the posteriors have learned from; less what ``rollback`` took back."""
        return several.labels_seen(self.policy.heads)

    def _update(self, context: ContextWindow, target: Array, features: Tensor | None, rows: Array) -> KBTInfo:
        if features is None:
            features = self.policy.encode(context)
        heads = self.policy.heads
        unit, log_scale = several.scales(heads)
        info = several.update(heads, rows, features, target)
        return KBTInfo(
            labels=len(target),
            innovation=info.innovation * unit**0.5,
            nis=info.nis,
            epistemic_variance=info.epistemic_variance * unit,
            predictive_variance=info.predictive_variance * unit,
            repairs=info.repairs,
            label_weight=info.label_weight,
            log_density=info.log_density - len(target) * log_scale,
            dof=info.dof,
            log_ratio=info.log_ratio,
        )

    def set_fallback(self, fallback: Fallback | None) -> None:
        """Let a controller act wherever the policy is too uncertain; see ``DecisionTransformerPolicy.set_fallback``.

        It acts in ``learn``, ``predict`` and what calls it, such as ``evaluate_policy``. The file that ``save`` writes
        has no controller; ``load`` warns that one is missing.
        """
        self.policy.set_fallback(fallback)

    def _before_saving(self) -> None:
        self.fallback_limit = None if self.policy.fallback is None else self.policy.fallback.limit

    def _after_loading(self) -> None:
        if self.fallback_limit is not None:
            warnings.warn(
                f"this model was saved with a fallback controller (limit {self.fallback_limit}), which no file holds; "
                "the policy acts alone until set_fallback is called (set_fallback(None) before saving ends this)",
                stacklevel=3,
            )

    def rollback(self, n: int = 1, env: int | None = None) -> int:
        """Take back the last ``n`` updates that had a label; see ``BayesianHead.rollback``.

        An update is a call of ``update``, that is one step of a rollout whatever its number of environments. Needs
        ``policy_kwargs=dict(head=HeadConfig(history=...))``. What a strategy remembers stays: the sums of a monitor
        hold the innovations of labels that were taken back. A strategy that loosens the posterior after every update
        leaves nothing to undo; ``ReopenOnDetection`` leaves what came after its last alarm.

        Args:
            n: Updates to take back.
            env: With ``per_env``, the sub-environment whose posterior forgets; None for all. Each then takes back its
                own last ``n``, which are not of the same steps where labels were missing.

        Returns:
            Labelled rows taken back, by which ``labels_used`` is less.

        Raises:
            IndexError: There is no posterior ``env``.
            ValueError: Fewer updates are kept; nothing has changed.
            UpdateError: What is left would not be a proper posterior; nothing has changed.
        """
        heads = self.policy.heads
        if env is not None and not 0 <= env < len(heads):
            raise IndexError(f"posterior {env} was to forget; there are {len(heads)}, from 0")
        return several.rollback(heads, n, env)
