"""Files are whole: after a kill at any moment, after an error, whoever writes beside, and whatever is there already."""

from __future__ import annotations

import io
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from kbt_rl import files
from kbt_rl.files import replacing, sealed, unsealed, write_bytes, write_text

POSIX = pytest.mark.skipif(os.name != "posix", reason="links, FIFOs and permissions of POSIX")
AS_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root makes another's files")
SCRIPT = Path(__file__).with_name("killed_saves.py")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def leftover(path: Path, *, host: str = files._HOST, age: float = 0.0) -> Path:
    """What a killed process leaves beside a path."""
    beside = path.with_name(f".{path.name}.kbt_rl-{host}-0123456789abcdef.part")
    beside.write_bytes(b"left")
    os.utime(beside, (time.time() - age,) * 2)
    return beside


# ---------------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20, pytest.param(1_000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("way", ["zip", "policy", "safetensors"])
def test_kills_leave_the_old_file_or_the_new_one(way: str, kills: int, tmp_path: Path) -> None:
    record = kill_while_saving(tmp_path, kills, way)
    assert record["broken"] == 0
    assert record["interrupted"] >= kills // 5  # else the kills have missed what they were to hit
    assert record["litter"] == 1  # the next writer removes what the last one has left
    assert record["left"] == 0


@pytest.mark.slow
def test_the_kills_would_find_a_file_that_is_written_in_place(tmp_path: Path) -> None:
    assert kill_while_saving(tmp_path, 40, "plain")["broken"] > 0


def kill_while_saving(folder: Path, kills: int, way: str) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), *sys.path])}
    command = [sys.executable, str(SCRIPT), str(folder), str(kills), way]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return {name: int(value) for name, value in (pair.split("=") for pair in result.stdout.split())}


def test_what_killed_processes_have_left_is_removed(tmp_path: Path) -> None:
    """Of any file in the folder, as a run that goes on writes others."""
    leftover(tmp_path / "model_1.zip")
    leftover(tmp_path / "model_2.zip", host="01234567", age=2 * 86_400)
    write_bytes(tmp_path / "model_3.zip", b"new")
    assert names(tmp_path) == ["model_3.zip"]


@POSIX
def test_what_may_not_be_a_leftover_is_left_alone(tmp_path: Path) -> None:
    """Another host's that is young, a link, a folder, one with two names, and files that have other names."""
    of_another_host = leftover(tmp_path / "a", host="01234567")
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    link = tmp_path / f".b.kbt_rl-{files._HOST}-0123456789abcdef.part"
    link.symlink_to(target)
    folder = tmp_path / f".c.kbt_rl-{files._HOST}-0123456789abcdef.part"
    folder.mkdir()
    fifo = tmp_path / f".d.kbt_rl-{files._HOST}-0123456789abcdef.part"
    os.mkfifo(fifo)
    twice = leftover(tmp_path / "e")
    os.link(twice, tmp_path / "other_name")
    alike = [tmp_path / ".model.zip.part", tmp_path / f".x.kbt_rl-{files._HOST}-0123.part"]
    for path in alike:
        path.write_bytes(b"mine")
    before = names(tmp_path)
    write_bytes(tmp_path / "new", b"new")
    assert names(tmp_path) == sorted([*before, "new"])
    assert (target.read_bytes(), of_another_host.read_bytes()) == (b"precious", b"left")


def test_a_file_that_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    with replacing(tmp_path / "slow") as file:
        file.write(b"slow")
        write_bytes(tmp_path / "quick", b"quick")
        assert len(names(tmp_path)) == 2
    assert (tmp_path / "slow").read_bytes() == b"slow"
    assert names(tmp_path) == ["quick", "slow"]


@POSIX
def test_a_writer_that_is_taken_for_a_leftover_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may look at the file between its creation and its lock."""
    real, tries = files._locked, []  # between creation and lock there is no other place to come in

    def lock(handle: int) -> bool | None:
        tries.append(handle)
        if len(tries) == 1:
            next(tmp_path.glob(".*.part")).unlink()
        return False if len(tries) == 2 else real(handle)

    monkeypatch.setattr(files, "_locked", lock)
    write_bytes(tmp_path / "file", b"new")
    assert len(tries) == 3
    assert (names(tmp_path), (tmp_path / "file").read_bytes()) == (["file"], b"new")


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_write_that_fails_keeps_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (names(tmp_path), path.read_bytes()) == (["file"], b"old")


@POSIX
@pytest.mark.parametrize("size", [10, 10_000, 3_000_000])
def test_a_full_disk_keeps_the_old_file(size: int, tmp_path: Path) -> None:
    """In a process that may not write longer files, which is told so by an error of ``write``."""
    path = tmp_path / "file"
    write_bytes(path, b"old")
    code = (
        "import resource, signal, sys; from pathlib import Path; from kbt_rl.files import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))\n"
        f"write_bytes(sys.argv[1], b'x' * {size})"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "File too large" in result.stderr
    assert (names(tmp_path), path.read_bytes()) == (["file"], b"old")


@pytest.mark.parametrize("size", [0, 1, 5, 2**20, 2**20 + 1])
def test_what_does_not_read_back_is_not_put_in_place(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that flips on its way to the disk, and bytes that are missing or too many."""
    path, real = tmp_path / "file", files._created  # where what is written can be changed on its way
    write_bytes(path, b"old")
    content = bytes(size)
    faults: dict[str, Callable[[bytes], bytes]] = {
        "flipped": lambda data: data[:-1] + b"\1",
        "short": lambda data: data[:-1],
        "long": lambda data: data + b"\0",
    }
    for name, fault in faults.items():
        if size == 0 and name != "long":
            continue

        class Faulty(io.BufferedRandom):
            """Stores something else than it is given."""

            def write(self, data: bytes, fault: Callable[[bytes], bytes] = fault) -> int:  # type: ignore[override]
                return super().write(fault(bytes(data)))

        def created(target: Path, kind: type[io.BufferedRandom] = Faulty) -> tuple[io.BufferedRandom, Path]:
            file, beside = real(target)
            file.close()
            return kind(io.FileIO(beside, "r+")), beside

        with monkeypatch.context() as patch:
            patch.setattr(files, "_created", created)
            with pytest.raises(OSError, match="does not read back as it was written"):
                write_bytes(path, content)
        assert (names(tmp_path), path.read_bytes()) == (["file"], b"old")
    write_bytes(path, content)
    assert path.read_bytes() == content


# ---------------------------------------------------------------------- several writers


def test_of_several_writers_the_last_one_wins_and_none_is_torn(tmp_path: Path) -> None:
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


@POSIX
def test_a_signal_handler_may_save_what_is_being_saved(tmp_path: Path) -> None:
    """It runs in the thread that saves, at any moment of it, and must not wait for it."""
    path, steps = tmp_path / "file", 0

    def write_own(*_: object) -> None:
        write_bytes(path, b"handler")

    before = signal.signal(signal.SIGUSR1, write_own)
    try:
        while True:
            left = [steps]

            def profile(frame: object, event: str, _: object, left: list[int] = left) -> None:
                left[0] -= event in ("call", "c_return")
                if left[0] == 0:
                    sys.setprofile(None)
                    signal.raise_signal(signal.SIGUSR1)

            sys.setprofile(profile)
            try:
                write_bytes(path, b"outer")
            finally:
                sys.setprofile(None)
            assert path.read_bytes() in (b"outer", b"handler")
            assert names(tmp_path) == ["file"]
            if left[0] > 0:
                break
            steps += 2
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert steps > 50


# ---------------------------------------------------------------------- what is there already


@POSIX
def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    target, link, dangling = tmp_path / "first", tmp_path / "latest", tmp_path / "next"
    write_bytes(target, b"old")
    target.chmod(0o640)
    link.symlink_to("first")
    dangling.symlink_to("second")
    for path in (link, dangling):
        write_bytes(path, b"new")
        assert path.is_symlink()
        assert path.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names(tmp_path) == ["first", "latest", "next", "second"]


@POSIX
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("told", [True, False])
def test_a_new_file_has_the_permissions_of_any_new_file(
    umask: int, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And while it is written only its owner may read it."""
    if not told:
        monkeypatch.setattr(files.re, "search", lambda *_: None)
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file"):
            beside = next(tmp_path.glob(".*.part"))
            assert stat.S_IMODE(beside.stat().st_mode) == 0o600
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_names_beside_cannot_be_guessed(tmp_path: Path) -> None:
    seen = set()
    for _ in range(20):
        with replacing(tmp_path / "file"):
            seen.update(path.name for path in tmp_path.glob(".*.part"))
    assert len(seen) == 20


@POSIX
def test_a_planted_file_or_link_beside_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even by whoever would guess the name."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "f" * 16)
    beside = tmp_path / f".file.kbt_rl-{files._HOST}-{'f' * 16}.part"
    beside.symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_bytes(tmp_path / "file", b"new")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "file").exists()


@POSIX
def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to("fifo")
        for path in (tmp_path / "fifo", tmp_path / "socket", tmp_path / "link", Path("/dev/null")):
            with pytest.raises(ValueError, match="is a FIFO, a socket or a device, whose place no file can take"):
                write_bytes(path, b"new")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_bytes(tmp_path, b"new")


@AS_ROOT
def test_another_user_decides_nothing_in_a_shared_folder(tmp_path: Path) -> None:
    """Neither by a link in the place of the file, nor by permissions of a file that is there, nor by leftovers."""
    victim, shared = tmp_path / "victim", tmp_path / "shared"
    victim.write_bytes(b"precious")
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "link").symlink_to(victim)
    os.lchown(shared / "link", 1234, 1234)
    with pytest.raises(PermissionError, match="symbolic link of another user"):
        write_bytes(shared / "link", b"new")
    assert victim.read_bytes() == b"precious"
    (shared / "file").write_bytes(b"theirs")
    (shared / "file").chmod(0o666)
    os.chown(shared / "file", 1234, 1234)
    theirs = leftover(shared / "other")
    os.chown(theirs, 1234, 1234)
    write_bytes(shared / "file", b"new")
    found = (shared / "file").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode) & 0o022) == (0, 0)
    assert theirs.exists()
    shared.chmod(0o755)
    write_bytes(shared / "link", b"new")  # who alone may write to a folder may have links in it
    assert victim.read_bytes() == b"new"


@pytest.mark.parametrize("name", ["x" * 250, "é" * 120, "a b", ".hidden"])
def test_any_name_of_a_file_will_do(name: str, tmp_path: Path) -> None:
    write_bytes(tmp_path / name, b"new")
    assert names(tmp_path) == [name]


def test_a_folder_that_is_missing_is_made_and_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"folder .*new.deep does not exist"):
        write_bytes(tmp_path / "new" / "deep" / "file", b"new")
    assert names(tmp_path / "new" / "deep") == ["file"]


def test_text_takes_its_place_as_a_whole_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.txt"
    for text in ("été\n", "b"):
        write_text(path, text)
        assert path.read_bytes() == text.encode("utf-8")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_bytes() == b"b"
    assert names(path.parent) == ["a.txt"]


def test_a_figure_is_drawn_into_it(tmp_path: Path) -> None:
    with replacing(tmp_path / "figure.png") as file:
        Figure().savefig(file)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------- digests


def archive(content: bytes = b"numbers") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("data", content)
    return buffer.getvalue()


def test_a_sealed_archive_is_still_one_and_every_flipped_bit_is_found() -> None:
    content = sealed(archive())
    with zipfile.ZipFile(unsealed(content, "file")) as file:
        assert file.read("data") == b"numbers"
        assert file.testzip() is None
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="file is damaged"):
            unsealed(bytes(damaged), "file")
    for length in range(len(content)):
        with pytest.raises(ValueError, match="truncated"):
            unsealed(content[:length], "file")


def test_what_was_never_sealed_is_refused() -> None:
    with pytest.raises(ValueError, match="was not written by this version of kbt_rl"):
        unsealed(archive(), "file")


@pytest.mark.parametrize("content", [b"", b"text", sealed(archive()), archive() + b"more"])
def test_only_an_archive_without_a_comment_is_sealed(content: bytes) -> None:
    with pytest.raises(ValueError, match="only a zip archive without a comment"):
        sealed(content)
