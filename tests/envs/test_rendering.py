"""Pictures: they are made, they are to scale, and pygame stays optional."""

from __future__ import annotations

import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # before pygame is imported

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import kbt_rl
from kbt_rl.envs import NOMINAL, SHIFTED, InvertedPendulumEnv, rendering

IDS = ("kbt_rl/InvertedPendulum-v0", "kbt_rl/ShiftedInvertedPendulum-v0")
SHAPE = (rendering.HEIGHT, rendering.WIDTH, 3)


@pytest.fixture(autouse=True)
def _pygame() -> None:
    pytest.importorskip("pygame")


def pixels_of(frame: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns of the pixels of a colour, ``(n, 2)``."""
    return np.argwhere(np.abs(frame.astype(int) - color).max(axis=-1) <= 3)


def test_rod_is_drawn_to_scale() -> None:
    for params in (NOMINAL, SHIFTED, replace(NOMINAL, pole_half_length=2.0)):
        frame = rendering.draw(np.zeros(4), 0.0, params)
        rows = pixels_of(frame, rendering._ROD)[:, 0]
        hinge = rendering._GROUND - 5 - 18
        height = (hinge - rows.min()) / rendering.PIXELS_PER_METRE
        assert height == pytest.approx(params.pole_length, abs=0.15)


def test_rod_leans_to_the_side_of_the_angle() -> None:
    for angle in (-0.4, 0.4):
        frame = rendering.draw(np.array([0.0, 0.0, angle, 0.0]), 0.0, SHIFTED)
        top = pixels_of(frame, rendering._ROD)[0]
        expected = rendering.WIDTH / 2 + SHIFTED.pole_length * rendering.PIXELS_PER_METRE * np.sin(angle)
        assert top[1] == pytest.approx(expected, abs=6)


def test_camera_follows_the_cart() -> None:
    for position in (0.0, -123.4, 5000.0):
        frame = rendering.draw(np.array([position, 0.0, 0.3, 0.0]), 0.0, NOMINAL)
        columns = pixels_of(frame, rendering._CART)[:, 1]
        assert (columns.min() + columns.max()) / 2 == pytest.approx(rendering.WIDTH / 2, abs=2)


def test_arrow_points_along_the_force_and_grows_with_it() -> None:
    def extent(force: float) -> float:
        columns = pixels_of(rendering.draw(np.array([0, 0, 0.1, 0]), force, NOMINAL), rendering._FORCE)[:, 1]
        outermost = columns[np.argmax(np.abs(columns - rendering.WIDTH / 2))]
        return float(outermost - rendering.WIDTH / 2)

    assert 0 < extent(20.0) < extent(100.0)
    assert extent(-100.0) == pytest.approx(-extent(100.0), abs=2)
    no_force = rendering.draw(np.array([0, 0, 0.1, 0]), 0.0, NOMINAL)
    assert len(pixels_of(no_force, rendering._FORCE)) == 0


def test_outcome_is_shown() -> None:
    def counts(state: list[float], fallen: bool | None = None) -> tuple[bool, bool]:
        frame = rendering.draw(np.array(state), 0.0, NOMINAL, fallen=fallen)
        return len(pixels_of(frame, rendering._SUCCESS)) > 100, len(pixels_of(frame, rendering._FAILURE)) > 100

    assert counts([0.0, 0.0, 0.0, 0.0]) == (True, False)
    assert counts([0.0, 0.0, 0.5, 0.0]) == (False, False)
    assert counts([0.0, 0.0, 1.7, 0.0]) == (False, True)
    assert counts([0.0, 0.0, 0.0, 0.0], fallen=True) == (False, True)


def test_title_and_time_are_written() -> None:
    plain = rendering.draw(np.zeros(4), 0.0, NOMINAL)
    assert not np.array_equal(plain[:60, :400], rendering.draw(np.zeros(4), 0.0, NOMINAL, title="expert")[:60, :400])
    assert not np.array_equal(plain[:30, 500:], rendering.draw(np.zeros(4), 0.0, NOMINAL, time=3.0)[:30, 500:])


@pytest.mark.parametrize("env_id", IDS)
def test_rgb_array(env_id: str) -> None:
    env = gym.make(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert isinstance(first, np.ndarray)
    assert (first.shape, first.dtype) == (SHAPE, np.uint8)
    env.step(np.array([1.0], dtype=np.float32))
    second = env.render()
    assert not np.array_equal(first, second)
    assert not np.shares_memory(first, second)
    env.close()


def test_checker_passes_with_its_render_check() -> None:
    for mode in ("rgb_array", "human"):
        check_env(gym.make(IDS[0], render_mode=mode).unwrapped)


def test_human_mode_draws_by_itself_and_can_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[np.ndarray] = []
    monkeypatch.setattr(rendering.Window, "show", lambda self, frame: shown.append(frame))
    env = InvertedPendulumEnv(render_mode="human")
    env.reset(seed=0)
    env.step([0.5])
    assert [frame.shape for frame in shown] == [SHAPE, SHAPE]
    assert env.render() is None
    copy.deepcopy(env).close()
    env.close()
    env.close()


def test_window_shows_a_frame() -> None:
    import pygame

    frame = rendering.draw(np.zeros(4), 0.0, NOMINAL)
    window = rendering.Window("test", fps=1000)
    window.show(frame)
    np.testing.assert_array_equal(pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1), frame)
    window.close()
    assert not pygame.display.get_init()


def test_vector_form_draws_each_plant() -> None:
    envs = gym.make_vec(IDS[0], num_envs=2, render_mode="rgb_array", pole_half_length=[0.5, 5.0])
    envs.reset(options={"state": [0.0, 0.0, 0.1, 0.0]})
    frames = envs.render()
    assert frames is not None
    for frame, params in zip(frames, envs.unwrapped.params, strict=True):
        np.testing.assert_array_equal(frame, rendering.draw(np.array([0, 0, 0.1, 0]), 0.0, params, time=0.0))


def test_missing_pygame_is_named() -> None:
    code = """
import sys
sys.modules["pygame"] = None  # as if it were not installed
import gymnasium, kbt_rl
env = gymnasium.make("kbt_rl/InvertedPendulum-v0", render_mode="rgb_array")
env.reset(seed=0)
try:
    env.render()
except gymnasium.error.DependencyNotInstalled as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(kbt_rl.__file__).parents[1], check=True, capture_output=True, text=True
    )
    assert 'pip install "kbt_rl[render]"' in result.stdout
