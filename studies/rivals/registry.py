"""All rivals by name, and the five settings of each that are tuned over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from studies.rivals import adam, low_rank_ekf, replay, rls, warm_start
from studies.trial import Learner, Method

#: Called with a ``Start`` and the settings of a ``Method``, whose ``kind`` is the name here.
RIVALS: dict[str, Callable[..., Learner]] = {
    "warm start": warm_start.WarmStart,
    "Adam": adam.Adam,
    "replay": replay.Replay,
    "RLS": rls.RecursiveLeastSquares,
    "low-rank EKF": low_rank_ekf.LowRankEKF,
}


def _methods(kind: str, *settings: dict[str, Any]) -> tuple[Method, ...]:
    """A method for each of the settings, named by the rival and what was set."""
    return tuple(Method(f"{kind}, {_text(each)}", kind, each) for each in settings)


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def _rates(*rates: float, **others: Any) -> Sequence[dict[str, Any]]:
    return [{"learning_rate": rate, **others} for rate in rates]


_CANDIDATES: tuple[tuple[Method, ...], ...] = (
    _methods(
        "warm start",
        *({"memory": memory, "learning_rate": rate} for memory, rate in
          ((20, 1e-3), (50, 1e-3), (100, 1e-3), (20, 1e-2), (20, 1e-4))),
    ),
    _methods("Adam", *_rates(1e-4, 1e-3, 1e-2, layers="all"), *_rates(1e-3, 1e-2, layers="last")),
    _methods("replay", *_rates(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, replayed=20)),
    _methods(
        "RLS",
        *({"forgetting": forgetting, "delta": delta} for forgetting, delta in
          ((1.0, 1.0), (1.0, 100.0), (0.999, 1.0), (0.999, 100.0), (0.99, 1.0))),
    ),
    _methods(
        "low-rank EKF",
        *({"rank": 10, "noise_variance": noise, "hidden_variance": hidden, "last_variance": last}
          for noise, hidden, last in
          ((1e-2, 1e-5, 1e-1), (1e-2, 1e-4, 1e-1), (1e-2, 1e-3, 1e-1), (1e-2, 1e-4, 1e-2), (1e-3, 1e-4, 1e-1))),
    ),
)  # fmt: skip
#: Five settings of each rival, an equal budget for all.
CANDIDATES: dict[str, tuple[Method, ...]] = {methods[0].kind: methods for methods in _CANDIDATES}
