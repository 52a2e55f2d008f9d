"""Write a file durably: what is there under its name is whole, also after a crash."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

from q8lightning.checkpoint.file.pack import zip_writer
from q8lightning.checkpoint.file.temporaries import TEMPORARY_SUFFIX, remove_leftovers, temporary_beside
from q8lightning.checkpoint.file.write_behind import WriteBehind
from q8lightning.system.advice import advise
from q8lightning.system.ambient import neutral

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
        with temporary_beside(target) as file:
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
