"""What a learner does about a world that moves again: exchangeable strategies for ``KalmanAdapter``.

After each update the adapter hands the strategy what the update saw. ``Forgetting``, ``ProcessNoise`` and
``TowardsPrior`` loosen the posterior a little every time, whether something changed or not. ``ReopenOnDetection``
leaves it alone until a monitor says that the innovations are no longer plausible. None of them stores a sample.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass

from kbt_rl.agents import posteriors as several
from kbt_rl.agents.bayesian import BayesianLearner, KBTInfo
from kbt_rl.arguments import between, instance, whole
from kbt_rl.inference.change_detection import Cusum, Lagged, LogLossCusum, Monitor, NoiseReference
from kbt_rl.inference.types import NoiseEstimate


class AdaptationStrategy(ABC):
    """Called after each update of a learner."""

    @property
    def alarms(self) -> int:
        """Changes noticed so far; 0 for a strategy that does not look for any."""
        return 0

    def attach(self, model: BayesianLearner) -> None:  # noqa: B027
        """Called before training: keep on the model what has to be saved with it."""

    @abstractmethod
    def after_update(self, model: BayesianLearner, info: KBTInfo) -> bool:
        """React to an update.

        Args:
            model: The learner; its posterior may be loosened.
            info: What the update saw, with at least one label.

        Returns:
            Whether a change of the world was noticed.
        """


class Forgetting(AdaptationStrategy):
    """Divide the covariance by a constant factor after each update.

    The covariance of what the labels do not determine grows without bound (wind-up), the more the longer it runs.

    Args:
        factor: In (0, 1]; evidence of ``1 / (1 - factor)`` samples counts.
    """

    def __init__(self, factor: float = 0.98) -> None:
        expected = "it lies in (0, 1], and 1 forgets nothing"
        self.factor = between("the forgetting factor", factor, 0.0, 1.0, expected=expected, open_low=True)

    def after_update(self, model: BayesianLearner, info: KBTInfo) -> bool:
        """See ``AdaptationStrategy``."""
        model.policy.head.forget(self.factor)
        return False


class ProcessNoise(AdaptationStrategy):
    """Add a fraction of the prior's covariance after each update: weights that wander.

    Args:
        scale: Variance of a step, in units of each weight's prior variance.
    """

    def __init__(self, scale: float = 1e-3) -> None:
        self.scale = between("the process noise", scale, 0.0, expected="it is finite and not negative")

    def after_update(self, model: BayesianLearner, info: KBTInfo) -> bool:
        """See ``AdaptationStrategy``."""
        model.policy.head.add_process_noise(self.scale)
        return False


class TowardsPrior(AdaptationStrategy):
    """Move the covariance a little towards the prior's after each update: forgetting that cannot wind up.

    Args:
        fraction: How far each time, in (0, 1].
    """

    def __init__(self, fraction: float = 1e-3) -> None:
        self.fraction = _checked_fraction(fraction)

    def after_update(self, model: BayesianLearner, info: KBTInfo) -> bool:
        """See ``AdaptationStrategy``."""
        model.policy.head.reopen(self.fraction)
        return False


@dataclass
class _Watch:
    """All that a test remembers of a model.

    Attributes:
        monitor: The test.
        reference: The noise level that it judges by.
        noises: What the noise was thought to be, to be put back.
        since: Updates since the last alarm; None before the first one.
    """

    monitor: Monitor
    reference: NoiseReference
    noises: Lagged[NoiseEstimate]
    since: int | None = None


class ReopenOnDetection(AdaptationStrategy):
    """Watch how labels fit their predictions; when it is implausible that they do, keep the means and re-open the rest.

    The test is of the normalised innovation squared, or with discrete actions of the log loss.

    A noise that is learned (``HeadConfig(noise="learned")``) is put back at the same time to what it was ``noise_lag``
    samples ago: until the alarm it has taken the change for noise, and by a noise too large the opened posterior would
    learn slowly. It is not after an alarm within ``noise_lag`` tested samples of the one before: what opening the
    weights has not explained is a change of the noise itself, which may then be learned. Give such a head a
    ``noise_floor`` of about ``misfit``. A noise below it makes the weights follow labels that the frozen features
    cannot express.

    Once attached to a model, the monitor's sums, its count of alarms and the noises live there and are saved with it. A
    strategy of the same settings goes on from them, one of other settings starts afresh.

    Args:
        monitor: The test; by default ``Cusum(1e-5)``, or with discrete actions ``LogLossCusum(1e-5)``.
        misfit: Variance of what the head cannot express even when it has converged, in units of ``target_scale``
            squared (the label's mean square in pre-training). Without it rare large misfits count as changes.
        noise_lag: How many samples ago the noise level is taken from that innovations are judged by: 0 if the label
            noise is known, some 50 if it is learned at the same time, since what is learned swallows the change. A
            learned noise is put back to the one of so many samples ago.
        fraction: How far to go towards the prior's covariance; 1 is all the way.
        rest: Updates after an alarm that are not tested. A re-opened posterior fits its first labels all too well where
            the frozen features cannot express the new law exactly, and would soon be re-opened again.
    """

    def __init__(
        self,
        monitor: Monitor | None = None,
        *,
        misfit: float = 0.01,
        noise_lag: int = 0,
        fraction: float = 1.0,
        rest: int = 25,
    ) -> None:
        if monitor is not None:
            instance("monitor", monitor, Monitor, "such as Cusum(1e-5)")
        self.fraction, self._given = _checked_fraction(fraction), monitor
        self.rest = whole("rest", rest, 0, "a whole number of updates, not negative")
        self._watch = _Watch(
            Cusum(1e-5) if monitor is None else monitor, NoiseReference(misfit, noise_lag), Lagged(noise_lag)
        )

    @property
    def monitor(self) -> Monitor:
        """The test."""
        return self._watch.monitor

    @property
    def reference(self) -> NoiseReference:
        """The noise level that innovations are judged by."""
        return self._watch.reference

    @property
    def alarms(self) -> int:
        """See ``AdaptationStrategy``."""
        return self.monitor.alarms

    def attach(self, model: BayesianLearner) -> None:
        """Go on where this test left off on the model, else start there.

        Raises:
            ValueError: The test is of innovations and the actions are discrete, whose innovations are not chi-square;
                or it is of the log loss and they are not.
        """
        head = model.policy.head
        classes, monitor = several.link(model.policy.heads) == "softmax", self.monitor
        if self._given is None and classes:
            monitor = LogLossCusum(1e-5)
        if classes != isinstance(monitor, LogLossCusum):
            raise ValueError(
                f"{type(monitor).__name__} tests {'innovations' if classes else 'the log loss'}, and this model's "
                f"actions are {'discrete' if classes else 'continuous'}; leave the monitor out, or pass "
                f"{'LogLossCusum' if classes else 'Cusum or WindowedChiSquare'}"
            )
        if head.learns_noise and self.reference.lag == 0:
            warnings.warn(
                "the noise is learned and will swallow what this test should notice; pass noise_lag=50 or so",
                stacklevel=2,
            )
        test, settings, noise = type(monitor), monitor.settings(), self.reference.settings()
        key = f"{test.__name__} {settings} {noise} {self.rest}"
        if key not in model.strategy_state:  # objects of its own: a strategy may serve several models in turn
            model.strategy_state[key] = _Watch(test(**settings), NoiseReference(**noise), Lagged(self.reference.lag))
        self._watch = model.strategy_state[key]

    def after_update(self, model: BayesianLearner, info: KBTInfo) -> bool:
        """See ``AdaptationStrategy``."""
        head, watch, unit = model.policy.head, self._watch, model.policy.head.mean_square_scale
        nis = watch.reference.restate(info.nis, info.epistemic_variance / unit, info.predictive_variance / unit)
        noise = head.noise_estimate
        before = None if noise is None else watch.noises.value(noise)
        if noise is not None:
            watch.noises.add(noise)
        since = watch.since = None if watch.since is None else watch.since + 1
        if since is not None and since <= self.rest:
            return False
        if isinstance(watch.monitor, LogLossCusum):
            alarm = watch.monitor.observe_ratio(info.log_ratio)
        else:
            alarm = watch.monitor.observe(nis, info.degrees)
        if not alarm:
            return False
        if before is not None and (since is None or since > self.rest + watch.reference.lag):
            head.reopen(self.fraction, before)
        else:
            head.reopen(self.fraction)
        watch.since = 0
        return True


def _checked_fraction(fraction: float) -> float:
    expected = "it lies in (0, 1], and 1 is the prior's covariance"
    return between("fraction", fraction, 0.0, 1.0, expected=expected, open_low=True)
