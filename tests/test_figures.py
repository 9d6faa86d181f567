"""Figures are real pictures, drawn from the tables alone, without a trace in matplotlib's global state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fabricated import KBT_SUCCESS, adapt, everything, timing
from matplotlib import rcParams
from matplotlib.colors import to_rgb
from PIL import Image

from kbt_rl.experiments import figures, figures_more
from kbt_rl.experiments.config import KBT_METHOD, MEMORIES, warm_start_method
from kbt_rl.experiments.figures import draw_figures
from kbt_rl.experiments.plot_style import VERMILION, method_styles, style
from kbt_rl.experiments.tables import Tables, collect, write_tables

NAMES = ("figure3", "figure4", "figure5", "initialisation", "softmax", "correlated")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def tables() -> Tables:
    return collect(everything())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, tables: Tables) -> Path:
    out = tmp_path_factory.mktemp("figures")
    write_tables(tables, out)
    before = dict(rcParams)
    assert [path.name for path in draw_figures(out)] == [f"{name}.png" for name in NAMES]
    assert dict(rcParams) == before
    return out


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_a_picture_with_something_on_it(name: str, drawn: Path) -> None:
    picture = pixels(drawn / f"{name}.png")
    assert picture.shape[1] == 1300
    assert 350 < picture.shape[0] < 1000
    ink = (picture < 200).any(axis=-1)
    assert 0.01 < ink.mean() < 0.7
    assert (picture[[0, -1]] > 250).all()  # nothing is cut off at the top and the bottom
    assert not list(drawn.glob(".*"))


def test_kbt_is_drawn_in_its_colour(drawn: Path) -> None:
    color = 255 * np.array(to_rgb(VERMILION))
    for name in ("figure3", "figure4", "correlated"):
        assert (np.abs(pixels(drawn / f"{name}.png") - color).max(axis=-1) < 4).sum() > 300


def test_only_tables_that_are_there_are_drawn(tmp_path: Path) -> None:
    write_tables(collect([timing(KBT_METHOD, 1e-3)]), tmp_path)
    assert [path.name for path in draw_figures(tmp_path)] == ["figure4.png"]
    with pytest.raises(FileNotFoundError, match="run an experiment"):
        draw_figures(tmp_path / "nothing")


def test_one_trial_with_few_samples_and_negative_regret_can_be_drawn(tmp_path: Path) -> None:
    results = [adapt(KBT_METHOD, KBT_SUCCESS[:3], (99.0, 0.0, -0.01))]
    write_tables(collect(results), tmp_path)
    (path,) = draw_figures(tmp_path)
    assert path.stat().st_size > 10_000


def test_figure_3_shows_the_means(tables: Tables) -> None:
    with style():
        figure = figures.draw_figure3(tables)
    success, regret = figure.axes
    lines = {line.get_label(): line for line in success.lines}
    np.testing.assert_allclose(lines["KBT"].get_ydata(), [0.0, 0.89, 0.99, 1.0, 1.0, 1.0])
    assert list(lines["KBT"].get_xdata()) == [0, 10, 20, 30, 50, 100]
    crosses = lines["KBT as printed: trials lost to NaN (4 of 4)"]
    assert list(crosses.get_xdata()) == [30]
    assert regret.get_yscale() == "log"
    assert "expert" not in {line.get_label() for line in regret.lines}
    assert "linear floor" in {line.get_label() for line in regret.lines}
    assert regret.get_ylim()[0] == pytest.approx(0.01)


def test_figure_3_gives_the_first_50_samples_half_of_the_axis(tables: Tables) -> None:
    with style():
        axes = figures.draw_figure3(tables).axes[0]
    axes.figure.canvas.draw()
    left, middle, right = (axes.transData.transform((samples, 0.0))[0] for samples in (0, 50, 100))
    assert middle - left == pytest.approx(right - middle)


def test_figure_4_has_two_bars_a_method(tables: Tables) -> None:
    with style():
        (axes,) = figures.draw_figure4(tables).axes
    widths = [bar.get_width() for container in axes.containers for bar in container if bar.get_width() > 0]
    np.testing.assert_allclose(widths, [0.2, 100.0, 10.0, 1.2, 101.0, 11.0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["KBT", "warm start 10", "warm start 100"]
    assert axes.get_xscale() == "log"


def test_figure_5_has_a_curve_for_each_rule_and_level(tables: Tables) -> None:
    with style():
        variances, errors, coverage = figures.draw_figure5(tables).axes
    curves = [line for line in variances.lines if len(line.get_xdata()) == 3]
    assert len(curves) == 8
    assert sum(line.get_linestyle() == "-" for line in curves) == 4
    assert len([bar for container in errors.containers for bar in container]) == 8
    assert "Coverage" in coverage.get_title(loc="left")


def test_correlated_has_a_panel_for_each_method(tables: Tables) -> None:
    with style():
        (axes,) = figures_more.draw_correlated(tables).axes
    solid, dashed = axes.lines[:2]
    np.testing.assert_allclose(solid.get_ydata(), KBT_SUCCESS)
    assert solid.get_linestyle() == "-" != dashed.get_linestyle()
    assert "3.0 falls a run" in axes.get_xlabel()


def test_a_warm_start_has_the_same_shade_in_every_figure_and_more_memory_a_darker_one() -> None:
    names = [warm_start_method(memory, 1e-3).name for memory in MEMORIES]
    styles = method_styles(names)
    luminance = [np.dot(styles[name].color[:3], (0.2126, 0.7152, 0.0722)) for name in names]
    assert all(np.diff(luminance) < -0.02)
    assert method_styles(["KBT", "warm start 50"])["warm start 50"] == styles["warm start 50"]


def test_the_legend_begins_with_kbt_and_knows_new_methods() -> None:
    order = list(method_styles(["expert", "warm start 100", "my method", "warm start 20", "KBT"]))
    assert order == ["KBT", "my method", "warm start 20", "warm start 100", "expert"]


def test_the_numbers_do_not_need_matplotlib() -> None:
    code = (
        "import sys, kbt_rl.experiments.tables, kbt_rl.experiments.figures\n"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'matplotlib.figure' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
