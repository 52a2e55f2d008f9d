"""One file of an open checkpoint in shards: what is where in it, and whether that is what was written."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from q8lightning.checkpoint.file.open_file import OpenFile
from q8lightning.checkpoint.sharded.check import checked_table
from q8lightning.checkpoint.sharded.shard_file import Chunk, has_its_sum


class OpenShard:
    """The file of one process, open as long as this object exists.

    Args:
        path: The file.
        shards: What ``meta.pt`` says of the files; None for a folder without that, whose files have no table either.

    Attributes:
        path: The file.
        chunks: What is in it; empty for a file without a table.

    Raises:
        CorruptCheckpointError: If it is of another save than ``meta.pt``, or its end is not what was written.
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, path: Path, shards: Mapping[str, Any] | None) -> None:
        self.path = path
        self._file = OpenFile(path)
        self.chunks: list[Chunk] = []
        self._has_table = shards is not None
        if shards is not None:
            self.chunks = checked_table(path, shards).chunks
        self._at = {chunk.start: chunk for chunk in self.chunks}

    def chunk_at(self, start: int) -> Chunk | None:
        """Return the chunk that begins at a position; None if the file does not say so."""
        return self._at.get(start)

    def reader(self, chunk: Chunk) -> io.BufferedReader:
        """Return a view of a chunk."""
        return self._file.reader(chunk.start, chunk.nbytes)

    def is_whole(self, chunk: Chunk) -> bool:
        """Whether a chunk is what was written: by the table's sum, or by the sums that ``torch.save`` writes."""
        with self.reader(chunk) as reader:
            if not self._has_table:
                return _has_sums_of_torch(reader)
            return has_its_sum(reader, chunk)


def _has_sums_of_torch(file: IO[bytes]) -> bool:
    """Whether what ``torch.save`` wrote has the CRC32 of its records; those that have none count as whole."""
    try:
        with zipfile.ZipFile(file) as archive:
            return not any(record.CRC for record in archive.infolist()) or archive.testzip() is None
    except Exception:  # damage of the table of contents or of a header surfaces in many ways
        return False
