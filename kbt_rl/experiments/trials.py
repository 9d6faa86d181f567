"""Trials: pure functions from their configurations to records of plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.sample import Sample
from kbt_rl.envs.plant import SHIFTED, is_upright, rk4_step
from kbt_rl.experiments import learners
from kbt_rl.experiments.aggregate import Z95
from kbt_rl.experiments.config import Trial
from kbt_rl.experiments.learners import LabelStream, build
from kbt_rl.experiments.printed import PrintedKBT
from kbt_rl.experiments.retraining import WaitingWarmStart, train_together
from kbt_rl.experiments.simulation import EPISODE_STEPS, Force, Outcome, expert_force, regret, simulate, starts
from kbt_rl.experiments.single import initialisation_errors, softmax_errors
from kbt_rl.experiments.timing import timing_record

Record = dict[str, Any]
FloatArray = npt.NDArray[np.float64]
# State and label, (1, ...) each, by their number in the stream.
SampleOf = Callable[[int], tuple[npt.NDArray[Any], FloatArray]]
# The curve of 70,000 iterations is kept at every so many.
_CURVE_STEP = 100
_MOVING_AVERAGE = 500


def run_trials(trials: Sequence[Trial], models: Path | None = None) -> list[Record]:
    """Run trials that belong together, see ``config.batches``, and return their records, which JSON can hold.

    Args:
        trials: What to do.
        models: Folder in which pre-trained policies are kept; each is trained anew if None.
    """
    if len(trials) == 1:
        return [run_trial(trials[0], models)]
    return _adapt_together(trials, [_pretrained(trial, models) for trial in trials])


def run_trial(trial: Trial, models: Path | None = None) -> Record:
    """Run one trial, see ``run_trials``."""
    torch.manual_seed(trial.stream_seed)
    run: Callable[[Trial, OnlineAlgorithm], Record] = {
        "adapt": _adapt,
        "correlated": _correlated,
        "uncertainty": _uncertainty,
        "timing": timing_record,
        "initialisation": lambda trial, model: initialisation_errors(model),
        "softmax": lambda trial, model: softmax_errors(trial.samples, trial.stream_seed),
    }[trial.kind]
    return run(trial, _pretrained(trial, models))


def _pretrained(trial: Trial, models: Path | None) -> OnlineAlgorithm:
    return learners.clone(trial.pretrain_seed, trial.pretraining, model_path(trial, models))


def model_path(trial: Trial, models: Path | None) -> Path | None:
    """Where the pre-trained policy of a trial is kept."""
    return learners.pretrained_path(trial.pretrain_seed, trial.pretraining, models)


@lru_cache(maxsize=64)
def _expert_outcome(stream_seed: int, count: int) -> tuple[FloatArray, Outcome]:
    """Starts, and what the expert makes of them; the trials of a stream share both."""
    initial = starts(stream_seed, count)
    return initial, simulate(expert_force(SHIFTED), initial, SHIFTED)


def _evaluate(force: Force, trial: Trial, policies: int) -> Record:
    """Success rate and regret of each of ``policies`` snapshots, on the same starts as the expert."""
    initial, expert = _expert_outcome(trial.stream_seed, trial.starts)
    outcome: Outcome = simulate(force, np.broadcast_to(initial, (policies, *initial.shape)), SHIFTED)
    return {
        "success": outcome.success.mean(axis=-1).tolist(),
        "regret": regret(outcome.cost, expert.cost).tolist(),
        "expert_success": float(expert.success.mean()),
    }


def _adapt(trial: Trial, pretrained: OnlineAlgorithm) -> Record:
    """Success and regret against the number of i.i.d. labels."""
    kind = trial.method.kind
    if kind in ("expert", "linear_floor"):
        force = expert_force(SHIFTED) if kind == "expert" else learners.best_linear_force(pretrained.policy)
        return _constant(_evaluate(force, trial, 1), trial)
    learner = build(trial.method, pretrained)
    if kind == "pretrained":
        force = learners.batch_force(learner, [learners.snapshot(learner)])
        return _constant(_evaluate(force, trial, 1), trial)
    return _learn_and_evaluate(trial, learner)


def _adapt_together(trials: Sequence[Trial], pretrained: Sequence[OnlineAlgorithm]) -> list[Record]:
    """``_adapt`` or ``_correlated`` for warm starts of one memory, whose trainings then fall together."""
    waiting = [build(t.method, model, warm_start=WaitingWarmStart) for t, model in zip(trials, pretrained, strict=True)]
    courses = [_Course(t, learner) for t, learner in zip(trials, waiting, strict=True)]
    for count in range(trials[0].samples + 1):
        for course in courses:
            course.advance(count)
        due = [learner for learner in waiting if isinstance(learner, WaitingWarmStart) and learner.full]
        if due:
            train_together(due)
    return [course.record() for course in courses]


def _iid_samples(trial: Trial) -> SampleOf:
    """The i.i.d. label stream of a trial."""
    stream = LabelStream(trial)
    states = stream.states(trial.samples)
    labels = stream.label(states)
    return lambda i: (states[i : i + 1], labels[i : i + 1])


def _visited_samples(trial: Trial, walk: VisitedStates) -> SampleOf:
    """Labels at the states of a walk, whatever their number."""
    stream = LabelStream(trial)

    def sample(index: int) -> tuple[npt.NDArray[Any], FloatArray]:
        state = walk.next_state()
        return state, stream.label(state)

    return sample


def _constant(record: Record, trial: Trial) -> Record:
    """A policy that does not learn has one value at every checkpoint."""
    repeated = {name: record[name] * len(trial.checkpoints) for name in ("success", "regret")}
    return {**record, **repeated, "checkpoints": list(trial.checkpoints)}


def _learn_and_evaluate(trial: Trial, learner: OnlineAlgorithm) -> Record:
    course = _Course(trial, learner)
    for count in range(trial.samples + 1):
        course.advance(count)
    return course.record()


class _Course:
    """A learner on its samples: update one by one, keep a snapshot at each checkpoint, evaluate the distinct ones."""

    def __init__(self, trial: Trial, learner: OnlineAlgorithm) -> None:
        self._trial, self._learner = trial, learner
        self._walk = None if trial.stream == "iid" else VisitedStates(learner, trial.stream_seed)
        self._sample = _iid_samples(trial) if self._walk is None else _visited_samples(trial, self._walk)
        self._snapshots: list[Any] = []
        self._used: list[int] = []
        self._fresh = True

    def advance(self, count: int) -> None:
        """What happens after ``count`` labels: look at the learner at a checkpoint, then give it the next one."""
        if count in self._trial.checkpoints:
            if self._fresh:
                self._snapshots.append(learners.snapshot(self._learner))
            self._used.append(len(self._snapshots) - 1)
            self._fresh = False
        if count < self._trial.samples:
            context, target = self._sample(count)
            info = self._learner.update(Sample(context, target))
            self._fresh = self._fresh or getattr(info, "trainings", 1) > 0

    def record(self) -> Record:
        """Evaluate all snapshots in one batch."""
        trial, learner = self._trial, self._learner
        record = _evaluate(learners.batch_force(learner, self._snapshots), trial, len(self._snapshots))
        for name in ("success", "regret"):
            record[name] = [record[name][index] for index in self._used]
        record["checkpoints"] = list(trial.checkpoints)
        failed_after = learner.failed_after if isinstance(learner, PrintedKBT) else None
        if failed_after is not None:
            _mark_failure(record, failed_after)
        record["failed_after"] = failed_after
        return record if self._walk is None else {**record, "falls": self._walk.falls}


def _mark_failure(record: Record, failed_after: int) -> None:
    """A posterior that is no longer proper counts as failure from there on."""
    for index, count in enumerate(record["checkpoints"]):
        if count > failed_after:
            record["success"][index] = 0.0
            record["regret"][index] = 99.0


def _correlated(trial: Trial, pretrained: OnlineAlgorithm) -> Record:
    """As ``_adapt``, with labels at i.i.d. states or at the states that the learning policy visits itself."""
    return _learn_and_evaluate(trial, build(trial.method, pretrained))


class VisitedStates:
    """Every 5th state of the learner's own path on the shifted plant; a new episode after a fall or 10 s."""

    every = 5

    def __init__(self, learner: OnlineAlgorithm, seed: int) -> None:
        self._policy = learner.policy
        self._starts = iter(starts(seed + 500_000, 10_000))
        self.falls = 0
        self._begin()

    def _begin(self) -> None:
        self._state, self._steps = next(self._starts), 0

    def next_state(self) -> npt.NDArray[np.float32]:
        """``(1, 4)``."""
        for _ in range(self.every):
            features = learners.features_of(self._policy, self._state[None])
            action = self._policy.clip(self._policy.act(features))
            self._state = rk4_step(self._state, float(action[0, 0]) * SHIFTED.max_force, SHIFTED)
            self._steps += 1
            upright = bool(is_upright(self._state))
            if not upright or self._steps >= EPISODE_STEPS:
                self.falls += not upright
                self._begin()
        return np.asarray(self._state[None], dtype=np.float32)


def _uncertainty(trial: Trial, pretrained: OnlineAlgorithm) -> Record:
    """Figure 5: predicted variance against iterations, then the error of the mean and the coverage of intervals."""
    learner = build(trial.method, pretrained, trial.noise_variance)
    assert isinstance(learner, KBT)
    head, newton = learner.policy.head, SHIFTED.max_force
    stream = LabelStream(trial)
    states = stream.states(trial.samples)
    features = learners.features_of(learner.policy, states).numpy()
    labels = stream.label(states)
    unit = (float(head.target_scale[0]) * newton) ** 2
    replacing = trial.method.settings.get("rule") == "replace"
    variance = np.empty(trial.samples)
    for i in range(trial.samples):
        info = head.update(features[i : i + 1], labels[i : i + 1])
        variance[i] = unit * (info.epistemic_variance if replacing else info.predictive_variance)
    held_out = stream.states(4_000)
    noisy = newton * stream.label(held_out)[:, 0]
    prediction = head.predict(learners.features_of(learner.policy, held_out))
    mean = newton * prediction.mean[:, 0].numpy()
    spread = prediction.epistemic[:, 0, 0] + (0.0 if replacing else prediction.aleatoric[:, 0, 0])
    half_width = Z95 * newton * spread.sqrt().numpy()
    clean = expert_force(SHIFTED)(held_out)
    window = min(_MOVING_AVERAGE, trial.samples)
    smooth = np.convolve(variance, np.full(window, 1.0 / window), mode="valid")
    return {
        "iterations": list(range(window, trial.samples + 1, _CURVE_STEP)),
        "predicted_variance": smooth[::_CURVE_STEP].tolist(),
        "final_variance": float(smooth[-1]),
        "noise_floor": float(head.noise_cov[0, 0]) * unit,
        "mean_error": float(np.sqrt(np.mean((mean - clean) ** 2))),
        "coverage": float(np.mean(np.abs(noisy - mean) <= half_width)),
    }
