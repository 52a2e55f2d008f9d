"""Open a checkpoint in shards by one process: its tensors are read one by one, each compared with its sums.

Folders of plain Lightning and of DCP alone are opened, too. They have no table, so that their chunks are compared with
the CRC32 that ``torch.save`` writes, and a file does not tell of which save it is.
"""

import os
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from q8lightning.checkpoint.file.load_errors import explained
from q8lightning.checkpoint.integrity import CorruptCheckpointError, is_verifying, save_of
from q8lightning.checkpoint.layout.places import VERSION_KEY
from q8lightning.checkpoint.layout.sections import OPTIMIZER_STATES, STATE_DICT, SUMMARY_KEY
from q8lightning.checkpoint.loading import keep_encoded
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.sharded.check import check_metadata, describe_chunk, read_meta, shards_in
from q8lightning.checkpoint.sharded.folder import META, METADATA, OPTIMIZER
from q8lightning.checkpoint.sharded.read.metadata_file import load_metadata
from q8lightning.checkpoint.sharded.read.open_shard import OpenShard
from q8lightning.checkpoint.sharded.read.unread import StoredAs, UnreadTensor
from q8lightning.checkpoint.sharded.shard_file import Chunk
from q8lightning.checkpoint.tree import Keys

_WEIGHTS = "model"
"""What FSDPStrategy calls the state of the model."""


class OpenFolder:
    """An open checkpoint in shards; its files stay open as long as this object exists.

    Args:
        path: The folder.
        trust: Also make objects of classes that ``torch.load(weights_only=True)`` refuses, which can run code of the
            files.

    Attributes:
        path: The folder.
        size: The bytes of its files.
        meta: What of the checkpoint is neither of the model nor of the optimizers, encoded as it is; empty for a folder
            of DCP alone.
        has_table: Whether its files say what is in them and of which save they are.
        lacks: What is wrong with whole files: those that are not there, of another save, or shorter than they were.

    Raises:
        CorruptCheckpointError: If ``meta.pt`` or ``.metadata`` is not what was saved, or not there.
        UnpicklingError: If ``.metadata`` or ``meta.pt`` has objects of unknown classes, and ``trust`` is not set.
        ValueError: If DCP wrote the folder in another way than by ``torch.save``.
    """

    def __init__(self, path: str | os.PathLike[str], trust: bool = False) -> None:
        self.path = Path(path)
        self._weights_only = not trust
        names = sorted(os.listdir(path))
        self.size = sum((self.path / name).stat().st_size for name in names)
        self.meta: dict[str, Any] = {}
        if META in names:
            with keep_encoded():
                self.meta = read_meta(path, self._weights_only)
        elif any(map(save_of, names)):
            raise CorruptCheckpointError(f"the checkpoint (it lacks {META})", path)
        shards = shards_in(self.meta)
        data = check_metadata(self.path, shards)
        try:
            self._metadata: Metadata = load_metadata(data, trust)
        except pickle.UnpicklingError:
            raise
        except Exception as error:
            raise CorruptCheckpointError(METADATA, path) from error
        places = self._metadata.storage_data.values()
        for through in filter(None, (getattr(place, "transform_descriptors", None) for place in places)):
            raise ValueError(f"its chunks went through {through}; load it with torch.distributed.checkpoint")
        self.has_table = shards is not None
        expected = {place.relative_path for place in places}
        if shards is not None:
            expected |= shards["files"].keys()
        self._files: dict[str, OpenShard] = {}
        self.lacks: list[CorruptCheckpointError] = []
        strangers = sorted(name for name in names if name.endswith(".distcp") and name not in expected)
        for name in sorted(expected):
            try:
                self._files[name] = OpenShard(self.path / name, shards)
            except CorruptCheckpointError as error:
                self.lacks.append(error)
            except FileNotFoundError:
                beside = f"; {strangers[0]} is of another save" if strangers else ""
                self.lacks.append(CorruptCheckpointError(f"the checkpoint (it lacks the shard {name}{beside})", path))

    @property
    def files(self) -> list[OpenShard]:
        """The files of its processes that are there and of this save."""
        return list(self._files.values())

    def content(self) -> dict[str, Any]:
        """Return what Lightning's own consolidation makes of the folder, with every tensor unread.

        The states of optimizers go by the names of parameters, as DCP has them.

        Raises:
            CorruptCheckpointError: If a value that is no tensor is not what was saved.
        """
        found: dict[Any, Any] = {key: value for key, value in self.meta.items() if key != SUMMARY_KEY}
        for name in self._names():
            known = self._metadata.state_dict_metadata[name]
            value = self.tensor(name, known) if isinstance(known, TensorStorageMetadata) else self._value(name)
            _put(found, self._keys(name), value)
        if VERSION_KEY in self.meta:
            found = _as_lightning(found)
        if SUMMARY_KEY in self.meta:
            found[SUMMARY_KEY] = self.meta[SUMMARY_KEY]
        return found

    def find(self, weight: str) -> tuple[str, TensorStorageMetadata]:
        """Return by which name DCP knows a weight of the model, and what of it.

        Raises:
            KeyError: If there is none.
        """
        for prefix in (STATE_DICT, _WEIGHTS):
            found = self._metadata.state_dict_metadata.get(f"{prefix}.{weight}")
            if isinstance(found, TensorStorageMetadata):
                return f"{prefix}.{weight}", found
        raise KeyError(weight)

    def tensor(self, name: str, known: TensorStorageMetadata) -> UnreadTensor:
        """Return a tensor of those that DCP knows."""
        read, look = partial(self._whole, name, known), partial(self._look, name, known)
        return UnreadTensor(tuple(known.size), known.properties.dtype, read, look)

    def shards(self, name: str, known: TensorStorageMetadata) -> Iterator[tuple[ChunkStorageMetadata, Any]]:
        """Yield what is stored of a tensor, encoded if it is, after where in the tensor it is."""
        for chunk in known.chunks:
            file, place = self._place(MetadataIndex(name, chunk.offsets))
            yield chunk, self.load(file, place)

    def load(self, file: str, chunk: Chunk, check: bool = True, to: str = "cpu") -> Any:
        """Return what a chunk holds, encoded if it is.

        Args:
            file: The name of the file.
            chunk: Which part of it.
            check: Compare it with its sum, unless verification is off.
            to: ``"meta"`` to leave out the content of tensors.

        Raises:
            CorruptCheckpointError: If it is not what was saved.
        """
        if file not in self._files:
            raise self.lacks[0]
        opened = self._files[file]
        if check and is_verifying() and not opened.is_whole(chunk):
            raise CorruptCheckpointError(describe_chunk(chunk), opened.path)
        with explained(opened.path), keep_encoded(), opened.reader(chunk) as reader:
            return torch.load(reader, map_location=to, weights_only=self._weights_only)

    def load_at(self, file: str, start: int, nbytes: int) -> Any:
        """Return what a chunk holds that DCP does not know, from where ``meta.pt`` says that it is."""
        known = self._files[file].chunk_at(start) if file in self._files else None
        return self.load(file, known or Chunk(f"at {start}", (), start, nbytes, 0))

    def damage(self) -> Iterator[CorruptCheckpointError]:
        """Compare everything with its sums; yield what is not what was saved."""
        yield from self.lacks
        for file in self._files.values():
            chunks = file.chunks if self.has_table else self._chunks_in(file.path.name)
            for each in chunks:
                if not file.is_whole(each):
                    yield CorruptCheckpointError(describe_chunk(each), file.path)

    def _names(self) -> list[str]:
        """Return the names by which DCP knows what is in the folder, in the order of the states that were saved."""
        there = self._metadata.state_dict_metadata
        first = [name for name in self._metadata.planner_data or () if name in there]
        return list(dict.fromkeys([*first, *there]))

    def _keys(self, name: str) -> Keys:
        paths = self._metadata.planner_data or {}
        return tuple(paths.get(name, (name,)))

    def _place(self, index: MetadataIndex) -> tuple[str, Chunk]:
        place = self._metadata.storage_data[index]
        return place.relative_path, self._chunk(index, place)

    def _chunk(self, index: MetadataIndex, place: Any) -> Chunk:
        """Return the chunk at a place, as its file describes it if it does."""
        file = self._files.get(place.relative_path)
        known = None if file is None else file.chunk_at(place.offset)
        return known or Chunk(index.fqn, tuple(index.offset or ()), place.offset, place.length, 0)

    def _chunks_in(self, file: str) -> Iterator[Chunk]:
        for index, place in self._metadata.storage_data.items():
            if place.relative_path == file:
                yield self._chunk(index, place)

    def _value(self, name: str) -> Any:
        return self.load(*self._place(MetadataIndex(name)))

    def _whole(self, name: str, known: TensorStorageMetadata) -> Tensor:
        whole: Tensor | None = None
        for chunk, value in self.shards(name, known):
            tensor = value.decode() if isinstance(value, QuantizedTensor) else value
            if tuple(chunk.sizes) == tuple(known.size):
                return tensor.detach()
            if whole is None:
                whole = torch.empty(known.size, dtype=known.properties.dtype, device="cpu")
            whole[box_of(chunk)] = tensor
        return torch.empty(known.size, dtype=known.properties.dtype, device="cpu") if whole is None else whole

    def _look(self, name: str, known: TensorStorageMetadata) -> StoredAs:
        nbytes, codecs = 0, {}
        for chunk in known.chunks:
            value = self.load(*self._place(MetadataIndex(name, chunk.offsets)), check=False, to="meta")
            nbytes += value.nbytes
            codecs[value.codec if isinstance(value, QuantizedTensor) else None] = True
        return StoredAs(nbytes, tuple(codecs) or (None,))


def box_of(chunk: ChunkStorageMetadata) -> tuple[slice, ...]:
    """Return where in the whole tensor a shard is."""
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def _put(root: dict[Any, Any], keys: Keys, value: Any) -> None:
    """Put a value where keys lead; what is between are lists for numbers, and dicts."""
    found: Any = root
    for key, following in zip(keys, (*keys[1:], None), strict=True):
        new: Any = value if following is None else [] if isinstance(following, int) else {}
        if isinstance(found, list):
            found += [None] * (key + 1 - len(found))
            found[key] = new if found[key] is None else found[key]
            found = found[key]
        else:
            found = found.setdefault(key, new)


def _as_lightning(found: dict[Any, Any]) -> dict[Any, Any]:
    """Return the content of a folder with the names that a Trainer has for it."""
    optimizers = {key: value for key, value in found.items() if _number_of(key) is not None}
    content = {key: value for key, value in found.items() if key not in optimizers}
    if STATE_DICT not in content and _WEIGHTS in content:
        content[STATE_DICT] = content.pop(_WEIGHTS)
    if optimizers:
        states = sorted(optimizers.items(), key=lambda item: _number_of(item[0]) or 0)
        content[OPTIMIZER_STATES] = [{"state": {}, **state} for _, state in states]
    return content


def _number_of(key: Any) -> int | None:
    number = key.removeprefix(OPTIMIZER) if isinstance(key, str) and key.startswith(OPTIMIZER) else ""
    return int(number) if number.isdecimal() else None
