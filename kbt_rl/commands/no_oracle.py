"""``kbt-rl no-oracle``: adaptation with labels from an expert that has to identify the plant first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


@dataclass
class NoOracle:
    """Adapt to a plant that nobody knows: labels come from identifying it online.

    Beside it run the same labels from an oracle, the policy without labels, and the identified LQR acting itself.
    Writes results (JSON), tables (CSV) and a figure (PNG) to --out; the same command continues where it stopped.
    """

    out: Path = Path("results/no_oracle")
    """Folder of the results."""
    quick: bool = False
    """A small version for a look."""
    seed: int = 1000
    """First pre-training seed, and that of starts and labels. Seeds below 100 were used for tuning."""

    def run(self, console: Console) -> None:
        """See the class."""
        from kbt_rl.experiments.no_oracle import perform, study_plan
        from kbt_rl.experiments.no_oracle_report import draw_study, read_study, summarise, write_study

        paths = []
        for config in study_plan(seed=self.seed, quick=self.quick):
            paths.append(perform(config, self.out))
            console.print(f"done: {config.name}, pre-training seed {config.pretrain_seed}")
        study = read_study(paths)
        for path in [*write_study(study, self.out), draw_study(study, self.out / "no_oracle.png")]:
            console.print(f"written to {path}")
        for row in summarise(study.learners):
            score = (
                "" if row.score is None else f", alone {row.score:.2f} [{row.score_lower:.2f}, {row.score_upper:.2f}]"
            )
            console.print(
                f"{row.method}, {row.episodes} episodes, {row.learners} starts: no fall in the first {row.no_fall:.2f} "
                f"[{row.no_fall_lower:.2f}, {row.no_fall_upper:.2f}]{score}",
                highlight=False,
            )
