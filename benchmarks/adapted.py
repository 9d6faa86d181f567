"""An SB3 policy beside itself adapted: its actions, a label of one, and the update of the head alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.sac.policies import SACPolicy

from benchmarks.rows import Case, Row, timed, turns, update_case
from kbt_rl.agents.adapt import adapt
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.model_average import ModelAverage

# Entries of an observation and of an action, as of MuJoCo's HalfCheetah.
OBSERVED, ACTED = 17, 6
POLICIES: dict[str, Callable[..., BasePolicy]] = {
    "SAC, 256 and 256 units": partial(SACPolicy, net_arch=[256, 256]),
    "PPO, 64 and 64 units": partial(ActorCriticPolicy, net_arch=[64, 64]),
}
# Features and outputs of the heads.
HEADS = ((64, 1), (256, 6), (256, 17))
_STREAM = 64


def adapted_policies(seconds: float) -> list[Row]:
    """One observation at a time: an action of a policy alone and adapted, and a label for it."""
    found: list[Row] = []
    bounds = spaces.Box(-1.0, 1.0, (OBSERVED,)), spaces.Box(-1.0, 1.0, (ACTED,))
    rng = np.random.default_rng(0)
    states = rng.uniform(-1.0, 1.0, (_STREAM, OBSERVED)).astype(np.float32)
    labels, turn = rng.uniform(-1.0, 1.0, (_STREAM, ACTED)), turns(_STREAM)
    for name, make in POLICIES.items():
        alone, policy = (make(*bounds, lr_schedule=lambda _: 0.0) for _ in range(2))
        adapted = adapt(policy, states=states)

        def act(subject: Any) -> None:
            subject.predict(states[next(turn)], deterministic=True)

        def learn(subject: Any = adapted) -> None:
            subject.update(None, labels[next(turn)])

        acting = [Case("predict, alone", partial(act, alone)), Case("predict, adapted", partial(act, adapted))]
        found += timed(name, [*acting, Case("update by a label", learn)], seconds)
    return found


def several_noises(seconds: float) -> list[Row]:
    """A layer learned under several label noises, beside as many outputs of one head without their evidence."""
    found: list[Row] = []
    for features, outputs in HEADS:
        average = ModelAverage(features, outputs, 1.0 / features)
        head = BayesianHead(features, average.models * outputs, HeadConfig(structure="shared", noise_variance=0.1))
        noises = np.repeat(average.ratios[:, 0], outputs)
        head.set_noise(average.head.noise_cov.new_tensor(np.diag(noises)))
        cases = [update_case("as many outputs", head), _of_average(average)]
        found += timed(
            f"several noises, {features} features, {outputs} output{'s' if outputs > 1 else ''}", cases, seconds
        )
    return found


def _of_average(average: ModelAverage) -> Case:
    rng, turn = np.random.default_rng(0), turns(_STREAM)
    features = rng.standard_normal((_STREAM, 1, average.in_features))
    labels = rng.standard_normal((_STREAM, 1, average.out_features))

    def call() -> None:
        i = next(turn)
        average.update(features[i], labels[i])

    return Case("update", call)
