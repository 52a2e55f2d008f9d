"""Let a library write a file by its path; it takes its name when it is whole and on the disk."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from q8lightning.checkpoint.file.write import flush_directory
from q8lightning.export.errors import ExportError


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give the path of a file to write, in a folder of its own beside the target, where more files may lie meanwhile.

    After an error, an old target is as it was, and nothing is left. Missing folders are made.

    Raises:
        ExportError: If the target is a folder.
    """
    if target.is_dir():
        raise ExportError(f"{target} is a folder, but the format is one file; name the file to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        path = Path(folder) / target.name
        yield path
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, target)
    with suppress(OSError):
        flush_directory(target.parent)
