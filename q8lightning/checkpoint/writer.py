"""Durable writing: a file that is there under its name is whole, whatever happens while it is written."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

TEMPORARY_SUFFIX = ".q8lightning.tmp"
"""Files with this ending were being written when their writer was killed; they can be deleted."""


def write_checkpoint(checkpoint: Any, path: str | os.PathLike[str]) -> None:
    """Write ``checkpoint`` with ``torch.save`` so that ``path`` holds either its old content or all of the new one.

    The content goes to a temporary file beside the target, without a second copy of it in memory, and is flushed to
    the disk before it takes the target's name; the folder is flushed last. Missing folders are made.

    Raises:
        IsADirectoryError: If ``path`` is a directory.
        OSError: If the file cannot be written; the temporary file is removed and an old target stays as it was.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"a checkpoint is a file, but {target} is a directory; choose another path")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_beside(target) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # When a write fails (a full disk), torch's zip writer reports its own confusion about it.
            if isinstance(error.__context__, OSError):
                raise OSError(error.__context__.errno, error.__context__.strerror, str(target)) from error
            raise
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, target)
    _flush_directory(target.parent)


@contextmanager
def _temporary_beside(target: Path) -> Iterator[IO[bytes]]:
    """Open a new file in the target's folder (with the user's usual permissions); remove it if the block fails."""
    temporary = target.with_name(f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")  # its length fits where any name does
    try:
        with open(temporary, "xb") as file:
            yield file
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _flush_directory(directory: Path) -> None:
    if os.name == "nt":  # Windows cannot open directories
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
