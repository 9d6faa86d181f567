"""The update of ``update.increment`` for heads with machine code: one row, or several jointly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kbt_rl.inference.compiled import Engine, Units
from kbt_rl.inference.conditioning import NoiseBelief, condition, huge_values_refused
from kbt_rl.inference.density import LOG_TWO_PI, scalar_log_density
from kbt_rl.inference.moments import Gaussian
from kbt_rl.inference.noise import NoiseEstimate
from kbt_rl.inference.output import OutputRule, lost_pivot, measure
from kbt_rl.inference.record import Increment, UpdateInfo, check, check_distance

if TYPE_CHECKING:
    from kbt_rl.inference.kernels.terms import RowPass

Array = npt.NDArray[np.float64]

_DOWNDATE = np.array([-1.0])


class RowStep(NamedTuple):
    """An ``Increment`` as arrays, with the factor as ``V'`` of shape ``(q, P)``."""

    mean_step: Array
    factor: Array
    signs: Array
    info: UpdateInfo
    noise: NoiseEstimate | None = None

    def as_increment(self) -> Increment:
        """The same as tensors on the same memory."""
        mean_step, factor, signs = (torch.from_numpy(array) for array in self[:3])
        return Increment(mean_step, factor.mT, signs, self.info, self.noise)


def row_step(
    engine: Engine,
    features: Array,
    target: Array,
    rule: OutputRule,
    noise_cov: Tensor,
    belief: NoiseBelief | None = None,
    weights: Tensor | None = None,
    passed: RowPass | None = None,
) -> RowStep:
    """``increment`` for rows ``(B, d)`` and their targets ``(B, o)``, with the forward pass in machine code.

    Uses ``passed`` up, which is that forward pass where it has been made.
    """
    row = engine.propagate(features) if passed is None else passed
    if target.size == 1 and belief is not None:
        return _judged_scalar_step(engine, row, float(target[0, 0]), belief)
    if rule.condition is measure and belief is None:
        measured = _measured_step(engine, row, target, noise_cov, weights)
        if measured is not None:
            return measured
        row = engine.propagate(features)  # once more, for the error that says what is wrong
    output = Gaussian(torch.from_numpy(row[0]), torch.from_numpy(row[1]))
    step, info, noise = condition(output, torch.from_numpy(target), rule, noise_cov, belief, weights)
    factor = np.ascontiguousarray(step.cov_factor.numpy())
    moved, moves, total, smallest = engine.weight_step(row, step.mean_step.numpy(), factor, step.signs.numpy())
    info = info._replace(smallest_variance=smallest)
    check(total, info)
    return RowStep(moved, moves, step.signs.numpy(), info, noise)


def _measured_step(
    engine: Engine, row: RowPass, target: Array, noise_cov: Tensor, weights: Tensor | None
) -> RowStep | None:
    """The rule ``measure`` with Gaussian noise that is known; None where the covariance cannot be inverted.

    Uses the pass up: its covariance with the weights becomes the factor.
    """
    count, o = target.shape
    noise = noise_cov.numpy()
    weighed = np.ones(o) if weights is None else weights.numpy()
    variances = row[1].diagonal().reshape(count, o) @ weighed
    found = engine.measure(row, target, noise, weighed, lost_pivot(target.size))
    if found is None:
        return None
    moved, (total, squares, nis, log_det, smallest) = found
    check_distance(nis, target.size)
    epistemic = float(variances.sum()) / target.size
    info = UpdateInfo(
        innovation=math.sqrt(squares / target.size),
        nis=nis,
        epistemic_variance=epistemic,
        predictive_variance=epistemic + float(noise.diagonal() @ weighed) / o,
        smallest_variance=smallest,
        labels=target.size,
        log_density=-0.5 * (nis + log_det + target.size * LOG_TWO_PI),
    )
    check(total, info)
    return RowStep(moved, row[2], np.full(target.size, -1.0), info)


def _judged_scalar_step(engine: Engine, row: RowPass, target: float, belief: NoiseBelief) -> RowStep:
    """The rule ``measure`` for one row and one output with a noise that is learned or has heavy tails."""
    estimate = belief.estimate
    noise = float(estimate.cov[0, 0])
    error, variance = target - float(row[0][0]), float(row[1][0, 0])
    with huge_values_refused():
        move, gained, weight, learned, labels = belief.model.judge_scalar(error, variance, noise, estimate.labels)
    factor = np.array([[math.sqrt(gained)]])
    moved, moves, total, smallest = engine.weight_step(row, np.array([move]), factor, _DOWNDATE)
    predictive = variance + noise
    if belief.model.robust_dof is None:
        check_distance(error * error / predictive, 1)
    info = UpdateInfo(abs(error), error * error / predictive, variance, predictive, smallest, 1, weight)
    check(total + learned, info)
    with huge_values_refused():
        info = info._replace(log_density=belief.model.log_density_scalar(error, variance, noise))
    return RowStep(moved, moves, _DOWNDATE, info, NoiseEstimate(np.array([[learned]]), labels))


def learn_row(
    engine: Engine, units: Units, features: Array, label: float, noise: float, replacing: bool
) -> UpdateInfo | None:
    """A whole update by the rule ``measure`` or ``replace`` on one row and one output, in one call of machine code.

    Args:
        engine: Bound to the posterior.
        units: See ``compiled.Units``.
        features: ``(d,)``, float64, as they come from the encoder.
        label: In the head's own units.
        noise: Variance of the label.
        replacing: Whether the rule is ``replace``.

    Returns:
        The record; None where the step must be refused: nothing has changed, and ``increment`` says why.
    """
    mean, variance, smallest, done = engine.learn(units, features, label, noise, replacing)
    if not done:
        return None
    innovation, predictive = label - mean, variance + noise
    nis = innovation * innovation / predictive
    density = scalar_log_density(nis, predictive)
    return UpdateInfo(abs(innovation), nis, variance, predictive, smallest, 1, 1.0, density)
