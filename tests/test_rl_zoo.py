"""The example for RL Zoo: its hyperparameter file is what RL Zoo reads, and trains a model that ``enjoy`` loads."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from kbt_rl import KBT

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "rl_zoo"
HYPERPARAMETERS: dict[str, Any] = yaml.safe_load((FOLDER / "kbt.yml").read_text(encoding="utf-8"))
SMALL = {"samples": 500, "steps": 60}
# What RL Zoo takes out before it makes the model.
OF_THE_ZOO = {"n_timesteps", "n_envs", "callback"}


@pytest.fixture
def callback(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("kbt_zoo").TaughtByLQR
    del sys.modules["kbt_zoo"]


@pytest.mark.slow
@pytest.mark.parametrize("env_id", HYPERPARAMETERS)
def test_every_entry_makes_and_teaches_a_model(env_id: str, callback: Any) -> None:
    entry = dict(HYPERPARAMETERS[env_id])
    ((path, arguments),) = entry["callback"][0].items()
    assert path == "kbt_zoo.TaughtByLQR"
    settings = {name: value for name, value in entry.items() if name not in OF_THE_ZOO}
    assert settings.keys() <= inspect.signature(KBT).parameters.keys()
    model = KBT(env=gym.make(env_id), seed=0, **settings)
    model.learn(20, callback(**arguments, pretraining=SMALL))
    assert model.labels_used == 20
    before = model.pretrain_info
    model.learn(10, callback(**arguments, budget=5), reset_num_timesteps=False)
    assert model.pretrain_info is before  # a model that knows something is not pre-trained again
    assert model.labels_used == 25


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("rl_zoo3") is None, reason="needs rl_zoo3: pip install rl_zoo3")
def test_the_zoo_trains_it_and_enjoys_it(tmp_path: Path) -> None:
    for entry in (small := yaml.safe_load((FOLDER / "kbt.yml").read_text(encoding="utf-8"))).values():
        entry["callback"][0]["kbt_zoo.TaughtByLQR"]["pretraining"] = SMALL
    (tmp_path / "small.yml").write_text(yaml.safe_dump(small), encoding="utf-8")
    env_id = "kbt_rl/ShiftedInvertedPendulum-v0"

    def run(command: str, *arguments: str) -> str:
        script = [sys.executable, str(FOLDER / "kbt_zoo.py"), command, "--algo", "kbt", "--env", env_id, "-f", "logs"]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*script, *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("train", "--conf-file", "small.yml", "-n", "30", "--eval-freq", "20", "--eval-episodes", "1", "--seed", "0")
    run_folder = tmp_path / "logs" / "kbt" / "kbt_rl-ShiftedInvertedPendulum-v0_1"
    assert (run_folder / "evaluations.npz").exists()
    assert KBT.load(run_folder / "kbt_rl-ShiftedInvertedPendulum-v0").labels_used == 30
    assert "Mean episode length" in run("enjoy", "--no-render", "-n", "600")
