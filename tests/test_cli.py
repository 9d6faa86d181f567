"""The command line: what it writes, and what it says when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kbt_rl.cli import main

COMMANDS = ["reproduce", "tune", "pretrain", "adapt", "evaluate", "render"]
STUDIES = ["rescue", "change", "noise", "no-oracle", "discrete", "trust", "prior"]


@pytest.mark.parametrize("command", COMMANDS + STUDIES)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--seed" in text or "--model" in text
    assert len(text.splitlines()) > 8


def test_a_missing_model_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", str(tmp_path / "none.zip")]) == 2
    assert "kbt-rl pretrain" in capsys.readouterr().out


def test_the_expert_is_evaluated_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--episodes", "5"]) == 0
    assert "success 1.00, 0 falls, regret 0.000" in capsys.readouterr().out


def test_quick_and_full_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--quick", "--full", "--out", str(tmp_path)]) == 2
    assert "exclude each other" in capsys.readouterr().out


@pytest.mark.slow
def test_pretrain_adapt_evaluate_is_one_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapted = tmp_path / "model.zip", tmp_path / "adapted.zip"
    assert main(["pretrain", "--model", str(model), "--steps", "800", "--seed", "0"]) == 0
    arguments = ["--model", str(model), "--out", str(adapted), "--labels", "30", "--eval-every", "100"]
    assert main(["adapt", *arguments, "--tensorboard", str(tmp_path / "runs")]) == 0
    assert "30 labels used" in capsys.readouterr().out
    assert main(["evaluate", "--model", str(model), "--episodes", "10"]) == 0
    assert "success 0.00" in capsys.readouterr().out
    assert main(["evaluate", "--model", str(adapted), "--episodes", "10"]) == 0
    assert "success 0.00" not in capsys.readouterr().out
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))
