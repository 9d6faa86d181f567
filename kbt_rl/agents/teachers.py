"""Teachers of a policy that ``adapt`` has made: another trained policy, asked for the outputs of its last layer.

These say more than its actions do: bounds and squashing have not taken anything away. Anything else is asked for
actions, by :mod:`kbt_rl.agents.experts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecNormalize

from kbt_rl.agents.experts import Expert, check_spaces, normaliser_of
from kbt_rl.agents.online_policy import Labeller
from kbt_rl.networks.base import Array, Call, Network
from kbt_rl.networks.normaliser import Normaliser
from kbt_rl.networks.sb3 import SB3Network, policy_of
from kbt_rl.networks.tap import Tap


class Teacher:
    """A trained policy as a teacher.

    Args:
        model: An SB3 or sb3-contrib model or policy.
        vec_normalize: The ``VecNormalize`` that it was trained in, or its file; by default the one of its environment.

    Raises:
        TypeError: The model is recurrent, and would have to see every observation.
    """

    def __init__(self, model: Any, vec_normalize: VecNormalize | str | Path | None = None) -> None:
        policy = policy_of(model)
        if policy is None:
            raise TypeError(f"a teacher is an SB3 model or policy; got {type(model).__name__}")
        found = normaliser_of(model)
        self.normaliser = found if vec_normalize is None else Normaliser.of(vec_normalize)
        self.network = SB3Network(policy)
        self.observation_space, self.action_space = policy.observation_space, policy.action_space

    def __call__(self, observations: Any) -> Array:
        """Actions for observations ``(n, ...)``."""
        return self.network.run(Call(self._seen(observations)))[0]

    def outputs(self, observations: Any) -> Array:
        """Outputs of the last layer for observations ``(n, ...)``, ``(n, o)``."""
        tap = Tap(self.network.layer)
        try:
            features = tap.hear(lambda: self.network.run(Call(self._seen(observations)))).features
        finally:
            tap.remove()
        weight, bias = self.network.linear()
        outputs: Array = (features.to(weight) @ weight.mT + bias).cpu().numpy()
        return outputs

    def _seen(self, observations: Any) -> Any:
        return observations if self.normaliser is None else self.normaliser(observations)


def labeller_for(network: Network, expert: Expert) -> Labeller:
    """How to ask an expert for labels of a network's outputs.

    Raises:
        TypeError: The expert is neither a policy nor callable.
        ValueError: It was made for other spaces.
    """
    answers = callable(getattr(expert, "label", None))  # as an LQRExpert, which is an SB3 policy without a network
    teacher: Any = expert if answers or policy_of(expert) is None else Teacher(expert)
    check_spaces(teacher, network.observation_space, network.action_space)
    if isinstance(teacher, Teacher) and type(teacher.network.link) is type(network.link):
        return Labeller(teacher.outputs, "output")
    ask = getattr(teacher, "label", teacher)  # an expert of this library answers without bounds
    if not callable(ask):
        raise TypeError(f"a teacher is an SB3 policy or a function of observations; got {type(expert).__name__}")
    return Labeller(lambda observations: np.asarray(ask(observations)), "action")
