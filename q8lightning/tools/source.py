"""Open a checkpoint without reading more of it than is looked at: memory-mapped, its payloads encoded."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint import tree
from q8lightning.checkpoint.encode.leaves import kind_of as kind_by_keys
from q8lightning.checkpoint.encode.state_dict import SUMMARY_KEY
from q8lightning.checkpoint.file.archive import verified
from q8lightning.checkpoint.file.load_errors import explained, newer_format_in
from q8lightning.checkpoint.file.open_file import OpenFile
from q8lightning.checkpoint.format import NewerFormatError, check_version
from q8lightning.checkpoint.payload import QuantizedTensor, keep_encoded, register_functions, watch_apart
from q8lightning.checkpoint.policy import FIRST_MOMENTS, SECOND_MOMENTS

KINDS = ("weights", *FIRST_MOMENTS, *SECOND_MOMENTS, "other")
"""What a tensor of a checkpoint is: of the model, a moment by its optimizer's name for it, or anything else."""

Keys = tuple[Any, ...]
"""Keys and indices that lead to a tensor."""


class CommandError(Exception):
    """What a user asked for cannot be done; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Source:
    """An open checkpoint.

    Attributes:
        file: The file, open as long as this is there.
        content: What ``torch.load`` returns, all of it on the CPU, payloads as :class:`QuantizedTensor`.
        locations: Where each storage was when it was saved, such as ``cuda:0``, by ``_cdata``.
    """

    file: OpenFile
    content: Any
    locations: Mapping[int, str]

    @property
    def path(self) -> Path:
        """The name of the file."""
        return Path(self.file.path)

    @property
    def summary(self) -> Mapping[str, Any]:
        """What the checkpoint says about how it was quantized, empty if it says nothing."""
        found = self.content.get(SUMMARY_KEY) if isinstance(self.content, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    def values(self, value: "Tensor | QuantizedTensor") -> Tensor:
        """Return the values of one of its tensors, decoded if need be.

        Raises:
            CorruptCheckpointError: If they are not what was saved.
        """
        with explained(self.path):
            return value.decode() if isinstance(value, QuantizedTensor) else value

    def location(self, value: "Tensor | QuantizedTensor") -> str:
        """Return where a tensor was when it was saved."""
        data = value.data if isinstance(value, QuantizedTensor) else value
        return self.locations.get(data.untyped_storage()._cdata, "cpu")


def open_checkpoint(path: str | Path, trust: bool = False) -> Source:
    """Open a file that ``torch.save`` or the callback wrote. Files of torch's old format (before 1.6) are read whole.

    Args:
        path: The file.
        trust: Also make objects of classes that ``torch.load(weights_only=True)`` refuses, which can run code of the
            file.

    Raises:
        CommandError: If there is no such file or it cannot be read.
        CorruptCheckpointError: If it is damaged in a way that keeps it from being read.
        NewerFormatError: If the file was written in a later format than this version reads.
    """
    return read_source(open_file(path), trust)


def open_file(path: str | Path) -> OpenFile:
    """Open a file; whatever is to be done with it is done with what this returns, whoever replaces the file meanwhile.

    Raises:
        CommandError: If there is no such file or it cannot be opened.
    """
    if Path(path).is_dir():
        raise CommandError(f"{path} is a directory; name a checkpoint file (sharded checkpoints are not supported)")
    try:
        return OpenFile(path)
    except OSError as error:
        raise CommandError(f"cannot open {path}: {error.strerror or error}") from error


def read_source(file: OpenFile, trust: bool = False) -> Source:
    """Read what :func:`open_checkpoint` does, from an open file."""
    path = file.path
    locations: dict[int, str] = {}

    def leave_on_cpu(storage: Any, location: str) -> Any:
        locations[storage._cdata] = location
        return storage

    def locate_apart(view: Tensor, tensor: Tensor) -> None:
        locations[tensor.untyped_storage()._cdata] = locations.get(view.untyped_storage()._cdata, "cpu")

    register_functions()  # somebody may have cleared torch's list
    try:
        with keep_encoded(), watch_apart(locate_apart), file.reader() as reader:
            mapped = zipfile.is_zipfile(reader)
            content = torch.load(file.address, map_location=leave_on_cpu, weights_only=not trust, mmap=mapped)
    except NewerFormatError:
        raise
    except Exception as error:  # whatever a file that is something else makes torch and pickle raise
        with verified(file):
            pass  # it is whole: something else is wrong
        raise _explain(path, error) from error
    check_version(content.get(SUMMARY_KEY) if isinstance(content, Mapping) else None)
    return Source(file, content, locations)


def _explain(path: str, error: Exception) -> Exception:
    newer = newer_format_in(error)
    if newer is not None:
        return newer
    if isinstance(error, OSError):
        return CommandError(f"cannot read {path}: {error.strerror or error}")
    unknown = re.search(r"GLOBAL (\S+)", str(error))
    if not isinstance(error, pickle.UnpicklingError):
        return CommandError(f"{path} is not a checkpoint that torch.load can read ({_first_line(error)})")
    if unknown is None:
        return CommandError(f"{path} is not a checkpoint that torch.load can read")
    return CommandError(
        f"{path} holds an object of {unknown[1]}, which torch.load(weights_only=True) does not make; pass --trust if"
        " you trust whoever wrote the file, because such objects can run code"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *(line[:120] for line in lines[:1])])


def leaves(content: Any) -> list[tuple[Keys, "Tensor | QuantizedTensor"]]:
    """Return the tensors of a checkpoint, encoded where they are, with the keys that lead to them."""
    return [leaf for leaf in tree.leaves(content, tree.PATHS) if isinstance(leaf[1], Tensor | QuantizedTensor)]


def path_of(keys: Keys) -> str:
    """Return the path by which policies and messages name a tensor."""
    return ".".join(map(str, keys))


def kind_of(keys: Keys, value: "Tensor | QuantizedTensor") -> str:
    """Return one of :data:`KINDS`. Entries of a state dict count as weights if they are floats."""
    if not keys or not (value.dtype.is_floating_point or value.dtype.is_complex):
        return "other"
    kind = kind_by_keys(keys)
    return kind if kind in KINDS else "other"


def decoded_bytes(value: "Tensor | QuantizedTensor") -> int:
    """Return the bytes of a tensor's values as they are in memory when it is loaded."""
    if isinstance(value, QuantizedTensor):
        numel = torch.Size(value.shape).numel()
        return numel * value.dtype.itemsize
    if value.layout == torch.strided:
        return value.nbytes
    if value.layout == torch.sparse_coo:
        return value._indices().nbytes + value._values().nbytes
    return value.values().nbytes
