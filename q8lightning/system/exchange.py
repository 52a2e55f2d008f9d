"""Put a folder in the place of another, in one step where the system can."""

import ctypes
import os
import shutil
import sys
from contextlib import suppress

ASIDE = ".old"
"""The ending of a folder in which something lies aside."""

_AT_FDCWD, _EXCHANGE = -100, 2
"""What Linux calls the working directory, and the wish to exchange two names."""


def put_in_place(new: str, target: str) -> None:
    """Give the folder ``new`` the name ``target``; remove what was there.

    On Linux there is always something whole at ``target``. Elsewhere, and on most network file systems, what was there
    lies for a moment in a folder beside it (the name of ``new`` with ``.old``). If the process is killed then,
    :func:`finish` does the rest.

    Raises:
        OSError: If the names cannot be changed; both stay as they were.
    """
    try:
        if not os.path.lexists(target):
            os.rename(new, target)
            return
    except OSError:
        if not os.path.lexists(target):
            raise
    if _exchange(new, target):
        remove(new)
        return
    aside = f"{new}{ASIDE}"
    old = os.path.join(aside, os.path.basename(target))
    os.mkdir(aside)
    try:
        os.rename(target, old)
        os.rename(new, target)
    except OSError:
        if os.path.lexists(old):
            os.rename(old, target)
        os.rmdir(aside)
        raise
    os.rename(aside, new)  # a name whose rest others remove if this process is killed
    remove(new)


def finish(aside: str) -> None:
    """Finish what a killed process began with :func:`put_in_place`: the target is the new folder, or the old one.

    Args:
        aside: What that process left; its name ends in :data:`ASIDE`.

    Raises:
        OSError: If a name cannot be changed; everything stays as it is.
    """
    new = aside.removesuffix(ASIDE)
    for name in os.listdir(aside):  # one, or none
        target = os.path.join(os.path.dirname(aside), name)
        if not os.path.lexists(target):
            os.rename(new if os.path.lexists(new) else os.path.join(aside, name), target)
    remove(aside)


def remove(path: str) -> None:
    """Remove a file, a link or a folder; it is no error if it cannot be removed."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            os.unlink(path)


def _exchange(one: str, two: str) -> bool:
    """Exchange two names in one step; return whether the system did."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # an older C library
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _EXCHANGE) == 0)
