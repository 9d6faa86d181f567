"""The tasks by name. A new one is a file like ``pendulum`` and a line here."""

from __future__ import annotations

from kbt_rl.envs.discrete import FIVE_FORCES, TWO_FORCES
from studies.pendulum import Pendulum

TASKS: dict[str, Pendulum] = {
    "shifted": Pendulum(),
    "two forces": Pendulum(forces=TWO_FORCES),
    "five forces": Pendulum(forces=FIVE_FORCES),
}
