"""Write a checkpoint as ``torch.save`` does, but with one new tensor in memory at a time.

``torch.save`` pickles everything before it writes the first tensor, so all tensors must exist at once. Here the bytes
of a tensor are written when the pickle gets to it. The pickle needs their checksums, so it is written last. Readers
find records by the zip's table of contents, so the order is free.
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

from q8lightning.checkpoint.file.pack.compact_pickle import PICKLE
from q8lightning.checkpoint.file.pack.small_tensors import SmallTensors
from q8lightning.checkpoint.file.pack.zip_writer import ZipWriter
from q8lightning.checkpoint.payload import QuantizedTensor

PROTOCOL = 2
"""The pickle protocol of ``torch.save``, which every reader of weights knows."""

Store = Callable[["Tensor | QuantizedTensor", str], "Stored"]
"""Writes the bytes of a tensor, given the device that it loads to; returns what replaces the tensor."""

Replace = Callable[[Any, Store], Any]
"""Returns what is written in place of an object: the object, another one, or a :class:`Stored` from the store."""


class Stored:
    """A tensor or payload whose bytes are in the file already. It pickles as the tensor and takes no memory."""

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
    """Write ``content`` so that ``torch.load`` reads it, replacing objects on the way.

    Args:
        content: What to write. Storages that several tensors share are written once.
        file: The binary file.
        replace: Called for every object that is pickled. If it returns the same :class:`Stored` twice, both load as one
            object.
        location: Returns where a storage of ``content`` loads to, given its ``_cdata``.
        small: Tensors of ``content`` to store together, which makes the file as small as the callback's; None for a
            file that loads without q8lightning.

    Raises:
        SharedMemory: If something else shares memory with a tensor of ``small``.
    """
    originals = small.originals if small is not None else set[int]()
    with ZipWriter(file, compressed=set[str]() if small is None else {PICKLE}, unwanted=originals) as archive:
        # There is no ".format_version": it would promise that records are in the order of their numbers.
        archive.write_record("byteorder", sys.byteorder, len(sys.byteorder))
        pickler = _Pickler(archive, replace, location, small)
        with _recursing():
            pickler.dump(content)
        archive.write_record(PICKLE, pickler.pickled, len(pickler.pickled))


@contextmanager
def _recursing() -> Iterator[None]:
    """Allow containers as deep as ``torch.save`` does: this pickler makes five calls where that makes one."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(5 * limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


class _Pickler(pickle._Pickler):
    """The pickler in Python, because the one in C cannot replace an object by one that was pickled before."""

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
        """Storages of the content with the number and the location of their records. The content keeps them alive."""

    @property
    def pickled(self) -> bytes:
        return self._buffer.getvalue()

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        """Pickle an object of the content, or what replaces it."""
        super().save(self._replace(obj, self.store), save_persistent_id)  # type: ignore[misc]  # not in typeshed

    def reducer_override(self, obj: Any) -> Any:
        """Pickle a small tensor as a part of the memory that it shares with others in the file."""
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
        reduced: Any = value.__reduce_ex__(PROTOCOL)
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
    """Return the persistent id by which a storage is found in the file; see ``torch.serialization._save``."""
    if isinstance(storage, UntypedStorage):
        return ("storage", UntypedStorage, key, location, storage.nbytes())
    typed: Any = storage  # its methods have no types
    return ("storage", getattr(torch, typed._pickle_storage_type()), key, location, typed._size())
