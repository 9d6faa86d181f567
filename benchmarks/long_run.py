"""Very many updates on a noisy stream: does rounding ever spoil the covariance, and does it drift?

For each structure, with one layer and with two, on features that vary alike in every direction and on features that
hardly vary in most. Recorded are the smallest eigenvalue of the covariance and of its correlations at the end, how
often a weight's variance grew between two looks by more than a billionth, refused updates, and the distance to a
reference in extended precision (80 bits on x86) on the same stream: for one layer exact Bayesian regression in
information form, or for ``diagonal`` the same recursion; for two layers the same recursion, with the normal
distribution function evaluated in float64.

    python benchmarks/long_run.py --updates 1000000 --out long_run.json

writes the records and, beside them, a page with the table of them (``long_run.md``).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import erfc
from torch import nn

from kbt_rl.inference.config import HeadConfig, StructureName
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.head import BayesianHead

STRUCTURES: tuple[StructureName, ...] = ("shared", "joint", "layer", "neuron", "diagonal")
FEATURES = {1: 16, 2: 4}  # the reference of two layers takes arithmetic in no library's matrix product
# Decades from the widest direction of the features to the narrowest, and the variance of the noise.
STREAMS = {"even": (0.0, 0.1), "uneven": (4.0, 1e-3)}
LONG = np.longdouble
# A root is rounded in every update, so that a variance which no longer shrinks wavers by some 1e-16 of itself.
ROUNDING = 1e-9
Array = npt.NDArray[Any]


class Exact:
    """Posterior of one linear layer in extended precision, ``(17,)`` and ``(17, 17)``."""

    def __init__(self, head: BayesianHead) -> None:
        self.noise = LONG(head.config.noise_variance)
        self.precision = inverse(head.covariance().numpy().astype(LONG))
        self.shift = self.precision @ head.mean.numpy().astype(LONG)

    def update(self, features: Array, label: LONG) -> None:
        """Add one row: ``P + x x' / R``."""
        inputs = np.append(features, LONG(1.0))
        self.precision += np.outer(inputs, inputs) / self.noise
        self.shift += inputs * label / self.noise

    def posterior(self) -> tuple[Array, Array]:
        """Mean and covariance."""
        cov = inverse(self.precision)
        return cov @ self.shift, cov


class Recursion:
    """The update of a head with one output, written out with full matrices in extended precision.

    Args:
        head: Of one or two layers, at its prior; ``mask`` of its structure says which entries are kept.
    """

    def __init__(self, head: BayesianHead) -> None:
        shapes, structure = head.spec.shapes, head.spec.structure
        self.noise = LONG(head.config.noise_variance)
        self.mean, self.cov = head.mean.numpy().astype(LONG), head.covariance().numpy().astype(LONG)
        self.hidden = shapes[0] if len(shapes) == 2 else None
        layer = np.repeat(np.arange(len(shapes)), [shape.size for shape in shapes])
        neuron = np.concatenate([np.repeat(np.arange(n), k) for n, k in shapes])
        kept = {
            "shared": 0 * layer,
            "joint": 0 * layer,
            "layer": layer,
            "neuron": 1000 * layer + neuron,
            "diagonal": np.arange(len(layer)),
        }
        self.mask = kept[structure][:, None] == kept[structure]

    def update(self, features: Array, label: LONG) -> None:
        """One update; what the structure does not store is dropped."""
        inputs = np.append(features, LONG(1.0))
        if self.hidden is None:
            mean, variance, cross = self.mean @ inputs, LONG(0.0), self.cov @ inputs
            variance = cross @ inputs
        else:
            mean, variance, cross = self._two_layers(inputs)
        total = variance + self.noise
        self.mean = self.mean + cross * ((label - mean) / total)
        self.cov = self.cov - np.where(self.mask, np.outer(cross, cross) / total, LONG(0.0))

    def _two_layers(self, inputs: Array) -> tuple[Any, Any, Array]:
        assert self.hidden is not None
        n, k = self.hidden
        size = n * k
        first, last = self.mean[:size].reshape(n, k), self.mean[size:]
        projection = (self.cov[:, :size].reshape(-1, n, k) @ inputs).reshape(-1, n)  # Cov(theta, u)
        mean, cov = first @ inputs, projection[:size].reshape(n, k, n).transpose(0, 2, 1) @ inputs
        variance = cov.diagonal()
        sd = np.sqrt(variance)
        ratio = mean / sd
        upper = LONG(0.5) * erfc((-ratio * math.sqrt(0.5)).astype(float)).astype(LONG)
        lower = LONG(0.5) * erfc((ratio * math.sqrt(0.5)).astype(float)).astype(LONG)
        density = np.exp(LONG(-0.5) * ratio * ratio) / np.sqrt(LONG(2.0) * LONG(math.pi))
        spread = upper + ratio * (ratio * (upper * lower) - density * (upper - lower)) - density * density
        curvature = density / sd
        z_cov = cov * (np.outer(upper, upper) + LONG(0.5) * cov * np.outer(curvature, curvature))
        np.fill_diagonal(z_cov, variance * np.maximum(spread, 0.0))
        z = np.append(mean * upper + sd * density, LONG(1.0))
        carried = projection * upper  # Cov(theta, z)
        shared, weights, own = carried[size:], last[:-1], self.cov[size:, size:]
        cross = carried @ weights + self.cov[:, size:] @ z
        linear = z @ own @ z + weights @ z_cov @ weights + (own[:-1, :-1] * z_cov).sum()
        one_sided = (z @ shared) @ weights
        both = (shared[:-1] * shared[:-1].T).sum()
        return last @ z + shared[:-1].trace(), linear + 2 * one_sided + both, cross

    def posterior(self) -> tuple[Array, Array]:
        """Mean and covariance."""
        return self.mean, self.cov


def inverse(matrix: Array) -> Array:
    """Inverse of a positive definite matrix in its own precision, by Gauss-Jordan elimination."""
    size = len(matrix)
    work = np.concatenate([matrix, np.eye(size, dtype=matrix.dtype)], axis=1)
    for row in range(size):
        work[row] /= work[row, row]
        others = np.arange(size) != row
        work[others] -= np.outer(work[others, row], work[row])
    return work[:, size:]


class Stream:
    """Features ``(1, d)`` whose directions vary by ``10 ** decades``, and labels of a function with a kink."""

    def __init__(self, features: int, decades: float, noise: float, seed: int) -> None:
        self.rng, self.deviation = np.random.default_rng(seed), math.sqrt(noise)
        self.law = self.rng.normal(size=features)
        turns = [np.linalg.qr(self.rng.normal(size=(features, features)))[0] for _ in range(2)]
        mix = turns[0] * np.logspace(0.0, -decades, features) @ turns[1]
        self.mix = mix / np.sqrt((mix * mix).sum(axis=0))

    def sample(self) -> tuple[Array, Array]:
        """A row and its label."""
        features = self.rng.normal(size=(1, len(self.law))) @ self.mix
        clean = features @ self.law + 0.5 * np.abs(features[:, 0])
        return features, (clean + self.deviation * self.rng.normal(size=1))[:, None]


# Relative to a variance, which is a sum of squares.
_ROUNDING = 1e-13


class Watched:
    """A head under test, and what has happened to it."""

    def __init__(self, head: BayesianHead) -> None:
        self.head, self.variances = head, head.variances()
        self.grown, self.refused, self.smallest, self.seconds = 0, 0, math.inf, 0.0

    def update(self, features: Array, label: Array, look: bool) -> None:
        """One update, and now and then a look at the variances."""
        start = time.perf_counter()
        try:
            self.head.update(features, label)
        except UpdateError:
            self.refused += 1
            return
        finally:
            self.seconds += time.perf_counter() - start
        if look:
            now = self.head.variances()
            self.grown, self.variances = self.grown + int((now > self.variances * (1.0 + ROUNDING)).sum()), now
            self.smallest = min(self.smallest, float(now.min()))

    def record(self, mean: Array, exact: Array) -> dict[str, Any]:
        """What is left, beside a reference; distances are relative to the reference's largest entry."""
        cov = self.head.covariance()
        scale = cov.diagonal().rsqrt()
        drift = np.sqrt(cov.diagonal().numpy() / exact.diagonal()) - 1.0
        return {
            "smallest_eigenvalue": float(torch.linalg.eigvalsh(cov)[0]),
            "largest_eigenvalue": float(torch.linalg.eigvalsh(cov)[-1]),
            "smallest_correlation_eigenvalue": float(torch.linalg.eigvalsh(scale.unsqueeze(-1) * cov * scale)[0]),
            "smallest_variance": self.smallest,
            "variances_grown": self.grown,
            "refused": self.refused,
            "mean_error": float(np.abs(self.head.mean.numpy() - mean).max() / np.abs(mean).max()),
            "cov_error": float(np.abs(cov.numpy() - exact).max() / np.abs(exact).max()),
            "deviation_error": float(np.abs(drift).max()),
            "us_per_update": 1e6 * self.seconds,
        }


def run(structure: StructureName, layers: int, stream: str, updates: int, seed: int = 1000) -> dict[str, Any]:
    """The record of a head on one long stream."""
    torch.manual_seed(seed)
    decades, noise = STREAMS[stream]
    config = HeadConfig(
        layers=layers, structure=structure, noise_variance=noise, hidden_variance=1e-4, last_variance=1.0
    )
    watched = Watched(BayesianHead.from_linear(nn.Linear(FEATURES[layers], 1), config))
    exact = layers == 1 and structure != "diagonal"
    reference = Exact(watched.head) if exact else Recursion(watched.head)
    samples = Stream(FEATURES[layers], decades, noise, seed)
    every = max(updates // 1000, 1)
    for index in range(updates):
        features, label = samples.sample()
        watched.update(features, label, index % every == 0 or index == updates - 1)
        reference.update(features[0].astype(LONG), LONG(label[0, 0]))
    record = watched.record(*reference.posterior())
    record["us_per_update"] /= updates
    return {"structure": structure, "layers": layers, "stream": stream, "updates": updates, **record}


def page(records: Sequence[dict[str, Any]]) -> str:
    """The records as a page in Markdown."""
    updates = {record["updates"] for record in records}
    heads = (
        "structure", "layers", "features", "smallest eigenvalue", "of the correlations", "variances grown", "refused",
        "error of the mean", "of the covariance", "of the deviations",
    )  # fmt: skip
    lines = [
        "# Long streams", "",
        f"{' or '.join(f'{count:,}' for count in sorted(updates))} updates of each posterior against a reference in "
        "extended precision (`benchmarks/long_run.py`). Errors are relative to the reference's largest entry, those of "
        "the deviations to each weight's own.", "",
        "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads),
    ]  # fmt: skip
    for record in records:
        named = [record[name] for name in ("structure", "layers", "stream")]
        eigenvalues = [f"{record[f'smallest_{name}']:.2g}" for name in ("eigenvalue", "correlation_eigenvalue")]
        counts = [f"{record[name]:,}" for name in ("variances_grown", "refused")]
        measured = [f"{record[name]:.1e}" for name in ("mean_error", "cov_error", "deviation_error")]
        lines.append("| " + " | ".join(map(str, (*named, *eigenvalues, *counts, *measured))) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("long_run.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    records: list[dict[str, Any]] = []
    for stream in STREAMS:
        for layers in FEATURES:
            for structure in STRUCTURES[layers - 1 :]:  # 'shared' is for one layer
                records.append(run(structure, layers, stream, options.updates))
                print(records[-1], flush=True)
                options.out.write_text(json.dumps(records, indent=1), encoding="utf-8")
                options.out.with_suffix(".md").write_text(page(records), encoding="utf-8")


if __name__ == "__main__":
    main()
