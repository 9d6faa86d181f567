"""Teachers of a policy that ``adapt`` has made: another trained policy, asked for the outputs of its last layer.

These say more than its actions do: bounds and squashing have not taken anything away. Anything else is asked for
actions, by :mod:`kbt_rl.agents.experts`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecNormalize

from kbt_rl.agents.experts import Expert, check_spaces, normaliser_of
from kbt_rl.agents.online_policy import Labeller
from kbt_rl.networks.base import Array, Call, Network, State
from kbt_rl.networks.links import LabelKind
from kbt_rl.networks.normaliser import Normaliser
from kbt_rl.networks.sb3 import SB3Network, policy_of
from kbt_rl.networks.tap import Tap


class Teacher:
    """A trained policy as a teacher.

    A recurrent one has to see every observation of an episode: ``learn`` lets it follow the learner, and it cannot be
    asked for single ones.

    Args:
        model: An SB3 or sb3-contrib model or policy.
        vec_normalize: The ``VecNormalize`` that it was trained in, or its file; by default the one of its environment.

    Raises:
        TypeError: The model is none of SB3's.
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
        return self._run(observations)[0]

    def outputs(self, observations: Any) -> Array:
        """Outputs of the last layer for observations ``(n, ...)``, ``(n, o)``."""
        return self._run(observations)[1]

    def said(self, observations: Any, state: State = None, begins: Array | None = None) -> tuple[Array, Array, State]:
        """Actions, outputs of the last layer, and the next state; see ``__call__`` and ``outputs``."""
        call = Call(self._seen(observations), state, begins)
        tap = Tap(self.network.layer)
        try:
            heard = tap.hear(lambda: self.network.run(call))
        finally:
            tap.remove()
        weight, bias = self.network.linear()
        outputs: Array = (heard.features.to(weight) @ weight.mT + bias).cpu().numpy()
        actions, state = heard.result
        return actions, outputs, state

    def _run(self, observations: Any) -> tuple[Array, Array]:
        if self.network.recurrent:
            raise TypeError(
                "a recurrent teacher has to see every observation of an episode; learn(env, steps, "
                "callback=KalmanAdapter(teacher)) lets it, or run it yourself and pass its actions to update()"
            )
        actions, outputs, _ = self.said(observations)
        return actions, outputs

    def _seen(self, observations: Any) -> Any:
        return observations if self.normaliser is None else self.normaliser(observations)


class Companion:
    """A recurrent teacher that goes where the learner goes.

    Args:
        teacher: Recurrent.
        kind: Which labels it gives.
    """

    def __init__(self, teacher: Teacher, kind: LabelKind) -> None:
        self._teacher, self._kind = teacher, kind
        self._state: State = None

    def follow(self, observations: Any, begins: npt.NDArray[np.bool_]) -> Array:
        """See ``Labeller``."""
        actions, outputs, self._state = self._teacher.said(observations, self._state, begins)
        return outputs if self._kind == "output" else actions


def labeller_for(network: Network, expert: Expert) -> Labeller:
    """How to ask an expert for labels of a network's outputs.

    Raises:
        TypeError: The expert is neither a policy nor callable.
        ValueError: It was made for other spaces.
    """
    answers = callable(getattr(expert, "label", None))  # as an LQRExpert, which is an SB3 policy without a network
    teacher: Any = expert if answers or policy_of(expert) is None else Teacher(expert)
    check_spaces(teacher, network.observation_space, network.action_space)
    if isinstance(teacher, Teacher):
        kind: LabelKind = "output" if type(teacher.network.link) is type(network.link) else "action"
        follow = Companion(teacher, kind).follow if teacher.network.recurrent else None
        return Labeller(teacher.outputs if kind == "output" else teacher, kind, follow)
    ask = getattr(teacher, "label", teacher)  # an expert of this library answers without bounds
    if not callable(ask):
        raise TypeError(f"a teacher is an SB3 policy or a function of observations; got {type(expert).__name__}")
    return Labeller(lambda observations: np.asarray(ask(observations)), "action")
