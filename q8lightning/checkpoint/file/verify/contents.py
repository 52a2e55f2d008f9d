"""Find out from the pickle of a checkpoint what its records hold, without running anything of the file."""

import pickle
import zipfile
from collections import Counter, OrderedDict
from typing import Any

from q8lightning.checkpoint.file.pack.compact_pickle import PICKLE
from q8lightning.checkpoint.format import read_header
from q8lightning.checkpoint.layout.parameter_names import parameters_of_states
from q8lightning.checkpoint.layout.sections import name_of, places_in
from q8lightning.checkpoint.payload import TENSOR, rebuild_v1
from q8lightning.checkpoint.tree import PATHS, leaves

WORTHWHILE = 64
"""Bytes of records that are summed in the time in which one byte of the pickle is read."""

_DATA = "/data/"
"""Between the folder of all records and the number of a storage."""


def describe_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> str:
    """Name the tensors that lie in a record; the record itself if the pickle does not tell any more."""
    folder, _, key = record.filename.rpartition(_DATA)
    if folder:
        try:
            with archive.open(f"{folder}/{PICKLE}") as content:
                names = _tensors_with(_Outline(content).load(), key)
        except Exception:
            names = []
        if names:
            more = "" if len(names) < 4 else f" and {len(names) - 3} more"
            return f"the tensor {', '.join(names[:3])}{more}"
    return f"the record {record.filename}"


def records_of_payloads(archive: zipfile.ZipFile) -> set[str]:
    """Return the names of the records that hold nothing but payloads, each of which has a checksum of its own.

    What lies between two payloads belongs to no tensor. Nothing is returned where reading the pickle would take longer
    than summing all records.
    """
    try:
        (whole,) = (each for each in archive.infolist() if each.filename.endswith(f"/{PICKLE}"))
        if sum(each.file_size for each in archive.infolist()) < WORTHWHILE * whole.file_size:
            return set()
        with archive.open(whole) as content:
            outline = _PayloadOutline(content)
            outline.load()
    except Exception:  # a damaged pickle, whose own record has a sum, or one of another kind
        return set()
    folder = whole.filename.removesuffix(f"/{PICKLE}")
    return {folder + _DATA + key for key, count in outline.payloads.items() if outline.references[key] == count}


class _Anything:
    """Stands for an object that is neither a container nor a primitive, so that no code of the file runs."""

    parts: tuple[Any, ...]

    def __new__(cls, *parts: Any) -> "_Anything":  # some objects are unpickled without __init__
        self = super().__new__(cls)
        self.parts = parts
        return self

    @property
    def shape(self) -> Any:
        """The shape of a tensor, as far as its parts tell; None for anything else."""
        kind, *rest = self.parts or ("",)
        match rest if type(kind) is str else self.parts:
            case [_Storage(), int(), shape, *_]:  # as torch rebuilds a tensor
                return shape
            case [str() as header, int(), _Anything(), int(), int()]:
                return tuple(read_header(header)["shape"])
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
    """Reads keys and storages of a checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Anything

    def persistent_load(self, pid: Any) -> Any:
        return _Storage(pid[2])


class _PayloadOutline(_Outline):
    """Counts the references to each storage, and those by buffers of payloads."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.references: Counter[str] = Counter()
        self.payloads: Counter[str] = Counter()
        self._buffers: dict[int, _Anything] = {}

    def find_class(self, module: str, name: str) -> Any:
        is_ours = (module, name) == (rebuild_v1.__module__, rebuild_v1.__name__)
        return self._rebuild if is_ours else super().find_class(module, name)

    def _rebuild(self, what: str, *arguments: Any) -> _Anything:
        if what == TENSOR:
            _, checksum, buffer, *_ = arguments
            if type(checksum) is int and id(buffer) not in self._buffers:
                self._buffers[id(buffer)] = buffer  # keeps it, so that nothing else gets its id
                self.payloads[buffer.parts[0]] += 1
        return _Anything(*arguments)

    def persistent_load(self, pid: Any) -> Any:
        storage = super().persistent_load(pid)
        self.references[storage] += 1
        return storage


class _Storage(str):
    """The key of a storage."""


def _tensors_with(checkpoint: Any, key: str) -> list[str]:
    """Return the names of the tensors that have a storage."""
    holders = _Holders(key)
    parameters, places = parameters_of_states(checkpoint), places_in(checkpoint)
    return [
        name_of(keys, parameters.get(keys[:-1]), places)
        for keys, leaf in leaves(checkpoint, PATHS)
        if holders.has(leaf)
    ]


class _Holders:
    """Tells whether objects have a storage in them. Each object is looked at once, however many share it."""

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
