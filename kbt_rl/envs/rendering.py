"""Pictures of the inverted pendulum, by pygame, which is imported when the first one is drawn.

:func:`draw` needs no environment: videos that show two plants side by side join two of its frames.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kbt_rl.envs.plant import FloatArray, InvertedPendulumParams

WIDTH, HEIGHT = 800, 480
PIXELS_PER_METRE = 34
"""Fixed, so that a rod of 10 m fits into the picture and one of 1 m is seen to be a tenth of it."""

_OVERSAMPLING = 2  # drawn larger and smoothed down: lines and circles of pygame are jagged
_GROUND = 405  # from the top, pixels
_PIXELS_PER_NEWTON = 1.2

_SKY = (247, 249, 251)
_GRID = (232, 236, 240)
_EARTH = (226, 221, 212)
_INK = (45, 52, 62)
_FAINT = (128, 136, 146)
_CART = (70, 96, 128)
_ROD = (196, 140, 84)
_FORCE = (214, 84, 70)
_SUCCESS = (58, 146, 96)
_FAILURE = (190, 62, 58)


def draw(
    state: FloatArray,
    force: float,
    params: InvertedPendulumParams,
    *,
    time: float | None = None,
    fallen: bool | None = None,
    title: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Draw a cart-pole to scale; the camera follows the cart.

    Args:
        state: Position (m), velocity (m/s), angle (rad), angular velocity (rad/s), ``(4,)``.
        force: Force on the cart, N.
        params: The plant; the rod has its true length, the disc at its centre of mass grows with its mass.
        time: Seconds since the start of the episode, or None to leave it out.
        fallen: Whether the episode has failed; None to tell from the angle alone.
        title: A line above the parameters, such as the name of a policy.

    Returns:
        The picture, ``(480, 800, 3)``.
    """
    from kbt_rl.envs.plant import is_settled, is_upright

    state = np.asarray(state, dtype=np.float64)
    failed = not is_upright(state) if fallen is None else fallen
    canvas = _Canvas()
    _draw_world(canvas, camera=float(state[0]))
    accent = _FAILURE if failed else _SUCCESS if is_settled(state) else None
    _draw_cart_pole(canvas, float(state[2]), params, outline=accent)
    _draw_force(canvas, force)
    _draw_text(canvas, state, force, params, time, title)
    if accent is not None:
        canvas.badge("fallen" if failed else "settled", accent)
    return canvas.pixels()


class Window:
    """A window on the screen that shows frames at a given rate."""

    def __init__(self, caption: str, fps: int) -> None:
        self._pygame = _import_pygame()
        self._fps = fps
        self._pygame.display.init()
        self._pygame.display.set_caption(caption)
        self._screen = self._pygame.display.set_mode((WIDTH, HEIGHT))
        self._clock = self._pygame.time.Clock()

    def show(self, frame: npt.NDArray[np.uint8]) -> None:
        """Show a frame, ``(480, 800, 3)``, and wait until it is due."""
        self._pygame.surfarray.blit_array(self._screen, frame.swapaxes(0, 1))
        self._pygame.event.pump()
        self._pygame.display.flip()
        self._clock.tick(self._fps)

    def close(self) -> None:
        """Close the window."""
        self._pygame.display.quit()


def _import_pygame() -> Any:
    try:
        return importlib.import_module("pygame")
    except ImportError as error:
        raise gym.error.DependencyNotInstalled(
            'rendering needs pygame, which is not installed: run pip install "kbt_rl[render]"'
        ) from error


class _Canvas:
    """A surface that is drawn on in the pixels of the final picture, at a multiple of its resolution."""

    def __init__(self) -> None:
        self._pygame = _import_pygame()
        self._surface = self._pygame.Surface((WIDTH * _OVERSAMPLING, HEIGHT * _OVERSAMPLING))
        self._surface.fill(_SKY)

    def rectangle(self, x: float, y: float, width: float, height: float, color: Any, radius: float = 0) -> None:
        box = [round(value * _OVERSAMPLING) for value in (x, y, width, height)]
        self._pygame.draw.rect(self._surface, color, box, border_radius=round(radius * _OVERSAMPLING))

    def polygon(self, points: list[tuple[float, float]], color: Any) -> None:
        self._pygame.draw.polygon(self._surface, color, [(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in points])

    def disc(self, center: tuple[float, float], radius: float, color: Any, **quadrants: bool) -> None:
        scaled = [value * _OVERSAMPLING for value in center]
        self._pygame.draw.circle(self._surface, color, scaled, radius * _OVERSAMPLING, **quadrants)

    def bar(self, start: tuple[float, float], end: tuple[float, float], thickness: float, color: Any) -> None:
        """Draw a straight bar with round ends."""
        along = np.subtract(end, start) / max(math.dist(start, end), 1e-9)
        side = np.array([-along[1], along[0]]) * thickness / 2
        corners = [np.add(start, side), np.add(end, side), np.subtract(end, side), np.subtract(start, side)]
        self.polygon([(float(x), float(y)) for x, y in corners], color)
        self.disc(start, thickness / 2, color)
        self.disc(end, thickness / 2, color)

    def text(self, words: str, x: float, y: float, color: Any, size: int = 16, align: str = "left") -> None:
        image = _font(size * _OVERSAMPLING).render(words, True, color)
        shift = {"left": 0.0, "center": 0.5, "right": 1.0}[align] * image.get_width()
        self._surface.blit(image, (round(x * _OVERSAMPLING - shift), round(y * _OVERSAMPLING)))

    def badge(self, words: str, color: Any) -> None:
        """Tell the outcome at the bottom left, where no rod comes."""
        self.rectangle(20, HEIGHT - 38, 96, 26, color, radius=13)
        self.text(words, 68, HEIGHT - 33, _SKY, align="center")

    def pixels(self) -> npt.NDArray[np.uint8]:
        smooth = self._pygame.transform.smoothscale(self._surface, (WIDTH, HEIGHT))
        data = self._pygame.image.tobytes(smooth, "RGB")  # several times as fast as surfarray, which transposes
        return np.array(np.frombuffer(data, dtype=np.uint8)).reshape(HEIGHT, WIDTH, 3)


@functools.lru_cache(maxsize=8)
def _font(size: int) -> Any:
    pygame = _import_pygame()
    pygame.font.init()
    return pygame.font.Font(None, round(1.25 * size))  # pygame counts the line height


def _draw_world(canvas: _Canvas, camera: float) -> None:
    """Draw a grid of metres, the ground with its ruler and the scale bar."""
    reach = WIDTH / 2 / PIXELS_PER_METRE
    metres = range(math.floor(camera - reach), math.ceil(camera + reach) + 1)
    for metre in metres:
        canvas.rectangle(_column(metre, camera), 64, 1, _GROUND - 64, _GRID)
    for height in range(1, 11):
        canvas.rectangle(0, _GROUND - height * PIXELS_PER_METRE, WIDTH, 1, _GRID)
    canvas.rectangle(0, _GROUND, WIDTH, HEIGHT - _GROUND, _EARTH)
    canvas.rectangle(0, _GROUND, WIDTH, 2, _INK)
    for metre in metres:
        major = metre % 5 == 0
        canvas.rectangle(_column(metre, camera) - 0.5, _GROUND, 2 if metre == 0 else 1, 14 if major else 7, _INK)
        if major:
            canvas.text(f"{metre} m", _column(metre, camera), _GROUND + 17, _INK, size=13, align="center")
    _draw_scale_bar(canvas)


def _draw_scale_bar(canvas: _Canvas) -> None:
    left, top = WIDTH - 24 - 2 * PIXELS_PER_METRE, HEIGHT - 18
    canvas.rectangle(left, top, 2 * PIXELS_PER_METRE, 3, _INK)
    for end in (left, left + 2 * PIXELS_PER_METRE - 1):
        canvas.rectangle(end, top - 4, 1.5, 11, _INK)
    canvas.text("2 m", left - 8, top - 5, _INK, size=13, align="right")


def _column(metre: float, camera: float) -> float:
    return WIDTH / 2 + (metre - camera) * PIXELS_PER_METRE


def _draw_cart_pole(
    canvas: _Canvas, theta: float, params: InvertedPendulumParams, outline: tuple[int, int, int] | None
) -> None:
    width, height, wheel = 44 * params.cart_mass ** (1 / 3), 18 * params.cart_mass ** (1 / 3), 5.0
    hinge = (WIDTH / 2, _GROUND - wheel - height)
    body = (hinge[0] - width / 2, hinge[1], width, height)
    canvas.rectangle(*body, outline or _CART, radius=4)
    for side in (-0.3, 0.3):
        canvas.disc((WIDTH / 2 + side * width, _GROUND - wheel), wheel, _INK)

    middle, tip = (
        (
            hinge[0] + metres * PIXELS_PER_METRE * math.sin(theta),
            hinge[1] - metres * PIXELS_PER_METRE * math.cos(theta),
        )
        for metres in (params.pole_half_length, params.pole_length)
    )
    canvas.bar(hinge, tip, 6, _ROD)
    canvas.disc(hinge, 4, _INK)
    _draw_center_of_mass(canvas, middle, radius=12 * params.pole_mass ** (1 / 3))


def _draw_center_of_mass(canvas: _Canvas, center: tuple[float, float], radius: float) -> None:
    """Draw the quartered disc of engineering drawings; its volume as a ball is proportional to the mass."""
    canvas.disc(center, radius + 1, _INK)
    canvas.disc(center, radius, _SKY)
    canvas.disc(center, radius, _INK, draw_top_right=True, draw_bottom_left=True)


def _draw_force(canvas: _Canvas, force: float) -> None:
    """Draw an arrow beside the cart, on the side that the force pushes to."""
    length = abs(force) * _PIXELS_PER_NEWTON
    if length < 0.5:
        return
    sign, y, start = math.copysign(1, force), _GROUND - 14, 34
    head = min(length, 9.0)

    def at(distance: float) -> float:
        return WIDTH / 2 + sign * (start + distance)

    if length > head:
        canvas.bar((at(0), y), (at(length - head), y), 4, _FORCE)
    half = 0.75 * head
    canvas.polygon([(at(length - head), y - half), (at(length), y), (at(length - head), y + half)], _FORCE)


def _draw_text(
    canvas: _Canvas,
    state: FloatArray,
    force: float,
    params: InvertedPendulumParams,
    time: float | None,
    title: str | None,
) -> None:
    plant = f"cart {params.cart_mass:g} kg, pole {params.pole_mass:g} kg, {params.pole_length:g} m long"
    for row, words in enumerate(words for words in (title, plant) if words is not None):
        canvas.text(words, 20, 14 + 22 * row, _INK if row == 0 else _FAINT)
    clock = "" if time is None else f"{time:5.2f} s"
    canvas.text(clock, WIDTH - 20, 14, _INK, align="right")
    canvas.text(
        f"angle {math.degrees(float(state[2])):+.1f} deg    force {force:+.1f} N", WIDTH - 20, 36, _FAINT, align="right"
    )
