"""Files that are whole whatever happens to the process that writes them.

A file is written beside its final place, in the same folder, and takes that place by one rename. Whoever reads, or is
left with what a killed process has written, finds the old file or the new one, never a part of one.
"""

from __future__ import annotations

import io
import os
import stat
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# Writes in progress, of a thread and a path: more than one if a signal handler writes the same again.
_under_way: Counter[tuple[int, Path]] = Counter()


@contextmanager
def replacing(path: str | Path) -> Iterator[io.BufferedRandom]:
    """Open a file that takes the place of ``path`` when the block is done, and is dropped if the block fails.

    The file beside has one fixed name, ``.NAME.part``, so that what a killed process leaves of it is overwritten by the
    next one. Several processes that write the same path wait for each other (on Windows they must not). A symbolic link
    stays one: the file it points at is replaced. An existing file keeps its permissions.

    Args:
        path: Where the file is to be; a folder that is missing is made, with a warning, as SB3 does.

    Yields:
        The file to write, open in binary mode.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        warnings.warn(f"the folder {target.parent} does not exist; creating it", stacklevel=3)
        target.parent.mkdir(parents=True, exist_ok=True)
    # A signal handler that saves what is just being saved must not wait for the thread that it interrupts.
    place = threading.get_ident(), target
    depth = _under_way[place]
    beside = target.with_name(f".{target.name}.part" if depth == 0 else f".{target.name}.{depth}.part")
    _under_way[place] += 1
    try:
        with _replacing(target, beside) as file:
            yield file
    finally:
        _under_way[place] -= 1
        if not _under_way[place]:
            del _under_way[place]


@contextmanager
def _replacing(target: Path, beside: Path) -> Iterator[io.BufferedRandom]:
    file = _open_locked(beside)
    try:
        with suppress(FileNotFoundError):
            beside.chmod(stat.S_IMODE(target.stat().st_mode))
        yield file
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
        if sys.platform == "win32":
            file.close()  # an open file cannot be renamed there
        os.replace(beside, target)
        _sync_folder(target.parent)
    except BaseException:
        if sys.platform == "win32":
            file.close()
            beside.unlink(missing_ok=True)
        elif _is_at(file, beside):  # not renamed yet
            beside.unlink()
        raise
    finally:
        file.close()


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, in UTF-8; a folder that is missing is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


def _open_locked(beside: Path) -> io.BufferedRandom:
    """The file, empty and locked until it is closed, which a killed process's files are at once."""
    while True:
        file = os.fdopen(os.open(beside, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b")
        if sys.platform != "win32":
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever had the lock before may have renamed or removed the file that was opened here.
            if not _is_at(file, beside):
                file.close()
                continue
        file.truncate(0)
        return file


def _is_at(file: io.BufferedRandom, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Make a rename last over a power cut, where folders can be opened."""
    if sys.platform == "win32":
        return
    with suppress(OSError):  # the folder may not be readable, and not every file system does this
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
