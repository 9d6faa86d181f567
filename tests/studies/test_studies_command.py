"""``python -m studies``: what it says, what it refuses before it runs, and that it continues."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from studies.__main__ import STUDIES, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name.replace("_", "-"), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--quick", "--full", "--seed", "--out", "--jobs", "--executor"):
        assert option in text


def test_the_list_of_studies_needs_no_torch() -> None:
    script = "import sys; from studies.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(name.replace("_", "-") in done.stdout for name in STUDIES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--jobs", "0"], "--jobs is 0; it must be at least 1"),
        (["--streams", "0"], "--streams is 0"),
        (["--policies", "0"], "--policies is 0"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["success", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_bad_folder_is_refused_before_anything_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["success", "--quick", "--out", str(tmp_path / "file"), "--models", str(tmp_path)]) == 2
    assert "file" in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_runs_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["start", "--quick", "--executor", "serial", "--out", str(tmp_path), "--models", str(tmp_path / "m")]
    assert main(arguments) == 0
    before = (tmp_path / "results.csv").read_text()
    assert "Head against the pre-trained layer" in (tmp_path / "tables.md").read_text()
    broken = next((tmp_path / "trials").glob("*.json"))
    broken.write_text("{}")
    assert main(arguments) == 2
    assert broken.name in capsys.readouterr().out.replace("\n", "")
    broken.unlink()
    assert main(arguments) == 0
    assert (tmp_path / "results.csv").read_text() == before
