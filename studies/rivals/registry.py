"""All rivals by name, and the five settings of each that are tuned over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from studies.rivals.adam import Adam
from studies.rivals.adf import AssumedDensityFilter
from studies.rivals.bgd import BayesianGradientDescent
from studies.rivals.dropout import Dropout
from studies.rivals.input_tuning import InputTuning
from studies.rivals.laplace import LastLayerLaplace
from studies.rivals.low_rank_ekf import LowRankEKF
from studies.rivals.replay import Replay
from studies.rivals.rls import RecursiveLeastSquares
from studies.rivals.sgld import Langevin
from studies.rivals.soft_reset import SoftReset
from studies.rivals.swag import SWAG
from studies.rivals.warm_start import WarmStart
from studies.trial import Learner, Method

#: Called with a ``Start`` and the settings of a ``Method``, whose ``kind`` is the name here.
RIVALS: dict[str, Callable[..., Learner]] = {
    "warm start": WarmStart,
    "Adam": Adam,
    "replay": Replay,
    "RLS": RecursiveLeastSquares,
    "soft reset": SoftReset,
    "BGD": BayesianGradientDescent,
    "ADF": AssumedDensityFilter,
    "SWAG": SWAG,
    "dropout": Dropout,
    "Laplace": LastLayerLaplace,
    "SGLD": Langevin,
    "low-rank EKF": LowRankEKF,
    "input tuning": InputTuning,
}


def _methods(kind: str, *settings: dict[str, Any]) -> tuple[Method, ...]:
    """A method for each of the settings, named by the rival and what is set."""
    return tuple(Method(f"{kind}, {_text(each)}", kind, each) for each in settings)


def _warm_start(memory: int) -> tuple[Method, ...]:
    return _methods("warm start", *_rates(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, memory=memory))


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def _each(names: str, *rows: tuple[Any, ...], **others: Any) -> list[dict[str, Any]]:
    """Settings of these names, row by row, and others that are the same in all."""
    return [dict(zip(names.split(), row, strict=True)) | others for row in rows]


def _rates(*rates: float, **others: Any) -> list[dict[str, Any]]:
    return [{"learning_rate": rate, **others} for rate in rates]


#: Five settings of each rival, an equal budget for all.
CANDIDATES: dict[str, tuple[Method, ...]] = {
    **{f"warm start, memory {memory}": _warm_start(memory) for memory in (20, 50, 100)},
    "Adam": _methods("Adam", *_rates(1e-4, 1e-3, 1e-2, layers="all"), *_rates(1e-3, 1e-2, layers="last")),
    "replay": _methods("replay", *_rates(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, replayed=20)),
    "RLS": _methods(
        "RLS", *_each("forgetting delta", (1.0, 1.0), (0.999, 1.0), (0.999, 100.0), (0.99, 1.0), (0.99, 100.0))
    ),
    "soft reset": _methods(
        "soft reset",
        *_each("learning_rate drift_rate", (1e-3, 0.1), (1e-2, 0.1), (3e-2, 0.1), (1e-1, 0.1), (3e-2, 1.0)),
    ),
    "BGD": _methods(
        "BGD",
        *_each("deviation mean_rate", (0.01, 10.0), (0.01, 100.0), (0.01, 1000.0), (0.03, 10.0), (0.03, 100.0)),
    ),
    "ADF": _methods("ADF", *_each("prior_variance", (1e-4,), (1e-3,), (1e-2,), (1e-1,), (1.0,), noise_variance=1e-2)),
    "SWAG": _methods("SWAG", *_rates(1e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "dropout": _methods("dropout", *_rates(1e-4, 1e-3, 1e-2, probability=0.1), *_rates(1e-3, 1e-2, probability=0.3)),
    "Laplace": _methods(
        "Laplace", *_each("prior_variance", (1e-4,), (1e-3,), (1e-2,), (1e-1,), (1.0,), noise_variance=1e-2)
    ),
    "SGLD": _methods(
        "SGLD",
        *_each("learning_rate temperature", (2e-3, 1e-6), (2e-2, 1e-6), (2e-1, 1e-6), (2e-2, 1e-4), (2e-1, 1e-4)),
    ),
    "low-rank EKF": _methods(
        "low-rank EKF",
        *_each("hidden_variance last_variance", (1e-5, 0.1), (1e-4, 0.1), (1e-3, 0.1), (1e-4, 0.01), (1e-4, 1.0),
               rank=10, noise_variance=1e-2),
    ),
    "input tuning": _methods("input tuning", *_rates(1e-4, 1e-3, 1e-2, head="bias"), *_rates(1e-3, 1e-2, head="layer")),
}  # fmt: skip
