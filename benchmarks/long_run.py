"""Very many updates on a noisy stream: does rounding ever spoil the covariance, and does it drift?

For each structure, for inputs in float64 and float32, with one layer and with two. Recorded are the smallest eigenvalue
of the covariance at the end, its asymmetry, how often a weight's variance grew between two looks, and, for one layer,
the distance to a reference in extended precision (80 bits on x86): exact Bayesian regression in information form, or
for ``diagonal`` the same recursion. Two layers have no such reference.

    python benchmarks/long_run.py --updates 1000000 --out long_run.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead

STRUCTURES = ("joint", "layer", "neuron", "diagonal")
FEATURES, NOISE = 16, 0.1
LONG = np.longdouble
Array = npt.NDArray[Any]


class Exact:
    """Posterior of one linear layer in extended precision, ``(17,)`` and ``(17, 17)``."""

    def __init__(self, mean: Array, cov: Array) -> None:
        self.precision = inverse(cov.astype(LONG))
        self.shift = self.precision @ mean.astype(LONG)

    def update(self, inputs: Array, label: LONG) -> None:
        """Add one row: ``P + x x' / R``."""
        self.precision += np.outer(inputs, inputs) / LONG(NOISE)
        self.shift += inputs * label / LONG(NOISE)

    def posterior(self) -> tuple[Array, Array]:
        """Mean and covariance."""
        cov = inverse(self.precision)
        return cov @ self.shift, cov


class ExactDiagonal:
    """The recursion of the structure ``diagonal`` in extended precision."""

    def __init__(self, mean: Array, cov: Array) -> None:
        self.mean, self.variance = mean.astype(LONG), cov.diagonal().astype(LONG)

    def update(self, inputs: Array, label: LONG) -> None:
        """One update, of which the variances are kept."""
        cross = self.variance * inputs
        predictive = cross @ inputs + LONG(NOISE)
        self.mean = self.mean + cross * (label - self.mean @ inputs) / predictive
        self.variance = self.variance - cross * cross / predictive

    def posterior(self) -> tuple[Array, Array]:
        """Mean and covariance."""
        return self.mean, np.diag(self.variance)


def inverse(matrix: Array) -> Array:
    """Inverse of a positive definite matrix in its own precision, by Gauss-Jordan elimination."""
    size = len(matrix)
    work = np.concatenate([matrix, np.eye(size, dtype=matrix.dtype)], axis=1)
    for row in range(size):
        work[row] /= work[row, row]
        others = np.arange(size) != row
        work[others] -= np.outer(work[others, row], work[row])
    return work[:, size:]


def run(structure: str, layers: int, dtype: str, updates: int, seed: int = 1000) -> dict[str, Any]:
    """One long stream; distances are relative to the reference's largest entry."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = HeadConfig(layers=layers, structure=structure, noise_variance=NOISE, hidden_variance=1e-4)
    head = BayesianHead.from_linear(nn.Linear(FEATURES, 1), config)
    law = rng.normal(size=FEATURES)
    kind = ExactDiagonal if structure == "diagonal" else Exact
    reference = kind(head.mean.numpy(), head.state.dense_cov().numpy()) if layers == 1 else None
    before, growth, seconds, smallest = head.state.variances(), 0, 0.0, np.inf
    look = max(updates // 1000, 1)
    for index in range(updates):
        features = rng.normal(size=(1, FEATURES)).astype(dtype)
        label = (features @ law + 0.5 * np.abs(features[:, 0]) + NOISE**0.5 * rng.normal(size=1))[:, None].astype(dtype)
        start = time.perf_counter()
        info = head.update(features, label)
        seconds += time.perf_counter() - start
        smallest = min(smallest, info.smallest_variance)
        if reference is not None:
            reference.update(np.append(features[0], 1.0).astype(LONG), LONG(label[0, 0]))
        if index % look == 0 or index == updates - 1:
            now = head.state.variances()
            growth, before = growth + int((now > before).sum()), now
    cov = head.state.dense_cov()
    record = {
        "structure": structure,
        "layers": layers,
        "dtype": dtype,
        "updates": updates,
        "smallest_eigenvalue": float(torch.linalg.eigvalsh(cov)[0]),
        "largest_eigenvalue": float(torch.linalg.eigvalsh(cov)[-1]),
        "asymmetry": float((cov - cov.mT).abs().max()),
        "smallest_variance": float(smallest),
        "variances_grown": growth,
        "us_per_update": 1e6 * seconds / updates,
    }
    if reference is not None:
        mean, exact = reference.posterior()
        record["mean_error"] = float(np.abs(head.mean.numpy() - mean).max() / np.abs(mean).max())
        record["cov_error"] = float(np.abs(cov.numpy() - exact).max() / np.abs(exact).max())
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("long_run.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for structure in STRUCTURES:
        for layers in (1, 2):
            for dtype in ("float64", "float32"):
                records.append(run(structure, layers, dtype, options.updates))
                print(records[-1], flush=True)
                options.out.write_text(json.dumps(records, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
