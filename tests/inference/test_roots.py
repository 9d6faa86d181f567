"""Square roots of covariances against dense algebra, and against 60 digits where float64 has no more of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mpmath
import pytest
import torch
from conftest import MACHINE_CODE, lower_root, randn, random_cov
from torch import Tensor

from kbt_rl.inference.covariance import roots
from kbt_rl.inference.errors import NotPositiveDefiniteError

RATIOS = [1.0, 1e5, 1e10, 1e13, 1e16, 1e20]
SIZES = [1, 2, 5]


@pytest.fixture(autouse=True, params=["torch", pytest.param("numba", marks=MACHINE_CODE)])
def _sixty_digits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For the oracle; measurements by either implementation."""
    if request.param == "torch":
        monkeypatch.setattr(roots, "kernels", lambda: None)
    with mpmath.workdps(60):
        yield


def matrix(values: Tensor) -> mpmath.matrix:
    return mpmath.matrix(values.tolist())


def exact_cov(root: Tensor, directions: Tensor, noise_cov: Tensor) -> mpmath.matrix:
    """``Sigma - Sigma H (H' Sigma H + N)^-1 H' Sigma``."""
    cov, H = matrix(root).T * matrix(root), matrix(directions)
    cross = cov * H
    return cov - cross * mpmath.inverse(H.T * cross + matrix(noise_cov)) * cross.T


def error_along(root: Tensor, exact: mpmath.matrix, direction: Tensor) -> float:
    """Relative error of the variance ``g' Sigma g`` as it is predicted, a sum of squares."""
    g = matrix(direction.unsqueeze(-1))
    variance = (g.T * exact * g)[0]
    return abs(float((float((root @ direction).square().sum()) - variance) / variance))


def problem(size: int, ratio: float, count: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A root, directions, and correlated noise that is ``ratio`` times smaller than their variance."""
    root, directions = lower_root(random_cov(size, seed=seed)), randn(size, count, seed=seed + 1)
    noise_cov = random_cov(count, seed=seed + 2) * float((root @ directions).square().sum()) / ratio
    return root, directions, noise_cov


def after(root: Tensor, directions: Tensor, noise_cov: Tensor) -> Tensor:
    return roots.measured(root, roots.whitened(root @ directions, noise_cov))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_a_measurement_keeps_the_digits_of_every_direction(size: int, ratio: float, seed: int) -> None:
    root, directions, noise_cov = problem(size, ratio, seed=10 * seed)
    measured = roots.downdated(root, root @ directions[:, 0], noise_cov[0, 0])
    exact = exact_cov(root, directions, noise_cov)
    assert torch.equal(measured.tril(), measured)
    # What is left of the measured direction is the difference of numbers that are sqrt(ratio) times as large.
    assert error_along(measured, exact, directions[:, 0]) < 1e-14 * (1.0 + ratio**0.5)
    if size > 1:
        assert error_along(measured, exact, randn(size, seed=50 + seed)) < 1e-12


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("size", "count"), [(5, 2), (5, 3), (2, 3)])
def test_correlated_measurements_are_taken_one_after_another(size: int, count: int, ratio: float) -> None:
    root, directions, noise_cov = problem(size, ratio, count)
    measured, exact = after(root, directions, noise_cov), exact_cov(root, directions, noise_cov)
    for direction in (*directions.mT, directions @ randn(count, seed=6)):
        assert error_along(measured, exact, direction) < 1e-14 * (1.0 + ratio**0.5)
    assert error_along(measured, exact, randn(size, seed=60)) < (1e-12 if size > count else 1e-14 * (1.0 + ratio**0.5))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_measurements_are_taken_back(count: int, ratio: float) -> None:
    root, directions, noise_cov = problem(5, ratio, count)
    moves = roots.whitened(root @ directions, noise_cov)
    assert roots.are_invertible(moves)
    back = roots.unmeasured(roots.measured(root, moves), moves)
    torch.testing.assert_close(back, root, rtol=0.0, atol=1e-13)
    assert torch.equal(back.tril(), back)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("share", [1e-16, 1e-10, 1e-4, 1.0])
def test_a_sum_keeps_the_digits_of_every_direction(ratio: float, share: float) -> None:
    root, directions, noise_cov = problem(5, ratio)
    contracted, other = after(root, directions, noise_cov), share**0.5 * lower_root(random_cov(5, seed=9))
    both = roots.combined(contracted, other)
    exact = matrix(contracted).T * matrix(contracted) + matrix(other).T * matrix(other)
    assert torch.equal(both.tril(), both)
    for direction in (directions[:, 0], randn(5, seed=70)):
        assert error_along(both, exact, direction) < 1e-7


def test_a_sum_of_singular_roots_is_one() -> None:
    root = torch.tril(randn(4, 4, seed=1))
    root[:, 2] = 0.0
    other = torch.zeros(4, 4, dtype=torch.float64)
    torch.testing.assert_close(roots.combined(root, other).mT @ roots.combined(root, other), root.mT @ root)
    assert torch.equal(roots.combined(other, other), other)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_leading_dimensions_are_independent_problems(lead: tuple[int, ...]) -> None:
    shape = torch.empty(lead).flatten()
    cases = [problem(4, 10.0, 2, seed=5 * i) for i in range(max(len(shape), 1))]
    root, directions, noise_cov = (torch.stack(part).view(*lead, *part[0].shape) for part in zip(*cases, strict=True))
    moves = roots.whitened(root @ directions, noise_cov)
    found = roots.measured(root, moves)
    back = roots.unmeasured(found, moves)
    summed = roots.added_roots(root, found, 0.3, 0.7)
    for i, (own, ways, noise) in enumerate(cases):
        alone = after(own, ways, noise)
        torch.testing.assert_close(found.view(-1, 4, 4)[i], alone, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(back.view(-1, 4, 4)[i], own, rtol=1e-12, atol=1e-14)
        expected = 0.3 * own.mT @ own + 0.7 * alone.mT @ alone
        torch.testing.assert_close((summed.mT @ summed).view(-1, 4, 4)[i], expected, rtol=1e-13, atol=1e-15)


def test_a_measurement_carries_further_columns_along() -> None:
    """``R H`` of later measurements moves as ``R`` does."""
    root, directions, _ = problem(5, 1.0, 3)
    phi, noise = root @ directions[:, 0], torch.tensor(0.3, dtype=torch.float64)
    together = roots.downdated(torch.cat([root, root @ directions], dim=-1), phi, noise)
    torch.testing.assert_close(together[:, 5:], together[:, :5] @ directions, rtol=1e-13, atol=1e-15)


def test_without_noise_a_direction_is_certain_and_cannot_be_taken_back() -> None:
    root, directions, _ = problem(4, 1.0)
    phi, nothing = root @ directions[:, 0], torch.tensor(0.0, dtype=torch.float64)
    measured = roots.downdated(root, phi, nothing)
    cov, cross = root.mT @ root, root.mT @ phi
    torch.testing.assert_close(measured.mT @ measured, cov - cross.outer(cross) / (phi @ phi), rtol=0.0, atol=1e-14)
    assert float((measured @ directions).abs().max()) < 1e-14
    assert not roots.are_invertible(roots.Measurements(phi.unsqueeze(0), nothing.unsqueeze(0)))
    with pytest.raises(NotPositiveDefiniteError, match="a measurement without noise"):
        roots.restored(measured, phi, nothing)


@pytest.mark.parametrize("change", [-0.999, -1e-3, -1e-17, -1e-310, 1e-310, 1e-17, 1e-12, 1e-3, 1.0, 1e5, 1e12, 1e20])
def test_one_variance_that_a_rule_raises_or_lowers(change: float) -> None:
    """``R' (I + t c c') R`` and the way back."""
    root, column = lower_root(random_cov(5, seed=1)), torch.nn.functional.normalize(randn(5, 1, seed=2), dim=0)
    column *= abs(change) ** 0.5
    sign = torch.tensor([1.0 if change > 0.0 else -1.0], dtype=torch.float64)
    moves = roots.replacing(root, column, sign, "the sum")
    moved, c = roots.measured(root, moves), matrix(column)
    exact = matrix(root).T * (mpmath.eye(5) + float(sign) * c * c.T) * matrix(root)
    assert torch.equal(moved.tril(), moved)
    for seed in range(4):
        assert error_along(moved, exact, randn(5, seed=50 + seed)) < 1e-12
    assert roots.are_invertible(moves)
    torch.testing.assert_close(roots.unmeasured(moved, moves), root, rtol=0.0, atol=1e-15 * (10.0 + abs(change) ** 0.5))


def test_several_variances_at_once_and_the_way_back() -> None:
    root, columns = lower_root(random_cov(5, seed=1)), 0.3 * randn(5, 3, seed=2)
    signs = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    moves = roots.replacing(root, columns, signs, "the sum")
    moved = roots.measured(root, moves)
    expected = root.mT @ (torch.eye(5, dtype=torch.float64) + (columns * signs) @ columns.mT) @ root
    torch.testing.assert_close(moved.mT @ moved, expected, rtol=1e-13, atol=1e-15)
    assert roots.are_invertible(moves)
    assert torch.equal(roots.unmeasured(moved, moves), root)


def test_a_variance_cannot_be_lowered_to_nothing() -> None:
    column = torch.tensor([[0.8], [0.6]], dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="the sum"):
        roots.replacing(
            torch.eye(2, dtype=torch.float64), 1.000001 * column, -torch.ones(1, dtype=torch.float64), "the sum"
        )


def test_nothing_changes_along_a_direction_without_change() -> None:
    root = lower_root(random_cov(3, seed=1))
    for column, sign in [
        (torch.zeros(3, 1), 1.0),
        (torch.ones(3, 1), 0.0),
        (torch.full((3, 1), 1e-158, dtype=torch.float64), -1.0),
    ]:
        moves = roots.replacing(root, column.double(), torch.tensor([sign], dtype=torch.float64), "the sum")
        assert torch.equal(roots.measured(root, moves), root)
        assert torch.equal(roots.unmeasured(root, moves), root)


def test_what_is_not_measured_stays_bit_by_bit() -> None:
    root, zero = lower_root(random_cov(4, seed=1)), torch.zeros(4, dtype=torch.float64)
    for noise in torch.tensor([0.0, 1.0], dtype=torch.float64):
        assert torch.equal(roots.downdated(root, zero, noise), root)
        assert torch.equal(roots.restored(root, zero, noise), root)
        assert roots.are_invertible(roots.Measurements(zero.unsqueeze(0), noise.unsqueeze(0)))


def test_the_root_of_a_covariance_and_whether_it_is_to_be_trusted() -> None:
    cov = torch.stack([random_cov(4, seed=1), random_cov(4, seed=2)])
    found, reliable = roots.root_of(cov)
    torch.testing.assert_close(found.mT @ found, cov, rtol=1e-14, atol=1e-15)
    assert torch.equal(found.tril(), found)
    assert reliable.tolist() == [True, True]
    cov[1, :, 3] = cov[1, 3] = cov[1, :, 2]  # two weights that are one, up to their own variances
    cov[1, 3, 3] = cov[1, 2, 2]
    assert roots.root_of(cov)[1].tolist() == [True, False]


BROKEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "indefinite": (lambda cov: cov - 0.9 * torch.eye(4, dtype=torch.float64), r"has the eigenvalue -0\."),
    "singular": (lambda cov: torch.outer(cov[0], cov[0]), "has the eigenvalue"),
    "not finite": (lambda cov: cov * torch.nan, "holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_covariance_has_no_root(kind: str) -> None:
    spoil, message = BROKEN[kind]
    cov = spoil(random_cov(4, seed=3))
    if kind == "singular":
        cov[2, 2] -= 1e-9
    with pytest.raises(NotPositiveDefiniteError, match=f"the sum {message}"):
        roots.proper_root(cov, "the sum")


def test_a_root_is_lower_triangular_and_finite() -> None:
    root = lower_root(random_cov(3, seed=4))
    roots.check_roots((root, torch.stack([root, root])))
    for bad in (root.mT, root * torch.nan, torch.stack([root, root.mT])):
        assert not roots.is_root(bad)
        with pytest.raises(ValueError, match="finite and lower triangular"):
            roots.check_roots((root, bad))


def test_sums_of_others_keep_small_ones_beside_a_huge_one() -> None:
    parts = torch.tensor([1e-3, 1e30, 2e-3, 4e-3], dtype=torch.float64)
    expected = torch.tensor([1e30, 7e-3, 1e30, 1e30], dtype=torch.float64)
    torch.testing.assert_close(roots.sums_of_others(parts), expected, rtol=1e-15, atol=0.0)
    assert torch.equal(roots.sums_of_others(parts[:1]), torch.zeros(1, dtype=torch.float64))
