"""Policies on a plant as a gif or mp4, side by side from the same start."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from kbt_rl.envs.inverted_pendulum import DT, InvertedPendulumParams, is_upright, rk4_step
from kbt_rl.experiments.simulation import Force

#: Physics runs at 50 Hz; a gif cannot show more than that, and half of it is smooth.
_STEPS_PER_FRAME = 2


def render_policies(
    policies: Mapping[str, Force],
    params: InvertedPendulumParams,
    start: npt.NDArray[np.float64],
    path: Path,
    seconds: float = 10.0,
) -> Path:
    """Drive the plant with each policy from the same start and write the pictures to one file.

    Args:
        policies: By name, forces in N for a state ``(4,)``.
        params: The plant.
        start: First state, ``(4,)``.
        path: File to write; its ending chooses ``.gif`` or ``.mp4``.
        seconds: Length.

    Raises:
        ValueError: The ending is neither, or there is no policy.
        ImportError: imageio or pygame is missing.
    """
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"{path} ends in {path.suffix!r}; choose .gif or .mp4")
    if not policies or not seconds > 0:
        raise ValueError(f"{len(policies)} policies for {seconds} s; there is nothing to render")
    try:
        imageio: Any = import_module("imageio.v2")
    except ImportError as error:
        raise ImportError('videos need imageio and pygame: pip install "kbt_rl[render]"') from error
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}"[: -len(path.suffix)] + f".part{path.suffix}")
    rate = 1.0 / (DT * _STEPS_PER_FRAME)
    timing: dict[str, Any] = (
        {"duration": 1e3 / rate, "loop": 0} if path.suffix == ".gif" else {"fps": rate, "macro_block_size": 8}
    )
    runs = [_Run(name, force, params, start) for name, force in policies.items()]
    steps = round(seconds / DT)
    with imageio.get_writer(beside, **timing) as writer, Progress(transient=True) as bar:
        task = bar.add_task("rendering", total=steps)
        for step in range(steps):
            if step % _STEPS_PER_FRAME == 0:
                writer.append_data(np.concatenate([run.frame(step * DT) for run in runs], axis=1))
            for run in runs:
                run.advance()
            bar.advance(task)
    beside.replace(path)
    return path


class _Run:
    """One policy on its own copy of the plant; after a fall it stays where it fell."""

    def __init__(self, name: str, force: Force, params: InvertedPendulumParams, start: npt.NDArray[np.float64]) -> None:
        self._name, self._force, self._params = name, force, params
        self._state = np.array(start, dtype=np.float64)
        self._upright, self._command = True, 0.0

    def advance(self) -> None:
        if not self._upright:
            return
        wanted = float(self._force(self._state.astype(np.float32)))
        self._command = float(np.clip(wanted, -self._params.max_force, self._params.max_force))
        self._state = rk4_step(self._state, self._command, self._params)
        self._upright = bool(is_upright(self._state))

    def frame(self, time: float) -> npt.NDArray[np.uint8]:
        from kbt_rl.envs.rendering import draw

        fallen = not self._upright
        command = 0.0 if fallen else self._command
        return draw(self._state, command, self._params, time=time, fallen=fallen, title=self._name)
