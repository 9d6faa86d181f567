"""What learners with a posterior share, whatever network is below it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kbt_rl.agents import posteriors as several
from kbt_rl.agents.fallback import Fallback
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.online_policy import Array
from kbt_rl.agents.sample import LearnerInfo
from kbt_rl.arguments import MOST, whole


@dataclass(frozen=True)
class KBTInfo(LearnerInfo):
    """What a Kalman update saw, in action units; variances are averages over rows and outputs before the update.

    With discrete actions the innovation is that of the probabilities and the variances are those of the logits;
    ``predictive_variance`` then adds the noise variance, which only the rules ``taylor`` and ``replace_softmax`` use.

    Attributes:
        nis: Normalised innovation squared, chi-square with ``degrees`` degrees of freedom if calibrated.
        epistemic_variance: From the weights.
        predictive_variance: From the weights and the label noise.
        repairs: Times a covariance was repaired, see ``inference.UpdateInfo``.
        label_weight: What the labels counted for where wild ones are expected (``HeadConfig.robust_dof``).
        log_density: Logarithm of the predictive density of the labels before the update, all entries of all rows
            jointly, in nats, with labels in action units. With discrete actions the log probability of the labels. Its
            mean over a stream, with the sign changed and over the labels, is the negative log predictive density.
        dof: Degrees of freedom of the predictive Student's t distribution; infinite where it is Gaussian.
        log_ratio: With discrete actions, what ``LogLossCusum`` sums; NaN else.
        degrees: Scalar labels that were used; degrees of freedom of ``nis`` if it is calibrated.
    """

    nis: float = float("nan")
    epistemic_variance: float = float("nan")
    predictive_variance: float = float("nan")
    repairs: int = 0
    label_weight: float = 1.0
    log_density: float = float("nan")
    dof: float = float("inf")
    log_ratio: float = float("nan")
    degrees: int = 0


class BayesianLearner(OnlineAlgorithm):
    """A learner whose policy has ``heads``: one posterior, or one for each environment.

    Attributes:
        posteriors: How many there are.
    """

    policy: Any
    info_type = KBTInfo
    per_env: bool = False
    posteriors: int = 1

    @property
    def labels_used(self) -> int:
        """Labelled rows that the posteriors have learned from; less what ``rollback`` took back."""
        return several.labels_seen(self.policy.heads)

    def _check_rows(self, rows: int) -> None:
        if self.posteriors > 1:
            several.check_rows(self.policy.heads, rows)

    def _update(self, context: Any, target: Array, features: Tensor | None, rows: Array) -> KBTInfo:
        if features is None:
            features = self.policy.encode(context)
        heads = self.policy.heads
        unit, log_scale = several.scales(heads, target)
        info = several.update(heads, rows, features, target)
        return KBTInfo(
            labels=len(target),
            innovation=info.innovation * unit**0.5,
            nis=info.nis,
            epistemic_variance=info.epistemic_variance * unit,
            predictive_variance=info.predictive_variance * unit,
            repairs=info.repairs,
            label_weight=info.label_weight,
            log_density=info.log_density - log_scale,
            dof=info.dof,
            log_ratio=info.log_ratio,
            degrees=info.labels - len(target) if several.link(heads) == "softmax" else info.labels,
        )

    def set_fallback(self, fallback: Fallback | None) -> None:
        """Let a controller act wherever the policy is too uncertain; see ``Fallback``.

        It acts in ``learn``, ``predict`` and what calls it, such as ``evaluate_policy``. The file that ``save`` writes
        has no controller; ``load`` warns that one is missing.
        """
        self.policy.set_fallback(fallback)

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
        env = None if env is None else whole("env", env, -MOST, "the number of a posterior, from 0")
        if env is not None and not 0 <= env < len(heads):
            raise IndexError(f"posterior {env} was to forget; there are {len(heads)}, from 0")
        return several.rollback(heads, n, env)
