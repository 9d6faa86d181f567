"""Adapt on a robot that must not fall: a controller acts while the policy does not know enough, and then lets go."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from kbt_rl import KBT, Fallback, HeadConfig, LQRExpert, Sample
from kbt_rl.agents.behaviour_cloning import PretrainConfig


def main(seconds: int = 6, limit: float = 0.08, pretraining: PretrainConfig | None = None) -> list[float]:
    """Clone the nominal expert, then learn on the shifted plant from i.i.d. labels, one every fifth step.

    Args:
        seconds: Length of the episode on the shifted plant.
        limit: Epistemic standard deviation above which the controller acts; 1 is the full force.
        pretraining: Sizes of the behaviour cloning.

    Returns:
        Share of the actions that were the controller's, second by second.
    """
    nominal, plant = gym.make("kbt_rl/InvertedPendulum-v0"), gym.make("kbt_rl/ShiftedInvertedPendulum-v0")
    model = KBT(env=nominal, seed=0, policy_kwargs={"head": HeadConfig(history=10)})
    model.pretrain(LQRExpert.for_env(nominal), pretraining)

    controller = LQRExpert.for_env(plant)  # stands in for a controller that is safe, and for whoever labels
    model.set_fallback(Fallback(controller, limit))
    rng = np.random.default_rng(0)
    observation, _ = plant.reset(seed=0)
    state, taken = None, []
    for step in range(50 * seconds):
        action, state = model.predict(observation, state, deterministic=True)
        taken.append(bool((action == controller.predict(observation)[0]).all()))
        observation, _, fallen, _, _ = plant.step(action)
        if fallen:
            raise RuntimeError(f"the pole fell after {step + 1} steps")
        if step % 5 == 0:
            asked = rng.uniform(-1.0, 1.0, 4) * [2.0, 2.0, 0.5, 1.0]
            model.update(Sample(asked, controller.label(asked)))
    shares = [float(np.mean(part)) for part in np.split(np.array(taken), seconds)]
    for second, share in enumerate(shares, start=1):
        print(f"second {second}: the controller chose {share:.0%} of the actions")
    print(f"the pole stands after {seconds} s and {model.labels_used} labels")
    model.rollback(2)
    print(f"the last two labels were taken back; {model.labels_used} are left")
    return shares


if __name__ == "__main__":
    main()
