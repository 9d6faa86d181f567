"""Products with a triangular root, and measurements of it: ``covariance.roots`` for one problem, in place."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kbt_rl.inference.kernels.jit import compiled

Array = npt.NDArray[np.float64]


@compiled
def dot(left: Array, right: Array) -> float:
    """``left . right``."""
    total = 0.0
    for i in range(left.size):
        total += left[i] * right[i]
    return total


@compiled
def project(root: Array, vector: Array, out: Array) -> float:
    """``out = R h``; returns ``|R h|^2``. Four rows at a time share the reading of ``h``."""
    size = root.shape[0]
    whole = size - size % 4
    for i in range(0, whole, 4):
        first, second, third, fourth = root[i], root[i + 1], root[i + 2], root[i + 3]
        t0 = t1 = t2 = t3 = 0.0
        for j in range(i + 4):  # what is above the diagonal is 0
            h = vector[j]
            t0 += first[j] * h
            t1 += second[j] * h
            t2 += third[j] * h
            t3 += fourth[j] * h
        out[i], out[i + 1], out[i + 2], out[i + 3] = t0, t1, t2, t3
    for i in range(whole, size):
        out[i] = dot(root[i, : i + 1], vector[: i + 1])
    return dot(out, out)


@compiled
def transposed(root: Array, vector: Array, start: int, out: Array) -> None:
    """``out = R' v`` for a vector that is 0 before ``start``; all columns but the last where ``out`` is one shorter."""
    size, columns = root.shape[0], out.size
    for j in range(columns):
        out[j] = 0.0
    whole = size - (size - start) % 4
    for i in range(start, whole, 4):
        first, second, third, fourth = root[i], root[i + 1], root[i + 2], root[i + 3]
        v0, v1, v2, v3 = vector[i], vector[i + 1], vector[i + 2], vector[i + 3]
        for j in range(min(i + 4, columns)):
            out[j] += (v0 * first[j] + v1 * second[j]) + (v2 * third[j] + v3 * fourth[j])
    for i in range(whole, size):
        row, value = root[i], vector[i]
        for j in range(min(i + 1, columns)):
            out[j] += value * row[j]


@compiled
def factors(phi: Array, noise: float, keep: Array, mix: Array) -> None:
    """``covariance.roots.factors``; partial sums go up from the noise, or from the end where it is negative."""
    if noise < 0.0:
        after = noise
        for i in range(phi.size - 1, -1, -1):
            before = after - phi[i] * phi[i]
            keep[i] = math.sqrt(before / after)
            mix[i] = phi[i] / (after * keep[i])
            after = before
        return
    before = noise
    for i in range(phi.size):
        after = before + phi[i] * phi[i]
        keep[i] = math.sqrt(before / after) if after > 0.0 else 1.0
        mix[i] = phi[i] / (after * keep[i]) if before > 0.0 else 0.0
        before = after


@compiled
def downdate(root: Array, phi: Array, noise: float, gain: Array) -> None:
    """Take a measurement with ``phi = R h``; ``gain`` receives ``R' phi = Sigma h`` of before.

    Rows go four at a time, so that ``gain``, the weighted sum of the rows above, is read and written once for four.
    """
    size = root.shape[0]
    keep, mix = np.empty(size), np.empty(size)
    factors(phi, noise, keep, mix)
    for i in range(size):
        gain[i] = 0.0
    whole = size - size % 4
    for i in range(0, whole, 4):
        first, second, third, fourth = root[i], root[i + 1], root[i + 2], root[i + 3]
        f0, f1, f2, f3 = phi[i], phi[i + 1], phi[i + 2], phi[i + 3]
        c0, c1, c2, c3 = keep[i], keep[i + 1], keep[i + 2], keep[i + 3]
        d0, d1, d2, d3 = mix[i], mix[i + 1], mix[i + 2], mix[i + 3]
        for j in range(i + 4):  # above the diagonal there is 0, which stays 0
            a0, a1, a2, a3, above = first[j], second[j], third[j], fourth[j], gain[j]
            first[j] = c0 * a0 - d0 * above
            above += f0 * a0
            second[j] = c1 * a1 - d1 * above
            above += f1 * a1
            third[j] = c2 * a2 - d2 * above
            above += f2 * a2
            fourth[j] = c3 * a3 - d3 * above
            gain[j] = above + f3 * a3
    for i in range(whole, size):
        row = root[i]
        for j in range(i + 1):
            old, above = row[j], gain[j]
            row[j] = keep[i] * old - mix[i] * above
            gain[j] = above + phi[i] * old


@compiled
def take(blocks: Array, phis: Array, noises: Array) -> None:
    """``covariance.roots.measured`` for each of ``(N, m, m)``, in place; directions ``(N, q, m)`` are used up."""
    size, count = blocks.shape[1], noises.shape[1]
    gain, keep, mix = np.empty(size), np.empty(size), np.empty(size)
    for block in range(blocks.shape[0]):
        for index in range(count):
            phi, noise = phis[block, index], noises[block, index]
            downdate(blocks[block], phi, noise, gain)
            if index + 1 < count:
                factors(phi, noise, keep, mix)
            for later in range(index + 1, count):  # the directions that are left move with the root
                other, above = phis[block, later], 0.0
                for i in range(size):
                    old = other[i]
                    other[i] = keep[i] * old - mix[i] * above
                    above += phi[i] * old


@compiled
def in_units(features: Array, centre: Array, scale: Array, out: Array) -> float:
    """``out = [z; 1]`` for features as they come from the encoder; returns ``|z|^2``."""
    total = 0.0
    for p in range(features.size):
        out[p] = (features[p] - centre[p]) / scale[p]
    out[features.size] = 1.0
    for p in range(features.size):
        total += out[p] * out[p]
    return total
