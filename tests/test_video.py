"""Videos: real files of the right length, the policies side by side, and clear errors before anything is written."""

from __future__ import annotations

import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # before pygame is imported

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from kbt_rl.envs import NOMINAL, SHIFTED, rendering
from kbt_rl.experiments import video
from kbt_rl.experiments.simulation import expert_force
from kbt_rl.experiments.video import render_policies

START = np.array([0.5, 0.1, 0.1, 0.0])
EXPERT = {"expert": expert_force(SHIFTED)}
BOTH = {"pre-trained": expert_force(NOMINAL), **EXPERT}


@pytest.fixture(autouse=True)
def _pygame() -> None:
    pytest.importorskip("pygame")


def gif_frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def test_a_gif_has_25_frames_a_second_and_a_pane_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "new" / "both.gif"
    assert render_policies(BOTH, SHIFTED, START, path, seconds=0.4) == path
    frames = gif_frames(path)
    assert len(frames) == 10
    assert frames[0].shape == (rendering.HEIGHT, 2 * rendering.WIDTH, 3)
    with Image.open(path) as image:
        assert image.info["duration"] == 40
        assert image.info["loop"] == 0
    left, right = np.split(frames[-1], 2, axis=1)
    assert (frames[0][:, 801:803] > 240).all()  # the divider, also over the ground
    assert np.abs(left.astype(int) - right).max() > 100
    assert [item.name for item in path.parent.iterdir()] == ["both.gif"]


def test_few_colours_still_show_the_drawing(tmp_path: Path) -> None:
    render_policies(EXPERT, SHIFTED, START, tmp_path / "a.gif", seconds=0.04)
    (frame,) = gif_frames(tmp_path / "a.gif")
    wanted = rendering.draw(START, 0.0, SHIFTED, time=0.0, fallen=False, title="expert").astype(int)
    assert np.abs(frame - wanted).mean() < 4
    assert (np.abs(frame - wanted).max(axis=-1) > 60).mean() < 0.002


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio leaves the pipes it reads open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_mp4_shows_the_same_frames(tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    path = render_policies(BOTH, SHIFTED, START, tmp_path / "both.mp4", seconds=0.4)
    with imageio.get_reader(path) as reader:
        frames = [np.asarray(frame) for frame in reader]
        assert reader.get_meta_data()["fps"] == 25
    assert len(frames) == 10
    assert frames[0].shape == (rendering.HEIGHT, 2 * rendering.WIDTH, 3)
    with Image.open(render_policies(BOTH, SHIFTED, START, tmp_path / "both.gif", seconds=0.04)) as gif:
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - frames[0]).mean() < 5


def test_policies_are_asked_once_a_step_and_held_to_the_actuator(tmp_path: Path, monkeypatch: Any) -> None:
    asked, forces = [], []
    draw = rendering.draw
    monkeypatch.setattr(rendering, "draw", lambda *a, **k: (forces.append(a[1]), draw(*a, **k))[1])

    def pushy(state: np.ndarray) -> np.ndarray:
        asked.append(state)
        return np.array([1e6])

    render_policies({"pushy": pushy}, SHIFTED, START, tmp_path / "a.gif", seconds=0.12)
    assert len(asked) == 6
    assert all(state.shape == (4,) and state.dtype == np.float32 for state in asked)
    assert forces == [0.0, SHIFTED.max_force, SHIFTED.max_force]


def test_a_fallen_pole_stays_where_it_fell(tmp_path: Path) -> None:
    asked = []

    def idle(state: np.ndarray) -> float:
        asked.append(state)
        return 0.0

    path = render_policies({"idle": idle}, NOMINAL, [0, 0, 1.5, 4.0], tmp_path / "a.gif", seconds=0.4)
    assert len(asked) < 10
    frames = gif_frames(path)
    last = frames[-1].astype(int)
    assert (np.abs(last - rendering._FAILURE).max(axis=-1) < 12).sum() > 500  # the badge
    assert (np.abs(frames[0].astype(int) - rendering._FAILURE).max(axis=-1) < 12).sum() < 100


@pytest.mark.parametrize(
    ("policies", "start", "name", "seconds", "message"),
    [
        (EXPERT, START, "a.avi", 1.0, r"choose .gif or .mp4"),
        ({}, START, "a.gif", 1.0, "nothing to render"),
        (EXPERT, START, "a.gif", 0.0, "nothing to render"),
        (EXPERT, START, "a.gif", float("nan"), "nothing to render"),
        (EXPERT, START[:3], "a.gif", 1.0, "shape"),
        (EXPERT, [0, 0, 2.0, 0], "a.gif", 1.0, "upright"),
    ],
)
def test_what_cannot_be_rendered_is_refused(
    policies: Any, start: Any, name: str, seconds: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        render_policies(policies, SHIFTED, start, tmp_path / name, seconds=seconds)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("missing", "name"), [("pygame", "a.gif"), ("imageio.v2", "a.mp4")])
def test_a_missing_package_is_named_with_the_extra(missing: str, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    def absent(module: str) -> Any:
        if module == missing:
            raise ImportError(module)
        return importlib.import_module(module)

    monkeypatch.setattr(video, "import_module", absent)
    with pytest.raises(ImportError, match=r'pip install "kbt_rl\[render\]"'):
        render_policies(EXPERT, SHIFTED, START, tmp_path / name, seconds=0.1)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_fails_leaves_the_old_video(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(b"old")

    def broken(state: np.ndarray) -> float:
        raise RuntimeError("no force today")

    with pytest.raises(RuntimeError, match="no force today"):
        render_policies({"broken": broken}, SHIFTED, START, path, seconds=0.4)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.gif"]
