"""Callbacks that teach a learner during rollouts, and the streams their samples come from."""

from kbt_rl.callbacks.adaptation import (
    AdaptationStrategy,
    Forgetting,
    ProcessNoise,
    ReopenOnDetection,
    TowardsPrior,
)
from kbt_rl.callbacks.adapters import KalmanAdapter, OnlineAdapter
from kbt_rl.callbacks.streams import IidStream, RecordedStream, SampleStream, StreamBatch, VisitedStream

__all__ = [
    "AdaptationStrategy",
    "Forgetting",
    "IidStream",
    "KalmanAdapter",
    "OnlineAdapter",
    "ProcessNoise",
    "RecordedStream",
    "ReopenOnDetection",
    "SampleStream",
    "StreamBatch",
    "TowardsPrior",
    "VisitedStream",
]
