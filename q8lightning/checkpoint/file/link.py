"""Point a link at a newer checkpoint, so that there is a link at every moment."""

import os
import shutil
from contextlib import suppress

from q8lightning.checkpoint.file.temporaries import TEMPORARY_SUFFIX
from q8lightning.checkpoint.file.write import write_durably
from q8lightning.system.paths import PathLike


def link_checkpoint(target: PathLike, path: PathLike) -> None:
    """Make ``path`` a relative link to ``target``, in one step; a copy of it where the system has no links.

    What was at ``path`` is replaced, a folder too.

    Raises:
        OSError: If there can be neither a link nor a copy; what was at ``path`` stays, unless it was a folder.
    """
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    temporary = os.path.join(folder, f".{name}{TEMPORARY_SUFFIX}")  # one that a killed process left is replaced
    with suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        os.symlink(os.path.relpath(target, folder), temporary)
    except OSError:  # a right that not every user has on Windows
        with open(target, "rb") as file:
            write_durably(path, lambda copy: shutil.copyfileobj(file, copy))
    else:
        os.replace(temporary, path)
