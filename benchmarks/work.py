"""The least that a call must move and compute, and the time which that takes the machine at best.

An update has to read the covariance once to propagate, and to read and write it once to condition, whatever the
arithmetic; both multiply and add each entry at least once a row. A network's pass has to read its weights.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.machine import Limits
from kbt_rl.inference.head import MAX_JOINT_ROWS

Shapes = tuple[tuple[int, int], ...]


class Work(NamedTuple):
    """What one call must move and compute.

    Attributes:
        working_set: Bytes that it goes through.
        read_bytes: Bytes that it reads and leaves as they are, each time it comes by.
        rewritten_bytes: Bytes that it reads and writes back.
        flops: Multiplications and additions.
        computed_in: Precision of these.
    """

    working_set: int
    read_bytes: int
    rewritten_bytes: int
    flops: int
    computed_in: str = "float64"

    def of_heads(self, count: int) -> Work:
        """The work of so many heads."""
        working_set, read, rewritten, flops = (count * part for part in self[:4])
        return Work(working_set, read, rewritten, flops, self.computed_in)


class Roofline(NamedTuple):
    """What must be done, and what the machine did at a working set of that size in the same run."""

    work: Work
    machine: Limits

    @property
    def moving_us(self) -> float:
        """Microseconds to read, and to read and write back."""
        return 1e6 * (self.work.read_bytes * self.machine.read_s + self.work.rewritten_bytes * self.machine.rewrite_s)

    @property
    def computing_us(self) -> float:
        """Microseconds to multiply and add."""
        return 1e6 * self.work.flops / self.machine.flops

    @property
    def limit_us(self) -> float:
        """The longer of the two."""
        return max(self.moving_us, self.computing_us)


def _triangle(m: int) -> int:
    return m * (m + 1) // 2


def _entries(structure: str, shapes: Shapes) -> tuple[int, int]:
    """Distinct entries of the covariance, and multiplications of one row's product with all of it.

    A symmetric matrix of ``m`` rows has ``m (m + 1) / 2`` entries to store, and ``m^2`` take part in the product.
    """
    sizes = [n * k for n, k in shapes]
    matrices = {
        "joint": [(1, sum(sizes))],
        "layer": [(1, size) for size in sizes],
        "neuron": list(shapes),
        "diagonal": [(size, 1) for size in sizes],
        "rotated": [(size, 1) for size in sizes],
        "shared": [(1, shapes[-1][1])],
    }[structure]
    return sum(n * _triangle(k) for n, k in matrices), sum(n * k * k for n, k in matrices)


def update_work(structure: str, shapes: Shapes, rows: int = 1) -> Work:
    """Least work of an update in float64.

    Rows go in blocks that are learned jointly, and a block comes by the covariance twice. A row meets each entry once
    to propagate, whatever the number of outputs: those share the covariance of weights and hidden units. To condition,
    the covariance of several units' weights changes by a matrix whose rank is the number of labels; that of one unit's
    weights by one in the space of the rows' inputs.

    Args:
        structure: ``joint``, ``layer``, ``neuron`` or ``diagonal``; for one layer also ``shared`` and ``rotated``.
        shapes: Neurons and inputs (bias included) of each layer.
        rows: Of features, with a label for each output.
    """
    entries, products = _entries(structure, shapes)
    blocks = -(-rows // MAX_JOINT_ROWS)
    rank = rows * shapes[-1][0] if structure in ("joint", "layer") else rows
    stored = 8 * entries
    # The rows are turned into the basis, which is read only.
    basis = (shapes[0][1] - 1) ** 2 if structure == "rotated" else 0
    flops = 2 * rows * (products + basis) + 2 * rank * entries
    return Work(stored + 8 * basis, blocks * stored + 8 * basis, blocks * stored, flops)


def prediction_work(structure: str, shapes: Shapes, *, variance: bool) -> Work:
    """Least work of the mean of one row, or of its mean and variance, by a head in float64.

    A variance is a quadratic form, of which two entries that mirror each other are one.
    """
    weights = sum(n * k for n, k in shapes)
    if not variance:
        return Work(8 * weights, 8 * weights, 0, 2 * weights)
    entries, _ = _entries(structure, shapes)
    stored = 8 * (weights + entries)
    return Work(stored, stored, 0, 2 * weights + 2 * entries)


def network_work(weights: int) -> Work:
    """Least work of one token's pass through so many weights in float32: each is read, multiplied and added once."""
    return Work(4 * weights, 4 * weights, 0, 2 * weights, "float32")


def training_work(weights: int, samples: int, epochs: int) -> Work:
    """Least work for one of ``samples`` that are trained on together by steps of Adam, in float32.

    The way back computes twice as much as the way there, for the inputs' and the weights' gradients. A step reads the
    weights on both, and reads and writes weights, gradient and two moments.
    """
    stored = 4 * weights
    return Work(
        4 * stored, 2 * stored * epochs // samples, 4 * stored * epochs // samples, 6 * weights * epochs, "float32"
    )
