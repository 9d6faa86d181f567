"""Gymnasium environments: the inverted pendulum, alone and vectorised; shifts of others. No heavy imports."""

from kbt_rl.envs.discrete import (
    FIVE_FORCES,
    TWO_FORCES,
    DiscreteInvertedPendulumEnv,
    DiscreteInvertedPendulumVectorEnv,
)
from kbt_rl.envs.dynamics_shift import DynamicsShift
from kbt_rl.envs.inverted_pendulum import InvertedPendulumEnv
from kbt_rl.envs.plant import (
    DT,
    LABEL_BOX,
    NOMINAL,
    OBSERVATION_BOX,
    SETTLED_BOX,
    SHIFTED,
    START_BOX,
    InvertedPendulumParams,
    dynamics,
    is_settled,
    is_upright,
    linearize,
    rk4_step,
    stage_cost,
)
from kbt_rl.envs.schedule import PLANT_RANGES, RandomWalkDrift, ScheduledShifts
from kbt_rl.envs.vector import InvertedPendulumVectorEnv

__all__ = [
    "DT",
    "FIVE_FORCES",
    "LABEL_BOX",
    "NOMINAL",
    "OBSERVATION_BOX",
    "PLANT_RANGES",
    "SETTLED_BOX",
    "SHIFTED",
    "START_BOX",
    "TWO_FORCES",
    "DiscreteInvertedPendulumEnv",
    "DiscreteInvertedPendulumVectorEnv",
    "DynamicsShift",
    "InvertedPendulumEnv",
    "InvertedPendulumParams",
    "InvertedPendulumVectorEnv",
    "RandomWalkDrift",
    "ScheduledShifts",
    "dynamics",
    "is_settled",
    "is_upright",
    "linearize",
    "rk4_step",
    "stage_cost",
]
