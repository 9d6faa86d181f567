"""A world that moves again: plants in sequence or in a slow drift, the strategies against it, and the noisy labels.

Every strategy meets the same plants, states and labels, and starts from the same pre-trained policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kbt_rl.agents.bayesian import KBTInfo
from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.lqr_gain import lqr_gain
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.callbacks.adaptation import AdaptationStrategy, Forgetting, ProcessNoise, ReopenOnDetection, TowardsPrior
from kbt_rl.envs.plant import NOMINAL, SHIFTED, InvertedPendulumParams
from kbt_rl.envs.schedule import PLANT_RANGES, reflected
from kbt_rl.inference.change_detection import Cusum, WindowedChiSquare
from kbt_rl.inference.config import HeadConfig
from studies.cloned import ClonedTrial, Setting
from studies.episodes import evaluate
from studies.methods import kbt, two_layers
from studies.pendulum import Pendulum, uniform_states
from studies.tasks import TASKS

#: Samples that the reference noise level lies back where the noise is learned.
NOISE_LAG = 50
#: Of the monitors, per sample.
FALSE_ALARM_RATE = 1e-5
#: Best of 0.98, 0.95, 0.9; 1e-3, 1e-2, 0.1; 1e-2, 0.1 by success after 25 labels, on one stream of seed 0. The last two
#: are in units of the prior's covariance, per sample.
_FORGETTING, _PROCESS_NOISE, _TOWARDS_PRIOR = 0.98, 0.1, 0.1
#: What a head that is told the noise assumes on top of it, and the least that one assumes that learns it, N^2: the
#: frozen features cannot express the expert exactly, and weights that follow the labels all too well on one plant are a
#: bad start for the next.
MISFIT = 1.0


NONE, FORGET, PROCESS = two_layers("none"), two_layers("forgetting"), two_layers("process noise")
TOWARDS, WINDOW = two_layers("towards the prior"), two_layers("re-open on window")
CUSUM, LEARNED = two_layers("re-open on CUSUM"), two_layers("re-open on CUSUM, learned noise", noise="learned")
TRAP = two_layers("learned noise without a lag", noise="learned")
UNTOLD = two_layers("none, learned noise", noise="learned")
STRATEGIES: dict[str, Callable[[], AdaptationStrategy | None]] = {
    NONE.name: lambda: None,
    UNTOLD.name: lambda: None,
    FORGET.name: lambda: Forgetting(_FORGETTING),
    PROCESS.name: lambda: ProcessNoise(_PROCESS_NOISE),
    TOWARDS.name: lambda: TowardsPrior(_TOWARDS_PRIOR),
    WINDOW.name: lambda: ReopenOnDetection(WindowedChiSquare(FALSE_ALARM_RATE)),
    CUSUM.name: lambda: ReopenOnDetection(Cusum(FALSE_ALARM_RATE)),
    LEARNED.name: lambda: ReopenOnDetection(Cusum(FALSE_ALARM_RATE), noise_lag=NOISE_LAG),
    TRAP.name: lambda: ReopenOnDetection(Cusum(FALSE_ALARM_RATE)),
}


@dataclass(frozen=True, kw_only=True)
class ChangingTrial(ClonedTrial):
    """A strategy on one stream.

    Attributes:
        noise_variance: Of the labels, N^2.
        misfit: See ``MISFIT``; 0 for a head that is not told of it.
        starts: Episodes of a score.
    """

    noise_variance: float = 0.1
    misfit: float = MISFIT
    starts: int = 10


class Adaptive:
    """A KBT model with its strategy; it is told the noise of the labels, or learns it.

    Either way it is told the misfit: as noise on top, or as the smallest noise that it may learn.
    """

    def __init__(self, trial: ChangingTrial, setting: Setting) -> None:
        settings = trial.method.settings
        self.told = settings["head"].get("noise") != "learned"
        if self.told:
            settings = {**settings, "told": trial.noise_variance + trial.misfit}
        else:
            unit = float(setting.pretrained.policy.transformer.action_scale[0] * setting.task.max_force) ** 2
            floor = max(trial.misfit / unit, HeadConfig.noise_floor)
            settings = {**settings, "head": {**settings["head"], "noise_floor": floor}}
        self.model: KBT = kbt(setting, **settings)
        self.strategy = STRATEGIES[trial.method.name]()
        self.noticed = False

    def update(self, sample: Sample) -> KBTInfo:
        """Learn a sample, and let the strategy react."""
        info = self.model.update(sample)
        assert isinstance(info, KBTInfo)
        self.noticed = self.strategy is not None and self.strategy.after_update(self.model, info)
        return info


# ---------------------------------------------------------------------- plants and labels


# A plant on which the previous expert succeeds as often is no shift; one where its own does not, no task.
_MOST_BEFORE, _LEAST_EXPERT = 0.5, 0.95
_AT_ONCE, _DRAW_STARTS, _DRAW_SEED = 32, 20, 50_000  # starts other than those of the scores


@lru_cache(maxsize=64)
def draw_plants(seed: int, count: int) -> tuple[InvertedPendulumParams, ...]:
    """Plants uniform in ``PLANT_RANGES``; on each, the previous plant's expert succeeds from under half of the starts.

    The first follows the nominal plant. Draws on which the plant's own expert does not reach 0.95 within the 10 s of
    an episode are rejected as well.
    """
    rng = np.random.default_rng([seed, 21])
    low, high = np.array(list(PLANT_RANGES.values())).T
    starts = TASKS["shifted"].starts(seed + _DRAW_SEED, _DRAW_STARTS)
    plants = [NOMINAL]
    while len(plants) <= count:
        drawn = rng.uniform(low, high, (_AT_ONCE, 3))  # stepped together, taken in turn
        each = dict(zip(PLANT_RANGES, np.repeat(drawn, _DRAW_STARTS, axis=0).T, strict=True))
        envs = Pendulum().envs(_AT_ONCE * _DRAW_STARTS, **each)
        before = evaluate([Pendulum(plants[-1]).expert()], envs, np.tile(starts, (_AT_ONCE, 1))).success
        shifts = np.flatnonzero(before.reshape(_AT_ONCE, _DRAW_STARTS).mean(axis=1) < _MOST_BEFORE)
        if len(shifts):
            task = Pendulum(InvertedPendulumParams(*drawn[shifts[0]].tolist()))
            if evaluate([task.expert()], task.envs(_DRAW_STARTS), starts).success.mean() >= _LEAST_EXPERT:
                plants.append(task.plant)
    return tuple(plants[1:])


def drifting_plants(seed: int, rate: float) -> Iterator[InvertedPendulumParams]:
    """The plant at each label: a random walk of the logarithms from the shifted plant, reflected at ``PLANT_RANGES``.

    Args:
        seed: Of the walk.
        rate: Standard deviation of a step.
    """
    rng = np.random.default_rng([seed, 23])
    low, high = np.log(np.array(list(PLANT_RANGES.values()))).T
    place = np.log(list(SHIFTED.dynamics.values()))
    while True:
        yield InvertedPendulumParams(*np.exp(place).tolist())
        place = reflected(place + rate * rng.standard_normal(3), low, high)


def labelled(
    policy: TransformerPolicy, plants: Sequence[InvertedPendulumParams], seed: Sequence[int], noise_variance: float
) -> list[Sample]:
    """One sample for each plant: a state uniform in the label box and the noisy force of the plant's expert.

    The encoder is frozen and the same for all strategies, so that all states are encoded at once.
    """
    rng = np.random.default_rng(list(seed))
    states = uniform_states(rng, (len(plants),))
    gains = {plant: lqr_gain(plant)[0] for plant in dict.fromkeys(plants)}
    forces = np.array([-gains[plant] @ state for plant, state in zip(plants, states.astype(np.float64), strict=True)])
    actions = (forces + noise_variance**0.5 * rng.standard_normal(len(plants))) / SHIFTED.max_force
    context = policy.start(states)
    parts = [slice(start, start + 1_000) for start in range(0, len(states), 1_000)]
    features = torch.cat([policy.encode(context.rows(part)) for part in parts])
    rows = [slice(index, index + 1) for index in range(len(plants))]
    return [Sample(context.rows(row), actions[row][:, None], features=features[row]) for row in rows]
