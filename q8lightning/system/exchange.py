"""Put a folder in the place of another, in one step where the system can."""

import ctypes
import os
import shutil
import sys
from contextlib import suppress

_AT_FDCWD, _EXCHANGE = -100, 2
"""What Linux calls the working directory, and the wish to exchange two names."""


def put_in_place(new: str, target: str) -> None:
    """Let the folder ``new`` be ``target``; remove what was there.

    On Linux there is always something whole at ``target``. Elsewhere the old folder keeps a name beside it for a moment
    (the one of ``new`` with ``.old``), where it stays if the process is killed then.

    Raises:
        OSError: If that cannot be; both stay as they were.
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
    aside = f"{new}.old"
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(aside, target)
        raise
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
