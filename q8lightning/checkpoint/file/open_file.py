"""Open a file once for all its readers, so that what they read belongs together.

A checkpoint is replaced by giving its name to another file. A reader that opens the name twice may read
two files, each of them whole, and compare one with the sums of the other.
"""

import errno
import io
import os
import threading
import weakref
from typing import Any


class OpenFile:
    """A file of this machine that several threads may read at once.

    It is closed at the end of its context, or with the last reference to it.

    Attributes:
        path: The name by which it was opened. It may be another file's by now.
        size: Its bytes.

    Raises:
        OSError: If it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = io.FileIO(self.path)
        self.close = weakref.finalize(self, self._file.close)
        self.size = os.fstat(self._file.fileno()).st_size
        self._turn = threading.Lock()

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_at(self, position: int, target: memoryview) -> int:
        """Fill ``target`` with the bytes from ``position`` on; return how many there were."""
        done = 0
        while done < len(target):
            read = self._read_some(position + done, target[done:])
            if read == 0:
                break
            done += read
        return done

    def _read_some(self, position: int, target: memoryview) -> int:
        if reads_in_parallel():
            return os.preadv(self._file.fileno(), [target], position)
        with self._turn:
            self._file.seek(position)
            return self._file.readinto(target) or 0

    def reader(self, start: int = 0, nbytes: int | None = None) -> io.BufferedReader:
        """Return a view with a position of its own. Closing that leaves the file open.

        Args:
            start: Where the view begins.
            nbytes: How long it is at most; None for all that follows.
        """
        return io.BufferedReader(FileView(self, start, nbytes))

    @property
    def address(self) -> str:
        """A path that leads to this very file as long as it is open; to map a file, one must open it by a path.

        Where the system has no such path, it is the file's name. On Windows an open file cannot be replaced.
        """
        address = f"/dev/fd/{self._file.fileno()}"
        return address if os.path.exists(address) else self.path

    def has_its_name(self) -> bool:
        """Whether the name still leads to this file."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False


def reads_in_parallel() -> bool:
    """Whether the system can read at a given position, so that threads need not take turns."""
    return hasattr(os, "preadv")


class FileView(io.RawIOBase):
    """Reads an open file, or a part of it, from a position of its own."""

    def __init__(self, file: OpenFile, start: int = 0, nbytes: int | None = None) -> None:
        self._file = file
        self._start = min(start, file.size)
        left = file.size - self._start
        self._size = left if nbytes is None else min(nbytes, left)
        self._position = 0

    @property
    def name(self) -> str:
        """The name by which the file was opened."""
        return self._file.path

    def readinto(self, buffer: Any) -> int:
        """Read from the current position on until ``buffer`` is full or the view ends."""
        target = memoryview(buffer).cast("B")[: max(self._size - self._position, 0)]
        read = self._file.read_at(self._start + self._position, target)
        self._position += read
        return read

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to another position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:  # as any file says, and ``zipfile`` expects
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readable(self) -> bool:
        """Whether one can read: always."""
        return True

    def seekable(self) -> bool:
        """Whether one can seek: always."""
        return True
