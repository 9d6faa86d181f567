"""What every structure answers, against the algebra of full matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mpmath
import pytest
import torch
from conftest import STRUCTURES, blocks_of, dense, lower_root, randn, random_cov, random_state, variances
from torch import Tensor

from kbt_rl.inference.covariance.base import Cov, PriorLayer, Replacement
from kbt_rl.inference.covariance.neuron import kept_variances
from kbt_rl.inference.covariance.registry import STRUCTURES as REGISTRY
from kbt_rl.inference.covariance.stored import Stored
from kbt_rl.inference.errors import NotPositiveDefiniteError, UpdateError
from kbt_rl.inference.likelihoods.registry import LIKELIHOODS
from kbt_rl.inference.network import apply, augment, forward, increment
from kbt_rl.inference.types import HeadState, LayerShape, Part

OF_LAYERS = (*STRUCTURES, "shared", "rotated")
inv = torch.linalg.inv


def grouped(groups: Sequence[int], k: int = 4) -> HeadState:
    """A ``shared`` state whose outputs belong to these groups."""
    state = random_state(1, "shared", features=k - 1, outputs=len(groups))
    root = torch.stack([lower_root(random_cov(k, seed=30 + group)) for group in range(max(groups) + 1)])
    return HeadState(state.spec, state.mean, (root, torch.tensor(groups)))


def states_of(structure: str) -> list[HeadState]:
    """One layer, and more where the structure has them; outputs in groups."""
    if structure == "shared":
        return [grouped([0, 0, 0]), grouped([0, 1, 0]), grouped([2, 0, 1])]
    depths = (1,) if structure == "rotated" else (1, 2)
    return [random_state(layers, structure, outputs=3, seed=layers) for layers in depths]


CASES = pytest.mark.parametrize(
    ("structure", "which"), [(name, i) for name in OF_LAYERS for i in range(len(states_of(name)))]
)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def kept_by(state: HeadState, cov: Tensor) -> Tensor:
    """The full covariance of what the state's structure stores of ``cov``."""
    structure = state.spec.structure
    blocks = blocks_of(cov, state.spec.shapes, structure)
    if structure in ("diagonal", "rotated"):
        return torch.cat([block.flatten() for block in blocks]).diag()
    return torch.block_diag(*[part for block in blocks for part in block.view(-1, *block.shape[-2:])])


def full_jacobian(state: HeadState, inputs: Tensor) -> Tensor:
    """``I (x) z~'`` of a single layer, ``(B o, P)``."""
    return torch.cat([torch.kron(torch.eye(state.spec.outputs, dtype=torch.float64), row) for row in inputs])


# ---------------------------------------------------------------------- what it shows of a covariance


@CASES
def test_what_it_tells_of_itself(structure: str, which: int) -> None:
    state, questions = states_of(structure)[which], REGISTRY[structure]
    full = dense(state)
    assert_close(full, full.mT, 1e-15)
    assert_close(variances(state), full.diagonal(), 1e-15)
    assert_close(kept_by(state, full), full, 0.0)
    assert questions.count(state.spec.shapes) == len(state.cov)
    stored = sum(block.numel() for block in state.cov if block.is_floating_point())
    groups = len(state.cov[0]) if structure == "shared" else 1
    assert questions.sizes(state.spec.shapes) * groups == stored


@pytest.mark.parametrize("structure", OF_LAYERS)
def test_a_prior_is_stored_as_it_is(structure: str) -> None:
    layers = [PriorLayer(4, torch.diag(randn(4, seed=1).exp())), PriorLayer(2, torch.diag(randn(5, seed=2).exp()))]
    layers = layers[:1] if structure in ("shared", "rotated") else layers
    if structure not in ("diagonal", "rotated"):
        layers[-1] = layers[-1]._replace(root=lower_root(random_cov(len(layers[-1].root), seed=3)))
    cov = REGISTRY[structure].from_prior(layers)
    shapes = tuple(LayerShape(layer.n, len(layer.root)) for layer in layers)
    state = random_state(1, structure)
    spec = state.spec.__class__(shapes, structure)
    expected = torch.block_diag(*[layer.root.mT @ layer.root for layer in layers for _ in range(layer.n)])
    assert_close(dense(HeadState(spec, state.mean, cov)), expected, 1e-15)
    REGISTRY[structure].check(cov)


def test_shared_is_for_one_layer() -> None:
    layer = PriorLayer(2, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="'shared' is for one layer; this head has 2"):
        REGISTRY["shared"].from_prior([layer, layer])


# ---------------------------------------------------------------------- outputs of a single layer


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_jacobian_is_projected(structure: str, lead: tuple[int, ...]) -> None:
    """``J Sigma J'`` through slopes, products with a matrix and sums, as the forward pass takes them."""
    state, rows = random_state(2, structure, outputs=3), 2
    structure_of, (first, second) = REGISTRY[structure], state.spec.shapes
    inputs, between = randn(*lead, rows, first.k, seed=1), randn(*lead, rows, second.k, seed=2)
    weight, slope = randn(second.n, first.n, seed=3), randn(*lead, rows, first.n, seed=4).abs()
    jacobian = {1: Part(between, None), 0: Part(inputs, weight * slope.unsqueeze(-2))}
    found = structure_of.gram(structure_of.project(state, jacobian))
    assert_close(structure_of.covariance(state, jacobian), found)
    sigma = dense(state)
    for index in range(math.prod(lead)):
        own, ours, theirs = (part.reshape(-1, *part.shape[-2:])[index] for part in (slope, inputs, between))
        parts = []
        for b in range(rows):
            jacobian = torch.kron(torch.eye(first.n, dtype=torch.float64), ours[b])
            head = torch.kron(torch.eye(second.n, dtype=torch.float64), theirs[b])
            parts.append(torch.cat([weight @ (own[b].unsqueeze(-1) * jacobian), head], dim=1))
        full = torch.cat(parts)
        assert_close(found.reshape(-1, *found.shape[-2:])[index], full @ sigma @ full.mT)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("lead", [(), (2,)])
def test_the_spread_of_the_inputs_meets_the_weights_own(structure: str, lead: tuple[int, ...]) -> None:
    """``trace(Sigma_jl C_cb)``, Eq. (20), of the second layer."""
    state, rows = random_state(2, structure, width=2), 2
    n, k = state.spec.shapes[1]
    covs = torch.stack([random_cov(rows * (k - 1), seed=10 + i) for i in range(max(math.prod(lead), 1))])
    found = REGISTRY[structure].input_part(state, 1, covs.view(*lead, *covs.shape[1:]), rows)
    first = state.spec.sizes[0]
    sigma = dense(state)[first:, first:].view(n, k, n, k)
    for index, cov in enumerate(covs):
        for b, j, c, i in [(0, 0, 0, 0), (0, 1, 1, 0), (1, 1, 0, 1), (1, 0, 1, 1)]:
            block = cov[c * (k - 1) : (c + 1) * (k - 1), b * (k - 1) : (b + 1) * (k - 1)]
            expected = float(torch.trace(sigma[j, :-1, i, :-1] @ block))
            entry = found.reshape(-1, rows * n, rows * n)[index, b * n + j, c * n + i]
            assert float(entry) == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("noise", ["ordinary", "small"])
def test_a_measurement_and_its_way_back(structure: str, rows: int, noise: str) -> None:
    state = random_state(1, structure, outputs=2)
    inputs, step, directions = randn(rows, 4, seed=1), randn(2 * rows, seed=2), randn(2 * rows, 2, seed=3)
    rest = random_cov(2, seed=4) * (1.0 if noise == "ordinary" else 1e-7)
    questions, sigma, jacobian = REGISTRY[structure], dense(state), full_jacobian(state, inputs)
    projected, cross = questions.project(state, {0: Part(inputs, None)}), sigma @ jacobian.mT
    assert_close(questions.gram(projected), jacobian @ cross)
    assert_close(questions.cross(state, projected, step), cross @ step)
    moves = questions.measured(state, projected, directions, rest)
    aimed = cross @ directions
    expected = sigma - aimed @ inv(directions.mT @ jacobian @ aimed + rest) @ aimed.mT
    after = HeadState(state.spec, state.mean, questions.apply(state.cov, moves))
    assert_close(dense(after), kept_by(state, expected), 1e-12 if noise == "ordinary" else 1e-8)
    assert questions.invertible(moves)
    for ours, theirs in zip(questions.revert(after.cov, moves), state.cov, strict=True):
        assert_close(ours, theirs, 1e-12 if noise == "ordinary" else 1e-10)
    questions.check(after.cov)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_change_that_is_no_measurement_and_its_way_back(structure: str) -> None:
    state, inputs = random_state(1, structure, outputs=2), randn(2, 4, seed=1)
    factor, signs = 0.1 * randn(4, 4, seed=2), torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    questions, cross = REGISTRY[structure], dense(state) @ full_jacobian(state, inputs).mT
    moves = questions.replaced(state, questions.project(state, {0: Part(inputs, None)}), factor, signs)
    expected = dense(state) + cross @ factor * signs @ factor.mT @ cross.mT
    after = questions.apply(state.cov, moves)
    assert_close(dense(HeadState(state.spec, state.mean, after)), kept_by(state, expected))
    for ours, theirs in zip(questions.revert(after, moves), state.cov, strict=True):
        assert_close(ours, theirs)
    with pytest.raises(UpdateError, match="unchanged"):
        questions.replaced(state, questions.project(state, {0: Part(inputs, None)}), 1e3 * factor, -signs.abs())


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("noise", [(0.3, 0.3, 0.3), (0.3, 0.1, 0.3), (math.inf, 0.2, 0.2)])
def test_outputs_that_are_measured_one_by_one(which: int, noise: tuple[float, ...]) -> None:
    state = [*states_of("shared"), states_of("neuron")[0], states_of("rotated")[0]][which]
    questions, inputs, step = REGISTRY[state.spec.structure], augment(randn(1, 3, seed=1)), randn(3, seed=2)
    given = torch.tensor(noise, dtype=torch.float64)
    jacobian, sigma = full_jacobian(state, inputs), dense(state)
    cross = sigma @ jacobian.mT
    assert_close(questions.output_variances(state, inputs)[0], (jacobian @ cross).diagonal())
    mean_step, moves = questions.output_step(state, inputs[0], step, given)
    assert_close(mean_step, cross @ step)
    seen = torch.isfinite(given)
    expected = sigma - cross[:, seen] @ inv((jacobian @ cross)[seen][:, seen] + given[seen].diag()) @ cross[:, seen].mT
    after = HeadState(state.spec, state.mean, questions.apply(state.cov, moves))
    assert_close(dense(after), kept_by(state, expected))
    for ours, theirs in zip(questions.revert(after.cov, moves), state.cov, strict=True):
        assert_close(ours.double(), theirs.double())


def test_groups_are_told_apart_by_what_they_have_seen_only() -> None:
    """Outputs with the same labels and noise share one root, as few as there can be."""
    questions, state, row = REGISTRY["shared"], grouped([0, 0, 0, 0]), augment(randn(1, 3, seed=1))[0]
    kept, told = [state.cov], []
    for noise in ([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 1.0, 2.0], [1.0, 1.0, math.inf, 1.0], [3.0, 3.0, 3.0, 3.0]):
        _, moves = questions.output_step(state, row, torch.ones(4).double(), torch.tensor(noise).double())
        state = HeadState(state.spec, state.mean, questions.apply(state.cov, moves))
        kept.append(state.cov)
        told.append((moves, len(state.cov[0])))
    assert [count for _, count in told] == [1, 2, 3, 3]
    assert state.cov[1].tolist() == [0, 2, 1, 2]
    cov = state.cov
    for (moves, _), before in zip(reversed(told), reversed(kept[:-1]), strict=True):
        cov = questions.revert(cov, moves)
        assert torch.equal(cov[1], before[1])
        assert_close(cov[0], before[0])


# ---------------------------------------------------------------------- sums, checks, refusals


@CASES
@pytest.mark.parametrize(("scale", "other_scale"), [(0.3, 0.7), (1.0, 1e-6), (2.0, 0.0), (0.0, 1.5), (0.0, 0.0)])
def test_sums_of_covariances(structure: str, which: int, scale: float, other_scale: float) -> None:
    state, questions = states_of(structure)[which], REGISTRY[structure]
    root = lower_root(random_cov(4, seed=77)).unsqueeze(0)
    prior = (root, torch.zeros(3, dtype=torch.int64)) if structure == "shared" else states_of(structure)[which].cov
    for other in (prior, state.cov):
        expected = scale * dense(state) + other_scale * dense(HeadState(state.spec, state.mean, other))
        found = HeadState(state.spec, state.mean, questions.added(state.cov, other, scale, other_scale))
        torch.testing.assert_close(dense(found), expected, rtol=1e-13, atol=1e-15)
        questions.check(found.cov)
    for block in questions.added(state.cov, prior, 0.0, 1.0):
        assert all(block.data_ptr() != mine.data_ptr() for mine in prior)


@pytest.mark.parametrize("structure", OF_LAYERS)
@pytest.mark.parametrize("bad", ["not finite", "not a root"])
def test_what_is_no_covariance_is_refused(structure: str, bad: str) -> None:
    state, questions = states_of(structure)[0], REGISTRY[structure]
    questions.check(state.cov)
    first = state.cov[0]
    if bad == "not finite":
        spoiled = first.index_fill(-1, torch.tensor([0]), torch.nan)
    else:
        spoiled = -first if structure in ("diagonal", "rotated") else first.mT
    with pytest.raises(ValueError, match=r"holds the variance|lower triangular"):
        questions.check((spoiled, *state.cov[1:]))


@pytest.mark.parametrize("groups", [[0, 1, 2], [0, -1, 1]])
def test_groups_without_a_root_are_refused(groups: list[int]) -> None:
    root = grouped([0, 1, 0]).cov[0]
    with pytest.raises(ValueError, match=r"outputs belong to the groups .* there are 2"):
        REGISTRY["shared"].check((root, torch.tensor(groups)))


def test_questions_for_another_network_are_refused_with_advice() -> None:
    state, questions = grouped([0, 0]), REGISTRY["shared"]
    row = augment(randn(1, 3, seed=1))
    projected = REGISTRY["neuron"].project(random_state(1, "neuron"), {0: Part(row, None)})
    two = torch.eye(2, dtype=torch.float64)
    for ask in (
        lambda: questions.project(state, {0: Part(row, None)}),
        lambda: questions.unit_blocks(state, 0, row),
        lambda: questions.input_part(state, 0, two, 1),
        lambda: questions.cross(state, projected, two[0]),
        lambda: questions.measured(state, projected, two, two),
    ):
        with pytest.raises(ValueError, match=r"'shared' cannot be asked this.*use 'joint'"):
            ask()
    with pytest.raises(ValueError, match=r"Shared projects nothing.*use 'joint'"):
        questions.gram(projected)
    with pytest.raises(UpdateError, match="takes measurements only"):
        questions.replaced(state, projected, two, two[0])
    for ask in (REGISTRY["joint"].output_variances, REGISTRY["layer"].output_variances):
        with pytest.raises(ValueError, match="use 'joint'"):
            ask(state, row)


# ---------------------------------------------------------------------- digits of single variances


@pytest.mark.parametrize(
    ("count", "ratio"), [*((1, ratio) for ratio in (1.0, 1e8, 1e16, 1e20)), (2, 1.0), (2, 1e6), (3, 1.0), (3, 1e6)]
)
def test_single_variances_keep_their_digits(count: int, ratio: float) -> None:
    """Also of a weight that explains nearly all of a measurement.

    For several measurements at once the covariance of what all other weights contribute is formed, whose digits go with
    the ratio.
    """
    for seed in range(5):
        columns = randn(6, count, seed=seed)
        columns[0] *= ratio**0.5
        rest = random_cov(count, seed=20 + seed)
        kept = kept_variances(columns, rest)
        with mpmath.workdps(60):
            total = mpmath.matrix(rest.tolist()) + mpmath.matrix(columns.tolist()).T * mpmath.matrix(columns.tolist())
            inverse = mpmath.inverse(total)
            for found, column in zip(kept, columns, strict=True):
                own = mpmath.matrix([column.tolist()])
                expected = 1 - (own * inverse * own.T)[0]
                assert float(found) == pytest.approx(float(expected), rel=1e-9)


# ---------------------------------------------------------------------- a structure of one's own


class FullMatrix(Stored):
    """The covariance itself."""

    def store(self, cov: Tensor, shapes: Sequence[LayerShape]) -> Cov:
        return (cov.clone(),)

    def dense(self, state: HeadState) -> Tensor:
        return state.cov[0]


@pytest.mark.parametrize("rule", ["measure", "replace", "fisher", "laplace", "taylor"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_structure_from_two_methods_is_the_joint_one(rule: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "full", FullMatrix())
    joint = random_state(layers, "joint", outputs=2, feature_variance=0.1)
    full = HeadState(joint.spec.__class__(joint.spec.shapes, "full", 0.1), joint.mean, (dense(joint),))
    noise = 0.1 * torch.eye(2, dtype=torch.float64)
    for seed in range(3):
        features, target = randn(2, 3, seed=seed), torch.softmax(randn(2, 2, seed=9 + seed), dim=-1)
        before = full
        steps = [increment(state, features, target, LIKELIHOODS[rule], noise) for state in (joint, full)]
        joint, full = (apply(state, step) for state, step in zip((joint, full), steps, strict=True))
        torch.testing.assert_close(full.mean, joint.mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(dense(full), dense(joint), rtol=1e-8, atol=1e-11)
        assert isinstance(steps[1].moves, Replacement)
        assert torch.equal(REGISTRY["full"].revert(full.cov, steps[1].moves)[0], dense(before))
    loosened = HeadState(full.spec, full.mean, REGISTRY["full"].added(full.cov, full.cov, 0.5, 2.0))
    torch.testing.assert_close(variances(loosened), 2.5 * variances(joint), rtol=1e-7, atol=0.0)


def test_a_general_measurement_of_a_singular_covariance_is_refused() -> None:
    state, row = random_state(1, "neuron", outputs=2), augment(randn(1, 3, seed=1))
    projected = REGISTRY["neuron"].project(state, {0: Part(row, None)})
    twice = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    rest = torch.ones(2, 2, dtype=torch.float64) - 2.0 * torch.eye(2, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError, match="label noise of rows learned jointly"):
        REGISTRY["neuron"].measured(state, projected, twice, rest)
    assert torch.isfinite(forward(state, row[:, :-1]).gaussian.cov).all()
