"""Adapt without Gym: a robot's own loop calls ``predict`` and ``update``, and nothing else of the library."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from kbt_rl import KBT, LQRExpert, Sample
from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.envs.plant import SHIFTED, rk4_step

Array = npt.NDArray[np.float64]


class Robot:
    """Stands in for sensors and motors: a cart whose pole is longer and heavier than the policy knows."""

    def __init__(self, state: Array) -> None:
        self.state = state

    def read_sensors(self) -> Array:
        """Cart position and speed, pole angle and its speed."""
        return self.state.astype(np.float32)

    def drive(self, action: Array) -> None:
        """Hold a force for one period of the control loop."""
        self.state = rk4_step(self.state, SHIFTED.max_force * float(action[0]), SHIFTED)


class Teacher:
    """Stands in for whoever corrects the robot; looks only now and then, and NaN says that there is no label."""

    def __init__(self, expert: LQRExpert, every: int) -> None:
        self.expert, self.every, self.asked = expert, every, 0

    def correct(self, observation: Array) -> Array:
        """The action that would have been right, or NaN."""
        self.asked += 1
        return self.expert.label(observation) if self.asked % self.every == 0 else np.array([np.nan])


def control(model: KBT, robot: Robot, teacher: Teacher, steps: int) -> None:
    """The robot's loop: sense, act, learn."""
    state = None
    for _ in range(steps):
        observation = robot.read_sensors()
        action, state = model.predict(observation, state, deterministic=True)
        robot.drive(action)
        label = teacher.correct(observation)
        model.update(Sample(state, label))


def main(steps: int = 500, every: int = 2, pretraining: PretrainConfig | None = None) -> KBT:
    """Clone the nominal expert, then run on the robot."""
    nominal = gym.make("kbt_rl/InvertedPendulum-v0")  # for the spaces and the expert; a saved model needs neither
    model = KBT(env=nominal, seed=0)
    model.pretrain(LQRExpert.for_env(nominal), pretraining)

    expert = LQRExpert.for_env(gym.make("kbt_rl/ShiftedInvertedPendulum-v0"))
    robot = Robot(np.array([0.3, 0.0, 0.05, 0.0]))
    control(model, robot, Teacher(expert, every), steps)
    lean = np.degrees(robot.state[2])
    print(f"{model.labels_used} labels in {steps} steps; the pole is {lean:.2f} degrees from upright")
    return model


if __name__ == "__main__":
    main()
