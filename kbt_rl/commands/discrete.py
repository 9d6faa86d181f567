"""``kbt-rl discrete``: adaptation with discrete actions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Discrete:
    """Success against labels with discrete actions: two forces, or five.

    Writes rows (CSV), a summary with the configuration (JSON) and a figure (PNG) to --out. The same command continues
    where an interrupted one stopped.
    """

    out: Path = Path("results/discrete")
    """Folder of the results."""
    levels: Literal["two", "five"] = "two"
    """Force levels: +-15 N, or 0, +-2 and +-15 N."""
    streams: int = 3
    """Label streams for each pre-trained policy."""
    policies: int = 2
    """Pre-trained policies."""
    quick: bool = False
    """One stream, one policy, few checkpoints."""
    tune: bool = False
    """Score the candidates for the settings of the baselines instead; use a seed below 100."""
    seed: int = 1000
    """First stream and pre-training seed. Seeds below 100 were used for tuning."""

    def run(self, console: Console) -> None:
        """See the class."""
        from kbt_rl.experiments import plot_style
        from kbt_rl.experiments.discrete import (
            METHODS,
            DiscreteStudy,
            configuration,
            draw_discrete,
            run_study,
            summary,
            tuning_methods,
        )
        from kbt_rl.experiments.runner import versions, write_json
        from kbt_rl.experiments.tables import write_rows

        if self.tune and self.seed + max(self.streams, self.policies) > 100:
            raise ValueError("tuning uses seeds 0 to 99; pass a smaller --seed")
        methods = tuning_methods() if self.tune else METHODS
        study = DiscreteStudy(self.levels, self.seed, self.streams, self.policies, methods=methods)
        if self.quick:
            study = DiscreteStudy(self.levels, self.seed, 1, 1, 20, (0, 20, 50, 100), methods)
        name = f"{'tune-' if self.tune else ''}{self.levels}"
        rows = run_study(study, self.out, console.print)
        write_rows(self.out / f"{name}.csv", rows)
        table = summary(rows)
        write_json({"study": configuration(study), "summary": table, "versions": versions()}, self.out / f"{name}.json")
        for method, values in table.items():
            pairs = zip(values["samples"], values["success"], strict=True)
            console.print(f"{method}: " + ", ".join(f"{int(n)}: {value:.2f}" for n, value in pairs))
        if not self.tune:
            with plot_style.style():
                path = plot_style.save(draw_discrete(rows, self.levels), self.out / f"{name}.png")
            console.print(f"written to {path}")
