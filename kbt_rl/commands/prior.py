"""``kbt-rl prior``: choose the prior by evidence, and see whether it holds on other plants."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Prior:
    """Choose the prior variances by one-step-ahead density on a few plants; judge the choice on others.

    Writes prior.csv (every trial), prior_scores.csv (every candidate), prior_summary.csv, prior_differences.csv,
    prior.json (what was run) and prior.png to --out.
    """

    out: Path = Path("results/prior")
    """Folder of the results."""
    models: Path | None = None
    """Folder of pre-trained policies; a folder under --out if left out. `kbt-rl reproduce` keeps its own in
    results/models."""
    quick: bool = False
    """One policy, two plants and few candidates, for a look."""
    seed: int = 1000
    """First plant, stream and pre-training seed of the judgement. Seeds below 100 were used for tuning."""

    def run(self, console: Console) -> None:
        """See the class."""
        from rich.progress import track

        from kbt_rl.experiments.figures_prior import draw_prior
        from kbt_rl.experiments.prior_choice import differences, run_study, study_plan, summarise
        from kbt_rl.experiments.runner import versions, write_json
        from kbt_rl.experiments.tables import write_rows

        plan = study_plan(quick=self.quick, seed=self.seed)
        models = self.out / "models" if self.models is None else self.models
        results = [run_study(config, models) for config in track(plan, "policies", console=console)]
        rows, scores = [row for part, _ in results for row in part], [row for _, part in results for row in part]
        summary, relative = summarise(rows), differences(rows)
        write_json({"studies": [asdict(config) for config in plan], "versions": versions()}, self.out / "prior.json")
        write_rows(self.out / "prior.csv", rows)
        write_rows(self.out / "prior_scores.csv", scores)
        write_rows(self.out / "prior_summary.csv", summary)
        write_rows(self.out / "prior_differences.csv", relative)
        for config in plan:
            best = max((row for row in scores if row.pretrain_seed == config.pretrain_seed), key=lambda row: row[-1])
            console.print(f"policy {config.pretrain_seed}: {best}", highlight=False)
        for row in summary:
            console.print(
                f"{row.labels:4d} labels  {row.method:16s} success {row.success:.3f} [{row.success_lower:.3f}, "
                f"{row.success_upper:.3f}]  regret {row.regret:8.3f} [{row.regret_lower:.3f}, {row.regret_upper:.3f}]  "
                f"nlpd {row.nlpd:6.2f}  over {row.trials}",
                highlight=False,
            )
        for each in relative:
            console.print(
                f"{each.labels:4d} labels  {each.method:16s} minus default: success {each.success:+.3f} "
                f"[{each.success_lower:+.3f}, {each.success_upper:+.3f}]  regret {each.regret:+.3f} "
                f"[{each.regret_lower:+.3f}, {each.regret_upper:+.3f}]",
                highlight=False,
            )
        console.print(f"written to {draw_prior(self.out)}")
