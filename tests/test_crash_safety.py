"""Checkpoints are whole: after a kill at any moment, after an error, and whatever the path is given as."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from learners import changed, kbt, warm_start, weights
from matplotlib.figure import Figure
from stable_baselines3.common.base_class import BaseAlgorithm

from kbt_rl import KBT, files
from kbt_rl.experiments.plot_style import save
from kbt_rl.files import replacing, write_text

SCRIPT = Path(__file__).with_name("killed_saves.py")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def kill_while_saving(folder: Path, kills: int, way: str) -> dict[str, int]:
    command = [sys.executable, str(SCRIPT), str(folder), str(kills), way]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), *sys.path])}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    record: dict[str, int] = json.loads(result.stdout)
    return record


@pytest.mark.slow
def test_two_hundred_kills_leave_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    record = kill_while_saving(tmp_path, 200, "safe")
    assert record["broken"] == 0
    assert record["interrupted"] >= 20  # else the kills have missed what they were to hit
    assert record["litter"] == 1
    assert record["left"] == 0


@pytest.mark.slow
def test_the_kills_would_find_a_file_that_is_written_in_place(tmp_path: Path) -> None:
    assert kill_while_saving(tmp_path, 40, "plain")["broken"] > 0


def test_a_policy_that_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = kbt(), tmp_path / "policy.pt"
    model.policy.save(path)
    before = path.read_bytes()

    def torn(values: object, file: io.BufferedIOBase) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stable_baselines3.common.policies.th.save", torn)
        with pytest.raises(OSError, match="no space"):
            model.policy.save(path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["policy.pt"]
    stream = io.BytesIO()
    model.policy.save(stream)
    stream.seek(0)
    for source in (path, stream):
        assert not changed(weights(type(model.policy).load(source)), weights(model.policy))


# ---------------------------------------------------------------------- the forms of a path, as in SB3


@pytest.mark.parametrize(
    ("given", "written"),
    [("model", "model.zip"), ("model.zip", "model.zip"), ("model.v1", "model.v1"), ("a b", "a b.zip")],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_names_are_those_of_sb3(given: str, written: str, kind: type, tmp_path: Path) -> None:
    model = kbt()
    model.save(kind(tmp_path / given))
    assert names(tmp_path) == [written]
    (tmp_path / "theirs").mkdir()
    BaseAlgorithm.save(model, kind(tmp_path / "theirs" / given))
    assert names(tmp_path / "theirs") == [written]
    assert not changed(weights(model), weights(KBT.load(tmp_path / given)))


def test_a_file_object_is_written_as_it_is() -> None:
    model, buffer = kbt(), io.BytesIO()
    model.save(buffer)
    buffer.seek(0)
    assert not changed(weights(model), weights(KBT.load(buffer)))


def test_what_is_excluded_and_included_is_passed_on(tmp_path: Path) -> None:
    model = kbt()
    model.labels_used = 3
    model.save(tmp_path / "model", exclude=["labels_used"], include=["verbose"])
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        data = json.loads(archive.read("data"))
    assert "labels_used" not in data
    assert "verbose" in data


def test_a_missing_folder_is_made_and_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"folder .*new.deep does not exist"):
        kbt().save(tmp_path / "new" / "deep" / "model")
    assert names(tmp_path / "new" / "deep") == ["model.zip"]


def test_a_folder_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder; saving to .*model.zip_2"):
        kbt().save(tmp_path / "model")
    assert names(tmp_path) == ["model.zip", "model.zip_2"]
    KBT.load(tmp_path / "model.zip_2")


def test_a_folder_beside_the_file_is_not_taken_for_it(tmp_path: Path) -> None:
    model = kbt()
    (tmp_path / "model").mkdir()
    model.save(tmp_path / "model")
    assert names(tmp_path) == ["model", "model.zip"]
    assert KBT.load(tmp_path / "model").labels_used == model.labels_used
    with pytest.raises(FileNotFoundError, match="there is no model at"):
        KBT.load(tmp_path)


def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    target, link = tmp_path / "first.zip", tmp_path / "latest.zip"
    kbt().save(target)
    target.chmod(0o600)
    link.symlink_to(target)
    model = kbt()
    model.labels_used = 9
    model.save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert KBT.load(target).labels_used == 9
    assert names(tmp_path) == ["first.zip", "latest.zip"]


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("make", [kbt, warm_start])
def test_a_save_that_fails_half_way_keeps_the_old_file(
    make: type, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    model.save(tmp_path / "model")
    before = (tmp_path / "model.zip").read_bytes()

    def fail(self: BaseAlgorithm, file: io.BufferedIOBase, *_: object) -> None:
        file.write(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(BaseAlgorithm, "save", fail)
    with pytest.raises(type(error)):
        model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").read_bytes() == before
    assert names(tmp_path) == ["model.zip"]


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / ".model.zip.part").write_bytes(b"x" * 10_000_000)
    model = kbt()
    model.save(tmp_path / "model")
    assert names(tmp_path) == ["model.zip"]
    assert not changed(weights(model), weights(KBT.load(tmp_path / "model")))


def test_writers_of_the_same_path_wait_for_each_other(tmp_path: Path) -> None:
    """Each of four threads writes its own letter a hundred times over; no file is ever a mixture."""
    path, mixed = tmp_path / "file", []

    def write(letter: bytes) -> None:
        for _ in range(25):
            with replacing(path) as file:
                for _ in range(50):
                    file.write(letter * 100)
            content = path.read_bytes()
            if len(content) != 5_000 or len(set(content)) != 1:
                mixed.append(content)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("nested", [1, 2])
def test_who_interrupts_a_write_may_write_the_same_path(nested: int, tmp_path: Path) -> None:
    """A signal handler that saves runs in the thread that is saving, and must not wait for it."""
    path = tmp_path / "file"

    def write(depth: int) -> None:
        with replacing(path) as file:
            file.write(b"%d" % depth)
            if depth:
                write(depth - 1)
                assert path.read_bytes() == b"%d" % (depth - 1)

    write(nested)
    assert path.read_bytes() == b"%d" % nested
    assert names(tmp_path) == ["file"]
    assert not files._under_way


# ---------------------------------------------------------------------- tables, figures and results


def test_a_figure_that_cannot_be_drawn_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    class Torn(Figure):
        """Fails half way."""

        def savefig(self, file: Any, **_: Any) -> None:
            file.write(b"half")
            raise MemoryError("no memory left")

    with pytest.raises(MemoryError, match="no memory"):
        save(Torn(), path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["figure.png"]
    save(Figure(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_text_takes_its_place_as_a_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.txt"
    for text in ("été\n", "b"):
        write_text(path, text)
        assert path.read_bytes() == text.encode("utf-8")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_bytes() == b"b"
    assert names(path.parent) == ["a.txt"]
