"""Read long stretches of a file by several threads, and sum them while they are in the cache."""

import zlib
from concurrent.futures import Future
from typing import Any

from q8lightning.checkpoint.file.crc32 import combine
from q8lightning.checkpoint.file.open_file import FileView, OpenFile, reads_in_parallel
from q8lightning.system.workers import Workers

LONG = 2**22
"""Bytes from which on threads read a stretch."""

_PART = 2**23
"""Bytes of a stretch that one thread reads, a multiple of the step."""

_STEP = 2**20
"""Bytes that are read and then summed, small enough for the cache."""


class SummedFile(FileView):
    """A file for ``torch.load``, which reads each record in one go.

    Args:
        file: The file. It stays open when this is closed.
        workers: Threads that read.
        sums: Whether to sum what is read.
    """

    def __init__(self, file: OpenFile, workers: Workers, sums: bool = True) -> None:
        super().__init__(file)
        self._workers = workers
        self._wants_sums = sums
        self._sums: dict[tuple[int, int], int] = {}
        self._left_out: set[int] = set()

    def leave_out(self, starts: set[int]) -> None:
        """Do not sum the stretches that begin at these positions."""
        self._left_out = starts

    def sum_of(self, start: int, nbytes: int) -> int | None:
        """Return the CRC32 of a stretch as it was read; None if it was not read in one go."""
        return self._sums.get((start, nbytes))

    def readinto(self, buffer: Any) -> int:
        """Read from the current position on until ``buffer`` is full or the file ends."""
        target = memoryview(buffer).cast("B")
        nbytes = max(0, min(len(target), self._file.size - self._position))
        if nbytes < LONG or not reads_in_parallel():
            return super().readinto(target[:nbytes])
        self._read_in_parts(target[:nbytes], self._position)
        self._position += nbytes
        return nbytes

    def _read_in_parts(self, target: memoryview, start: int) -> None:
        wants_sum = self._wants_sums and start not in self._left_out
        parts = [target[first : first + _PART] for first in range(0, len(target), _PART)]
        pending: list[Future[int]] = []
        for index, part in enumerate(parts):
            pending.append(self._workers.submit(self._read_part, part, start + index * _PART, wants_sum))
        crc = 0
        for part, future in zip(parts, pending, strict=True):
            crc = combine(crc, future.result(), len(part))
        if wants_sum:
            self._sums[start, len(target)] = crc

    def _read_part(self, part: memoryview, position: int, wants_sum: bool) -> int:
        """Fill ``part`` from the file; return its CRC32, 0 if that is not wanted."""
        crc = 0
        for first in range(0, len(part), _STEP):
            step = part[first : first + _STEP]
            if self._file.read_at(position + first, step) < len(step):
                raise OSError(f"{self._file.path} became shorter while it was read")
            if wants_sum:
                crc = zlib.crc32(step, crc)
        return crc
