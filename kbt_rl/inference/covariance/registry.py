"""The structures by name."""

from __future__ import annotations

from kbt_rl.inference.covariance.base import Structure
from kbt_rl.inference.covariance.joint import Joint
from kbt_rl.inference.covariance.layered import Layer
from kbt_rl.inference.covariance.low_rank import LowRank
from kbt_rl.inference.covariance.neuron import Diagonal, Neuron
from kbt_rl.inference.covariance.shared import Rotated, Shared

STRUCTURES: dict[str, Structure] = {
    "joint": Joint(),
    "layer": Layer(),
    "neuron": Neuron(),
    "diagonal": Diagonal(),
    "shared": Shared(),
    "rotated": Rotated(),
    "low_rank": LowRank(),
}
