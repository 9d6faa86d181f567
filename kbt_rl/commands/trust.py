"""``kbt-rl trust``: are the predictive intervals as wide as they should be?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Trust:
    """Coverage and density of held-out labels, i.i.d. and in closed loop, for every covariance structure.

    Writes trust.csv (every trial), trust_summary.csv (means with intervals), trust.json (what was run) and
    calibration.png to --out.
    """

    out: Path = Path("results/trust")
    """Folder of the results."""
    models: Path | None = None
    """Folder of pre-trained policies; a folder under --out if left out. `kbt-rl reproduce` keeps its own in
    results/models."""
    quick: bool = False
    """One stream, one variance and 200 labels, for a look."""
    seed: int = 1000
    """First stream and pre-training seed. Seeds below 100 were used for tuning."""

    def run(self, console: Console) -> None:
        """See the class."""
        from rich.progress import track

        from kbt_rl.experiments.figures_trust import draw_trust
        from kbt_rl.experiments.runner import versions, write_json
        from kbt_rl.experiments.tables import write_rows
        from kbt_rl.experiments.trust import run_trust_trial, summarise, trust_plan

        plan = trust_plan(quick=self.quick, seed=self.seed)
        models = self.out / "models" if self.models is None else self.models
        rows = [run_trust_trial(trial, models) for trial in track(plan, "trials", console=console)]
        summary = summarise(rows)
        write_json({"trials": [asdict(trial) for trial in plan], "versions": versions()}, self.out / "trust.json")
        write_rows(self.out / "trust.csv", rows)
        write_rows(self.out / "trust_summary.csv", summary)
        groups: dict[tuple[str, str, str, float], dict[str, str]] = {}
        for row in summary:
            unit = 100.0 if "coverage" in row.quantity else 1.0
            mean, lower, upper = (unit * value for value in row[5:8])
            groups.setdefault(row[:4], {})[row.quantity] = f"{mean:6.2f} [{lower:.2f}, {upper:.2f}]"
        for (structure, noise, stream, variance), found in groups.items():
            console.print(
                f"{stream:11s} {variance:3.0f} N²  {structure:11s} noise {noise:7s}  95 %: {found['coverage_95']}  "
                f"online {found.get('online_coverage_95', '-')}  nlpd {found['nlpd']} (floor {found['oracle_nlpd']})  "
                f"error {found['mean_error']} N",
                highlight=False,
            )
        console.print(f"written to {draw_trust(self.out)}")
