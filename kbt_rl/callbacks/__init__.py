"""Callbacks that teach a learner during rollouts, and the streams their samples come from."""

from kbt_rl.callbacks.adapters import KalmanAdapter, OnlineAdapter
from kbt_rl.callbacks.streams import IidStream, RecordedStream, SampleStream, StreamBatch, VisitedStream

__all__ = [
    "IidStream",
    "KalmanAdapter",
    "OnlineAdapter",
    "RecordedStream",
    "SampleStream",
    "StreamBatch",
    "VisitedStream",
]
