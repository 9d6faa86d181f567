"""``kbt-rl rescue``: a falling pole, a few labels, and who saves it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


@dataclass
class Rescue:
    """Save a falling pole with a few labels, and count how often it works.

    The pre-trained policy stands on the shifted plant and falls. Labels arrive one step after the policy has acted,
    stop after a budget, and the policy is alone until the end of the 10 s. Writes rescue.csv and label_rules.csv (what
    each label is worth under several query rules), label_rules.png and, unless --no-video, rescue.gif: pre-trained
    policy, warm start and KBT side by side on the same pendulum. Interrupt it when you like: the same command
    continues.
    """

    out: Path = Path("results/rescue")
    """Folder of the results."""
    quick: bool = False
    """10 starts and one policy, for a look."""
    video: bool = True
    """Draw the gif as well (needs the extra `render`)."""
    labels: int = 8
    """Labels in the video, at i.i.d. states, one a step."""
    seed: int = 1000
    """First seed of policies and starts. Seeds below 100 were used for tuning."""

    def run(self, console: Console) -> None:
        """See the class."""
        if self.labels < 1:
            raise ValueError(f"--labels is {self.labels}; a rescue needs at least one")
        from kbt_rl.experiments.rescue_study import run_study

        run_study(self.seed, self.quick, self.out, console)
        if self.video:
            from kbt_rl.experiments.rescue_video import render_rescue

            path = render_rescue(self.seed, self.labels, self.out)
            console.print(f"video: {path}")
