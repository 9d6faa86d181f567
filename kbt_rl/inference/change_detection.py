"""Has the world changed? Sequential tests of the normalised innovation squared (NIS).

While predictions are calibrated, the NIS of a sample with ``d`` scalar labels is chi-square with ``d`` degrees of
freedom, independent from sample to sample. A monitor looks at one NIS after another and says when they are no longer
plausible. Its parameter is the false-alarm rate per sample. Monitors are small, picklable, and start again after an
alarm.

* ``WindowedChiSquare`` sums the NIS of the last samples and compares with a quantile.
* ``Cusum`` (Page 1954) accumulates log-likelihood ratios of "innovations of ``inflation`` times the variance" against
  "calibrated", and forgets at zero: the quickest test of that change for its false-alarm rate (Lorden 1971).

``NoiseReference`` guards both against two ways in which a NIS is not chi-square: predictions that are overconfident by
a model misfit, and a noise estimate that swallows the very change that should be noticed. It looks back by ``Lagged``,
and so does who puts the noise back once the change is noticed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from functools import lru_cache
from typing import Any, Generic, TypeVar

from numpy.linalg import LinAlgError
from scipy.stats import chi2, f

from kbt_rl.arguments import between, whole
from kbt_rl.inference.run_length import cusum_threshold

T = TypeVar("T")
# Of one sample; the threshold is found by quadrature over their distribution.
_MOST_LABELS = 10**6


class Monitor(ABC):
    """A sequential test; ``observe`` one NIS after another.

    Args:
        false_alarm_rate: Alarms a sample while the NIS are chi-square, in (0, 1).

    Attributes:
        alarms: How many so far.
        samples: Samples looked at so far.
    """

    def __init__(self, false_alarm_rate: float) -> None:
        expected = "it is a probability per sample, in (0, 1)"
        rate = between("false_alarm_rate", false_alarm_rate, 0.0, 1.0, expected=expected, open_low=True)
        if rate == 1.0:
            raise ValueError(f"false_alarm_rate is {false_alarm_rate}; {expected}")
        self.false_alarm_rate = rate
        self.alarms = self.samples = 0

    def observe(self, nis: float, labels: int = 1) -> bool:
        """Take the NIS of the next sample.

        Args:
            nis: Normalised innovation squared.
            labels: Its degrees of freedom: the scalar labels of the sample.

        Returns:
            Whether this is an alarm; the test has then started again.

        Raises:
            ValueError: The NIS is negative or not finite, or there is no label; nothing has changed.
        """
        if not 0.0 <= nis < math.inf:
            raise ValueError(f"the NIS is {nis}; it is finite and not negative")
        if labels < 1:
            raise ValueError(f"the sample has {labels} labels; without a label there is no innovation to test")
        return self._take(nis, labels)

    def _take(self, nis: float, labels: int) -> bool:
        self.samples += 1
        if not self._exceeded(nis, labels):
            return False
        self.alarms += 1
        self.restart()
        return True

    @abstractmethod
    def restart(self) -> None:
        """Forget the samples so far, but not the counts."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""

    @abstractmethod
    def _exceeded(self, nis: float, labels: int) -> bool:
        """Take a sample, and say whether the statistic is over its threshold."""


class WindowedChiSquare(Monitor):
    """Sum of the NIS over the last ``window`` samples against a chi-square quantile.

    At every sample the probability of exceeding is the false-alarm rate, also while the window fills. Windows that
    overlap exceed together and an alarm empties the window, so for ``window > 1`` there are fewer alarms than that.

    Args:
        false_alarm_rate: Upper bound of the alarms a sample; exact for ``window`` 1.
        window: Samples. A short one notices a large change sooner, a long one a smaller change.
    """

    def __init__(self, false_alarm_rate: float = 1e-4, window: int = 5) -> None:
        super().__init__(false_alarm_rate)
        self.window = whole("window", window, 1, "it holds at least 1 sample")
        self._recent: deque[tuple[float, int]] = deque(maxlen=self.window)

    def restart(self) -> None:
        """See ``Monitor``."""
        self._recent.clear()

    def settings(self) -> dict[str, Any]:
        """See ``Monitor``."""
        return {"false_alarm_rate": self.false_alarm_rate, "window": self.window}

    def _exceeded(self, nis: float, labels: int) -> bool:
        self._recent.append((nis, labels))
        total = sum(value for value, _ in self._recent)
        return total > upper_quantile(self.false_alarm_rate, sum(count for _, count in self._recent))


class Cusum(Monitor):
    """One-sided cumulative sum ``g <- max(0, g + log-likelihood ratio)``, alarm at ``g > threshold``.

    If the innovations' covariance is ``inflation`` times what was predicted, the log-likelihood ratio of a sample is
    ``(nis (1 - 1 / inflation) - labels log(inflation)) / 2``. The threshold makes ``1 / false_alarm_rate`` the mean
    number of samples between false alarms; see ``run_length``.

    Args:
        false_alarm_rate: Alarms a sample while the NIS are chi-square.
        inflation: The least factor on the variance that should be noticed soon, above 1. Larger changes are noticed
            sooner still.
        labels: Scalar labels of a usual sample, which the threshold is for. Samples with more or fewer are weighted
            rightly, and the rate stays below ``exp(-threshold)``.
    """

    def __init__(self, false_alarm_rate: float = 1e-4, inflation: float = 4.0, labels: int = 1) -> None:
        super().__init__(false_alarm_rate)
        expected = "the variance that should be noticed is above 1 times the usual"
        self.inflation = between("inflation", inflation, 1.0, expected=expected, open_low=True)
        self.labels = whole("labels", labels, 1, "a sample has at least 1", most=_MOST_LABELS)
        try:
            self.threshold = cusum_threshold(self.false_alarm_rate, self.inflation, self.labels)
        except (LinAlgError, ArithmeticError) as error:
            raise ValueError(
                f"no threshold is found for false_alarm_rate={false_alarm_rate}, inflation={inflation} and "
                f"labels={labels} ({error}); take less extreme ones"
            ) from error
        self.statistic = 0.0

    def restart(self) -> None:
        """See ``Monitor``."""
        self.statistic = 0.0

    def settings(self) -> dict[str, Any]:
        """See ``Monitor``."""
        return {"false_alarm_rate": self.false_alarm_rate, "inflation": self.inflation, "labels": self.labels}

    def _exceeded(self, nis: float, labels: int) -> bool:
        ratio = 0.5 * (nis * (1.0 - 1.0 / self.inflation) - labels * math.log(self.inflation))
        self.statistic = max(0.0, self.statistic + ratio)
        return self.statistic > self.threshold


class LogLossCusum(Monitor):
    """CUSUM for class labels: of the log ratios that an update with the softmax link reports, ``UpdateInfo.log_ratio``.

    While labels come from the predicted probabilities, the exponential of a log ratio has the mean 1, so that the mean
    number of samples between false alarms is at least ``exp(threshold)`` (Lorden 1971), whatever the classes. Labels
    that the predictions hold for improbable drive the sum up.

    Args:
        false_alarm_rate: Upper bound of the alarms a sample; the threshold is ``-log`` of it.
    """

    def __init__(self, false_alarm_rate: float = 1e-4) -> None:
        super().__init__(false_alarm_rate)
        self.threshold, self.statistic = -math.log(self.false_alarm_rate), 0.0

    def observe_ratio(self, log_ratio: float) -> bool:
        """Take the log ratio of the next sample; see ``observe``.

        Raises:
            ValueError: It is not finite: the rule has another link.
        """
        if not math.isfinite(log_ratio):
            raise ValueError(f"the log ratio is {log_ratio}; only updates with the softmax link have one")
        return self._take(log_ratio, 1)

    def restart(self) -> None:
        """See ``Monitor``."""
        self.statistic = 0.0

    def settings(self) -> dict[str, Any]:
        """See ``Monitor``."""
        return {"false_alarm_rate": self.false_alarm_rate}

    def _exceeded(self, nis: float, labels: int) -> bool:
        self.statistic = max(0.0, self.statistic + nis)
        return self.statistic > self.threshold


@lru_cache(maxsize=256)
def upper_quantile(rate: float, degrees: int, dof: float = math.inf) -> float:
    """What the NIS of ``degrees`` labels exceeds with probability ``rate`` if it is calibrated.

    It is chi-square, or, where predictions are Student's t with ``dof`` degrees of freedom, ``degrees`` times F.
    """
    if math.isinf(dof):
        return float(chi2.isf(rate, degrees))
    return degrees * float(f.isf(rate, degrees, dof))


class Lagged(Generic[T]):
    """The value of ``lag`` samples ago; at the start, when values are still far off, at most half the samples so far.

    Args:
        lag: Samples back; 0 is now.
    """

    def __init__(self, lag: int) -> None:
        self.lag = whole("lag", lag, 0, "it counts samples back, 0 is now")
        self._values: deque[T] = deque(maxlen=self.lag)
        self._samples = 0

    def value(self, now: T) -> T:
        """The lagged value for a sample whose own is ``now``."""
        age = min(self.lag, (self._samples + 1) // 2, len(self._values))
        return now if age == 0 else self._values[-age]

    def add(self, now: T) -> None:
        """Keep the value of a sample."""
        self._values.append(now)
        self._samples += 1


class NoiseReference:
    """Restates a NIS against a noise level that neither a misfit nor a change of the world can deceive.

    ``nis * predictive / (epistemic + level + floor)``, exact for one output; for several, whose variances come as
    averages, it is the NIS for a covariance of the same shape.

    Args:
        floor: Variance of the model's misfit. A converged posterior knows nothing of it, so without a floor every
            large misfit looks like a change.
        lag: The noise level is the one of so many samples ago. 0, for known noise, takes the current one. A noise
            estimate that learns all the time swallows a change within a few samples, and a test against it never fires
            (or much too late); the level from before the change cannot know of it; see ``Lagged``. Nothing is held for
            ever, so a lasting change of the noise itself becomes the new level after ``lag`` samples.
    """

    def __init__(self, floor: float = 0.0, lag: int = 0) -> None:
        self.floor = between("floor", floor, 0.0, expected="a variance is finite and not negative")
        self._levels: Lagged[float] = Lagged(lag)
        self.lag = self._levels.lag

    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"floor": self.floor, "lag": self.lag}

    def restate(self, nis: float, epistemic: float, predictive: float) -> float:
        """Take the record of the next sample and return its NIS against the reference level.

        Args:
            nis: NIS against ``predictive``.
            epistemic: Variance of the target from the weights, averaged over the labels.
            predictive: Variance from the weights and the noise.

        Raises:
            ValueError: The variances are not ordered, or there is neither noise nor anything else to divide by.
        """
        if not 0.0 <= epistemic <= predictive < math.inf:
            raise ValueError(
                f"epistemic variance {epistemic}, predictive {predictive}; expected 0 <= the first <= both"
            )
        noise = predictive - epistemic
        expected = epistemic + self._levels.value(noise) + self.floor
        if not expected > 0.0:
            raise ValueError("predictive variance, reference level and floor are all zero; pass a positive floor")
        self._levels.add(noise)
        return nis * predictive / expected
