"""RL Zoo with KBT: its ``train`` and ``enjoy``, which know the algorithm ``kbt``. Needs ``pip install rl_zoo3``.

RL Zoo chooses among its own algorithms before it imports anything else, so that KBT has to be entered first::

    python examples/rl_zoo/kbt_zoo.py train --algo kbt --env kbt_rl/ShiftedInvertedPendulum-v0 \
        --conf-file examples/rl_zoo/kbt.yml --eval-freq 100 -f logs -tb runs
    python examples/rl_zoo/kbt_zoo.py enjoy --algo kbt --env kbt_rl/ShiftedInvertedPendulum-v0 -f logs --no-render

``--trained-agent policy.zip`` starts from what ``kbt-rl pretrain`` or an earlier run has written. ``--optimize`` is not
served: RL Zoo has no search space for an algorithm that it does not know.
"""

from __future__ import annotations

import sys
from typing import Any

import gymnasium as gym

from kbt_rl import KBT, KalmanAdapter, LQRExpert
from kbt_rl.agents.behaviour_cloning import PretrainConfig


class TaughtByLQR(KalmanAdapter):
    """A callback that a hyperparameter file can state: it makes its expert from the environment that is trained in.

    Args:
        nominal: Environment on which a model that knows nothing is pre-trained first.
        pretraining: Fields of ``PretrainConfig``.
        **settings: Of ``KalmanAdapter``, such as ``stream`` and ``budget``.
    """

    def __init__(self, nominal: str, pretraining: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(_unknown, **settings)
        self.nominal, self.pretraining = nominal, PretrainConfig(**(pretraining or {}))

    def _init_callback(self) -> None:
        """Pre-train if nobody has, and ask the expert of the plant at hand."""
        if isinstance(self.model, KBT) and self.model.pretrain_info is None:
            nominal = gym.make(self.nominal)
            source = KBT(self.model.policy_class, nominal, policy_kwargs=self.model.policy_kwargs, seed=self.model.seed)
            source.pretrain(LQRExpert.for_env(nominal), self.pretraining)
            self.model.start_from(source)
        self.expert = LQRExpert.for_env(self.training_env)
        super()._init_callback()


def _unknown(observations: Any) -> Any:
    raise RuntimeError("the expert is made when training starts")


def main(command: str, arguments: list[str]) -> None:
    """Run ``rl_zoo3.train`` or ``rl_zoo3.enjoy`` with its own arguments."""
    import rl_zoo3.enjoy
    import rl_zoo3.train

    rl_zoo3.ALGOS["kbt"] = KBT
    commands = {"train": rl_zoo3.train.train, "enjoy": rl_zoo3.enjoy.enjoy}
    if command not in commands:
        raise SystemExit(f"usage: kbt_zoo.py {{{','.join(commands)}}} --algo kbt ...")
    sys.argv[1:] = arguments
    commands[command]()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:])
