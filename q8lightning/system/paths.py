"""Resolve paths: to local files or not, through links, to what is there."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

PathLike = str | os.PathLike[str]


def local_path(path: PathLike) -> str | None:
    """Return a path of this machine as the system knows it; None for a path elsewhere."""
    filesystem, path_there = _resolve(path)
    return path_there if isinstance(filesystem, LocalFileSystem) else None


def place_of(path: PathLike) -> str:
    """Return one name for all paths of a file: absolute, and without links among its folders.

    If the file itself is a link, its name is that of the link, because saving and removing change the link.
    """
    local = local_path(path)
    if local is None:
        return os.fspath(path).rstrip("/")
    folder, name = os.path.split(os.path.abspath(local))
    return os.path.join(os.path.realpath(folder), name)


def target_of(place: str) -> str:
    """Return the place that a link leads to, even if nothing is there; any other place itself."""
    return os.path.realpath(place) if os.path.islink(place) else place


def is_within(place: str, folder: str) -> bool:
    """Whether a place is ``folder`` or lies in it."""
    return place == folder or place.startswith((folder + "/", folder + os.sep))


def check_is_there(path: PathLike) -> None:
    """Raise FileNotFoundError if there is nothing at ``path``; accept a path that only a CheckpointIO understands."""
    filesystem, path_there = _resolve(path)
    if filesystem is not None and not filesystem.exists(path_there):
        message = "there is no such checkpoint, and no save of it is pending"
        raise FileNotFoundError(errno.ENOENT, message, os.fspath(path))


@contextmanager
def keeping(folder: str | None) -> Iterator[None]:
    """Raise FileNotFoundError if the folder is removed before or while a file is written to it; None for no folder."""
    if folder is None:
        yield
        return
    try:
        if not os.path.isdir(folder):
            raise FileNotFoundError
        yield
    except OSError as error:
        if os.path.isdir(folder):
            raise
        message = "the folder was removed before the checkpoint could be written to it"
        raise FileNotFoundError(errno.ENOENT, message, folder) from error


def _resolve(path: PathLike) -> tuple[AbstractFileSystem | None, str]:
    """Return the file system of a path and the path within it; None if only a CheckpointIO understands the path."""
    try:
        filesystem, path_there = url_to_fs(os.fspath(path))
    except (ValueError, ImportError):  # an unknown scheme; one whose package is missing
        return None, os.fspath(path)
    return filesystem, str(path_there)
