"""One TensorBoard run a method, so that their success-rate curves lie over each other."""

from __future__ import annotations

import shutil
from pathlib import Path

from kbt_rl.experiments.aggregate import curve, methods_of
from kbt_rl.experiments.tables import Tables


def export_runs(tables: Tables, out: Path) -> list[Path]:
    """Write ``out/tensorboard/<method>``, replacing what is there.

    Scalars at the number of samples: ``eval/success_rate`` (mean over trials) with the ``_lower`` and ``_upper`` ends
    of its 95 % interval, ``eval/regret``, and ``kalman/update_ms`` where it was timed.

    Returns:
        Folders of the runs.
    """
    from torch.utils.tensorboard import SummaryWriter

    root = out / "tensorboard"
    shutil.rmtree(root, ignore_errors=True)
    times = {row.method: 1e3 * row.update_s for row in tables.figure4}
    folders = []
    for method in methods_of(tables.figure3):
        folder = root / method.replace(" ", "_").replace("(", "").replace(")", "").replace("=", "")
        success, regret = curve(tables.figure3, method), curve(tables.figure3, method, "regret")
        with SummaryWriter(str(folder)) as writer:
            for samples, rate, loss in zip(success.samples, success.estimates, regret.estimates, strict=True):
                scalars = {
                    "eval/success_rate": rate.mean,
                    "eval/success_rate_lower": rate.lower,
                    "eval/success_rate_upper": rate.upper,
                    "eval/regret": loss.mean,
                }
                for tag, value in scalars.items():
                    writer.add_scalar(tag, value, samples)
            if method in times:
                writer.add_scalar("kalman/update_ms", times[method], 0)
        folders.append(folder)
    return folders
