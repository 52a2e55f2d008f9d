"""Write a file durably: what is there under its name is whole, also after a crash."""

import errno
import os
import platform
import re
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

from q8lightning.checkpoint.file.pack import zip_writer
from q8lightning.checkpoint.file.write_behind import WriteBehind
from q8lightning.system.advice import advise
from q8lightning.system.ambient import neutral
from q8lightning.system.exchange import ASIDE, finish

if sys.platform != "win32":
    import fcntl

TEMPORARY_SUFFIX = ".q8lightning.tmp"
"""The ending of files that are being written. The next save removes those whose writer was killed."""

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_TEMPORARY = re.compile(r"\.([0-9a-f]{8})?[0-9a-f]{16}" + re.escape(TEMPORARY_SUFFIX))
_FOREIGN_AGE = 3600.0
"""Seconds without a write after which another host's file counts as left over. Locks may not reach across hosts."""


STEPS = ("frozen", "fetched", "opened", "written", "flushed", "renamed", "durable", "removing", "removed")
"""What happens to a checkpoint, in this order; the last two only where something is removed.

Each is announced as an audit event, ``q8lightning.save`` with the step and the path (see ``sys.addaudithook``).
"""


@neutral()
def write_checkpoint(checkpoint: Any, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint durably, in the format of ``torch.save``; see :func:`write_durably`.

    No second copy of the content is made in memory. A checkpoint with payloads, which only q8lightning loads anyway, is
    written in fewer bytes than ``torch.save`` would use.

    Raises:
        IsADirectoryError: If ``path`` is a directory.
        OSError: If the file cannot be written; the temporary file is removed and an old target stays as it was.
    """

    def write(file: IO[bytes]) -> None:
        zip_writer.save(checkpoint, file, compact=True)

    write_durably(path, write)


def write_durably(path: str | os.PathLike[str], write: Callable[[IO[bytes]], None]) -> None:
    """Let ``write`` fill a file; at every moment ``path`` holds either its old content or all of the new one.

    The content goes to a temporary file beside the target. It is flushed to the disk, then the file takes the target's
    name, then the folder is flushed, if its file system can do that. Missing folders are made. Temporary files that a
    killed writer left in the folder are removed.

    Raises:
        IsADirectoryError: If ``path`` is a directory.
        OSError: If the file cannot be written. After any error of ``write``, the temporary file is removed
            and an old target is as it was.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"a checkpoint is a file, but {target} is a directory; choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    with _naming(target):
        with _temporary_beside(target) as file:
            announce("opened", target)
            with WriteBehind(file) as behind:
                write(cast("IO[bytes]", behind))
            file.flush()
            announce("written", target)
            os.fsync(file.fileno())
            announce("flushed", target)
            os.replace(file.name, target)
            announce("renamed", target)
        flushed = flush_directory(target.parent)
    announce("durable", target)
    if not flushed:
        warn_not_flushed(target.parent)


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Let errors of the system name the target; by themselves they know the temporary file at best."""
    try:
        yield
    except OSError as error:
        known = error.filename is not None and not str(error.filename).endswith(TEMPORARY_SUFFIX)
        if error.errno is not None and error.filename2 is None and not known:
            error.filename = str(target)
        raise
    except RuntimeError as error:
        # When a write fails, as on a full disk, torch's zip writer raises an error about its own state.
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(target)) from error
        raise


def announce(step: str, path: str | os.PathLike[str]) -> None:
    """Raise the audit event of one of the ``STEPS``."""
    sys.audit("q8lightning.save", step, os.fspath(path))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders of killed writers from ``folder``, but none of a writer that lives.

    A writer holds a lock on its file or folder, and the lock ends with its process.
    """
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


def temporary_name() -> str:
    """Return a name for what is being written, short enough for wherever a name fits."""
    return f".{_HOST}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"


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


def remove_folder(folder: str | os.PathLike[str]) -> None:
    """Remove a folder that counts as left over from the first moment on.

    Raises:
        OSError: If it cannot be renamed.
    """
    leftover = Path(folder).parent / temporary_name()
    os.rename(folder, leftover)
    shutil.rmtree(leftover, ignore_errors=True)


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


@contextmanager
def _temporary_beside(target: Path) -> Iterator[IO[bytes]]:
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


_FAILING = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""Errors of the disk itself. Any other error means that the file system does not flush folders."""


def flush_directory(directory: Path) -> bool:
    """Flush a folder, so that a new name in it survives a crash of the system; return whether that is possible.

    Network file systems and those in user space (cifs, FUSE) refuse it in many ways. A folder may also be one that can
    be written to and not read.

    Raises:
        OSError: If the disk fails.
    """
    if os.name == "nt":  # Windows cannot open directories
        return True
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _FAILING:
            raise
        return False
    return True


@cache
def warn_not_flushed(directory: Path) -> None:
    """Warn once in this process that a folder cannot be flushed."""
    advise(  # no exception: the save went well
        f"{directory} cannot be flushed to the disk, as on some network file systems: checkpoints there are whole, but"
        " a crash of the machine soon after a save may take the new file's name away; keep more than one checkpoint,"
        " or save to a local disk",
        stacklevel=2,
    )
