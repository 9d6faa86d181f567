"""Forward moments and ``Cov(w, u^L)`` of every structure against explicit loops, autodiff, each other and sampling."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import STRUCTURES, blocks_of, dense, randn, random_state, restructured, smallest_eigenvalue, variances
from numpy.typing import NDArray
from scipy.stats import norm
from torch import Tensor

from kbt_rl.inference.covariance.registry import STRUCTURES as REGISTRY
from kbt_rl.inference.likelihoods.registry import LIKELIHOODS
from kbt_rl.inference.network import apply, forward, increment, predict_logits, weights_of
from kbt_rl.inference.types import Gaussian, HeadSpec, HeadState

DEPTHS = (1, 2, 3, 4)
Array = NDArray[np.float64]


def targets(state: HeadState, rows: int, seed: int) -> Tensor:
    return randn(rows, state.spec.outputs, seed=seed)


def noise(state: HeadState, variance: float = 0.1) -> Tensor:
    return variance * torch.eye(state.spec.outputs, dtype=torch.float64)


def propagate(state: HeadState, features: Tensor) -> tuple[Gaussian, Tensor]:
    """Distribution of the outputs of all rows, and ``Cov(w, u^L)``, one column after another."""
    passed = forward(state, features)
    unit = torch.eye(passed.mean.shape[-1], dtype=torch.float64)
    columns = [REGISTRY[state.spec.structure].cross(state, passed.projected, step) for step in unit]
    return passed.gaussian, torch.stack(columns, dim=-1)


def taught(state: HeadState, features: Tensor, target: Tensor, rule: str, noise_cov: Tensor) -> HeadState:
    return apply(state, increment(state, features, target, LIKELIHOODS[rule], noise_cov))


def plain_network(state: HeadState, flat: Tensor, features: Tensor) -> Tensor:
    """The network with certain weights ``flat``, ``(..., P)`` to ``(..., B o)``."""
    z, start = features, 0
    for depth, (n, k) in enumerate(state.spec.shapes):
        weight = flat[..., start : start + n * k].unflatten(-1, (n, k))
        start += n * k
        u = z @ weight[..., :-1].mT + weight[..., -1].unsqueeze(-2)
        z = u.clamp_min(0.0) if depth < len(state.spec.shapes) - 1 else u
    return z.flatten(-2)


# Explicit loops, in NumPy, one scalar at a time


class LoopPass(NamedTuple):
    mean: Array
    cov: Array
    cross_cov: Array


def relu_by_rows(mean: Array, cov: Array) -> tuple[Array, Array, Array]:
    """Eqs. (22) and (23) with the square, for ``mean[b, j]`` and ``cov[b, j, c, k]``; and the slopes."""
    out, slope, out_cov = np.zeros_like(mean), np.zeros_like(mean), np.zeros_like(cov)
    cells = list(np.ndindex(*mean.shape))
    for i in cells:
        sd = np.sqrt(cov[i + i])
        slope[i] = norm.cdf(mean[i] / sd)
        out[i] = mean[i] * slope[i] + sd * norm.pdf(mean[i] / sd)
    for i, j in product(cells, cells):
        s, vi, vj = cov[i + j], cov[i + i], cov[j + j]
        bumps = norm.pdf(mean[i] / np.sqrt(vi)) * norm.pdf(mean[j] / np.sqrt(vj))
        out_cov[i + j] = s * slope[i] * slope[j] + s**2 * bumps / (2.0 * np.sqrt(vi * vj))
    for i in cells:
        second = (mean[i] ** 2 + cov[i + i]) * slope[i] + mean[i] * (out[i] - mean[i] * slope[i])
        out_cov[i + i] = second - out[i] ** 2
    return out, out_cov, slope


def layerwise_by_loops(state: HeadState, features: Tensor) -> LoopPass:
    """Independent layers: Eqs. (19) to (23) forward, mean Jacobians backward."""
    shapes, rows = state.spec.shapes, len(features)
    sigma_all, sizes = dense(state).numpy(), state.spec.sizes
    starts = np.cumsum([0, *sizes])
    z, d = features.numpy(), features.shape[1]
    c = np.zeros((rows, d, rows, d))
    for b, p in np.ndindex(rows, d):
        c[b, p, b, p] = state.spec.feature_variance
    inputs, slopes, sigmas = [], [], []
    for depth, (n, k) in enumerate(shapes):
        m = weights_of(state)[depth].numpy()
        sigma = sigma_all[starts[depth] : starts[depth + 1], starts[depth] : starts[depth + 1]].reshape(n, k, n, k)
        zt = np.concatenate([z, np.ones((rows, 1))], axis=1)
        inputs.append(zt)
        sigmas.append(sigma)
        u, cov = np.zeros((rows, n)), np.zeros((rows, n, rows, n))
        for b, j in np.ndindex(rows, n):
            u[b, j] = m[j] @ zt[b]
        for b, j, e, i in np.ndindex(rows, n, rows, n):
            block = sigma[j, :, i, :]
            cov[b, j, e, i] = (
                zt[b] @ block @ zt[e]
                + np.trace(block[:-1, :-1] @ c[e, :, b, :])
                + m[j, :-1] @ c[b, :, e, :] @ m[i, :-1]
            )
        if depth < len(shapes) - 1:
            z, c, slope = relu_by_rows(u, cov)
            slopes.append(slope)
    cross = np.zeros((sum(sizes), rows, n))
    for b in range(rows):
        jacobian = np.eye(n)
        for depth in reversed(range(len(shapes))):
            n_i, k_i = shapes[depth]
            for j in range(n_i):
                block = sum(np.outer(sigmas[depth][j, :, i, :] @ inputs[depth][b], jacobian[:, i]) for i in range(n_i))
                first = starts[depth] + j * k_i
                cross[first : first + k_i, b] = block
            if depth:
                jacobian = jacobian @ weights_of(state)[depth].numpy()[:, :-1] @ np.diag(slopes[depth - 1][b])
    size = rows * n
    return LoopPass(u.reshape(size), cov.reshape(size, size), cross.reshape(-1, size))


def joint_by_loops(state: HeadState, features: Tensor) -> LoopPass:
    """All weights and activations as one Gaussian: products of two by Isserlis' theorem, one scalar at a time."""
    sigma, rows = dense(state).numpy(), len(features)
    z, d = features.numpy(), features.shape[1]
    c = np.zeros((rows, d, rows, d))
    for b, p in np.ndindex(rows, d):
        c[b, p, b, p] = state.spec.feature_variance
    carried = np.zeros((len(sigma), rows, d))  # Cov(theta, z)
    start = 0
    for depth, (n, k) in enumerate(state.spec.shapes):
        m = weights_of(state)[depth].numpy()
        # The constant 1 of the bias is an input without variance.
        z = np.concatenate([z, np.ones((rows, 1))], axis=1)
        c = np.pad(c, ((0, 0), (0, 1), (0, 0), (0, 1)))
        carried = np.pad(carried, ((0, 0), (0, 0), (0, 1)))
        u, cov, cross = np.zeros((rows, n)), np.zeros((rows, n, rows, n)), np.zeros((len(sigma), rows, n))
        for b, j, p in np.ndindex(rows, n, k):
            w = start + j * k + p
            u[b, j] += m[j, p] * z[b, p] + carried[w, b, p]
            cross[:, b, j] += sigma[:, w] * z[b, p] + m[j, p] * carried[:, b, p]
        for b, j, e, i, p, q in np.ndindex(rows, n, rows, n, k, k):
            w, v = start + j * k + p, start + i * k + q
            ww, zz, wz, zw = sigma[w, v], c[b, p, e, q], carried[w, e, q], carried[v, b, p]
            cov[b, j, e, i] += (
                m[j, p] * m[i, q] * zz
                + z[b, p] * z[e, q] * ww
                + m[j, p] * z[e, q] * zw
                + z[b, p] * m[i, q] * wz
                + ww * zz
                + wz * zw
            )
        start += n * k
        if depth < len(state.spec.shapes) - 1:
            z, c, slope = relu_by_rows(u, cov)
            carried = cross * slope
    size = rows * n
    return LoopPass(u.reshape(size), cov.reshape(size, size), cross.reshape(-1, size))


def assert_pass_equals(state: HeadState, features: Tensor, expected: LoopPass, tolerance: float = 1e-10) -> None:
    output, cross_cov = propagate(state, features)
    for ours, theirs in zip((output.mean, output.cov, cross_cov), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0.0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("structure", ["layer", "neuron", "diagonal"])
@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize(("rows", "feature_variance"), [(1, 0.0), (3, 0.0), (2, 0.2)])
def test_independent_layers_match_explicit_loops(
    structure: str, layers: int, rows: int, feature_variance: float
) -> None:
    state = random_state(layers, structure, feature_variance=feature_variance, seed=layers)
    features = randn(rows, 3, seed=100 + rows)
    assert_pass_equals(state, features, layerwise_by_loops(state, features))


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("rows", "feature_variance"), [(1, 0.0), (2, 0.0), (2, 0.2)])
def test_joint_matches_isserlis_by_scalar_loops(layers: int, rows: int, feature_variance: float) -> None:
    state = random_state(layers, "joint", features=2, width=3, feature_variance=feature_variance, seed=layers)
    features = randn(rows, 2, seed=200 + rows)
    assert_pass_equals(state, features, joint_by_loops(state, features))


# Limits


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize("relu_order", [2, 5])
def test_certain_weights_give_the_plain_network(structure: str, layers: int, relu_order: int) -> None:
    state = random_state(layers, structure, variance=0.0, relu_order=relu_order)
    weights_of(state)[0][0] = 0.0  # the mean of the first unit is exactly 0, its slope undefined
    features = torch.cat([randn(3, 3, seed=1), torch.zeros(1, 3, dtype=torch.float64)])
    output, cross_cov = propagate(state, features)
    torch.testing.assert_close(output.mean, plain_network(state, state.mean, features), rtol=1e-13, atol=1e-14)
    assert float(output.cov.abs().max()) < 1e-140
    assert torch.equal(cross_cov, torch.zeros_like(cross_cov))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", DEPTHS)
def test_cross_covariance_tends_to_the_jacobian_of_the_plain_network(structure: str, layers: int) -> None:
    variance = 1e-12
    state = random_state(layers, structure, variance=variance, seed=10 + layers)
    features = randn(3, 3, seed=2)
    jacobian = torch.func.jacrev(lambda flat: plain_network(state, flat, features))(state.mean)
    cov = dense(state)
    output, cross_cov = propagate(state, features)
    torch.testing.assert_close(cross_cov / variance, cov @ jacobian.mT / variance, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(output.cov / variance, jacobian @ cov @ jacobian.mT / variance, rtol=1e-5, atol=1e-7)


# Structures against each other


@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize(("rows", "feature_variance"), [(1, 0.0), (3, 0.1)])
def test_joint_without_covariance_between_layers_is_layer(layers: int, rows: int, feature_variance: float) -> None:
    layer = random_state(layers, feature_variance=feature_variance)
    joint = restructured(layer, "joint")
    features = randn(rows, 3, seed=3)
    for ours, theirs in zip(one_step(joint, features), one_step(layer, features), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def one_step(state: HeadState, features: Tensor) -> tuple[Tensor, ...]:
    """Mean step and the change of what independent layers store of the covariance."""
    step = increment(state, features, targets(state, len(features), 4), LIKELIHOODS["measure"], noise(state))
    change = dense(apply(state, step)) - dense(state)
    return step.mean_step, *blocks_of(change, state.spec.shapes, "layer")


@pytest.mark.parametrize("structure", ["neuron", "diagonal"])
@pytest.mark.parametrize("layers", DEPTHS)
@pytest.mark.parametrize(("rows", "feature_variance"), [(1, 0.0), (3, 0.1)])
def test_smaller_structure_steps_as_layer_and_keeps_its_own_entries(
    structure: str, layers: int, rows: int, feature_variance: float
) -> None:
    before = random_state(layers, structure, feature_variance=feature_variance)
    features, target = randn(rows, 3, seed=5), targets(before, rows, 6)
    small, layer = (
        taught(state, features, target, "measure", noise(state)) for state in (before, restructured(before, "layer"))
    )
    torch.testing.assert_close(small.mean, layer.mean, rtol=1e-11, atol=1e-13)
    for ours, theirs in zip(*(blocks_of(dense(s), s.spec.shapes, structure) for s in (small, layer)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


# Rows


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layers", DEPTHS)
def test_rows_on_their_own_are_the_diagonal_blocks_of_the_joint_prediction(structure: str, layers: int) -> None:
    state = random_state(layers, structure, feature_variance=0.1)
    features = randn(5, 3, seed=7)
    together, cross_cov = propagate(state, features)
    alone = predict_logits(state, features, chunk=2)
    batch = forward(state, features.unsqueeze(-2)).gaussian
    torch.testing.assert_close(batch.mean, alone.mean, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(batch.cov, alone.cov, rtol=1e-12, atol=1e-13)
    for b in range(5):
        own = slice(2 * b, 2 * b + 2)
        single, single_cross = propagate(state, features[b : b + 1])
        for mean, cov in ((together.mean[own], together.cov[own, own]), (alone.mean[b], alone.cov[b])):
            torch.testing.assert_close(mean, single.mean, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(cov, single.cov, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(cross_cov[:, own], single_cross, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rule", ["measure", "fisher", "taylor"])
def test_order_of_rows_in_one_update_does_not_matter(structure: str, rule: str) -> None:
    before = random_state(2, structure, outputs=3)
    features, target = randn(6, 3, seed=8), torch.softmax(randn(6, 3, seed=9), dim=-1)
    orders = [list(range(6)), [4, 2, 0, 5, 1, 3]]
    ours, theirs = (taught(before, features[rows], target[rows], rule, noise(before)) for rows in orders)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dense(ours), dense(theirs), rtol=1e-11, atol=1e-12)


# Sampling the weights


def sampled(state: HeadState, features: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights and outputs of ``count`` networks drawn from the posterior."""
    root = torch.linalg.cholesky(dense(state))
    weights = state.mean + randn(count, len(state.mean), seed=seed) @ root.mT
    return weights, plain_network(state, weights, features)


def standard_errors_off(value: Tensor, samples: Tensor) -> float:
    return float(((value - samples.mean(0)) / (samples.std(0) / len(samples) ** 0.5)).abs().max())


def centred_products(left: Tensor, right: Tensor) -> Tensor:
    return (left - left.mean(0)).unsqueeze(-1) * (right - right.mean(0)).unsqueeze(-2)


@pytest.mark.parametrize("structure", ["layer", "neuron", "diagonal"])
def test_moments_of_two_independent_layers_agree_with_sampling(structure: str) -> None:
    """Exact for two layers and exact features, but for the rest of the ReLU's series."""
    state = random_state(2, structure, features=2, width=3, variance=0.3, relu_order=6)
    features = randn(2, 2, seed=11)
    weights, outputs = sampled(state, features, 100_000, seed=12)
    output, cross_cov = propagate(state, features)
    assert standard_errors_off(output.mean, outputs) < 6.0
    assert standard_errors_off(output.cov, centred_products(outputs, outputs)) < 6.0
    assert standard_errors_off(cross_cov, centred_products(weights, outputs)) < 6.0


def test_joint_mean_is_exact_and_its_cross_covariance_is_exact_to_first_order() -> None:
    """What the Gaussian projection drops is ``E[dtheta dw relu(u)]``, known from Stein's lemma to be one more term."""
    state = random_state(2, "joint", features=2, width=3, outputs=1, variance=1.0)
    features = randn(1, 2, seed=13)
    weights, outputs = sampled(state, features, 200_000, seed=14)
    output, cross_cov = propagate(state, features)
    assert standard_errors_off(output.mean, outputs) < 6.0
    samples = centred_products(weights, outputs)
    assert standard_errors_off(cross_cov, samples) > 20.0

    (n, k), _ = state.spec.shapes
    zt, cov = torch.cat([features[0], features.new_ones(1)]), dense(state)
    dropped = torch.zeros(len(cov), dtype=torch.float64)
    for unit in range(n):
        own = slice(unit * k, unit * k + k)
        with_u, mean = cov[:, own] @ zt, float(weights_of(state)[0][unit] @ zt)
        density_at_zero = norm.pdf(0.0, mean, float(zt @ cov[own, own] @ zt) ** 0.5)
        dropped += with_u * with_u[n * k + unit] * density_at_zero
    assert standard_errors_off(cross_cov + dropped.unsqueeze(-1), samples) < 6.0


# The posterior over many updates


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("rule", "layers"), [("measure", 3), ("fisher", 2), ("taylor", 2)])
def test_posterior_stays_a_covariance_and_variances_never_grow(structure: str, rule: str, layers: int) -> None:
    state = random_state(layers, structure, variance=1.0, feature_variance=0.01)
    first = dense(state)
    features, labels = randn(300, 3, seed=15), torch.softmax(randn(300, 2, seed=16), dim=-1)
    before = variances(state)
    for row in range(300):
        rows = slice(row, row + 1)
        state = taught(state, features[rows], labels[rows], rule, noise(state, 0.01))
        after = variances(state)
        assert bool((after <= before + 1e-15).all())
        before = after
    cov = dense(state)
    torch.testing.assert_close(variances(state), cov.diagonal(), rtol=1e-14, atol=0.0)
    assert smallest_eigenvalue(cov) > -1e-14
    assert smallest_eigenvalue(first - cov) > -1e-13
    assert float(cov.trace()) < 0.9 * float(first.trace())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_replace_grows_the_variances_where_the_data_covariance_exceeds_the_prediction(structure: str) -> None:
    state = random_state(2, structure, variance=0.01)
    before, features = variances(state), randn(1, 3, seed=17)
    data_cov = 2.0 * forward(state, features).gaussian.cov + noise(state)
    after = variances(taught(state, features, targets(state, 1, 18), "replace", data_cov))
    assert bool((after >= before * (1.0 - 1e-14)).all())  # a new root of the same block has rounding of its own
    assert float(after.sum()) > 1.01 * float(before.sum())


def test_replace_forces_the_output_of_one_layer_to_the_target_and_its_covariance() -> None:
    state = random_state(1)
    features, target = randn(2, 3, seed=19), targets(state, 2, 20)
    data_cov = torch.tensor([[0.7, 0.2], [0.2, 0.4]], dtype=torch.float64)
    output = forward(taught(state, features, target, "replace", data_cov), features).gaussian
    torch.testing.assert_close(output.mean, target.flatten(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.cov, torch.block_diag(data_cov, data_cov), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rule", ["measure", "replace"])
def test_neither_an_increment_nor_its_application_changes_the_state(structure: str, rule: str) -> None:
    state = random_state(2, structure)
    kept = state.clone()
    after = taught(state, randn(1, 3, seed=21), targets(state, 1, 22), rule, noise(state))
    assert torch.equal(state.mean, kept.mean)
    assert all(torch.equal(mine, old) for mine, old in zip(state.cov, kept.cov, strict=True))
    assert not torch.equal(after.mean, kept.mean)


def test_the_record_of_an_update_says_what_it_saw() -> None:
    state, variance = random_state(2, "joint"), 0.3
    features, target = randn(3, 3, seed=23), targets(state, 3, 24)
    output = forward(state, features).gaussian
    step = increment(state, features, target, LIKELIHOODS["measure"], noise(state, variance))
    error = (target.flatten() - output.mean).numpy()
    total = output.cov.numpy() + variance * np.eye(6)
    assert step.info.innovation == pytest.approx(np.sqrt(np.mean(error**2)))
    assert step.info.nis == pytest.approx(error @ np.linalg.solve(total, error))
    assert step.info.epistemic_variance == pytest.approx(np.trace(output.cov.numpy()) / 6)
    assert step.info.predictive_variance == pytest.approx(np.trace(total) / 6)
    assert (step.info.labels, step.rows) == (6, 3)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rule", ["measure", "replace"])
def test_an_entry_without_a_label_is_not_measured(structure: str, rule: str) -> None:
    """The same as if that output of that row did not exist: by the dense formula on the entries that are left."""
    state = random_state(2, structure, variance=0.3)
    features, target = randn(2, 3, seed=26), targets(state, 2, 27)
    noise_cov = torch.tensor([[0.7, 0.2], [0.2, 0.4]], dtype=torch.float64)
    seen = torch.tensor([0, 2, 3])
    passed, cross_cov = propagate(state, features)
    cross = cross_cov[:, seen]
    cov, error = passed.cov[seen][:, seen], target.flatten()[seen] - passed.mean[seen]
    given = torch.block_diag(noise_cov, noise_cov)[seen][:, seen]
    before = torch.linalg.inv(cov + given if rule == "measure" else cov)
    inner = before if rule == "measure" else before @ (cov - given) @ before
    step = increment(
        state,
        features,
        target.flatten().index_fill(0, torch.tensor([1]), torch.nan).view(2, 2),
        LIKELIHOODS[rule],
        noise_cov,
    )
    torch.testing.assert_close(step.mean_step, cross @ before @ error, rtol=1e-10, atol=1e-12)
    expected = blocks_of(dense(state) - cross @ inner @ cross.mT, state.spec.shapes, structure)
    for ours, theirs in zip(blocks_of(dense(apply(state, step)), state.spec.shapes, structure), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert step.info.labels == 3
    assert step.info.nis == pytest.approx(float(error @ torch.linalg.inv(cov + given) @ error), rel=1e-9)
    with pytest.raises(ValueError, match="at least one entry of the update has a label"):
        increment(state, features, torch.full((2, 2), torch.nan), LIKELIHOODS[rule], noise_cov)


def test_a_head_without_layers_is_refused() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    for structure in STRUCTURES:
        with pytest.raises(ValueError, match="no layers"):
            forward(HeadState(HeadSpec((), structure), empty, ()), randn(1, 3, seed=25))
