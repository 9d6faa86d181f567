"""Callbacks that teach a learner during rollouts, and the streams their samples come from."""

from kbt_rl.callbacks.adaptation import (
    AdaptationStrategy,
    Forgetting,
    ProcessNoise,
    ReopenOnDetection,
    TowardsPrior,
)
from kbt_rl.callbacks.adapters import KalmanAdapter, OnlineAdapter
from kbt_rl.callbacks.identification import IdentificationCallback
from kbt_rl.callbacks.queries import Always, QueryRule, Random, VarianceGate
from kbt_rl.callbacks.streams import (
    IidStream,
    RecordedStream,
    SampleStream,
    StreamBatch,
    UncertainStream,
    VisitedStream,
)

__all__ = [
    "AdaptationStrategy",
    "Always",
    "Forgetting",
    "IdentificationCallback",
    "IidStream",
    "KalmanAdapter",
    "OnlineAdapter",
    "ProcessNoise",
    "QueryRule",
    "Random",
    "RecordedStream",
    "ReopenOnDetection",
    "SampleStream",
    "StreamBatch",
    "TowardsPrior",
    "UncertainStream",
    "VarianceGate",
    "VisitedStream",
]
