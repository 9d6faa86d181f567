"""The rescue as a film: the same falling pendulum under three learners, what KBT believes drawn live below.

The strip shows the force that KBT asks for, twice its standard deviation around it, and each label's innovation. Needs
the extra ``render``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kbt_rl.envs import video
from kbt_rl.envs.plant import DT, SHIFTED, is_upright
from studies import plots
from studies.cloned import Setting
from studies.fleet import Fleet
from studies.methods import PRETRAINED, TWO_LAYERS, warm_start
from studies.rescue import NOISE_FREE, RescueTrial, rescue
from studies.table import Row, Table
from studies.trial import Size

Frame = npt.NDArray[np.uint8]
LABELS = 8
STATE = ("x, m", "x_dot, m/s", "theta, rad", "theta_dot, rad/s")
FORCE, DEVIATION, INNOVATION = "force, N", "standard deviation, N", "innovation, N"
_STEPS_PER_FRAME = 5  # ten pictures a second: the file stays below a megabyte
_PANE_STRIDE = 2  # every second pixel: three panes side by side are wide enough
_STRIP_HEIGHT, _STRIP_DPI, _WIDTH = 240, 90, 1200  # pixels, pixels an inch, pixels
_CAPTION = 30  # pixels


def plan(size: Size) -> list[RescueTrial]:
    """Pre-trained policy, warm start and KBT from the same start with the same labels."""
    missing = [name for name in ("pygame", "PIL") if find_spec(name) is None]
    if missing:
        raise ImportError(f'the film needs {", ".join(missing)}: pip install "kbt_rl[render]"')
    warm = warm_start(LABELS, warm_start(10).settings["learning_rate"])
    methods = (PRETRAINED, replace(warm, name="warm start"), NOISE_FREE)
    options = {"study": "film", "states": "iid", "budget": LABELS, "starts": 1}
    return size.trials(RescueTrial, methods, policies=1, streams=1, **options)


def run(trial: RescueTrial, setting: Setting) -> Iterator[Row]:
    """State and force at every step; of KBT also its standard deviation, and the innovation of each label."""
    task = setting.task
    fleet = Fleet(trial.method, setting, 1)
    policy: Any = fleet.learners[0].policy
    for step, seen in enumerate(rescue(fleet, task, trial)):
        for name, value in zip(STATE, seen.observations[0], strict=True):
            yield trial.row(step, name, value)
        yield trial.row(step, FORCE, task.max_force * float(seen.actions[0, 0]))
        if trial.method.kind == "kbt":
            deviation = policy.predict_moments(seen.observations).epistemic[0, 0, 0] ** 0.5
            yield trial.row(step, DEVIATION, task.max_force * deviation)
            if seen.asked is not None and seen.labels is not None:
                innovation = seen.labels - policy.predict_moments(seen.asked).mean
                yield trial.row(step, INNOVATION, task.max_force * float(innovation[0, 0]))


class Film(NamedTuple):
    """The three traces as one gif."""

    table: Table

    def write(self, out: Path) -> Path:
        """Write ``rescue.gif``; the file is replaced as a whole."""
        traces = self.table.by("method")
        panes = {caption(name): Trace.of(rows) for name, rows in traces.items()}
        with plots.style():
            below = strip(traces[TWO_LAYERS.name])
            steps = range(0, max(len(trace.states) for trace in panes.values()), _STEPS_PER_FRAME)
            frames = [np.concatenate([_row(panes, step), below(step)]) for step in steps]
        colourful = np.concatenate([frames[0], frames[-1]])
        return video.write_video(iter(frames), out / "rescue.gif", DT * _STEPS_PER_FRAME, colourful)


def report(table: Table) -> Iterator[Film]:
    """The film."""
    yield Film(table)


def caption(method: str) -> str:
    """What a pane says above the picture."""
    if method == PRETRAINED.name:
        return "pre-trained policy, no labels"
    return f"{'KBT' if method == TWO_LAYERS.name else method}, {LABELS} labels in {LABELS * DT:g} s"


class Trace(NamedTuple):
    """States ``(T, 4)`` and forces ``(T,)`` until the end or the fall."""

    states: npt.NDArray[np.float64]
    forces: npt.NDArray[np.float64]

    @classmethod
    def of(cls, table: Table) -> Trace:
        """The trace in the rows of one method."""
        states = np.stack([table.where(metric=name).values() for name in STATE], axis=1)
        return cls(states, np.array(table.where(metric=FORCE).values()))


def _row(panes: dict[str, Trace], step: int) -> Frame:
    """The pendulums side by side, each with its caption."""
    from kbt_rl.envs.rendering import draw

    row = []
    for words, (states, forces) in panes.items():
        at = min(step, len(states) - 1)
        fallen = step >= len(states) or not bool(is_upright(states[at]))
        picture = draw(states[at], 0.0 if fallen else float(forces[at]), SHIFTED, fallen=fallen)
        above = video.caption(words, picture.shape[1] // _PANE_STRIDE, _CAPTION)
        row.append(np.concatenate([above, picture[::_PANE_STRIDE, ::_PANE_STRIDE]]))
    return np.concatenate(row, axis=1)


def strip(table: Table) -> Callable[[int], Frame]:
    """What draws force, band and innovations up to a step: a white patch covers what is still to come."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    force, deviation = (np.array(table.where(metric=metric).values()) for metric in (FORCE, DEVIATION))
    labels = table.where(metric=INNOVATION)
    times = np.arange(len(force)) * DT
    reach = 1.2 * max(np.abs(force).max(), 2 * deviation.max(), *np.abs(labels.values()))
    figure = Figure(figsize=(_WIDTH / _STRIP_DPI, _STRIP_HEIGHT / _STRIP_DPI), dpi=_STRIP_DPI, layout="constrained")
    canvas, panel = FigureCanvasAgg(figure), figure.add_subplot()
    panel.axvspan(0, LABELS * DT, color=plots.VERMILION, alpha=0.15, linewidth=0, label="labels arrive")
    panel.fill_between(times, force - 2 * deviation, force + 2 * deviation, color=plots.BLUE, alpha=0.3,
                       linewidth=0, label="2 standard deviations of the mean")  # fmt: skip
    panel.plot(times, force, color=plots.INK, linewidth=1.4, label="force of KBT")
    places = [row.labels * DT for row in labels]
    panel.plot(places, labels.values(), "x", color=plots.VERMILION, label="innovation of a label")
    panel.set(xlim=(0, times[-1]), ylim=(-reach, reach), xlabel="s", ylabel="N")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    cover = Rectangle((0, -reach), times[-1], 2 * reach, color="white", linewidth=0, zorder=2.4)  # below the axes
    panel.add_patch(cover)

    def until(step: int) -> Frame:
        cover.set_x(step * DT)
        canvas.draw()
        picture: Frame = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        return picture

    return until
