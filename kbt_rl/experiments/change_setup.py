"""What the experiments with a changing world share: the strategies, the plants, the labels, the learner.

Every strategy meets the same plants, the same states and the same noisy labels, and starts from the same pre-trained
policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kbt_rl.agents.kbt import KBT, KBTInfo
from kbt_rl.agents.lqr import lqr_gain
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.callbacks.adaptation import AdaptationStrategy, Forgetting, ProcessNoise, ReopenOnDetection, TowardsPrior
from kbt_rl.envs.plant import LABEL_BOX, NOMINAL, SHIFTED, InvertedPendulumParams
from kbt_rl.envs.schedule import PLANT_RANGES, reflected
from kbt_rl.experiments.config import KBT_METHOD, Method
from kbt_rl.experiments.learners import build, features_of
from kbt_rl.experiments.simulation import PlantBatch, expert_force, simulate, starts
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.monitor import Cusum, WindowedChiSquare

Params = InvertedPendulumParams

NONE, PRETRAINED, EXPERT = "none", "pre-trained", "expert"
FORGETTING, PROCESS, TOWARDS = "forgetting", "process noise", "towards the prior"
CUSUM, WINDOW = "re-open on CUSUM", "re-open on window"
LEARNED, TRAP = "re-open on CUSUM, learned noise", "learned noise without a lag"
UNTOLD_NONE = "none, learned noise"
#: Samples that the reference noise level lies back where the noise is learned.
NOISE_LAG = 50
#: Of the monitors in the experiments, per sample.
FALSE_ALARM_RATE = 1e-5


def strategies() -> dict[str, Callable[[], AdaptationStrategy | None]]:
    """What is compared, by name."""
    return {
        NONE: lambda: None,
        UNTOLD_NONE: lambda: None,
        FORGETTING: lambda: Forgetting(FORGETTING_FACTOR),
        PROCESS: lambda: ProcessNoise(PROCESS_NOISE),
        TOWARDS: lambda: TowardsPrior(TOWARDS_PRIOR),
        WINDOW: lambda: ReopenOnDetection(WindowedChiSquare(FALSE_ALARM_RATE)),
        CUSUM: lambda: ReopenOnDetection(Cusum(FALSE_ALARM_RATE)),
        LEARNED: lambda: ReopenOnDetection(Cusum(FALSE_ALARM_RATE), noise_lag=NOISE_LAG),
        TRAP: lambda: ReopenOnDetection(Cusum(FALSE_ALARM_RATE)),
    }


#: Best of 0.98, 0.95, 0.9; 1e-3, 1e-2, 0.1; 1e-2, 0.1 by success after 25 labels, on one stream of seed 0. The last two
#: are in units of the prior's covariance, per sample.
FORGETTING_FACTOR, PROCESS_NOISE, TOWARDS_PRIOR = 0.98, 0.1, 0.1
#: The strategies whose learner is not told the noise variance.
UNTOLD = (LEARNED, TRAP, UNTOLD_NONE)


@dataclass(frozen=True)
class ChangeConfig:
    """One stream and one pre-trained policy.

    Attributes:
        pretrain_seed: Of the policy.
        stream_seed: Of plants, states, noise and starts.
        plants: Shifts in sequence.
        samples: Labels on each plant.
        checkpoints: Labels since the shift at which the policy is evaluated.
        starts: Episodes of an evaluation.
        noise_variance: Of the labels, N^2.
        misfit_variance: What a head that is told the noise assumes on top of it, and the least that one assumes that
            learns it, N^2. The frozen features cannot express the expert exactly, and weights that follow the labels
            all too well on one plant are a bad start for the next.
        drift_samples: Labels under the drift.
        drift_rate: Standard deviation of the step that each logarithm takes with every label.
        drift_every: Labels between two evaluations under the drift.
    """

    pretrain_seed: int
    stream_seed: int
    plants: int = 10
    samples: int = 150
    checkpoints: tuple[int, ...] = (0, 10, 25)
    starts: int = 10
    noise_variance: float = 0.1
    misfit_variance: float = 1.0
    drift_samples: int = 1_500
    drift_rate: float = 0.02
    drift_every: int = 100


class PlantDraw(NamedTuple):
    """Plants in sequence, and how many draws were rejected because the shift was small, or the expert too weak."""

    plants: list[Params]
    too_similar: int
    too_hard: int


#: A plant on which the previous expert succeeds as often is no shift; one where its own does not, no task.
_MOST_BEFORE, _LEAST_EXPERT = 0.5, 0.95
_AT_ONCE, _DRAW_STARTS, _DRAW_SEED = 32, 20, 50_000  # starts other than those of the evaluation


def draw_plants(config: ChangeConfig) -> PlantDraw:
    """Plants uniform in ``PLANT_RANGES``; on each, the previous plant's expert succeeds from under half of the starts.

    The first follows the nominal plant. Draws on which the plant's own expert does not reach 0.95 within the 10 s of
    an episode are rejected as well.
    """
    rng = np.random.default_rng([config.stream_seed, 21])
    low, high = np.array(list(PLANT_RANGES.values())).T
    initial = starts(config.stream_seed + _DRAW_SEED, _DRAW_STARTS)
    plants, similar, hard = [NOMINAL], 0, 0
    while len(plants) <= config.plants:
        drawn = rng.uniform(low, high, (_AT_ONCE, 3))  # simulated together, taken in turn
        cart_mass, pole_mass, half_length = drawn.T[..., None]
        batch = PlantBatch(cart_mass, pole_mass, half_length, np.array(NOMINAL.gravity))
        force = expert_force(plants[-1])
        before = simulate(force, np.broadcast_to(initial, (_AT_ONCE, *initial.shape)), batch).success.mean(axis=-1)
        shifts = np.flatnonzero(before < _MOST_BEFORE)
        similar += int(shifts[0]) if len(shifts) else _AT_ONCE
        if len(shifts):
            plant = Params(*drawn[shifts[0]].tolist())
            if simulate(expert_force(plant), initial, plant).success.mean() < _LEAST_EXPERT:
                hard += 1
            else:
                plants.append(plant)
    return PlantDraw(plants[1:], similar, hard)


def drifting_plants(config: ChangeConfig) -> Iterator[Params]:
    """The plant at each label: a random walk from the shifted plant, reflected at ``PLANT_RANGES``."""
    rng = np.random.default_rng([config.stream_seed, 23])
    low, high = np.log(np.array(list(PLANT_RANGES.values()))).T
    place = np.log(list(SHIFTED.dynamics.values()))
    while True:
        yield Params(*np.exp(place).tolist())
        place = reflected(place + config.drift_rate * rng.standard_normal(3), low, high)


# ---------------------------------------------------------------------- learning


class Learner:
    """A KBT model with its strategy; it is told the noise of the labels, or learns it.

    Either way it is told the misfit: as noise on top, or as the smallest noise that it may learn.
    """

    def __init__(self, name: str, pretrained: KBT, config: ChangeConfig) -> None:
        self.told = name not in UNTOLD
        if self.told:
            model = build(KBT_METHOD, pretrained, config.noise_variance + config.misfit_variance)
        else:
            unit = pretrained.policy.head.mean_square_scale * SHIFTED.max_force**2
            floor = max(config.misfit_variance / unit, HeadConfig.noise_floor)
            model = build(Method("learned noise", "kbt", {"noise": "learned", "noise_floor": floor}), pretrained)
        assert isinstance(model, KBT)
        self.model, self.strategy = model, strategies()[name]()
        self.noticed = False

    def learn(self, sample: Sample) -> KBTInfo:
        """Learn a sample, and let the strategy react."""
        info = self.model.update(sample)
        assert isinstance(info, KBTInfo)
        self.noticed = self.strategy is not None and self.strategy.after_update(self.model, info)
        return info


def labelled(config: ChangeConfig, policy: TransformerPolicy, plants: Sequence[Params], purpose: int) -> list[Sample]:
    """One sample for each plant: a state uniform in the label box and the noisy force of the plant's expert.

    The encoder is frozen and the same for all strategies, so all states are encoded at once.
    """
    rng = np.random.default_rng([config.stream_seed, purpose])
    box = np.asarray(LABEL_BOX)
    states = rng.uniform(-box, box, (len(plants), 4)).astype(np.float32)
    gains = {plant: lqr_gain(plant)[0] for plant in dict.fromkeys(plants)}
    forces = np.array([-gains[plant] @ state for plant, state in zip(plants, states.astype(np.float64), strict=True)])
    actions = (forces + config.noise_variance**0.5 * rng.standard_normal(len(plants))) / SHIFTED.max_force
    features = torch.cat([features_of(policy, part) for part in np.array_split(states, -(-len(states) // 1_000))])
    context = policy.start(states)
    return [
        Sample(context.rows(slice(index, index + 1)), actions[index : index + 1], features=features[index : index + 1])
        for index in range(len(plants))
    ]
