"""The file of one process: chunks that DCP reads, and after them a table of what they are.

Each chunk is what ``torch.save`` writes for one shard, encoded or as it is, or for one value that is no tensor.
DCP finds chunks by their offsets, which are in ``.metadata``. Only the comparison of a file with its
sums reads the table: JSON, its checksum and its length (8 bytes each, little-endian), and :data:`MAGIC`.
"""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from io import BufferedIOBase, RawIOBase
from typing import IO, Any, NamedTuple, cast

import torch
import xxhash
from torch import Tensor

from q8lightning.checkpoint.file.write_behind import WriteBehind
from q8lightning.checkpoint.integrity import CorruptCheckpointError, bytes_of, checksum
from q8lightning.checkpoint.memory import is_ordinary
from q8lightning.checkpoint.payload import RAW, QuantizedTensor, elements_of, header_of_raw, rebuild_v1

MAGIC = b"q8shards"
"""The last eight bytes of the file of a process."""

_END = struct.Struct(f"<QQ{len(MAGIC)}s")

_STEP = 2**22
"""Bytes that are read and summed at a time."""


class Chunk(NamedTuple):
    """One chunk of a file.

    Attributes:
        name: The tensor or value, as messages name it.
        offsets: Where in the whole tensor the shard begins; empty for what is no tensor.
        start: Where in the file the chunk begins.
        nbytes: Its bytes.
        checksum: XXH3 of them (64 bits).
    """

    name: str
    offsets: tuple[int, ...]
    start: int
    nbytes: int
    checksum: int


class Item(NamedTuple):
    """What is to be written as one chunk.

    Attributes:
        name: As messages name it.
        offsets: See :class:`Chunk`.
        value: A payload, a tensor on the host, or any value that can be pickled.
    """

    name: str
    offsets: tuple[int, ...]
    value: Any


class _Summed:
    """Sums what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sum = xxhash.xxh3_64()
        self.nbytes = 0

    def write(self, data: Any) -> int:
        self.sum.update(data)
        self.nbytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Nothing: the file is flushed when it is complete."""


def write_shards(path: str, save: str, rank: int, items: Sequence[Item]) -> list[Chunk]:
    """Write the file of a process, and flush it to the disk.

    Args:
        path: Where to; nothing is there.
        save: The id of the save.
        rank: Of the process.
        items: What to write, in this order.

    Raises:
        OSError: If it cannot be written.
    """
    chunks: list[Chunk] = []
    start = 0
    with open(path, "xb") as file:
        with WriteBehind(file) as behind:
            for item in items:
                through = _Summed(cast("IO[bytes]", behind))
                torch.save(_stored(item, save), cast("IO[bytes]", through))
                chunks.append(Chunk(item.name, item.offsets, start, through.nbytes, through.sum.intdigest()))
                start += through.nbytes
            behind.write(_table(save, rank, chunks))
        file.flush()
        os.fsync(file.fileno())
    return chunks


class _Raw:
    """A tensor that is stored as it is, with its name and a checksum; unpickles as the tensor."""

    def __init__(self, tensor: Tensor, name: str, save: str) -> None:
        self._tensor, self._name, self._save = tensor, name, save

    def __reduce__(self) -> tuple[Any, ...]:
        found = checksum(header_of_raw(self._name, self._save), bytes_of(elements_of(self._tensor)))
        return rebuild_v1, (RAW, self._name, self._save, found, self._tensor)


def _stored(item: Item, save: str) -> Any:
    """Return what is pickled of an item: a file has the whole memory of each tensor, so that each has its own."""
    value = item.value
    if isinstance(value, QuantizedTensor):
        return value.replace_data(_alone(value.data)).of_save(save)
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return _Raw(_alone(value), item.name, save) if is_ordinary(value) and value.numel() else value


def _alone(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _table(save: str, rank: int, chunks: Sequence[Chunk]) -> bytes:
    text = json.dumps({"save": save, "rank": rank, "chunks": chunks}, separators=(",", ":")).encode()
    return text + _END.pack(xxhash.xxh3_64_intdigest(text), len(text), MAGIC)


class Table(NamedTuple):
    """What the end of a file says of it.

    Attributes:
        save: The id of the save that it is of.
        rank: Of the process that wrote it.
        chunks: Its chunks, in their order.
    """

    save: str
    rank: int
    chunks: list[Chunk]


def read_table(path: str | os.PathLike[str]) -> Table:
    """Return the table of a file.

    Raises:
        CorruptCheckpointError: If there is none, or it is not what was written.
        OSError: If there is no such file.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        try:
            file.seek(max(0, size - _END.size))
            checksum, nbytes, magic = _END.unpack(file.read())
            if magic != MAGIC or nbytes > size - _END.size:
                raise ValueError
            file.seek(size - _END.size - nbytes)
            text = file.read(nbytes)
            if xxhash.xxh3_64_intdigest(text) != checksum:
                raise ValueError
            return _table_of(json.loads(text), size)
        except (ValueError, KeyError, TypeError, RecursionError, struct.error):
            raise CorruptCheckpointError("the table at the end of the shard", path) from None


def _table_of(found: Any, size: int) -> Table:
    """Return what the table of a file of ``size`` bytes says; raise one of several errors if it is none."""
    chunks = [Chunk(name, tuple(offsets), *rest) for name, offsets, *rest in found["chunks"]]
    for chunk in chunks:
        numbers = (*chunk.offsets, chunk.start, chunk.nbytes, chunk.checksum)
        if not isinstance(chunk.name, str) or any(type(each) is not int or each < 0 for each in numbers):
            raise TypeError(chunk)
        if chunk.start + chunk.nbytes > size:
            raise ValueError(chunk)
    if not isinstance(found["save"], str) or type(found["rank"]) is not int:
        raise TypeError(found)
    return Table(found["save"], found["rank"], chunks)


def damaged_chunks(path: str | os.PathLike[str], table: Table) -> Iterator[Chunk]:
    """Yield the chunks of a file that are not what was written."""
    with open(path, "rb", buffering=0) as file:
        for chunk in table.chunks:
            file.seek(chunk.start)
            if not has_its_sum(file, chunk):
                yield chunk


def has_its_sum(file: RawIOBase | BufferedIOBase, chunk: Chunk) -> bool:
    """Whether what a file has from its position on is a chunk as it was written."""
    buffer = memoryview(bytearray(min(_STEP, chunk.nbytes)))
    found, left = xxhash.xxh3_64(), chunk.nbytes
    while left and (count := file.readinto(buffer[:left])):
        found.update(buffer[:count])
        left -= count
    return not left and found.intdigest() == chunk.checksum
