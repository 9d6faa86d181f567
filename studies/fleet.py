"""Many learners of one method, each with an episode and a posterior of its own, side by side: row i is learner i's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.sample import Sample
from kbt_rl.callbacks.queries import epistemic_variance, noise_variance
from studies.cloned import Setting
from studies.episodes import BoolArray, FloatArray, Policy
from studies.frozen import frozen
from studies.methods import build, kbt
from studies.trial import Fixed, Learner, Method

Array = npt.NDArray[Any]


class Fleet:
    """Learners that act by ``predict`` and learn from labels of their own.

    KBT keeps all posteriors in one model (``per_env``), a policy that does not learn is asked once for all rows, and of
    everything else there are copies.

    Args:
        method: What they are.
        setting: Where each starts.
        count: How many.

    Attributes:
        learners: One for all rows, or one each; empty where one model has all posteriors.
    """

    def __init__(self, method: Method, setting: Setting, count: int) -> None:
        self._count = count
        self._model: KBT | None = None
        self.learners: list[Learner] = []
        if method.kind == "kbt" and count > 1:
            self._model = kbt(setting, **method.settings, count=count)
            return
        first = build(method, setting)
        self.learners = [first] if isinstance(first, Fixed) else [first, *map(copy.deepcopy, [first] * (count - 1))]

    def predict(
        self, observation: Array, state: Any = None, episode_start: BoolArray | None = None, deterministic: bool = True
    ) -> tuple[Array, Any]:
        """What each does, ``(n, a)``: SB3's signature, each row by its own learner."""
        if self._model is not None:
            return self._model.policy.predict(observation, state, episode_start, deterministic)
        if len(self.learners) < self._count:
            return self.learners[0].policy.predict(observation, state, episode_start, deterministic)
        states = [None] * self._count if state is None else state
        rows = [slice(i, i + 1) for i in range(self._count)]
        begins = np.ones(self._count, dtype=bool) if episode_start is None else episode_start
        answers = [
            learner.policy.predict(observation[row], own, begins[row], deterministic)
            for learner, own, row in zip(self.learners, states, rows, strict=True)
        ]
        return np.concatenate([action for action, _ in answers]), [own for _, own in answers]

    def update(self, states: Array, labels: FloatArray) -> None:
        """One label each, ``(n, a)`` in the states ``(n, 4)``; NaN where there is none."""
        present = np.flatnonzero(~np.isnan(labels).any(axis=1))
        seen = np.asarray(np.nan_to_num(states), dtype=np.float32)
        if self._model is not None:
            if len(present):
                self._model.update(Sample(seen, labels))
            return
        for i in present if len(self.learners) == self._count else []:
            self.learners[i].update(Sample(seen[i : i + 1], labels[i : i + 1]))

    @property
    def is_uncertain(self) -> bool:
        """Whether the learners know what they do not know."""
        return self._model is not None or hasattr(self.learners[0].policy, "predict_moments")

    def variances(self, states: Array) -> FloatArray:
        """Epistemic over noise variance of each learner in states of its own, ``(n, m, 4)`` to ``(n, m)``."""
        if self._model is not None:
            policy = self._model.policy
            features = policy.encode(policy.start(states.reshape(-1, 4)))
            epistemic = epistemic_variance(self._model, features, each=states.shape[1]).reshape(states.shape[:2])
            ratio: FloatArray = epistemic / noise_variance(self._model)[:, None]
            return ratio
        moments = [
            learner.policy.predict_moments(own)  # type: ignore[attr-defined]
            for learner, own in zip(self.learners, states, strict=True)
        ]
        return np.stack([each.epistemic[:, 0, 0] / each.aleatoric[:, 0, 0] for each in moments])

    def alone(self, index: int) -> Policy:
        """The policy of one learner as it is now."""
        if self._model is not None:
            return frozen(self._model.policy.select(index))
        return frozen(self.learners[min(index, len(self.learners) - 1)].policy)
