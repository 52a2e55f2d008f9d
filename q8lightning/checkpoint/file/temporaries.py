"""Name and lock what is being written, and remove what killed writers left.

A writer holds a lock on its temporary file or folder, and the lock ends with its process.
"""

import os
import platform
import re
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from q8lightning.system.exchange import ASIDE, finish

if sys.platform != "win32":
    import fcntl

TEMPORARY_SUFFIX = ".q8lightning.tmp"
"""The ending of files that are being written. The next save removes those whose writer was killed."""

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})?[0-9a-f]{16}" + re.escape(TEMPORARY_SUFFIX))
_FOREIGN_AGE = 3600.0
"""Seconds without a write after which another host's file counts as left over. Locks may not reach across hosts."""


def temporary_name() -> str:
    """Return a name for what is being written, short enough for wherever a name fits."""
    return f".{_HOST}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"


@contextmanager
def temporary_beside(target: Path) -> Iterator[IO[bytes]]:
    """Open a new file in the target's folder, with the user's usual permissions; remove it if the block fails."""
    file = _open_locked(target.parent)
    try:
        with file:
            yield file
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(file.name)
        raise


def _open_locked(folder: Path) -> IO[bytes]:
    while True:
        file = open(folder / temporary_name(), "xb")  # noqa: SIM115 (the caller does)
        if sys.platform != "win32":
            with suppress(OSError):  # file systems without locks: leftovers are not removed there either
                fcntl.flock(file, fcntl.LOCK_EX)
            if not os.path.exists(file.name):  # taken for a leftover in the moment before it was locked
                file.close()
                continue
        return file


@contextmanager
def locked_folder(parent: Path) -> Iterator[Path]:
    """Make a folder that counts as being written while the block runs."""
    while True:
        folder = parent / temporary_name()
        folder.mkdir()
        if sys.platform == "win32":
            yield folder
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # file systems without locks: leftovers are not removed there either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not folder.exists():  # taken for a leftover in the moment before it was locked
                continue
            yield folder
            return
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of killed writers from ``folder``, but none of a writer that lives."""
    _finish_exchanges(folder)
    with suppress(OSError):
        for entry in os.scandir(folder):
            if match := _TEMPORARY.fullmatch(entry.name):
                _remove_unless_locked(Path(entry.path), own_host=match[1] == _HOST)


def _finish_exchanges(folder: Path) -> None:
    """Give a checkpoint its name back that a killed writer had taken away from it for a moment."""
    with suppress(OSError):
        for aside in [*folder.glob(f".*{TEMPORARY_SUFFIX}{ASIDE}")]:
            new = aside.with_suffix("")
            match = _TEMPORARY.fullmatch(new.name)
            if match and not _is_locked(new) and (match[1] == _HOST or time.time() - _newest(aside) > _FOREIGN_AGE):
                finish(os.fspath(aside))


def _is_locked(folder: Path) -> bool:
    """Whether a folder is there, and its writer lives."""
    if sys.platform == "win32":
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _remove_unless_locked(path: Path, own_host: bool) -> None:
    if path.is_dir() and not path.is_symlink():
        _remove_folder_unless_locked(path, own_host)
        return
    if sys.platform == "win32":  # an open file cannot be deleted there
        with suppress(OSError):
            path.unlink()
        return
    # OSError: its writer lives (BlockingIOError), it is gone, it is not ours, or there are no locks here
    with suppress(OSError), open(path, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if own_host or time.time() - os.fstat(file.fileno()).st_mtime > _FOREIGN_AGE:
            path.unlink()


def _remove_folder_unless_locked(path: Path, own_host: bool) -> None:
    if sys.platform == "win32":  # nothing tells there whether its writer lives
        return
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if own_host or time.time() - _newest(path) > _FOREIGN_AGE:
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _newest(folder: Path) -> float:
    """Return when something was last written in a folder."""
    return max(each.stat().st_mtime for each in (folder, *folder.iterdir()))


def remove_folder(folder: str | os.PathLike[str]) -> None:
    """Remove a folder; if the process is killed meanwhile, the next save removes the rest.

    Raises:
        OSError: If it cannot be renamed.
    """
    leftover = Path(folder).parent / temporary_name()
    os.rename(folder, leftover)
    shutil.rmtree(leftover, ignore_errors=True)
