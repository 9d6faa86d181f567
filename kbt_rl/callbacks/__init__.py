"""Callbacks that teach a learner during rollouts, and the streams their samples come from."""

from kbt_rl.callbacks.adapters import KalmanAdapter, OnlineAdapter
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
    "Always",
    "IidStream",
    "KalmanAdapter",
    "OnlineAdapter",
    "QueryRule",
    "Random",
    "RecordedStream",
    "SampleStream",
    "StreamBatch",
    "UncertainStream",
    "VarianceGate",
    "VisitedStream",
]
