"""The rescue as a video: the same falling pendulum under three learners, what KBT believes drawn live below.

The strip shows the force that KBT asks for, twice its standard deviation around it, and each label's innovation.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from kbt_rl.envs.plant import DT, SHIFTED, is_upright
from kbt_rl.experiments.config import PRETRAINING, tuned, warm_start_method
from kbt_rl.experiments.fleet import make_fleet
from kbt_rl.experiments.learners import pretrain, pretrained_path
from kbt_rl.experiments.plot_style import BLUE, INK, VERMILION, style
from kbt_rl.experiments.rescue import Labelling, RescueTrace, rescue
from kbt_rl.experiments.rescue_study import NOISE_FREE, PRETRAINED
from kbt_rl.experiments.simulation import starts
from kbt_rl.experiments.video import write_video

Frame = npt.NDArray[np.uint8]
_STRIP_HEIGHT, _STRIP_DPI = 240, 90  # pixels, and pixels an inch
_STEPS_PER_FRAME = 5  # ten pictures a second: the file stays below a megabyte
_PANE_STRIDE = 2  # every second pixel: three panes side by side are wide enough


def render_rescue(seed: int, labels: int, out: Path) -> Path:
    """Write ``rescue.gif``: pre-trained policy, warm start and KBT from the same start with the same labels."""
    model = pretrain(seed, PRETRAINING, pretrained_path(seed, PRETRAINING, out / "models"))
    initial, labelling = starts(seed, 1), Labelling("iid", labels)
    memory = min(10, labels)
    warm = warm_start_method(memory, tuned()["learning_rate"]["10"])
    traces = {}
    for method in (PRETRAINED, warm, NOISE_FREE):
        fleet = make_fleet(method, model, 1, SHIFTED)
        traces[method.name] = rescue(fleet, initial, labelling, seed, watch=method is NOISE_FREE)
    strip = _draw_strip(traces[NOISE_FREE.name], labelling, width=3 * 400)
    titles = {
        PRETRAINED.name: "pre-trained",
        warm.name: f"warm start, {labels} labels",
        NOISE_FREE.name: f"KBT, {labels} labels",
    }
    path = out / "rescue.gif"
    with Progress(transient=True) as bar:
        steps = range(0, len(traces[NOISE_FREE.name].forces), _STEPS_PER_FRAME)
        frames = (_frame(traces, titles, strip, step) for step in bar.track(steps, description="rendering"))
        colourful = np.concatenate([_frame(traces, titles, strip, step) for step in (steps[0], steps[-1])])
        return write_video(frames, path, DT * _STEPS_PER_FRAME, colourful)


def _frame(traces: dict[str, RescueTrace], titles: dict[str, str], strip: _Strip, step: int) -> Frame:
    """Three panes over the part of the strip that has happened."""
    from kbt_rl.envs.rendering import draw

    panes = []
    for name, trace in traces.items():
        state, force = trace.states[step, 0], float(trace.forces[step, 0])
        pane = draw(state, force, SHIFTED, time=step * DT, fallen=not bool(is_upright(state)), title=titles[name])
        panes.append(pane[::_PANE_STRIDE, ::_PANE_STRIDE])
    below = strip.picture.copy()
    now = strip.left + round((strip.right - strip.left) * step / len(trace.forces))
    below[strip.top : strip.bottom, now + 1 : strip.right] = 255
    return np.concatenate([np.concatenate(panes, axis=1), below])


class _Strip(NamedTuple):
    """The whole episode as a picture, and the box in it that time uncovers."""

    picture: Frame
    left: int
    right: int
    top: int
    bottom: int


def _draw_strip(trace: RescueTrace, labelling: Labelling, width: int) -> _Strip:
    """Force, band and innovations against time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    times = np.arange(len(trace.forces)) * DT
    force, deviation, innovation = trace.forces[:, 0], trace.deviation[:, 0], trace.innovation[:, 0]
    arrived = np.isfinite(innovation)
    reach = 1.2 * max(np.abs(force).max(), np.abs(innovation[arrived]).max(), 2 * deviation.max())
    with style():
        figure = Figure(figsize=(width / _STRIP_DPI, _STRIP_HEIGHT / _STRIP_DPI), dpi=_STRIP_DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        panel = figure.add_subplot()
        panel.axvspan(0, labelling.last_step * DT, color=VERMILION, alpha=0.1, linewidth=0, label="labels arrive")
        panel.fill_between(
            times, force - 2 * deviation, force + 2 * deviation, color=BLUE, alpha=0.3, linewidth=0,
            label="2 standard deviations of the mean",
        )  # fmt: skip
        panel.plot(times, force, color=INK, linewidth=1.4, label="force of KBT")
        panel.plot(times[arrived], innovation[arrived], "x", color=VERMILION, label="innovation of a label")
        panel.set(xlim=(0, times[-1]), ylim=(-reach, reach), xlabel="s", ylabel="N")
        figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=4)
        canvas.draw()
        box = panel.get_window_extent()
        picture: Frame = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    height = len(picture)
    return _Strip(picture, round(box.x0) + 1, round(box.x1), height - round(box.y1), height - round(box.y0) - 1)
