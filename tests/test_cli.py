"""The command line: it runs whatever was saved by ``predict``, and says what is wrong before it changes anything."""

from __future__ import annotations

import os

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # before pygame is imported

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO, SAC

import kbt_rl
from kbt_rl import KBT, HeadConfig, LQRExpert, WarmStart
from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.export import save_safetensors
from kbt_rl.cli import OnPlant, evaluate, main
from kbt_rl.models.decision_transformer import DecisionTransformerConfig
from kbt_rl.saved import load_policy

COMMANDS = ["pretrain", "adapt", "evaluate", "render"]
NOMINAL = "kbt_rl/InvertedPendulum-v0"
TINY = PretrainConfig(samples=500, steps=60, batch_size=32)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model.zip"
    env = gym.make(NOMINAL)
    learner = KBT(env=env, seed=0, policy_kwargs={"head": HeadConfig(layers=1)})
    learner.pretrain(LQRExpert.for_env(env), TINY, progress_bar=False)
    learner.save(path)
    return path


def saved_by(make: Callable[[Any], Any], path: Path, env_id: str = NOMINAL, **options: Any) -> Any:
    learner = make(gym.make(env_id, **options))
    learner.save(path)
    return learner


# ---------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = said(capsys)
    assert "--seed" in text
    assert len(text.splitlines()) > 8


def test_there_are_no_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = said(capsys)
    assert all(f"• {command}" in text for command in COMMANDS)
    assert text.count("•") == len(COMMANDS)
    assert "python -m studies" in text


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert said(capsys).strip() == f"kbt_rl {kbt_rl.__version__}"


# ---------------------------------------------------------------------- what cannot be meant


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapt", "--labels", "0"], "--labels is 0; it must be at least 1"),
        (["adapt", "--labels", "-5"], "--labels is -5"),
        (["adapt", "--eval-every", "0"], "--eval-every is 0; it must be at least 1"),
        (["adapt", "--seed", "-1"], "--seed is -1"),
        (["evaluate", "--episodes", "0"], "--episodes is 0; it must be at least 1"),
        (["evaluate", "--seed", "-1"], "--seed is -1"),
        (["render", "--seconds", "0"], "--seconds is 0.0"),
        (["render", "--seconds", "nan"], "--seconds is nan"),
        (["render", "--out", "film.avi"], "choose .gif or .mp4"),
        (["pretrain", "--steps", "0"], "--steps is 0"),
        (["pretrain", "--layers", "0"], "--layers is 0"),
        (["evaluate", "--pole-mass", "-1"], "pole_mass must be positive"),
    ],
)
def test_it_is_refused_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in said(capsys)
    assert list(tmp_path.iterdir()) == []


def test_labels_of_zero_leave_an_adapted_model_alone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapted.zip"
    out.write_bytes(b"200 labels")
    assert main(["adapt", "--model", str(model), "--out", str(out), "--labels", "0"]) == 2
    assert out.read_bytes() == b"200 labels"


@pytest.mark.parametrize("command", ["evaluate", "render", "adapt"])
def test_a_missing_model_says_how_to_make_one(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([command, "--model", str(tmp_path / "none.zip")]) == 2
    assert "kbt-rl pretrain --model" in said(capsys)


def foreign_files(folder: Path) -> list[Path]:
    """Files that are no model, each in a way of its own."""
    paths = {name: folder / name for name in ("text.zip", "empty.zip", "other.zip", "pickle.zip", "bad.safetensors")}
    paths["text.zip"].write_text("not a zip")
    paths["empty.zip"].write_bytes(b"")
    with zipfile.ZipFile(paths["other.zip"], "w") as archive:
        archive.writestr("readme", "hello")
    paths["pickle.zip"].write_bytes(pickle.dumps({"a": 1}))
    paths["bad.safetensors"].write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    return list(paths.values())


@pytest.mark.parametrize("command", ["evaluate", "render", "adapt"])
def test_foreign_files_are_named_without_a_traceback(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    for path in foreign_files(tmp_path):
        assert main([command, "--model", str(path)]) == 2
        text = said(capsys)
        assert "error: " in text
        assert path.name in text


def test_a_damaged_file_of_this_library_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SB3 alone would load it: every entry of the archive is whole."""
    content = model.read_bytes()
    other = b"0" if content[-1:] != b"0" else b"1"
    (tmp_path / "damaged.zip").write_bytes(content[:-1] + other)
    assert main(["evaluate", "--model", str(tmp_path / "damaged.zip")]) == 2
    assert "damaged.zip is damaged: its content has not the SHA-256" in said(capsys)


def test_a_policy_of_another_environment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_by(
        lambda env: PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu"), tmp_path / "c.zip", "CartPole-v1"
    )
    assert main(["evaluate", "--model", str(tmp_path / "c.zip")]) == 2
    assert "the policy is for other observations" in said(capsys)


def test_markup_in_a_message_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pygame", None)
    assert main(["render", "--out", str(tmp_path / "a.gif")]) == 2
    assert 'pip install "kbt_rl[render]"' in said(capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_promises_nothing(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import kbt_rl.cli as cli

    def interrupted(self: Any, console: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(getattr(cli, command.capitalize()), "run", interrupted)
    assert main([command]) == 130
    text = said(capsys)
    assert "nothing was saved" in text
    assert "continue" not in text


# ---------------------------------------------------------------------- one way to act


def test_the_expert_is_evaluated_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--episodes", "5"]) == 0
    assert "success 1.00, 0 falls, regret 0.000, mean reward" in said(capsys)


def test_a_pickle_is_announced_and_a_safetensors_file_is_not(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    assert main(["evaluate", "--model", str(model), "--episodes", "3"]) == 0
    by_zip = said(capsys)
    assert "may hold pickles, which can run code" in by_zip
    save_safetensors(KBT.load(model), tmp_path / "model")
    assert main(["evaluate", "--model", str(tmp_path / "model"), "--episodes", "3"]) == 0
    by_safetensors = said(capsys)
    assert "pickles" not in by_safetensors
    assert by_zip.splitlines()[-1].partition(" on ")[2] == by_safetensors.splitlines()[-1].partition(" on ")[2]


class Payload:
    """What a pickle from a stranger may do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (exec, (f"import pathlib; pathlib.Path({str(self.target)!r}).touch(); print('the payload runs')",))


@pytest.mark.parametrize("command", ["evaluate", "render", "adapt"])
def test_it_is_said_before_a_pickle_is_read_and_a_safe_file_runs_no_code(
    command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    infected = KBT.load(model)
    infected.tensorboard_log = Payload(tmp_path / "mark")  # type: ignore[assignment]
    infected.save("infected.zip")
    arguments = {"adapt": ["--labels", "1"], "evaluate": ["--episodes", "1"], "render": ["--seconds", "0.04"]}[command]
    main([command, "--model", "infected.zip", *arguments])
    text = said(capsys)
    assert text.index("may hold pickles, which can run code") < text.index("the payload runs")
    (tmp_path / "mark").unlink()
    content = (tmp_path / "infected.zip").read_bytes()
    for name in ("renamed.safetensors", "RENAMED.SafeTensors"):
        (tmp_path / name).write_bytes(content)
        assert main([command, "--model", name, *arguments]) == 2
        assert name in said(capsys)
        assert not (tmp_path / "mark").exists()


def test_the_ending_chooses_the_safe_format_for_what_is_written_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--model", "a.safetensors", "--steps", "2"]) == 0
    assert main(["adapt", "--model", "a.safetensors", "--out", "b.safetensors", "--labels", "2"]) == 0
    assert main(["evaluate", "--model", "b.safetensors", "--episodes", "2"]) == 0
    assert "pickles" not in said(capsys)
    assert load_policy(tmp_path / "b.safetensors").policy.head.labels_seen == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("option", ["pretrain --model", "adapt --out", "adapt --tensorboard", "render --out"])
@pytest.mark.parametrize("place", ["file/a.gif", "folder.gif"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(
    option: str, place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import kbt_rl.cli as cli

    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder.gif").mkdir()
    if option == "adapt --tensorboard":
        place = "file/a"
    for work in ("evaluate", "_load_kbt", "_load_policy"):
        monkeypatch.setattr(cli, work, lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(KBT, "pretrain", lambda *_, **__: pytest.fail("it began"))
    command, name = option.split()
    others = {"adapt": ["--model", str(model)], "pretrain": [], "render": ["--model", str(model)]}[command]
    assert main([command, *others, name, place]) == 2
    assert "error: " in said(capsys)
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "folder.gif", "runs"}


@pytest.mark.parametrize(
    "make",
    [
        lambda env: WarmStart(env=env, seed=0),
        lambda env: KBT(env=env, seed=0, policy_kwargs={"head": HeadConfig(layers=2)}),
        lambda env: KBT(
            env=env, seed=0, policy_kwargs={"transformer": DecisionTransformerConfig(context_length=3, width=8)}
        ),
        lambda env: PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu"),
        lambda env: PPO("MlpPolicy", env, n_steps=8, batch_size=8, device="cpu", use_sde=True),
        lambda env: SAC("MlpPolicy", env, device="cpu"),
    ],
    ids=["warm start", "two layers", "context of 3", "PPO", "PPO with gSDE", "SAC"],
)
def test_any_saved_policy_acts_as_it_did(make: Callable[[Any], Any], tmp_path: Path) -> None:
    learner = saved_by(make, tmp_path / "any.zip")
    loaded = load_policy(tmp_path / "any").policy
    observations = np.random.default_rng(0).uniform(-1, 1, (6, 2, 4)).astype(np.float32)
    state = other = None
    for step, rows in enumerate(observations):
        begins = np.full(2, step == 0)
        wanted, state = learner.predict(rows, state, begins, deterministic=True)
        found, other = loaded.predict(rows, other, begins, deterministic=True)
        np.testing.assert_array_equal(found, wanted)
    plant = OnPlant()
    assert evaluate(loaded, plant.envs(4), 1).cost == pytest.approx(evaluate(learner.policy, plant.envs(4), 1).cost)


def test_a_longer_context_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = DecisionTransformerConfig(context_length=3, width=8)
    saved_by(lambda env: KBT(env=env, seed=0, policy_kwargs={"transformer": transformer}), tmp_path / "k.zip")
    policy = load_policy(tmp_path / "k.zip").policy
    seen: list[int] = []
    predict = type(policy).predict

    def watched(
        self: Any, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        seen.append(0 if state is None else int(state.timesteps.max()))
        return predict(self, observation, state, episode_start, deterministic)

    monkeypatch.setattr(type(policy), "predict", watched)
    evaluate(policy, OnPlant().envs(2), 1)
    assert seen[:4] == [0, 0, 1, 2]


def test_discrete_actions_keep_their_forces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forces = (-20.0, -1.0, 1.0, 20.0)
    saved_by(lambda env: KBT(env=env, seed=0), tmp_path / "d.zip", "kbt_rl/DiscreteInvertedPendulum-v0", forces=forces)
    assert load_policy(tmp_path / "d.zip").forces == forces
    assert main(["evaluate", "--model", str(tmp_path / "d.zip"), "--episodes", "2"]) == 0
    assert "2 episodes" in said(capsys)


def test_several_posteriors_are_refused_with_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    envs = OnPlant("nominal").envs(2)
    KBT(env=envs, seed=0, per_env=True).save(tmp_path / "two.zip")
    assert main(["evaluate", "--model", str(tmp_path / "two.zip")]) == 2
    assert "select(i)" in said(capsys)


def test_the_plant_can_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--plant", "nominal", "--pole-mass", "0.5", "--episodes", "2"]) == 0
    assert "on the nominal plant" in said(capsys)
    env = OnPlant("nominal", pole_mass=0.5).envs(1)
    assert env.get_attr("params")[0].pole_mass == 0.5


@pytest.mark.parametrize("ending", ["gif", "mp4"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio leaves the pipes it reads open
def test_a_film_shows_the_saved_policy(ending: str, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pygame")
    pytest.importorskip("imageio_ffmpeg")
    out = tmp_path / f"film.{ending}"
    assert main(["render", "--model", str(model), "--out", str(out), "--seconds", "0.4"]) == 0
    assert out.stat().st_size > 1_000
    if ending == "gif":
        from PIL import Image

        with Image.open(out) as image:
            assert getattr(image, "n_frames") == 10  # noqa: B009
            assert image.info["duration"] == 40


@pytest.mark.slow
def test_pretrain_adapt_evaluate_is_one_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapted = tmp_path / "model.zip", tmp_path / "adapted.zip"
    assert main(["pretrain", "--model", str(model), "--steps", "800", "--seed", "0", "--layers", "1"]) == 0
    arguments = ["--model", str(model), "--out", str(adapted), "--labels", "30", "--eval-every", "100"]
    assert main(["adapt", *arguments, "--tensorboard", str(tmp_path / "runs")]) == 0
    text = said(capsys)
    assert "30 labels used; success of 20 episodes 0.00 before and" in text
    assert "older file" not in text
    assert main(["evaluate", "--model", str(model), "--episodes", "10"]) == 0
    assert "success 0.00" in said(capsys)
    assert main(["evaluate", "--model", str(adapted), "--episodes", "10"]) == 0
    assert "success 0.00" not in said(capsys)
    assert list((tmp_path / "runs").rglob("events.out.tfevents.*"))
    assert main(["adapt", *arguments[:4], "--labels", "2", "--tensorboard", str(tmp_path / "runs")]) == 0
    assert "in place of an older file" in said(capsys)


def test_a_safetensors_file_can_be_adapted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    save_safetensors(KBT.load(model), tmp_path / "model.safetensors")
    arguments = ["--model", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "out.zip"), "--labels", "3"]
    assert main(["adapt", *arguments, "--tensorboard", str(tmp_path / "runs")]) == 0
    assert "3 labels used" in said(capsys)
    assert KBT.load(tmp_path / "out.zip").labels_used == 3
