"""``kbt-rl noise``: labels whose noise nobody has told the method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Noise:
    """Learn the noise of the labels: Gaussian, heavy-tailed, and with 5 % wild labels, against a known noise.

    Writes noise.csv (every trial), noise_curves.csv, noise_summary.csv, noise_ratios.csv, noise.json (what was run) and
    noise.png to --out.
    """

    out: Path = Path("results/noise")
    """Folder of the results."""
    models: Path | None = None
    """Folder of pre-trained policies; a folder under --out if left out. `kbt-rl reproduce` keeps its own in
    results/models."""
    quick: bool = False
    """One stream and 300 labels, for a look."""
    seed: int = 1000
    """First stream and pre-training seed. Seeds below 100 were used for tuning."""

    def run(self, console: Console) -> None:
        """See the class."""
        from rich.progress import track

        from kbt_rl.experiments.figures_noise import draw_noise
        from kbt_rl.experiments.noise import noise_plan, ratios, run_noise_trial, summarise
        from kbt_rl.experiments.runner import versions, write_json
        from kbt_rl.experiments.tables import write_rows

        plan = noise_plan(quick=self.quick, seed=self.seed)
        models = self.out / "models" if self.models is None else self.models
        results = [run_noise_trial(trial, models) for trial in track(plan, "trials", console=console)]
        rows = [row for row, _ in results]
        summary, relative = summarise(rows), ratios(rows)
        write_json({"trials": [asdict(trial) for trial in plan], "versions": versions()}, self.out / "noise.json")
        write_rows(self.out / "noise.csv", rows)
        write_rows(self.out / "noise_curves.csv", [point for _, curve in results for point in curve])
        write_rows(self.out / "noise_summary.csv", summary)
        write_rows(self.out / "noise_ratios.csv", relative)
        by_key = {row[:3]: row for row in relative}
        for row in summary:
            ratio = by_key.get(row[:3])
            beside = f", {ratio.ratio:.2f} of known" if ratio else ""
            console.print(
                f"{row.kind:10s} {row.noise_variance:4.0f} N²  {row.method:21s} noise {row.learned_variance:7.2f} N²  "
                f"error {row.mean_error:6.2f} N{beside}  coverage {row.coverage:.3f}  nlpd {row.nlpd:.2f}",
                highlight=False,
            )
        console.print(f"written to {draw_noise(self.out)}")
