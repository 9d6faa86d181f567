"""Pictures as a gif or mp4, with captions that stay legible in a small one. Needs the extra ``render``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from kbt_rl.files import replacing

Frame = npt.NDArray[np.uint8]
ENDINGS = (".gif", ".mp4")
_GIF_COLORS, _SHARED_COLORS = 64, 256  # of a drawing with few colours
_INK = (43, 47, 54)


def check_video(path: Path) -> None:
    """Raise an error if a video could not be written to ``path``, before anything is run for it.

    Raises:
        ValueError: The ending is neither ``.gif`` nor ``.mp4``.
        ImportError: A package is missing.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path} ends in {path.suffix!r}; choose .gif or .mp4")
    for module in ("pygame", "PIL", *(("imageio.v2", "imageio_ffmpeg") if path.suffix == ".mp4" else ())):
        _need(module)


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

    Raises:
        ValueError: The ending is neither ``.gif`` nor ``.mp4``.
        ImportError: A package is missing.
    """
    check_video(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if path.suffix == ".gif":
            _write_gif(frames, file, frame_seconds, colourful)
        else:
            _write_mp4(frames, file, frame_seconds)
    return path


def caption(text: str, width: int, height: int = 32) -> Frame:
    """A line of text as a picture ``(height, width, 3)``, to be put above another."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height), "white")
    font = ImageFont.load_default(size=0.6 * height)
    ImageDraw.Draw(image).text((0.3 * height, 0.1 * height), text, fill=_INK, font=font)
    return np.asarray(image)


def _need(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f'videos need {module.split(".")[0]}: pip install "kbt_rl[render]"') from error


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
    with imageio.get_writer(file, format=".mp4", fps=1.0 / frame_seconds) as writer:
        for frame in frames:
            writer.append_data(frame)
