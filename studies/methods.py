"""What is compared: every method as a learner that acts by ``predict`` and learns by ``update(sample)``.

A new baseline is a file with a function like ``build`` of ``printed``, and a line in ``KINDS``. A new setting of one is
a ``Method``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.warm_start import WarmStart
from kbt_rl.inference.config import HeadConfig
from studies import every_layer, printed
from studies.cloned import Setting
from studies.episodes import Policy
from studies.pendulum import uniform_states
from studies.trial import Fixed, Learner, Method


def build(method: Method, setting: Setting) -> Learner:
    """A learner of this method that starts as the pre-trained policy.

    Raises:
        ValueError: There is no such kind.
    """
    if method.kind not in KINDS:
        raise ValueError(f"method {method.name!r} is of the kind {method.kind!r}; there are {', '.join(KINDS)}")
    return KINDS[method.kind](setting, **method.settings)


def kbt(
    setting: Setting, head: dict[str, Any] | None = None, told: float | None = None, count: int = 1, **policy: Any
) -> KBT:
    """KBT.

    Args:
        setting: Where to start.
        head: Fields of its ``HeadConfig``, those of the default otherwise.
        told: Variance of the label noise that it is told, N^2.
        count: Posteriors, each for a row of its own; see ``KBT(per_env=True)``.
        **policy: Further ``policy_kwargs``.
    """
    arguments = policy if head is None else {**policy, "head": HeadConfig(**head)}
    env = setting.task.env() if count == 1 else setting.task.sb3_envs(count)
    model = KBT(env=env, seed=setting.pretrained.seed, policy_kwargs=arguments, per_env=count > 1)
    model.start_from(setting.pretrained)
    if told is not None:
        model.policy.head.set_noise(told / setting.task.max_force**2)
    return model


def _warm_start(setting: Setting, memory: int, learning_rate: float) -> WarmStart:
    model = WarmStart(env=setting.task.env(), seed=setting.pretrained.seed, memory=memory, learning_rate=learning_rate)
    model.start_from(setting.pretrained)
    return model


def _best_linear_head(setting: Setting, states: int = 20_000) -> Fixed:
    """The best linear head on the frozen features by least squares: the floor that the encoder sets."""
    policy = copy.deepcopy(setting.pretrained.policy)
    sample = uniform_states(np.random.default_rng(0), (states,))
    features = policy.encode(policy.start(sample)).double()
    design = torch.cat([features, torch.ones(states, 1, dtype=torch.float64)], dim=1)
    labels = torch.from_numpy(setting.task.expert().label(sample)) / policy.transformer.action_scale.double()
    weights = torch.linalg.lstsq(design, labels).solution.mT
    with torch.no_grad():
        policy.transformer.linear.weight.copy_(weights[:, :-1])
        policy.transformer.linear.bias.copy_(weights[:, -1])
    return Fixed(policy)


class HoldLabel:
    """No learning: act as the pre-trained policy until a label comes, then as the newest label says."""

    def __init__(self, policy: Policy) -> None:
        self.policy: Policy = self
        self._before, self._held = policy, None

    _held: Any

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """The newest label for every row."""
        if self._held is None:
            return self._before.predict(observation, state, episode_start, deterministic)
        return np.repeat(self._held, len(observation), axis=0), state

    def update(self, sample: Sample) -> None:
        """Keep the label."""
        self._held = np.clip(np.asarray(sample.target, dtype=np.float32), -1.0, 1.0)


KINDS: dict[str, Callable[..., Learner]] = {
    "kbt": kbt,
    "every layer": every_layer.EveryLayer,
    "printed": printed.build,
    "warm start": _warm_start,
    "pre-trained": lambda setting: Fixed(setting.pretrained.policy),
    "expert": lambda setting: Fixed(setting.task.expert()),
    "best linear head": _best_linear_head,
    "hold": lambda setting: HoldLabel(setting.pretrained.policy),
}


# ---------------------------------------------------------------------- what most studies compare

#: Found by ``python -m studies tune`` on seeds below 100.
TUNED: dict[str, Any] = json.loads(Path(__file__).with_name("tuned.json").read_text(encoding="utf-8"))


def two_layers(name: str = "KBT, two layers (the paper's head)", **head: Any) -> Method:
    """KBT with the paper's head on the last hidden layer alone; ``head`` are further fields of its ``HeadConfig``."""
    return Method(name, "kbt", {"head": {"layers": 2, **head}, "skip": "none"})


#: KBT as the package delivers it.
DEFAULT = Method("KBT", "kbt")
TWO_LAYERS = two_layers()
#: Exact Bayesian linear regression on the last hidden layer alone.
ONE_LAYER = Method("KBT, one layer without the observation", "kbt", {"head": {"layers": 1}, "skip": "none"})
#: Extended Kalman: the paper's head and prior, linearised at its mean.
EKF = two_layers("EKF", structure="joint", propagation="linearised")
#: All weights of the transformer and a straight path; noise and prior variances were chosen on seeds below 100.
EVERY_LAYER = Method(
    "every layer (low rank)", "every layer",
    {"prior": {"straight.weight": 1.0, "*": 1e-5}, "rank": 10, "noise_variance": 1e-6},
)  # fmt: skip
PRINTED = Method("KBT as printed", "printed", {"epsilon": TUNED["epsilon"]})
FLOOR = Method("best linear head on the features", "best linear head")
PRETRAINED = Method("pre-trained policy", "pre-trained")
EXPERT = Method("expert", "expert")


def warm_start(memory: int, learning_rate: float | None = None) -> Method:
    """The paper's baseline, at its best learning rate if none is given."""
    rate = TUNED["learning_rate"][str(memory)] if learning_rate is None else learning_rate
    return Method(f"warm start, memory {memory}", "warm start", {"memory": memory, "learning_rate": rate})
