"""A file whose long stretches several threads read at once, and sum while they are in the cache."""

import io
import os
import zlib
from concurrent.futures import Future
from typing import Any

from q8lightning.checkpoint.crc32 import combine
from q8lightning.quantization.cpu import use_huge_pages
from q8lightning.quantization.workers import Workers

LONG = 2**22
"""Bytes from which on a stretch is read by threads."""

_PART = 2**23
"""Bytes that a thread reads in one go, a multiple of the step."""

_STEP = 2**20
"""Bytes that are summed as soon as they are read."""


class SummedFile(io.RawIOBase):
    """A file to read from; give it to ``torch.load``, which reads each record in one go.

    Args:
        path: The file.
        workers: Threads that read.
        sums: Whether to sum what is read.
    """

    def __init__(self, path: str | os.PathLike[str], workers: Workers, sums: bool = True) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        self._size = os.fstat(self._file.fileno()).st_size
        self._position = 0
        self._workers = workers
        self._wants_sums = sums
        self._sums: dict[tuple[int, int], int] = {}

    def sum_of(self, start: int, nbytes: int) -> int | None:
        """Return the CRC32 of a stretch, as it was when it was read; None if it was not read in one go."""
        return self._sums.get((start, nbytes))

    def readinto(self, buffer: Any) -> int:
        """Read from the current position on until ``buffer`` is full or the file ends."""
        target = memoryview(buffer).cast("B")
        start = self._position
        nbytes = max(0, min(len(target), self._size - start))
        if nbytes < LONG or not hasattr(os, "preadv"):
            self._file.seek(start)
            nbytes = self._file.readinto(target[:nbytes])
        else:
            self._read_in_parts(target[:nbytes], start)
        self._position += nbytes
        return nbytes

    def _read_in_parts(self, target: memoryview, start: int) -> None:
        use_huge_pages(target)
        parts = [target[first : first + _PART] for first in range(0, len(target), _PART)]
        pending: list[Future[int]] = []
        for index, part in enumerate(parts):
            pending.append(self._workers.submit(self._read_part, part, start + index * _PART))
        crc = 0
        for part, future in zip(parts, pending, strict=True):
            crc = combine(crc, future.result(), len(part))
        if self._wants_sums:
            self._sums[start, len(target)] = crc

    def _read_part(self, part: memoryview, position: int) -> int:
        """Fill ``part`` from the file; return its CRC32, or 0 if nobody wants it."""
        crc = 0
        for first in range(0, len(part), _STEP):
            step = part[first : first + _STEP]
            done = 0
            while done < len(step):
                read = os.preadv(self._file.fileno(), [step[done:]], position + first + done)
                if read == 0:
                    raise OSError(f"{self._file.name} became shorter while it was read")
                done += read
            if self._wants_sums:
                crc = zlib.crc32(step, crc)
        return crc

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to another position."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def close(self) -> None:
        """Close the file; nobody may be reading."""
        self._file.close()
        super().close()
