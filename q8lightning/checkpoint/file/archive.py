"""The zip around a checkpoint: compare every record with its CRC32 while the file is being loaded.

``torch.save`` writes the CRC32 of each record, ``torch.load`` does not look at it: a flipped bit in a raw tensor, a
learning rate or a key of the state dict would load without a word.
"""

import os
import pickle
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from q8lightning.checkpoint.file.load_errors import CONTENTS, damage_in
from q8lightning.checkpoint.file.open_file import OpenFile
from q8lightning.checkpoint.file.summed_file import LONG, SummedFile
from q8lightning.checkpoint.integrity import CorruptCheckpointError
from q8lightning.checkpoint.parameter_names import parameters_of_states
from q8lightning.checkpoint.sections import name_of
from q8lightning.checkpoint.tree import PATHS, leaves

CHUNK = 2**20
"""Bytes that are read at a time: they stay in the cache between the reading and the sum."""

THREADS = 4
"""Reading and CRC32 (about 2.5 GB a second a thread) release Python's lock."""


_HEADER, _NAME_LENGTH = 30, 26
"""Bytes of a record's header before its name, and where in it the lengths of the name and of the extra fields are."""

_FOLDER = 0x10
"""An attribute of a record that makes torch take it for a folder and return memory that nobody has written to."""


@contextmanager
def verified(file: OpenFile, through: SummedFile | None = None) -> Iterator[None]:
    """Verify a file in other threads while the block loads it.

    A file that is no zip, or one whose writer was told to leave the sums out (``set_crc32_options(False)``), has
    nothing to verify.

    Args:
        file: The file.
        through: What the block reads it through, if it does: long records are then not read once more.

    Raises:
        CorruptCheckpointError: If a record is not what was written. An error of the block about a file that is damaged
            becomes its cause.
    """
    verification = _Verification(file, through)
    try:
        yield
    except CorruptCheckpointError:
        raise  # it knows the tensor
    except Exception as error:
        verification.check(cause=error)
        if (damage := damage_in(error)) is not None:  # torch reads the table of contents more strictly than Python
            raise CorruptCheckpointError(damage, file.path) from error
        raise
    else:
        verification.check()
    finally:
        verification.stop()


class _Verification:
    """Threads that share the records of a file. They never keep the process alive."""

    def __init__(self, file: OpenFile, through: SummedFile | None) -> None:
        self._stopped = False
        self._file = file
        self._through = through
        self._long: list[zipfile.ZipInfo] = []
        """Records that the file sums when they are read."""
        self._damage: list[str] = []
        self._threads: list[threading.Thread] = []
        try:
            records = _records(file)
        except _DamagedArchive as error:
            self._damage.append(str(error))
            return
        if through is not None:
            self._long = [record for record in records if record.file_size >= LONG]
            records = [record for record in records if record.file_size < LONG]
        records.sort(key=lambda record: record.file_size, reverse=True)
        count = min(THREADS, max(1, (os.cpu_count() or 1) // 2), len(records))  # the rest of the cores decodes
        for start in range(count):
            thread = threading.Thread(target=self._verify, args=(records[start::count],), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _verify(self, records: list[zipfile.ZipInfo]) -> None:
        try:
            with self._file.reader() as reader, zipfile.ZipFile(reader) as archive:
                for record in records:
                    if not self._is_whole(archive, record):
                        self._damage.append(_describe(archive, record))
                    if self._stopped or self._damage:
                        return
        except Exception as error:
            self._damage.append(f"{CONTENTS}: {error}")

    def _is_whole(self, archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
        if record.external_attr & _FOLDER:
            return False
        try:
            with archive.open(record) as content:
                found = self._sum_as_read(record)
                if found is not None:
                    return found == record.CRC
                while not self._stopped and content.read(CHUNK):
                    pass
        except Exception:  # a wrong sum, or any of the ways in which a damaged header surfaces
            return False
        return True

    def _sum_as_read(self, record: zipfile.ZipInfo) -> int | None:
        """Return the CRC32 of what the file read where torch looks for the record, None if it did not."""
        if self._through is None or record.compress_type != zipfile.ZIP_STORED:
            return None
        lengths = bytearray(4)
        self._file.read_at(record.header_offset + _NAME_LENGTH, memoryview(lengths))
        name, extra = struct.unpack("<2H", lengths)
        return self._through.sum_of(record.header_offset + _HEADER + name + extra, record.file_size)

    def check(self, cause: Exception | None = None) -> None:
        """Wait for the threads; raise CorruptCheckpointError if the file is damaged."""
        for thread in self._threads:
            thread.join()
        if self._long and not self._damage:
            self._verify(self._long)
        if self._damage:
            raise CorruptCheckpointError(self._damage[0], self._file.path) from cause

    def stop(self) -> None:
        """End the threads, whose answer nobody waits for any more."""
        self._stopped = True
        for thread in self._threads:
            thread.join()


class _DamagedArchive(Exception):
    """Not even the list of records can be read."""


def _records(file: OpenFile) -> list[zipfile.ZipInfo]:
    """Return the records that have a sum to compare with; none if the file is no zip."""
    with file.reader() as reader:
        beginning = reader.read(4)
        if len(beginning) < 4:
            raise _DamagedArchive(f"the file ({len(beginning)} bytes are left)")
        begins = beginning == b"PK\x03\x04"
        try:
            if not begins and not zipfile.is_zipfile(reader):
                return []
            with zipfile.ZipFile(reader) as archive:
                records = archive.infolist()
        except Exception:  # a damaged table of contents surfaces in many ways
            raise _DamagedArchive(CONTENTS) from None
    if not begins:
        raise _DamagedArchive("the beginning of the file")
    return records if any(record.CRC for record in records) else []


def _describe(archive: zipfile.ZipFile, damaged: zipfile.ZipInfo) -> str:
    """Say what a record holds: the tensors that lie in it, as far as the file still tells."""
    folder, _, key = damaged.filename.rpartition("/data/")
    if folder:
        try:
            with archive.open(f"{folder}/data.pkl") as content:
                names = _tensors_with(_Outline(content).load(), key)
        except Exception:
            names = []
        if names:
            more = "" if len(names) < 4 else f" and {len(names) - 3} more"
            return f"the tensor {', '.join(names[:3])}{more}"
    return f"the record {damaged.filename}"


class _Anything:
    """Stands for every object of a checkpoint that is neither a container nor a primitive; runs no code of the file."""

    parts: tuple[Any, ...]

    def __new__(cls, *parts: Any) -> "_Anything":  # some objects are unpickled without __init__
        self = super().__new__(cls)
        self.parts = parts
        return self

    @property
    def shape(self) -> Any:
        """Of a tensor, as far as its parts say it; None of anything else."""
        kind, *rest = self.parts or ("",)
        match rest if type(kind) is str else self.parts:
            case [_Storage(), int(), shape, *_]:  # as torch rebuilds a tensor
                return shape
            case [dict() as header, _Anything()]:
                return header.get("shape")
            case [_Anything(parts=[*_, list() as shapes, list()]), int() as number] if number < len(shapes):
                return shapes[number]
        return None

    def __setstate__(self, state: Any) -> None:
        self.parts += (state,)

    def append(self, part: Any) -> None:
        self.parts += (part,)

    def extend(self, parts: Any) -> None:
        self.parts += tuple(parts)

    def __setitem__(self, key: Any, part: Any) -> None:
        self.parts += (part,)


class _Outline(pickle.Unpickler):
    """Reads the keys and the storages of a checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Anything

    def persistent_load(self, pid: Any) -> Any:
        return _Storage(pid[2])


class _Storage(str):
    """The key of a storage."""


def _tensors_with(checkpoint: Any, key: str) -> list[str]:
    """Return the names of the tensors that have a storage."""
    holders = _Holders(key)
    parameters = parameters_of_states(checkpoint)
    return [name_of(keys, parameters.get(keys[:-1])) for keys, leaf in leaves(checkpoint, PATHS) if holders.has(leaf)]


class _Holders:
    """Tells whether objects have a storage in them; each is looked at once, since many may share one."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._known: dict[int, bool] = {}

    def has(self, value: Any) -> bool:
        if isinstance(value, _Storage):
            return value == self._key
        if not isinstance(value, _Anything):
            return False
        if id(value) not in self._known:
            self._known[id(value)] = False  # while its parts are looked at, of which it may be one
            self._known[id(value)] = any(self.has(part) for _, part in leaves(value.parts))
        return self._known[id(value)]
