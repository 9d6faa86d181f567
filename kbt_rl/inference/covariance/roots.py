"""Square roots of covariances: ``Sigma = R' R`` with ``R`` lower triangular, moved by one measurement after another.

A covariance that is stored by its root is symmetric by construction, and no variance that is computed from it, a sum of
squares ``|R h|^2``, can be negative. A downdate ``Sigma - k k' / (s + r)`` of the covariance itself loses its digits
where ``s / r`` passes 1e15; here they are lost at 1e30.

A measurement of ``h' w`` with noise variance ``r`` multiplies the root: with ``phi = R h`` and the partial sums
``alpha_i = r + phi_1^2 + ... + phi_i^2``,

    row_i <- sqrt(alpha_{i-1} / alpha_i) row_i - phi_i / sqrt(alpha_{i-1} alpha_i) (phi_1 row_1 + ... + phi_{i-1}
    row_{i-1})

(Carlson 1973, "Fast triangular formulation of the square root filter", AIAA Journal 11). A rule that is not Bayes' may
raise a variance. The same map does that where all ``alpha`` are negative, ``alpha_m = -1 / t`` for a covariance that
becomes ``Sigma + t k k'``; a negative noise stands for this ``alpha_m``, not for ``r``, whose digits might be gone. All
functions take leading batch dimensions. ``kernels.roots`` has the same in machine code.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kbt_rl.inference.errors import NotPositiveDefiniteError
from kbt_rl.inference.machine_code import kernels
from kbt_rl.inference.types import LayerShape


def sums(phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``alpha_{i-1}`` and ``alpha_i``, ``(..., m)`` each; summed from the end where the noise is negative."""
    squares, start = phi.square(), noise.unsqueeze(-1)
    after = squares.cumsum(-1) + start
    before = torch.cat([start, after[..., :-1]], dim=-1)
    if bool((noise < 0.0).any()):
        rising = start < 0.0
        reverse = start - squares.flip(-1).cumsum(-1).flip(-1)
        before = torch.where(rising, reverse, before)
        after = torch.where(rising, torch.cat([reverse[..., 1:], start], dim=-1), after)
    return before, after


def factors(phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """``sqrt(alpha_{i-1} / alpha_i)`` and ``phi_i / sqrt(alpha_{i-1} alpha_i)``, ``(..., m)`` each.

    Args:
        phi: ``R h``, ``(..., m)``.
        noise: ``r``, or ``-1 / t``, ``(...)``.
    """
    before, after = sums(phi, noise)
    # Where nothing has been measured so far, the row stays; where the noise is 0, the first measured one vanishes.
    keep = torch.where(after != 0.0, (before / after).sqrt(), 1.0)
    mix = torch.where(before != 0.0, phi / (after * keep), 0.0)
    return keep, mix


def _sums_above(rows: Tensor) -> Tensor:
    """Sum of all rows above each, ``(..., m, n)``.

    Not the sum up to a row minus that row: after several exact measurements the rows above are smaller by as much as
    the noise is, and ``mix`` is larger.
    """
    return functional.pad(rows[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def downdated(root: Tensor, phi: Tensor, noise: Tensor) -> Tensor:
    """The root ``(..., m, n)`` after a measurement; further columns may be carried along."""
    keep, mix = factors(phi, noise)
    weighted = phi.unsqueeze(-1) * root
    return keep.unsqueeze(-1) * root - mix.unsqueeze(-1) * _sums_above(weighted)


def restored(root: Tensor, phi: Tensor, noise: Tensor) -> Tensor:
    """The root before a measurement that ``downdated`` has taken: the same map, inverted.

    Raises:
        NotPositiveDefiniteError: The measurement was exact (noise 0), and nothing is left to restore from.
    """
    keep, _ = factors(phi, noise)
    if not bool((keep > 0.0).all()):
        raise NotPositiveDefiniteError("the covariance after a measurement without noise", 0.0)
    _, after = sums(phi, noise)
    scaled = root / keep.unsqueeze(-1)
    weighted = torch.where(after != 0.0, phi / after, 0.0).unsqueeze(-1) * scaled
    return scaled + phi.unsqueeze(-1) * _sums_above(weighted)


# Parts in which the square of a triangular matrix is taken: three tenths of the work of a product, in large pieces.
_PARTS = 4


def square(columns: Tensor, step: int = 1) -> Tensor:
    """``C' C`` of columns ``(m, n, c)`` in ``n`` groups, of which group j is 0 above row ``j step``; ``(n c, n c)``.

    The columns of a lower triangular root are such groups of one; its products with the inputs of ``n`` neurons, whose
    weights are ``step`` columns each, are such groups, too.
    """
    n, c = columns.shape[1:]
    out = columns.new_empty(n * c, n * c)
    bounds = [n * part // _PARTS for part in range(_PARTS + 1)]
    for start, end in itertools.pairwise(bounds):
        rows = columns[start * step :]
        block = rows[:, start:end].flatten(1).mT @ rows[:, :end].flatten(1)
        out[start * c : end * c, : end * c] = block
        out[: start * c, start * c : end * c] = block[:, : start * c].mT
    return out


class Measurements(NamedTuple):
    """Measurements with independent noise, taken one after another.

    Attributes:
        phi: ``R h`` of each direction, by the root before all of them, ``(..., q, m)``.
        noise: Variance of each, ``(..., q)``; negative where it raises variances, see above.
    """

    phi: Tensor
    noise: Tensor


def whitened(projected: Tensor, noise_cov: Tensor) -> Measurements:
    """Measurements with correlated noise as others whose noise is independent.

    Args:
        projected: ``R H`` for the directions ``H``, ``(..., m, q)``.
        noise_cov: Their noise, ``(..., q, q)``.
    """
    noise = noise_cov.diagonal(dim1=-2, dim2=-1)
    if projected.shape[-1] == 1 or torch.equal(torch.diag_embed(noise), noise_cov):
        return Measurements(projected.mT, noise)
    cholesky, failed = torch.linalg.cholesky_ex(noise_cov)
    if bool(failed.any()):
        values = torch.linalg.eigvalsh(noise_cov[failed > 0] if failed.ndim else noise_cov)
        raise NotPositiveDefiniteError("the label noise of rows learned jointly", float(values.min()))
    return Measurements(torch.linalg.solve_triangular(cholesky, projected.mT, upper=False), torch.ones_like(noise))


# Of a variance, as a share of it: far below its rounding. The noise that stands for less may be infinite.
_LEAST_CHANGE = 1e-40


class Replaced(NamedTuple):
    """Another root in the place of the one before."""

    before: Tensor
    after: Tensor


def replacing(root: Tensor, columns: Tensor, signs: Tensor, name: str) -> Measurements | Replaced:
    """The move to ``R' (I + C diag(signs) C') R``, in ``m^3``; for a single column as a measurement, in ``m^2``.

    Args:
        root: ``R``, ``(..., m, m)``.
        columns: ``C``, ``(..., m, q)``.
        signs: ``(q,)``.
        name: Of the covariance, for an error.

    Raises:
        NotPositiveDefiniteError: It would be no covariance.
    """
    if columns.shape[-1] > 1:
        moved = root.mT @ columns
        return Replaced(root.clone(), proper_root(root.mT @ root + (moved * signs) @ moved.mT, name))
    length = columns.norm(dim=-2)
    change = signs * length.square()
    if not bool((change > -1.0).all()):  # the share of the direction's variance that is left
        raise NotPositiveDefiniteError(name, float(1.0 + change.min()))
    noise = torch.where(change > 0.0, -1.0 / change, -(1.0 + change) / change)
    told = change.abs() > _LEAST_CHANGE
    phi = torch.where(told, 1.0 / length, 0.0).unsqueeze(-1) * columns.mT
    return Measurements(phi, torch.where(told, noise, 1.0))


def measured(root: Tensor, moves: Measurements | Replaced) -> Tensor:
    """The root after all measurements; by machine code where there is some."""
    if isinstance(moves, Replaced):
        return moves.after
    code, size = kernels(), root.shape[-1]
    if code is not None and root.device.type == "cpu":
        out = root.contiguous().clone()
        blocks = out.view(-1, size, size).numpy()
        phi, noise = (
            part.reshape(len(blocks), *part.shape[-depth:]) for part, depth in zip(moves, (2, 1), strict=True)
        )
        code.roots.take(blocks, phi.clone(memory_format=torch.contiguous_format).numpy(), noise.contiguous().numpy())
        return out
    carried = torch.cat([root, moves.phi.mT], dim=-1)  # later directions move with the root
    for index in range(moves.noise.shape[-1]):
        carried = downdated(carried, carried[..., size + index], moves.noise[..., index])
    return carried[..., :size]


def are_invertible(moves: Measurements | Replaced) -> bool:
    """Whether no measurement was without noise, which leaves nothing to restore from."""
    return isinstance(moves, Replaced) or bool(((moves.noise != 0.0) | ~moves.phi.any(-1)).all())


def unmeasured(root: Tensor, moves: Measurements | Replaced) -> Tensor:
    """The root before them."""
    if isinstance(moves, Replaced):
        return moves.before
    phis, left = [], moves.phi.mT
    for index in range(moves.noise.shape[-1]):
        phis.append(left[..., 0])
        left = downdated(left[..., 1:], phis[-1], moves.noise[..., index])
    for index in reversed(range(moves.noise.shape[-1])):
        root = restored(root, phis[index], moves.noise[..., index])
    return root


# Smallest pivot, as a share of its variance, of a sum that is factorised: it then keeps eight digits or so.
_LEAST_PIVOT = 1e-7


def root_of(cov: Tensor, least: float | None = None) -> tuple[Tensor, Tensor]:
    """Lower triangular ``R`` with ``R' R = cov``, and whether the factorisation is reliable, ``(...)``.

    It is where each variance given all later entries is above ``least`` times that variance, by default what rounding
    leaves of a singular matrix, which often factorises.
    """
    cholesky, failed = torch.linalg.cholesky_ex(cov.flip(-1, -2))
    least = 64.0 * cov.shape[-1] * torch.finfo(cov.dtype).eps if least is None else least
    pivots = cholesky.diagonal(dim1=-2, dim2=-1).square()
    reliable = (failed == 0) & (pivots > least * cov.flip(-1, -2).diagonal(dim1=-2, dim2=-1)).all(-1)
    return cholesky.flip(-1, -2).mT, reliable


def combined(first: Tensor, second: Tensor) -> Tensor:
    """Lower triangular ``R`` with ``R' R = A' A + B' B`` for two roots."""
    root, reliable = root_of(first.mT @ first + second.mT @ second, _LEAST_PIVOT)
    if not bool(reliable.all()):  # without squares: three times the time, and all digits
        root = torch.linalg.qr(torch.cat([first, second], dim=-2).flip(-1)).R.flip(-1, -2).tril()
    return root.contiguous()


def is_root(root: Tensor) -> bool:
    """Whether a tensor is finite and lower triangular, so that it is the root of a covariance."""
    return bool(torch.isfinite(root).all()) and torch.equal(root.tril(), root)


def proper_root(cov: Tensor, name: str) -> Tensor:
    """The root of a covariance, or an UpdateError if it is none."""
    root, reliable = root_of(cov)
    if bool(reliable.all()):
        return root
    if not bool(torch.isfinite(cov).all()):
        raise NotPositiveDefiniteError(name, float("nan"))
    values, vectors = torch.linalg.eigh(cov)
    if not bool((values > 0.0).all()):
        raise NotPositiveDefiniteError(name, float(values.min()))
    any_root = (vectors * values.sqrt().unsqueeze(-2)).mT
    return combined(any_root, torch.zeros_like(any_root))


def added_roots(root: Tensor, other: Tensor, scale: float, other_scale: float) -> Tensor:
    """Root of ``scale Sigma + other_scale Sigma_other``."""
    first, second = root * math.sqrt(scale), other * math.sqrt(other_scale)
    if other_scale == 0.0:
        return first
    return second if scale == 0.0 else combined(first, second)


def check_roots(cov: tuple[Tensor, ...]) -> None:
    """Raise ValueError unless all tensors are roots."""
    if not all(is_root(root) for root in cov):
        raise ValueError("the posterior holds no root of a covariance: it must be finite and lower triangular")


def sums_of_others(parts: Tensor) -> Tensor:
    """For each of ``(N, ...)``, the sum of all others, without taking it away from the sum of all."""
    nothing = torch.zeros_like(parts[:1])
    before = torch.cat([nothing, parts[:-1].cumsum(0)])
    after = torch.cat([nothing, parts[1:].flip(0).cumsum(0)]).flip(0)
    return before + after


def input_part(columns: Tensor, shape: LayerShape, input_cov: Tensor, rows: int) -> Tensor:
    """``Structure.input_part`` of a layer whose weights have the root ``(m, n k)``, lower triangular."""
    (n, k), by_row = shape, by_rows(input_cov, rows)
    inner = square(columns.unflatten(1, shape), k).view(n, k, n, k)[:, :-1, :, :-1]
    if n == 1:
        return (by_row * inner[0, :, 0].unsqueeze(-2)).sum((-3, -1))
    term = torch.einsum("jplq,...bpcq->...bjcl", inner, by_row)
    return term.reshape(*input_cov.shape[:-2], rows * n, rows * n)


def by_rows(input_cov: Tensor, rows: int) -> Tensor:
    """``(..., B m, B m)`` as ``(..., B, m, B, m)``."""
    width = input_cov.shape[-1] // rows
    return input_cov.reshape(*input_cov.shape[:-2], rows, width, rows, width)


def eye(like: Tensor) -> Tensor:
    """The identity with as many rows as ``like``, in its dtype and place."""
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def inverse_root(matrix: Tensor, name: str) -> Tensor:
    """``L^-1`` for ``matrix = L L'``; says what is wrong instead of repairing it."""
    if matrix.shape[-1] == 1:
        value = float(matrix)
        if not value > 0.0:
            raise NotPositiveDefiniteError(name, value)
        return matrix.rsqrt()
    root, failed = torch.linalg.cholesky_ex(matrix)
    # A singular matrix often factorises by rounding; its last pivot is then noise, and its inverse too.
    lost = 64.0 * len(matrix) * torch.finfo(matrix.dtype).eps
    if int(failed) or bool((root.diagonal().square() <= lost * matrix.diagonal()).any()):
        finite = bool(torch.isfinite(matrix).all())
        values = torch.linalg.eigvalsh(matrix) if finite else torch.full((1,), float("nan"))
        raise NotPositiveDefiniteError(name, float(values[0]), float(values[-1]))
    inverse: Tensor = torch.linalg.solve_triangular(root, eye(matrix), upper=False)
    return inverse


def signed_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``F, signs`` with ``F diag(signs) F'`` equal to the symmetric, possibly indefinite matrix."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return vectors * values.abs().sqrt(), values.sign()
