"""The examples run, in sizes that take seconds."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from kbt_rl import KBT
from kbt_rl.agents.behaviour_cloning import PretrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = PretrainConfig(samples=2_000, steps=300)


def main_of(name: str) -> Any:
    """``main`` of an example; importing it must run nothing."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "adapt_pendulum",
        "fallback",
        "longer_context",
        "robot_loop",
    }


def test_adapt_pendulum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = main_of("adapt_pendulum")(
        labels=100, episodes=8, pretraining=SMALL, log_folder=str(tmp_path / "runs")
    )
    assert before == 0.0
    assert after > 0.8
    assert f"{before:.2f} before, {after:.2f} after 100 labels" in capsys.readouterr().out
    assert KBT.load(tmp_path / "runs" / "adapted").labels_used == 100
    assert list((tmp_path / "runs").glob("KBT_1/events.out.tfevents*"))


def test_robot_loop(capsys: pytest.CaptureFixture[str]) -> None:
    model = main_of("robot_loop")(steps=300, every=2, pretraining=SMALL)
    assert model.labels_used == 150
    said = capsys.readouterr().out
    assert "150 labels in 300 steps" in said
    assert abs(float(said.split("the pole is ")[1].split()[0])) < 3.0


def test_longer_context(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = main_of("longer_context")(context_length=3, steps=200, episodes=2, pretraining=SMALL)
    assert 1 <= before <= 500
    assert 1 <= after <= 500
    assert "after 40 labels" in capsys.readouterr().out


def test_fallback(capsys: pytest.CaptureFixture[str]) -> None:
    shares = main_of("fallback")(seconds=4, pretraining=SMALL)
    assert len(shares) == 4
    assert shares[0] > 0.3
    assert shares[-1] < 0.1
    said = capsys.readouterr().out
    assert "second 1: the controller chose" in said
    assert "the pole stands" in said
