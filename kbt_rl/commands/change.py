"""``kbt-rl change``: strategies against a world that moves again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Change:
    """Compare strategies on ten successive plants and a slow drift; count false alarms while nothing changes.

    Writes tables (CSV), a summary (JSON) and a figure (PNG) to --out. Interrupt it when you like: the same command
    continues where it stopped.
    """

    out: Path = Path("results/change")
    """Folder of the results."""
    seed: int = 1000
    """First stream and pre-training seed. Seeds below 100 were used for tuning."""
    streams: int = 5
    """Streams for each policy."""
    policies: int = 2
    """Pre-trained policies."""
    quick: bool = False
    """One stream, one policy, two plants, 2,000 stationary samples; for a look."""

    def run(self, console: Console) -> None:
        """See the class."""
        from kbt_rl.experiments.change_report import run
        from kbt_rl.experiments.change_setup import ChangeConfig

        if self.quick:
            configs = [ChangeConfig(self.seed, self.seed, plants=2, starts=5, drift_samples=200)]
            run(configs, (2_000, (1.0,)), self.out, console)
            return
        pairs = [(self.seed + p, self.seed + s) for s in range(self.streams) for p in range(self.policies)]
        run([ChangeConfig(*pair) for pair in pairs], (100_000, (0.1, 1.0, 10.0)), self.out, console)
