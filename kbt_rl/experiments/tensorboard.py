"""One TensorBoard run a method, so that their success-rate curves lie over each other."""

from __future__ import annotations

import re
from pathlib import Path

from kbt_rl.experiments.aggregate import curve, methods_of
from kbt_rl.experiments.tables import Tables


def export_runs(tables: Tables, out: Path) -> list[Path]:
    """Write ``out/tensorboard/<method>``, replacing the run of that name but nothing else in the folder.

    Scalars at the number of samples: ``eval/success_rate`` (mean over trials) with the ``_lower`` and ``_upper`` ends
    of its 95 % interval, ``eval/regret``, and ``kalman/update_ms`` where it was timed. The first three are also one
    chart with a band under "Custom scalars".

    Returns:
        Folders of the runs.
    """
    return [_export(tables, method, out / "tensorboard") for method in methods_of(tables.figure3)]


def _export(tables: Tables, method: str, root: Path) -> Path:
    from torch.utils.tensorboard import SummaryWriter

    folder = root / run_name(method)
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    rate = "eval/success_rate"
    with SummaryWriter(str(folder)) as writer:
        success, regret = curve(tables.figure3, method), curve(tables.figure3, method, "regret")
        for samples, found, loss in zip(success.samples, success.estimates, regret.estimates, strict=True):
            writer.add_scalar(rate, found.mean, samples)
            writer.add_scalar(f"{rate}_lower", found.lower, samples)
            writer.add_scalar(f"{rate}_upper", found.upper, samples)
            writer.add_scalar("eval/regret", loss.mean, samples)
        for row in tables.figure4:
            if row.method == method:
                writer.add_scalar("kalman/update_ms", 1e3 * row.update_s, 0)
        writer.add_custom_scalars({"eval": {"success rate": ["Margin", [rate, f"{rate}_lower", f"{rate}_upper"]]}})
    return folder


def run_name(method: str) -> str:
    """Name of a method's folder, plain enough for a shell."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", method).strip("_")
