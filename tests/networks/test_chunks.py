"""Heads that say a chunk of actions at once: one observation is several rows to learn from, or one long one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from kbt_rl import AdaptedPolicy, Fallback, HeadConfig, KalmanAdapter, adapt

S, C, A, D = 5, 4, 2, 16
ROWS = np.random.default_rng(0).normal(size=(60, S)).astype(np.float32)
NOISE = 1e-2


class Transformer(nn.Module):
    """As LeRobot's ACT: the chunk's queries attend to the observation, rows first, and one layer acts for each."""

    def __init__(self, squash: bool = False, flat: bool = False) -> None:
        super().__init__()
        self.state, self.latent = nn.Linear(S, D), nn.Linear(3, D)
        self.queries = nn.Embedding(C, D)
        self.decoder = nn.TransformerDecoderLayer(D, 2, 2 * D, dropout=0.0)
        self.action_head = nn.Linear(D, A)
        self.squash, self.flat = squash, flat

    def forward(self, rows: Tensor) -> Tensor:
        """From ``(n, S)`` to ``(n, C, A)``."""
        tokens = torch.stack([self.state(rows), self.latent(rows[:, :3])])
        asked = self.queries.weight[:, None].expand(-1, len(rows), -1)
        decoded: Tensor = self.decoder(asked, tokens).transpose(0, 1)
        if self.flat:
            return self.action_head(decoded.reshape(-1, D)).view(-1, C, A)
        said: Tensor = self.action_head(decoded)
        return torch.tanh(said) if self.squash else said


class OneLinear(nn.Module):
    """One layer says the whole chunk."""

    def __init__(self, squash: bool = False) -> None:
        super().__init__()
        self.hidden, self.head, self.squash = nn.Linear(S, D), nn.Linear(D, C * A), squash

    def forward(self, rows: Tensor) -> Tensor:
        """From ``(n, S)`` to ``(n, C, A)``."""
        said: Tensor = self.head(torch.tanh(self.hidden(rows))).view(-1, C, A)
        return torch.tanh(said) if self.squash else said


class Broken(Transformer):
    """Does something else with the rows of its last layer."""

    def __init__(self, made: str) -> None:
        super().__init__()
        self.made = made

    def forward(self, rows: Tensor) -> Tensor:
        """Of several shapes."""
        if self.made == "rows first":
            decoded = self.decoder(self.queries.weight[:, None].expand(-1, len(rows), -1), self.state(rows)[None])
            said: Tensor = self.action_head(decoded)
            return said
        said = super().forward(rows)
        return said[:, -1] if self.made == "last" else said.transpose(1, 2)


def built(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args, **kwargs).eval()


def said_by(module: nn.Module, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = module(torch.from_numpy(rows)).numpy()
    return found


MODULES = {
    "a row a step": lambda squash=False: built(Transformer, squash),
    "one linear": lambda squash=False: built(OneLinear, squash),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("skip", ["hidden", "none"])
def test_it_says_the_module_s_chunk_before_the_first_label_and_after_detach(name: str, skip: Any) -> None:
    module = MODULES[name]()
    policy, expected = adapt(module, states=ROWS, skip=skip), said_by(module, ROWS)
    assert policy.action_space.shape == (C, A)
    np.testing.assert_allclose(policy.predict(ROWS)[0], expected, atol=1e-6)
    np.testing.assert_allclose(policy.predict(ROWS[0])[0], expected[0], atol=1e-6)
    context = policy.start(ROWS)
    np.testing.assert_allclose(policy.choose(context, context.features).actions, expected, atol=1e-6)
    assert policy.detach() is module
    np.testing.assert_array_equal(said_by(module, ROWS), expected)


def test_a_correction_of_some_steps_is_ridge_regression_on_their_rows() -> None:
    """One layer for all steps: the weights move from the module's own by the rows that have a label."""
    module = MODULES["a row a step"]()
    policy = adapt(module, states=ROWS, head=HeadConfig(noise_variance=NOISE), skip="none")
    rng = np.random.default_rng(1)
    labels = rng.normal(size=(6, C, A))
    labels[0, 1:], labels[3], labels[4, 2, 1] = np.nan, np.nan, np.nan
    heard: list[Tensor] = []
    handle = module.action_head.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    said = said_by(module, ROWS[:6]).astype(float)
    handle.remove()
    assert policy.update(ROWS[0], labels[0]).labels == A
    assert policy.update(ROWS[1:6], labels[1:]).labels == np.isfinite(labels[1:]).sum()

    units = policy.start_units
    features = (heard[0].reshape(-1, D).double() - units.feature_mean) / units.feature_scale
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1).numpy()
    variance = policy.head.config.last_variance  # type: ignore[union-attr]
    for output in range(A):
        residual = (labels - said).reshape(-1, A)[:, output]
        known = ~np.isnan(residual)
        some = features[known]
        step = np.linalg.solve(some.T @ some + np.eye(D + 1) * NOISE / variance, some.T @ residual[known])
        expected = said.reshape(-1, A)[:, output] + features @ step
        np.testing.assert_allclose(policy.predict(ROWS[:6])[0].reshape(-1, A)[:, output], expected, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("squash", [False, True])
def test_chunks_are_learned_and_remembered(name: str, squash: bool, tmp_path: Path) -> None:
    module = MODULES[name](squash)
    policy = adapt(module, states=ROWS, link="squashed" if squash else "auto", history=1)
    label = np.array([[0.5, -0.5], [0.3, 0.1], [np.nan, np.nan], [-0.2, 0.6]])
    for row in ROWS[:20]:
        policy.predict(row)
        policy.update(None, label)
    assert policy.update(ROWS[:3], np.full((3, C, A), np.nan)).labels == 0
    assert policy.update(ROWS[:3], np.full((3, C, A), 0.2), kind="output").labels == 3 * C * A
    policy.rollback()
    known = ~np.isnan(label)
    chunk = policy.predict(ROWS[25])[0]
    np.testing.assert_allclose(chunk[known], label[known], atol=0.15)
    assert policy.epistemic_std(ROWS).shape == (60,)
    moments = policy.predict_moments(ROWS[25])
    np.testing.assert_allclose(moments.mean.reshape(C, A), chunk, atol=1e-5)
    again = AdaptedPolicy.load(policy.save(tmp_path / "chunks"), module)
    np.testing.assert_array_equal(again.predict(ROWS)[0], policy.predict(ROWS)[0])
    assert again.action_space == policy.action_space


def test_moments_have_a_row_a_step() -> None:
    moments = adapt(MODULES["a row a step"](), states=ROWS).predict_moments(ROWS)
    assert moments.mean.shape == (60, C, A)
    assert moments.epistemic.shape == moments.aleatoric.shape == (60, C, A, A)


def test_steps_of_one_linear_are_learned_apart() -> None:
    policy = adapt(MODULES["one linear"](), states=ROWS)
    before, label = policy.predict(ROWS)[0], np.full((C, A), np.nan)
    label[1] = 0.9
    policy.update(ROWS[0], label)
    moved = abs(policy.predict(ROWS)[0] - before).max(axis=(0, 2))
    assert moved[1] > 0.01
    assert (moved[[0, 2, 3]] < 1e-6).all()


def test_rows_that_are_flattened_before_the_layer_are_found() -> None:
    module = built(Transformer, flat=True)
    policy = adapt(module, states=ROWS, skip="none")
    np.testing.assert_allclose(policy.predict(ROWS)[0], said_by(module, ROWS), atol=1e-6)
    assert policy.update(ROWS[:2], np.zeros((2, C, A))).labels == 2 * C * A
    with pytest.raises(ValueError, match="use skip='none'"):
        adapt(module, states=ROWS)


def test_a_baked_module_says_the_learned_chunk() -> None:
    module = MODULES["a row a step"]()
    policy = adapt(module, states=ROWS, skip="none")
    policy.update(ROWS[:5], np.zeros((5, C, A)))
    np.testing.assert_allclose(said_by(policy.bake(), ROWS), policy.predict(ROWS)[0], atol=1e-5)


@pytest.mark.parametrize("made", ["rows first", "last", "turned"])
def test_rows_that_are_no_chunk_are_refused(made: str) -> None:
    with pytest.raises(ValueError, match=r"a chunk of actions is \(1, chunk, a\) in both"):
        adapt(built(Broken, made), states=ROWS)


def test_what_chunks_cannot_do_is_said() -> None:
    module = MODULES["a row a step"]()
    with pytest.raises(ValueError, match="one row of scores acts"):
        adapt(module, states=ROWS, link="scores")
    policy = adapt(module, states=ROWS)
    with pytest.raises(ValueError, match=r"shape \(2, 2\); expected \(1, 4, 2\) or \(4, 2\)"):
        policy.update(ROWS[0], np.zeros((2, A)))
    with pytest.raises(ValueError, match="needs a Box with one axis"):
        policy.set_fallback(Fallback(lambda rows: np.zeros((len(rows), C, A)), 1.0))
    with pytest.raises(ValueError, match="this policy says a chunk; call update"):
        policy.learn(Chunks(), 10, KalmanAdapter(lambda rows: np.zeros((len(rows), C, A))))


class Chunks(gym.Env[Any, Any]):
    """Takes whole chunks."""

    observation_space = spaces.Box(-np.inf, np.inf, (S,), np.float32)
    action_space = spaces.Box(-np.inf, np.inf, (C, A), np.float32)
