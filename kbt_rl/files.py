"""Files that are whole whatever happens to the process that writes them, and that tell when they were damaged.

A file is written beside its final place, in the same folder, and takes that place by one rename. Whoever reads, or is
left with what a killed process has written, finds the old file or the new one, never a part of one. Of two writers of
one path the last one wins.

The file beside has a name that nobody can guess and is created anew, so that no link or file that is there already
decides what is written to or who owns it. Its writer holds a lock on it, which ends with the process: the next writer
in the folder removes what killed ones have left.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import secrets
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_BESIDE = re.compile(r"\..*\.kbt_rl-([0-9a-f]{8})-[0-9a-f]{16}\.part", re.DOTALL)
_DAY = 86_400.0
# The end of a zip archive's last record: its comment and, before it, the comment's length in two bytes.
_SEAL = b"kbt_rl 2 sha256 "
_DIGEST = 64
_CHUNK = 2**20


@contextmanager
def replacing(path: str | Path) -> Iterator[io.BufferedRandom]:
    """Open a file that takes the place of ``path`` when the block is done, and is dropped if the block fails.

    A symbolic link stays one: the file it points at is replaced. An existing file of the same user keeps its
    permissions.

    Args:
        path: Where the file is to be; a folder that is missing is made, with a warning, as SB3 does.

    Yields:
        The file to write, open in binary mode.

    Raises:
        IsADirectoryError: There is a folder.
        PermissionError: There is a symbolic link that another user has put into a folder which others may write to.
        ValueError: There is a FIFO, a socket or a device, which no file can take the place of.
    """
    target = _target(path)
    _remove_leftovers(target.parent)
    file, beside = _created(target)
    try:
        yield file
        file.flush()
        _set_mode(file, beside, target)
        os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
        _rename(file, beside, target)
        _sync_folder(target.parent)
    except BaseException:
        with suppress(OSError):  # what is left in the buffer finds no more room than before
            file.close()
        beside.unlink(missing_ok=True)
        raise
    finally:
        file.close()


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file as a whole, and read it back before it takes its place.

    Raises:
        OSError: It could not be written, or does not read back as it was written; an old file is still there.
    """
    with replacing(path) as file:
        file.write(content)
        file.flush()
        file.seek(0)
        view = memoryview(content)
        for start in range(0, len(content) + 1, _CHUNK):
            if file.read(_CHUNK) != view[start : start + _CHUNK]:
                raise OSError(f"{path} does not read back as it was written, and is what it was before; check the disk")


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, in UTF-8; a folder that is missing is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


# ---------------------------------------------------------------------- digests


def sealed(archive: bytes) -> bytes:
    """A zip archive whose comment is the SHA-256 of all that is before it; whoever reads zip archives reads it too.

    Raises:
        ValueError: It is no zip archive, or has a comment already.
    """
    if archive[-22:-18] != b"PK\x05\x06" or archive[-2:] != b"\0\0":
        raise ValueError("only a zip archive without a comment can be sealed")
    content = archive[:-2] + (len(_SEAL) + _DIGEST).to_bytes(2, "little") + _SEAL
    return content + hashlib.sha256(content).hexdigest().encode()


def unsealed(content: bytes, name: object) -> io.BytesIO:
    """A sealed archive as a file to read, once it is found to be what was sealed.

    Args:
        content: Of the file.
        name: Of the file, for the errors.

    Raises:
        ValueError: It is not what was sealed.
    """
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if not body.endswith(_SEAL):
        raise ValueError(
            f"{name} is damaged or truncated, or was not written by this version of kbt_rl: it does not end in the "
            "SHA-256 of its content"
        )
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ValueError(f"{name} is damaged: its content has not the SHA-256 that is stated in it")
    return io.BytesIO(content)


# ---------------------------------------------------------------------- the file beside


def _target(path: str | Path) -> Path:
    """The regular file that a path means, in a folder that is there."""
    _check_links(Path(path))
    with suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{path} is a folder; nothing was written")
        if not stat.S_ISREG(mode):
            raise ValueError(
                f"{path} is a FIFO, a socket or a device, whose place no file can take; nothing was written. To write "
                "into it, open it and pass the open file"
            )
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        warnings.warn(f"the folder {target.parent} does not exist; creating it", stacklevel=4)
        target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _check_links(path: Path) -> None:
    """Raise PermissionError at a link by which somebody else would choose what is overwritten."""
    if sys.platform == "win32":
        return
    for _ in range(40):  # as many as Linux follows
        if not path.is_symlink():
            return
        folder, owner = path.parent.stat(), os.lstat(path).st_uid
        if owner not in (os.geteuid(), 0) and folder.st_mode & 0o022:
            raise PermissionError(
                f"{path} is a symbolic link of another user (uid {owner}) in a folder that others may write to; "
                "nothing was written. Remove it, or save elsewhere"
            )
        path = path.parent / os.readlink(path)


def _created(target: Path) -> tuple[io.BufferedRandom, Path]:
    """A new file beside the target, which only its owner may read, locked until it is closed or its process ends."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    short = target.name.encode(errors="ignore")[:100].decode(errors="ignore")
    for attempt in range(20):
        beside = target.with_name(f".{short}.kbt_rl-{_HOST}-{secrets.token_hex(8)}.part")
        file = os.fdopen(os.open(beside, flags, 0o600), "r+b")
        if attempt == 19 or (_locked(file.fileno()) is not False and _is_at(file.fileno(), beside)):
            break
        file.close()  # another writer has taken it for a leftover before it was locked
        beside.unlink(missing_ok=True)
    return file, beside


def _locked(handle: int) -> bool | None:
    """Lock an open file; False if another has the lock, None where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _set_mode(file: io.BufferedRandom, beside: Path, target: Path) -> None:
    """The permissions of the file that is replaced, or those of any new file."""
    mode = 0o666 & ~_umask()
    with suppress(FileNotFoundError):
        old = os.lstat(target)
        if sys.platform == "win32" or old.st_uid == os.geteuid():  # else somebody else would decide who may write
            mode = stat.S_IMODE(old.st_mode) & 0o777
    with suppress(OSError):  # not every file system has them
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), mode)
        else:
            beside.chmod(mode)


def _umask() -> int:
    with suppress(OSError):  # Linux tells without changing it
        found = re.search(r"^Umask:\s*([0-7]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1], 8)
    mask = os.umask(0o077)  # what another thread creates in between is too private rather than too open
    os.umask(mask)
    return mask


def _rename(file: io.BufferedRandom, beside: Path, target: Path) -> None:
    if sys.platform == "win32":
        file.close()  # an open file cannot be renamed there, nor one replaced that somebody is reading
        for _ in range(50):
            with suppress(PermissionError):
                os.replace(beside, target)
                return
            time.sleep(0.02)
    os.replace(beside, target)


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


# ---------------------------------------------------------------------- what killed processes leave


def _remove_leftovers(folder: Path) -> None:
    """Remove the files of this user that were left beside by processes that are no more."""
    with suppress(OSError):  # the folder may not be readable
        for name in os.listdir(folder):
            found = _BESIDE.fullmatch(name)
            if found:
                with suppress(OSError):
                    _remove_if_left(folder / name, found[1] == _HOST)


def _remove_if_left(path: Path, same_host: bool) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return
    if sys.platform == "win32":
        path.unlink()  # which is refused while it is open
        return
    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
            return
        locked = _locked(handle)
        if locked is False:  # its writer is at work
            return
        # Locks may not be seen from other hosts, and not every file system has them.
        sure = locked is True and same_host
        if (sure or time.time() - found.st_mtime > _DAY) and _is_at(handle, path):
            path.unlink()
    finally:
        os.close(handle)
