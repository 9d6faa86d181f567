"""Feeds the transitions of a rollout to an expert that identifies the plant."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from kbt_rl.agents.identification import SelfTuningLQR
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.arguments import whole


class IdentificationCallback(BaseCallback):
    """Let a ``SelfTuningLQR`` see every transition of ``learn``; stands before the adapter that asks it for labels.

    ``model.learn(500, callback=[IdentificationCallback(expert), KalmanAdapter(expert)])``

    The sub-environments of a vector environment are taken for copies of one plant. Logs ``identification/transitions``
    and ``identification/fallbacks`` (times that the last valid gain was kept).

    Args:
        expert: Who identifies.
        verbose: As in SB3.
    """

    model: OnlineAlgorithm

    def __init__(self, expert: SelfTuningLQR, verbose: int = 0) -> None:
        super().__init__(whole("verbose", verbose))
        if not isinstance(expert, SelfTuningLQR):
            raise TypeError(f"the expert must be a SelfTuningLQR, which takes transitions; got {type(expert).__name__}")
        self.expert = expert

    def _init_callback(self) -> None:
        if not isinstance(self.model, OnlineAlgorithm):
            raise TypeError(
                f"IdentificationCallback reads the rollouts of the learners of kbt_rl (KBT, WarmStart); got "
                f"{type(self.model).__name__}; elsewhere call expert.observe(states, actions, next_states) yourself"
            )

    def _on_step(self) -> bool:
        # The loop replaces _last_obs after this call: it still is the state in which the action was taken.
        states = np.asarray(self.model._last_obs)
        arrived = np.array(self.locals["new_obs"])
        ended = np.flatnonzero(self.locals["dones"])
        whole = np.ones(len(arrived), dtype=bool)
        for index in ended:  # the vector environment has been reset: new_obs belongs to the next episode
            last = self.locals["infos"][index].get("terminal_observation")
            if last is None:
                whole[index] = False
            else:
                arrived[index] = last
        self.expert.observe(states[whole], self.locals["actions"][whole], arrived[whole])
        self.logger.record("identification/transitions", self.expert.transitions)
        self.logger.record("identification/fallbacks", self.expert.fallbacks)
        return True
