"""Write the zip file of a checkpoint with the bytes of ``torch.save``, or with fewer, and sum while writing.

``torch.save`` computes the CRC32 of a record and then writes it, so that processor and disk wait for each other. Here
threads sum a stretch while it and those after it are written.
"""

import pickle
import struct
import zlib
from collections import deque
from collections.abc import Collection
from concurrent.futures import Future
from functools import cache
from typing import IO, Any

import torch
from torch import Tensor, UntypedStorage

from q8lightning.checkpoint.file.crc32 import combine
from q8lightning.checkpoint.file.pack.compact_pickle import PICKLE, WORTHWHILE, compact_pickle, deflate
from q8lightning.checkpoint.file.pack.parts import Parts
from q8lightning.checkpoint.file.pack.small_tensors import SmallTensors
from q8lightning.checkpoint.load_locations import located
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.tree import leaves
from q8lightning.system.advice import advise
from q8lightning.system.private_names import ZIP_NAMES, is_there
from q8lightning.system.workers import Workers, count_workers

CHUNK = 2**25
"""Bytes that are summed and written at a time. Fewer would be no faster, and each time takes Python's lock."""

ALONE = 2**22
"""Bytes of the longest record that the thread which writes it also sums: asking another thread takes longer."""

SUMMING_THREADS = 2
"""The most threads that sum. One sums about as fast as another writes to the page cache; two are faster."""

ZIP64_LIMIT = 0xFFFFFFFF
"""Sizes and offsets from here on take 64 bits."""

_ARCHIVE = "archive"
"""The folder of all records, as ``torch.save`` names it when it is given an open file."""

_VERSION = "3"
"""Of torch's format for zip files, the same since torch 1.6."""

_DEFLATED = 8
"""The number of the method by which a zip's records are compressed; 0 stands for none."""

_NAME_IS_UTF8, _SUM_FOLLOWS = 0x0800, 0x0008
_LOCAL, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_END64, _END64_LOCATOR, _END = b"PK\x06\x06", b"PK\x06\x07", b"PK\x05\x06"


def save(obj: Any, file: IO[bytes], compact: bool = False) -> None:
    """Write ``obj`` to an open file with the bytes of ``torch.save``, except for the file's id.

    ``torch.save`` itself writes where the installed torch does not have what this needs, or an option is set that this
    does not know.

    Args:
        obj: What to save.
        file: Open for writing, at the place where the archive begins.
        compact: Write fewer bytes in less time if there are payloads, which only q8lightning loads anyway. Payloads
            then share buffers, small tensors are stored together, and the pickle is compressed. Small tensors are
            stored apart if an object that is no container shares their memory.

    Raises:
        OSError: If the file cannot be written.
    """
    start = file.tell()
    found = [leaf for _, leaf in leaves(obj)] if compact else []
    payloads = list({id(leaf): leaf for leaf in found if isinstance(leaf, QuantizedTensor)}.values())
    with Parts(payloads) as parts:
        for small in (SmallTensors(found), None) if payloads else (None,):
            try:
                if _knows_torch():
                    _save(obj, file, parts if payloads else None, small)
                    return
            except SharedMemory:
                pass
            except UnknownRequest as request:
                _say_that_torch_writes(str(request))
            file.seek(start)
            file.truncate()
    torch.save(obj, file)


def _save(obj: Any, file: IO[bytes], parts: Parts | None, small: SmallTensors | None) -> None:
    # The private function pickles, and calls write_record(name, data, nbytes) for the pickle and then for each storage.
    # It is the same in torch 2.6 to 2.13; _knows_torch looks.
    serialization: Any = torch.serialization
    module = compact_pickle(parts, small) if parts else pickle
    compressed, unwanted = {PICKLE} if parts else set[str](), small.originals if small else set[int]()
    with (
        located(small.tags if small else {}),
        ZipWriter(file, serialization._get_storage_alignment(), compressed, unwanted) as archive,
    ):
        serialization._save(obj, archive, module, serialization.DEFAULT_PROTOCOL, False)


def _knows_torch() -> bool:
    """Whether torch has what this needs, and no option is set that this does not know."""
    serialization: Any = torch.serialization
    if not all(map(is_there, ZIP_NAMES)):
        return False
    try:
        return bool(serialization.get_crc32_options() and not serialization._serialization_tls.skip_data)
    except AttributeError:
        return False


@cache
def _say_that_torch_writes(request: str) -> None:
    """Say once that ``torch.save`` writes; ``check_names`` cannot, since torch asks for this only when it saves."""
    advise(
        f"torch {torch.__version__} asks for {request} when it saves, which this q8lightning does not have: torch.save"
        " writes the files, more slowly and larger; a newer q8lightning may have it"
    )


class UnknownRequest(AttributeError):
    """A later torch asks its zip writer for something that this one does not have."""


class SharedMemory(Exception):
    """Something else that is saved shares the memory of a small tensor."""


class ZipWriter:
    """Writes records one after the other, in place of torch's ``PyTorchFileWriter``.

    Leaving its context completes the file, unless there was an error, and ends its threads in any case.

    Args:
        file: Open for writing, at the place where the archive begins.
        alignment: Content of records begins at multiples of so many bytes, so that it can be memory-mapped.
        compressed: Names of records to compress. Those cannot be memory-mapped.
        unwanted: Addresses of storages that must not be written.
    """

    def __init__(
        self, file: IO[bytes], alignment: int = 64, compressed: Collection[str] = (), unwanted: Collection[int] = ()
    ) -> None:
        self._file = file
        self._alignment = alignment
        self._compressed = compressed
        self._unwanted = unwanted
        self._workers = Workers(count_workers(SUMMING_THREADS))
        self._position = 0
        self._directory: list[bytes] = []
        self._names = 0
        self._sums = 0

    def __getattr__(self, name: str) -> Any:
        raise UnknownRequest(name)

    def __enter__(self) -> "ZipWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._workers:  # in any case
            if kind is None:
                self._write_end()

    def write_record(self, name: str, data: bytes | str | UntypedStorage, nbytes: int) -> None:
        """Append a record.

        Args:
            name: Its path in the archive.
            data: Its content, in host memory. It may change when this has returned.
            nbytes: The number of its bytes.

        Raises:
            OSError: If the file cannot be written.
            SharedMemory: If the data is an unwanted storage.
        """
        if isinstance(data, UntypedStorage) and data.data_ptr() in self._unwanted:
            raise SharedMemory
        path, start, content = f"{_ARCHIVE}/{name}".encode(), self._position, _bytes_of(data)[:nbytes]
        compressed = deflate(content) if name in self._compressed and 0 < nbytes <= WORTHWHILE else None
        size64, offset64 = nbytes >= ZIP64_LIMIT, start >= ZIP64_LIMIT
        offset = struct.pack("<Q", start) if offset64 else b""
        local = _zip64(struct.pack("<QQ", nbytes, 0) if size64 else b"", offset)
        before = start + 30 + len(path) + len(local) + 4
        local += _padding(-before % self._alignment)
        flags = _NAME_IS_UTF8 | (_SUM_FOLLOWS if nbytes else 0)
        method = 0 if compressed is None else _DEFLATED
        fixed = (0, 0, flags, method, 0, 0)  # versions, flags, method, no time: the same content, the same file
        self._write(_LOCAL + struct.pack("<5H3I2H", *fixed[1:], 0, 0, 0, len(path), len(local)) + path + local)
        if compressed is None:
            stored, crc = nbytes, self._write_and_sum(content)
        else:
            stored, crc = len(compressed), zlib.crc32(content)
            self._write(compressed)
        if nbytes:
            layout = "<I2Q" if size64 or offset64 else "<3I"
            self._write(_DESCRIPTOR + struct.pack(layout, crc, stored, nbytes))
        central = _zip64(struct.pack("<QQ", nbytes, stored) if size64 else b"", offset)
        sizes, lengths = (min(stored, ZIP64_LIMIT), min(nbytes, ZIP64_LIMIT)), (len(path), len(central), 0)
        entry = struct.pack("<6H3I3H2H2I", *fixed, crc, *sizes, *lengths, 0, 0, 0, min(start, ZIP64_LIMIT))
        self._directory.append(_CENTRAL + entry + path + central)
        self._names = zlib.crc32(path, self._names)
        self._sums = zlib.crc32(struct.pack("<I", crc), self._sums)

    def _write_and_sum(self, content: memoryview) -> int:
        """Write ``content``; return its CRC32."""
        if len(content) <= ALONE:
            self._write(content)
            return zlib.crc32(content)
        crc = 0
        pending: deque[tuple[Future[int], int]] = deque()
        for start in range(0, len(content), CHUNK):
            chunk = content[start : start + CHUNK]
            pending.append((self._workers.submit(zlib.crc32, chunk), len(chunk)))
            self._write(chunk)
            while pending and (pending[0][0].done() or len(pending) > 4 * SUMMING_THREADS):
                crc = _add(crc, *pending.popleft())
        while pending:
            crc = _add(crc, *pending.popleft())
        return crc

    def _write_end(self) -> None:
        self.write_record("version", f"{_VERSION}\n", 2)
        # Two numbers of 20 digits that tell contents apart. Torch derives them from names and sums, too.
        identity = f"{self._names:020}{self._sums:020}"
        self.write_record(".data/serialization_id", identity, len(identity))
        start, directory, count = self._position, b"".join(self._directory), len(self._directory)
        self._write(directory)
        end = self._position
        self._write(_END64 + struct.pack("<Q2H2I4Q", 44, 0x031E, 45, 0, 0, count, count, len(directory), start))
        self._write(_END64_LOCATOR + struct.pack("<IQI", 0, end, 1))
        short = (min(count, 0xFFFF), min(count, 0xFFFF), min(len(directory), ZIP64_LIMIT), min(start, ZIP64_LIMIT))
        self._write(_END + struct.pack("<4H2IH", 0, 0, *short, 0))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._position += len(data)


def _add(crc: int, following: "Future[int]", length: int) -> int:
    return combine(crc, following.result(), length)


def _bytes_of(data: Any) -> memoryview:
    if isinstance(data, str):
        return memoryview(data.encode())
    if isinstance(data, bytes):
        return memoryview(data)
    if not isinstance(data, UntypedStorage) or data.device.type != "cpu":
        raise UnknownRequest(f"a record of {type(data).__name__}")
    tensor: Tensor = torch.empty(0, dtype=torch.uint8, device="cpu").set_(data)
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # numpy says so from Python 3.12 on


def _zip64(sizes: bytes, offset: bytes) -> bytes:
    """Return the extra field for what 32 bits do not hold."""
    return struct.pack("<2H", 1, len(sizes + offset)) + sizes + offset if sizes or offset else b""


def _padding(nbytes: int) -> bytes:
    """Return an extra field of ``nbytes + 4`` bytes, by the name that torch gives it."""
    return b"FB" + struct.pack("<H", nbytes) + b"Z" * nbytes
