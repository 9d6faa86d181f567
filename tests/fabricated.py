"""Results of an experiment that was never run, in the form of the trials' files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from kbt_rl.experiments.config import KBT_METHOD, LINEAR_METHOD, Method, Trial, printed_method, warm_start_method

Result = dict[str, Any]
CHECKPOINTS = (0, 10, 20, 30, 50, 100)
KBT_SUCCESS = (0.0, 0.9, 1.0, 1.0, 1.0, 1.0)
KBT_REGRET = (99.0, 0.5, 0.07, 0.05, 0.025, 0.015)
WARM_SUCCESS = (0.0, 0.1, 0.2, 0.4, 0.6, 1.0)
WARM_REGRET = (99.0, 50.0, 30.0, 10.0, 1.0, 0.01)
BASE = Trial("adapt", KBT_METHOD, 1000, 1000, samples=100, starts=5, checkpoints=CHECKPOINTS)


def result(trial: Trial, record: dict[str, Any]) -> Result:
    """As it comes back from a file."""
    loaded: Result = json.loads(
        json.dumps({"trial": asdict(trial), "record": record, "versions": {"kbt_rl": "0.1.0", "torch": "2.13"}})
    )
    return loaded


def adapt(
    method: Method,
    success: Sequence[float],
    regret: Sequence[float],
    *,
    seeds: tuple[int, int] = (1000, 1000),
    failed_after: int | None = None,
    **options: Any,
) -> Result:
    """One trial of Figure 3 (or of ``kind`` and ``stream`` in ``options``) at the first checkpoints."""
    checkpoints = CHECKPOINTS[: len(success)]
    extra = {name: options.pop(name) for name in ("falls",) if name in options}
    trial = replace(
        BASE, method=method, pretrain_seed=seeds[0], stream_seed=seeds[1], checkpoints=checkpoints, **options
    )
    record = {"success": list(success), "regret": list(regret), "checkpoints": list(checkpoints), "expert_success": 1.0}
    return result(trial, {**record, "failed_after": failed_after, **extra})


def timing(method: Method, update_s: float, encoder_s: float = 1e-3) -> Result:
    times = {
        "update_s": update_s,
        "encoder_s": encoder_s,
        "sample_to_posterior_s": update_s + encoder_s,
        "pytorch_encoder_s": 2.0 * encoder_s,
    }
    return result(replace(BASE, kind="timing", methods=(method,)), {"methods": {method.name: times}})


def uncertainty(rule: str, variance: float, final: float, error: float, coverage: float) -> Result:
    floor = variance or 0.1
    record = {
        "iterations": [500, 600, 700],
        "predicted_variance": [3 * final, 1.5 * final, final],
        "final_variance": final,
        "noise_floor": floor,
        "mean_error": error,
        "coverage": coverage,
    }
    method = Method(f"KBT {rule}", "kbt", {"rule": rule})
    return result(replace(BASE, kind="uncertainty", method=method, noise_variance=variance), record)


def everything() -> list[Result]:
    """Two encoders times two streams of every kind of trial, all figures to reach reached."""
    pairs = [(p, s) for s in (1000, 1001) for p in (1000, 1001)]
    results = []
    for seeds in pairs:
        weak = 0.02 * (seeds[0] == 1001)
        success = [max(0.0, value - weak * (n < 30)) for n, value in zip(CHECKPOINTS, KBT_SUCCESS, strict=True)]
        results += [
            adapt(KBT_METHOD, success, KBT_REGRET, seeds=seeds),
            adapt(LINEAR_METHOD, KBT_SUCCESS, KBT_REGRET, seeds=seeds),
            adapt(printed_method(0.01), (0.0, 0.3, 0.2, 0.0, 0.0, 0.0), [99.0] * 6, seeds=seeds, failed_after=20),
            adapt(warm_start_method(10, 1e-3), WARM_SUCCESS, WARM_REGRET, seeds=seeds),
            adapt(warm_start_method(100, 1e-3), (0.0,) * 5 + (1.0,), [99.0] * 5 + [0.1], seeds=seeds),
            adapt(Method("linear floor", "linear_floor"), [1.0] * 6, [0.014] * 6, seeds=seeds),
            adapt(Method("pre-trained", "pretrained"), [0.0] * 6, [99.0] * 6, seeds=seeds),
            adapt(Method("expert", "expert"), [1.0] * 6, [0.0] * 6, seeds=seeds),
            adapt(KBT_METHOD, KBT_SUCCESS, KBT_REGRET, seeds=seeds, kind="correlated"),
            adapt(KBT_METHOD, WARM_SUCCESS, WARM_REGRET, seeds=seeds, kind="correlated", stream="visited", falls=3),
        ]
    results += [
        timing(KBT_METHOD, 2e-4),
        timing(warm_start_method(10, 1e-3), 0.1),
        timing(warm_start_method(100, 1e-3), 0.01),
    ]
    for variance in (0.0, 10.0, 20.0, 50.0):
        level = variance or 0.1
        results.append(uncertainty("measure", variance, 1.01 * level, 0.4, 0.95))
        results.append(uncertainty("replace", variance, level, 3.0, 0.85))
    errors = {"1": [0.0, 1e-16], "2": [1e-16, 2e-15]}
    record = {"prior_variances": [1e-4, 1.0], "largest_difference": errors}
    results.append(result(replace(BASE, kind="initialisation"), record))
    softmax = {
        "logit_variances": [0.01, 1.0],
        "mean_rmse": [1e-3, 0.1],
        "cov_relative_error": [0.01, 0.5],
        "samples": 9,
    }
    results.append(result(replace(BASE, kind="softmax"), softmax))
    return results
