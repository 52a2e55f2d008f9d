"""Pickle payloads as stretches of buffers that many share, with checksums that threads make ahead.

Pickling takes time for each object and holds Python's lock, for which training waits. A pickle has each buffer once,
and of a payload only its header, its checksum, and where in the buffer its bytes lie.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from q8lightning.checkpoint.integrity import bytes_of, checksum
from q8lightning.checkpoint.payload import TENSOR, QuantizedTensor, rebuild_v1
from q8lightning.system.workers import WORTH_THREADS, Workers, count_workers

_BATCHES = 4
"""Batches of payloads for each thread. With several, all threads end at about the same time."""


class _Part(NamedTuple):
    """A payload in the memory that it shares with others.

    Attributes:
        header: What the file says of it.
        checksum: As its file had it, if it was loaded; else None.
        buffer: ``[bytes]`` uint8, the whole memory.
        start: Where in the buffer it begins.
        content: Its bytes.
    """

    header: str
    checksum: int | None
    buffer: Tensor
    start: int
    content: memoryview


class Parts:
    """Knows what payloads on the host pickle as; within its context, threads compute their checksums.

    Args:
        payloads: They must not change before the context is left.
    """

    def __init__(self, payloads: Iterable[QuantizedTensor]) -> None:
        buffers: dict[int, tuple[Tensor, memoryview]] = {}
        self._parts: dict[int, _Part] = {}
        self._sums: dict[int, tuple[Future[list[int]], int]] = {}
        for payload in payloads:
            data = payload.data
            if type(data) is not Tensor or data.device.type != "cpu" or not data.is_contiguous():
                continue  # it pickles by itself
            storage, start = data.untyped_storage(), int(data.storage_offset())
            address = storage.data_ptr()
            if address not in buffers:
                whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
                buffers[address] = whole, bytes_of(whole)
            buffer, content = buffers[address]
            part = _Part(payload.header, payload.checksum, buffer, start, content[start : start + payload.nbytes])
            self._parts[id(payload)] = part
        unsummed = {key: part for key, part in self._parts.items() if part.checksum is None}
        total = sum(len(part.content) for part in unsummed.values())
        self._unsummed = unsummed if total >= WORTH_THREADS else {}
        threads = count_workers(max(1, len(self._unsummed)))
        self._workers = Workers(threads)
        self._batch_bytes = total / (_BATCHES * threads)

    def reduce(self, value: Any) -> Any:
        """Return what a payload pickles as; for anything else ``NotImplemented``, as ``reducer_override`` does."""
        part = self._parts.get(id(value))
        if part is None:
            return NotImplemented
        header, known, buffer, start, content = part
        if known is None and id(value) in self._sums:
            batch, number = self._sums[id(value)]
            known = batch.result()[number]
        elif known is None:
            known = checksum(header, content)
        return rebuild_v1, (TENSOR, header, known, buffer, start, len(content))

    def __enter__(self) -> "Parts":
        self._workers.__enter__()
        batch: dict[int, _Part] = {}
        nbytes = 0
        for key, part in self._unsummed.items():
            batch[key] = part
            nbytes += len(part.content)
            if nbytes >= self._batch_bytes:
                self._submit(batch)
                batch, nbytes = {}, 0
        if batch:
            self._submit(batch)
        return self

    def _submit(self, batch: Mapping[int, _Part]) -> None:
        future = self._workers.submit(_checksums, list(batch.values()))
        self._sums.update({key: (future, number) for number, key in enumerate(batch)})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._workers.__exit__(kind, error, traceback)


def _checksums(parts: Sequence[_Part]) -> list[int]:
    return [checksum(part.header, part.content) for part in parts]
