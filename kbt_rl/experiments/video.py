"""Policies on a plant as a gif or mp4, side by side from the same start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from kbt_rl.envs.inverted_pendulum import check_start
from kbt_rl.envs.plant import DT, InvertedPendulumParams, is_upright, rk4_step
from kbt_rl.experiments.simulation import Force
from kbt_rl.files import replacing

Frame = npt.NDArray[np.uint8]
#: The physics runs at 50 Hz; half of that looks smooth, and many viewers show no gif faster.
_STEPS_PER_FRAME = 2
_FRAME_SECONDS = DT * _STEPS_PER_FRAME
_GIF_COLORS, _SHARED_COLORS = 64, 256  # of a drawing with few colours
_DIVIDER = 4  # pixels between two panes


def render_policies(
    policies: Mapping[str, Force],
    params: InvertedPendulumParams,
    start: npt.ArrayLike,
    path: Path,
    seconds: float = 10.0,
) -> Path:
    """Drive the plant with each policy from the same start and write the pictures to one file.

    The file is replaced as a whole, so an interrupted call leaves what was there.

    Args:
        policies: By name, force in N for a state ``(4,)``; called once a step, in order, until the pole falls.
        params: The plant.
        start: First state, ``(4,)``.
        path: File to write; its ending chooses ``.gif`` or ``.mp4``.
        seconds: Length.

    Returns:
        ``path``.

    Raises:
        ValueError: The ending is neither, there is no policy, or no episode can start there.
        ImportError: pygame, or imageio for an mp4, is missing.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path} ends in {path.suffix!r}; choose .gif or .mp4")
    if not policies or not 0 < seconds < float("inf"):
        raise ValueError(f"{len(policies)} policies for {seconds} s; there is nothing to render")
    state = check_start({"state": start}, (4,))
    assert state is not None
    _need("pygame")
    runs = [_Run(name, force, params, state) for name, force in policies.items()]
    return write_video(_frames(runs, round(seconds / DT)), path, _FRAME_SECONDS)


def write_video(frames: Iterator[Frame], path: Path, frame_seconds: float, colourful: Frame | None = None) -> Path:
    """Write pictures as a gif or mp4, by the ending; the file is replaced as a whole.

    Args:
        frames: ``(H, W, 3)`` each.
        path: File to write.
        frame_seconds: How long a picture stands.
        colourful: A picture with the colours of all: a gif then has one palette, in which what stands still costs
            nothing. Without it each picture has its own.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if path.suffix == ".gif":
            _write_gif(frames, file, frame_seconds, colourful)
        else:
            _write_mp4(frames, file, frame_seconds)
    return path


def _need(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f'videos need {module.split(".")[0]}: pip install "kbt_rl[render]"') from error


class _Run:
    """One policy on its own copy of the plant; after a fall it stays where it fell."""

    def __init__(self, name: str, force: Force, params: InvertedPendulumParams, start: npt.NDArray[np.float64]) -> None:
        self._name, self._force, self._params = name, force, params
        self._state = start.copy()
        self._upright, self._command = True, 0.0

    def advance(self) -> None:
        if not self._upright:
            return
        wanted = np.asarray(self._force(self._state.astype(np.float32))).item()
        self._command = float(np.clip(wanted, -self._params.max_force, self._params.max_force))
        self._state = rk4_step(self._state, self._command, self._params)
        self._upright = bool(is_upright(self._state))

    def frame(self, time: float) -> Frame:
        from kbt_rl.envs.rendering import draw

        force = self._command if self._upright else 0.0
        return draw(self._state, force, self._params, time=time, fallen=not self._upright, title=self._name)


def _frames(runs: list[_Run], steps: int) -> Iterator[Frame]:
    """Pictures of all runs side by side, ``(H, W, 3)``, with a progress bar."""
    with Progress(transient=True) as bar:
        for step in bar.track(range(steps), description="rendering"):
            if step % _STEPS_PER_FRAME == 0:
                yield _side_by_side([run.frame(step * DT) for run in runs])
            for run in runs:
                run.advance()


def _side_by_side(panes: list[Frame]) -> Frame:
    """Joined at white dividers that the panes give up pixels for, as video formats want multiples of 16."""
    for pane in panes[1:]:
        pane[:, :_DIVIDER] = 255
    return np.concatenate(panes, axis=1)


def _write_gif(frames: Iterator[Frame], file: BinaryIO, frame_seconds: float, colourful: Frame | None) -> None:
    """By Pillow; an octree finds the colours of each frame in a quarter of the time and for half of the size."""
    from PIL import Image

    octree, plain = Image.Quantize.FASTOCTREE, Image.Dither.NONE
    shared = None if colourful is None else Image.fromarray(colourful).quantize(_SHARED_COLORS)

    def few_colors(frame: Frame) -> Image.Image:
        image = Image.fromarray(frame)
        if shared is not None:
            return image.quantize(palette=shared, dither=plain)
        return image.quantize(_GIF_COLORS, method=octree, dither=plain)

    images = map(few_colors, frames)
    first = next(images)
    first.save(file, "GIF", save_all=True, append_images=images, duration=round(1e3 * frame_seconds), loop=0)


def _write_mp4(frames: Iterator[Frame], file: BinaryIO, frame_seconds: float) -> None:
    imageio = _need("imageio.v2")
    _need("imageio_ffmpeg")
    with imageio.get_writer(file, format=".mp4", fps=1.0 / frame_seconds) as writer:
        for frame in frames:
            writer.append_data(frame)
