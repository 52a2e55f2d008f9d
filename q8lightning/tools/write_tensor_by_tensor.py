"""Write a checkpoint tensor by tensor: what ``torch.save`` writes, with one new tensor in memory at a time.

``torch.save`` pickles everything before it writes the first tensor, so all of them must exist at once. Here the bytes
of a tensor go to the file when the pickle gets to it, and the pickle, which must know their checksums, goes last.
Readers find records by the zip's table of contents, so the order is free.
"""

import io
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch
from torch import Tensor, UntypedStorage
from torch.storage import TypedStorage

from q8lightning.checkpoint.file.compact_pickle import PICKLE
from q8lightning.checkpoint.file.small_tensors import SmallTensors
from q8lightning.checkpoint.file.zip_writer import ZipWriter
from q8lightning.checkpoint.payload import QuantizedTensor

PROTOCOL = 2
"""Of the pickle: that of ``torch.save``, which every reader of weights knows."""

Store = Callable[["Tensor | QuantizedTensor", str], "Stored"]
"""Writes a tensor's bytes, for the device that it loads to, and returns what to put in the tensor's place."""

Replace = Callable[[Any, Store], Any]
"""Returns what to write in the place of an object: the object, another one, or what it had stored."""


class Stored:
    """A tensor or payload whose bytes are in the file already; pickles as that. It takes no memory."""

    __slots__ = ("_reduced",)

    def __init__(self, reduced: tuple[Any, ...]) -> None:
        self._reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reduced


class _Record:
    """A storage whose bytes are in the file already."""

    __slots__ = ("persistent_id",)

    def __init__(self, persistent_id: tuple[Any, ...]) -> None:
        self.persistent_id = persistent_id


def write_tensor_by_tensor(
    content: Any,
    file: IO[bytes],
    replace: Replace,
    location: Callable[[int], str],
    small: SmallTensors | None = None,
) -> None:
    """Write ``content`` so that ``torch.load`` reads it, replacing objects as they come.

    Args:
        content: What to write. Storages that several tensors share are written once.
        file: Where to; binary.
        replace: Asked for every object that is pickled. An object that it stored twice loads as one if it returns the
            same :class:`Stored`.
        location: Where a storage of ``content`` loads to, by ``_cdata``.
        small: Tensors of ``content`` to store together, in a file that is as small as the callback's; None for one that
            needs no q8lightning.

    Raises:
        SharedMemory: If something else shares memory with one of those.
    """
    originals = small.originals if small is not None else set[int]()
    with ZipWriter(file, compressed=set[str]() if small is None else {PICKLE}, unwanted=originals) as archive:
        # No ".format_version", by which torch.save promises that records are in the order of their numbers.
        archive.write_record("byteorder", sys.byteorder, len(sys.byteorder))
        pickler = _Pickler(archive, replace, location, small)
        with _recursing():
            pickler.dump(content)
        archive.write_record(PICKLE, pickler.pickled, len(pickler.pickled))


@contextmanager
def _recursing() -> Iterator[None]:
    """Let containers be as deep as ``torch.save`` takes them: this pickler makes five calls where that makes one."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(5 * limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


class _Pickler(pickle._Pickler):
    """The pickler in Python, because the one in C does not let an object be replaced by one that was pickled before."""

    def __init__(
        self, archive: ZipWriter, replace: Replace, location: Callable[[int], str], small: SmallTensors | None
    ) -> None:
        self._buffer = io.BytesIO()
        super().__init__(self._buffer, protocol=PROTOCOL)
        self._archive = archive
        self._replace = replace
        self._location = location
        self._small = small
        self._count = 0
        self._written: dict[int, tuple[UntypedStorage, str, str]] = {}
        """Storages of the content, which live as long as it, with their record's number and location."""

    @property
    def pickled(self) -> bytes:
        return self._buffer.getvalue()

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Pickle an object of the content, or what takes its place."""
        super().save(self._replace(obj, self.store), save_persistent_id)  # type: ignore[misc]  # not in typeshed

    def reducer_override(self, obj: Any) -> Any:
        """Let a small tensor be the view of the storage that it shares with others in the file."""
        return NotImplemented if self._small is None else self._small.reduce(obj)

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        """Write a storage when the pickle gets to it."""
        if isinstance(obj, _Record):
            return obj.persistent_id
        if isinstance(obj, TypedStorage | UntypedStorage):
            storage = _untyped(obj)
            if storage._cdata not in self._written:
                tag = None if self._small is None else self._small.tags.get(storage.data_ptr())
                location = self._location(storage._cdata) if tag is None else tag
                self._written[storage._cdata] = (storage, self._write(storage), location)
            return _describe(obj, *self._written[storage._cdata][1:])
        return None

    def store(self, value: Tensor | QuantizedTensor, location: str) -> Stored:
        """Write the bytes of a tensor that is not kept, as they are now."""
        reduced: Any = value.__reduce_ex__(PROTOCOL)  # never the string that it also may be
        function, arguments, *state = reduced
        return Stored((function, tuple(self._store_part(part, location) for part in arguments), *state))

    def _store_part(self, part: Any, location: str) -> Any:
        if isinstance(part, Tensor):
            return self.store(part, location)
        if isinstance(part, TypedStorage | UntypedStorage):
            return _Record(_describe(part, self._write(_untyped(part)), location))
        return part

    def _write(self, storage: UntypedStorage) -> str:
        key = str(self._count)
        self._count += 1
        self._archive.write_record(f"data/{key}", storage, storage.nbytes())
        return key


def _untyped(storage: TypedStorage | UntypedStorage) -> UntypedStorage:
    return storage._untyped_storage if isinstance(storage, TypedStorage) else storage


def _describe(storage: TypedStorage | UntypedStorage, key: str, location: str) -> tuple[Any, ...]:
    """Return by what a storage is found in the file, as ``torch.serialization._save`` does."""
    if isinstance(storage, UntypedStorage):
        return ("storage", UntypedStorage, key, location, storage.nbytes())
    typed: Any = storage  # its methods have no types
    return ("storage", getattr(torch, typed._pickle_storage_type()), key, location, typed._size())
