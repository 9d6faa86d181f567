"""False alarms while nothing changes: 100,000 labels of one plant, with noise of 0.1, 1 or 10 N^2.

One learner is told the label noise, one learns it, and neither is told of the misfit, which is the harder case. Several
tests look on at their innovations; nothing re-opens the posterior, so that all see the same. Beside them stand two
strategies as they meet the shifts of ``change``, each with a learner of its own that a false alarm re-opens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from kbt_rl.callbacks.adaptation import ReopenOnDetection
from kbt_rl.envs.plant import SHIFTED
from kbt_rl.inference.change_detection import Cusum, Monitor, NoiseReference, WindowedChiSquare
from studies import changing
from studies.changing import FALSE_ALARM_RATE, MISFIT, NOISE_LAG, Adaptive, ChangingTrial, labelled
from studies.cloned import Setting
from studies.table import Row, Table, Text
from studies.trial import Size

NOISE_VARIANCES = (0.1, 1.0, 10.0)
_TESTS: dict[str, Callable[[], Monitor]] = {
    "window": lambda: WindowedChiSquare(FALSE_ALARM_RATE),
    "CUSUM": lambda: Cusum(FALSE_ALARM_RATE),
}


@dataclass(frozen=True, kw_only=True)
class AlarmTrial(ChangingTrial):
    """A learner on labels of one plant.

    Attributes:
        samples: Labels.
    """

    study: str = "false_alarms"
    samples: int

    @property
    def label(self) -> str:
        """The noise of the labels."""
        return f"{self.noise_variance:g} N²"


def plan(size: Size) -> list[AlarmTrial]:
    """Two learners that are watched and two strategies, with each noise."""
    samples = 2_000 if size.quick else 100_000
    learners = ((0.0, (changing.NONE, changing.UNTOLD)), (MISFIT, (changing.CUSUM, changing.LEARNED)))
    return [
        trial
        for variance in ((1.0,) if size.quick else NOISE_VARIANCES)
        for misfit, methods in learners
        for trial in size.trials(
            AlarmTrial, methods, policies=1, streams=1, noise_variance=variance, misfit=misfit, samples=samples
        )
    ]


def run(trial: AlarmTrial, setting: Setting) -> Iterator[Row]:
    """Alarms of the tests that watch a learner, or of its own strategy."""
    learner = Adaptive(trial, setting)
    stream = labelled(learner.model.policy, [SHIFTED] * trial.samples, (trial.stream_seed, 25), trial.noise_variance)
    lags = (0,) if learner.told else (0, NOISE_LAG)
    tests = {
        f"{name}, misfit {misfit:g}, lag {lag}": (NoiseReference(misfit, lag), make())
        for misfit in (0.0, 0.01)
        for lag in lags
        for name, make in _TESTS.items()
    }
    unit = learner.model.policy.head.mean_square_scale
    for sample in stream:
        info = learner.update(sample)
        if learner.strategy is None:
            for reference, monitor in tests.values():
                variances = (info.epistemic_variance / unit, info.predictive_variance / unit)
                monitor.observe(reference.restate(info.nis, *variances))
    if isinstance(learner.strategy, ReopenOnDetection):
        yield trial.row(trial.samples, "alarms of its own", learner.strategy.alarms)
        return
    for name, (_, monitor) in tests.items():
        yield trial.row(trial.samples, f"alarms of {name}", monitor.alarms)


def report(table: Table) -> Iterator[Text]:
    """Alarms by learner and test, a column for each noise."""
    title = f"False alarms in {max(table.distinct('labels')):,} labels"
    cells = {f"labels with {noise}": partial(_alarms, noise) for noise in table.distinct("task")}
    yield Text.of(title, table, {"method": "learner", "metric": "alarms"}, cells)


def _alarms(noise: str, rows: Table) -> str:
    return f"{sum(rows.where(task=noise).values()):.0f}"
