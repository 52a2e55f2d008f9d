"""Open a checkpoint without reading all of it: memory-mapped, with its payloads encoded; a folder tensor by tensor."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from q8lightning.checkpoint.file.load_errors import explained, newer_format_in
from q8lightning.checkpoint.file.open_file import OpenFile
from q8lightning.checkpoint.file.verify.archive import verified
from q8lightning.checkpoint.format import NewerFormatError, check_version
from q8lightning.checkpoint.integrity import CorruptCheckpointError
from q8lightning.checkpoint.layout.parameter_names import names_of_states, parameters_of_states
from q8lightning.checkpoint.layout.places import Places, place_of
from q8lightning.checkpoint.layout.sections import name_of, places_in, summary_in
from q8lightning.checkpoint.loading import keep_encoded, watch_apart
from q8lightning.checkpoint.payload import QuantizedTensor, register_functions
from q8lightning.checkpoint.sharded.folder import is_folder
from q8lightning.checkpoint.sharded.read.open_folder import OpenFolder
from q8lightning.checkpoint.sharded.read.read_codes import with_codes
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.checkpoint.tree import Keys
from q8lightning.system.arguments import check_bool
from q8lightning.tools.tensors import Value

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Called with how much has been done, and of how much."""


def silent(done: int, total: int) -> None:
    """Show no progress."""


class ToolError(Exception):
    """A request of the user that cannot be done; the message says in one line why, and what to do."""


@dataclass(frozen=True)
class OpenCheckpoint:
    """An open checkpoint.

    Attributes:
        source: The file or folder, open as long as this object exists.
        content: What ``torch.load`` returns, on the CPU, with payloads as :class:`QuantizedTensor`. Of a folder, the
            content of the file that it can be decompressed to, with tensors as :class:`UnreadTensor`.
        locations: The device of each storage when it was saved, such as ``cuda:0``, by the storage's ``_cdata``.
    """

    source: OpenFile | OpenFolder
    content: Any
    locations: Mapping[int, str]

    @property
    def path(self) -> Path:
        """The name of the file or folder."""
        return Path(self.source.path)

    @property
    def in_shards(self) -> bool:
        """Whether it is a folder."""
        return isinstance(self.source, OpenFolder)

    @property
    def size(self) -> int:
        """Its bytes; of a folder, those of all its files."""
        return self.source.size

    def verified(self) -> AbstractContextManager[None]:
        """Compare everything with its sums while the block reads it; what is read of a folder always is.

        Raises:
            CorruptCheckpointError: If something is not what was saved.
        """
        return verified(self.source) if isinstance(self.source, OpenFile) else nullcontext()

    @property
    def summary(self) -> Mapping[str, Any]:
        """The summary of the checkpoint; empty if it has none."""
        return summary_in(self.content)

    @cached_property
    def parameters(self) -> Mapping[Keys, str]:
        """Names of parameters that are known, by the keys that lead to their optimizer states."""
        return parameters_of_states(self.content)

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Names in messages of optimizer states whose parameters are known, by their paths."""
        return names_of_states(self.content)

    @cached_property
    def places(self) -> Places:
        """Where states of modules and optimizers under a user's own keys stand in Lightning's layout."""
        return places_in(self.content)

    def place(self, keys: Keys) -> Keys:
        """Return the keys that would lead to a tensor in Lightning's layout."""
        return place_of(keys, self.places)

    def name(self, keys: Keys) -> str:
        """Return the name in messages of the tensor that keys lead to."""
        return name_of(keys, self.parameters.get(keys[:-1]), self.places)

    def values(self, value: Value) -> Tensor:
        """Return the values of one of its tensors, decoded if it is a payload.

        Raises:
            CorruptCheckpointError: If they differ from what was saved.
        """
        if isinstance(value, UnreadTensor):
            return value.read()  # which knows the file
        with explained(self.path):
            return self.decode(value) if isinstance(value, QuantizedTensor) else value

    def decode(self, payload: QuantizedTensor | UnreadTensor) -> Tensor:
        """Decode a payload.

        Raises:
            CorruptCheckpointError: If it differs from what was saved; with the tensor's name for people.
        """
        if isinstance(payload, UnreadTensor):
            return payload.read()
        try:
            return payload.decode()
        except CorruptCheckpointError as error:
            name = self.names.get(payload.name, payload.name)
            raise CorruptCheckpointError(f"the tensor {name}", error.file) from error

    def location(self, value: Value) -> str:
        """Return the device of a tensor when it was saved; the host for a folder, of which DCP does not say it."""
        if isinstance(value, UnreadTensor):
            return "cpu"
        data = value.data if isinstance(value, QuantizedTensor) else value
        return self.locations.get(data.untyped_storage()._cdata, "cpu")


def open_checkpoint(path: str | os.PathLike[str], trust: bool = False) -> OpenCheckpoint:
    """Open a file that ``torch.save`` or the callback wrote, or a folder that a sharded strategy or DCP wrote.

    Files of torch's old format (before 1.6) are read whole.

    Args:
        path: The file or folder.
        trust: Also make objects of classes that ``torch.load(weights_only=True)`` refuses, which can run code of the
            file.

    Raises:
        ToolError: If there is no such file or it cannot be read.
        CorruptCheckpointError: If the damage keeps the file from being read.
        NewerFormatError: If the file was written in a later format than this version reads.
    """
    if Path(path).is_dir():
        folder = open_folder(path, trust)
        if folder.lacks:
            raise folder.lacks[0]
        return read_folder(folder)
    return read_checkpoint(open_file(path), trust)


def open_folder(path: str | os.PathLike[str], trust: bool = False) -> OpenFolder:
    """Open a folder; see :func:`open_checkpoint`. Files that it lacks are no error.

    Raises:
        ToolError: If it is no checkpoint or cannot be read.
        CorruptCheckpointError: If the damage keeps it from being read.
    """
    check_bool("trust", trust)
    if not os.fspath(path):
        raise ToolError("the name of the checkpoint is empty; name a file, or a folder with shards")
    if not is_folder(path):
        raise ToolError(f"{path} is a directory; name a checkpoint file, or a folder with shards (meta.pt, .metadata)")
    return _explaining(path, lambda: OpenFolder(path, trust))


def read_folder(folder: OpenFolder) -> OpenCheckpoint:
    """Return the checkpoint in an open folder, with every tensor unread; see :func:`open_checkpoint`."""
    content = _explaining(folder.path, lambda: with_codes(folder, folder.content()))
    check_version(summary_in(content))
    return OpenCheckpoint(folder, content, {})


def _explaining(path: str | os.PathLike[str], read: Callable[[], T]) -> T:
    try:
        return read()
    except (CorruptCheckpointError, NewerFormatError):
        raise
    except Exception as error:  # pickle raises anything
        raise explain(os.fspath(path), error) from error


def open_file(path: str | os.PathLike[str]) -> OpenFile:
    """Open a file, so that everything reads the same file even if another one takes its name meanwhile.

    Raises:
        ToolError: If there is no such file or it cannot be opened.
    """
    try:
        return OpenFile(path)
    except OSError as error:
        raise ToolError(f"cannot open {path}: {error.strerror or error}") from error


def read_checkpoint(file: OpenFile, trust: bool = False) -> OpenCheckpoint:
    """Return the checkpoint in an open file; see :func:`open_checkpoint`."""
    check_bool("trust", trust)
    path = file.path
    locations: dict[int, str] = {}

    def leave_on_cpu(storage: Any, location: str) -> Any:
        locations[storage._cdata] = location
        return storage

    def locate_apart(view: Tensor, tensor: Tensor) -> None:
        locations[tensor.untyped_storage()._cdata] = locations.get(view.untyped_storage()._cdata, "cpu")

    register_functions()  # torch's list may have been cleared
    try:
        with keep_encoded(), watch_apart(locate_apart), file.reader() as reader:
            mapped = zipfile.is_zipfile(reader)
            content = torch.load(file.address, map_location=leave_on_cpu, weights_only=not trust, mmap=mapped)
    except NewerFormatError:
        raise
    except Exception as error:  # torch and pickle raise anything for a file that is no checkpoint
        with verified(file):  # raises if the file is damaged
            pass
        if isinstance(error, CorruptCheckpointError):  # although its sums fit
            raise CorruptCheckpointError(error.what, path) from error
        raise explain(path, error) from error
    check_version(summary_in(content))
    return OpenCheckpoint(file, content, locations)


def explain(path: str, error: Exception) -> Exception:
    """Return the error that tells the user why a file could not be read."""
    newer = newer_format_in(error)
    if newer is not None:
        return newer
    if isinstance(error, OSError):
        return ToolError(f"cannot read {path}: {error.strerror or error}")
    unknown = re.search(r"GLOBAL (\w+(?:\.\w+)+)(?!\S)", str(error))
    if not isinstance(error, pickle.UnpicklingError):
        return ToolError(f"{path} is not a checkpoint that torch.load can read ({_first_line(error)})")
    if unknown is None:
        return ToolError(f"{path} is not a checkpoint that torch.load can read")
    return ToolError(
        f"{path} holds an object of {unknown[1]}, which torch.load(weights_only=True) does not make; pass --trust"
        " (from Python: trust=True) if you trust the author of the file, because such objects can run code"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *(line[:120] for line in lines[:1])])
