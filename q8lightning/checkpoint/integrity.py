"""Compare payloads with their checksums, so that damage is reported by the tensor's name.

XXH3 (64 bits) reads 10 to 30 GB a second on one core. That is several times faster than a disk and than decoding, so
every load can afford it. It protects against accidents, not against forgery.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
import xxhash
from torch import Tensor

_VERIFY: ContextVar[bool] = ContextVar("verify", default=True)


class CorruptCheckpointError(RuntimeError):
    """The content of a checkpoint is not what was saved.

    Attributes:
        what: What is damaged, such as a tensor by its path in the checkpoint.
        file: The file; None where it is not known.
    """

    def __init__(self, what: str, file: str | os.PathLike[str] | None = None) -> None:
        where = "" if file is None else f" in {os.fspath(file)}"
        super().__init__(
            f"{what}{where} is damaged: its content is not what was saved. Load another checkpoint or fetch the file"
            " again; `q8lightning verify` says which files are whole, and where only tensors are damaged, the rest can"
            " be loaded inside `with q8lightning.without_verification():`"
        )
        self.what = what
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.file)


def checksum(header: str, data: memoryview) -> int:
    """Return the checksum of a payload: XXH3 of its bytes, seeded with that of its header.

    Args:
        header: The header as the file has it.
        data: Scales and codes; see :func:`bytes_of`.
    """
    return xxhash.xxh3_64_intdigest(data, seed=xxhash.xxh3_64_intdigest(header.encode()))


def bytes_of(data: Tensor) -> memoryview:
    """Return the bytes of a uint8 tensor; they are copied if it is not on the host."""
    return memoryview(data.cpu().numpy())  # type: ignore[arg-type]  # numpy says so from Python 3.12 on


def verify(name: str, header: str, data: Tensor, expected: int | None) -> None:
    """Compare a payload with the checksum that it was saved with, unless verification is off.

    Args:
        name: The tensor, for the message.
        header: The header as the file has it.
        data: ``[nbytes]`` uint8, scales and codes.
        expected: The checksum; None if the payload was not loaded.

    Raises:
        CorruptCheckpointError: If they differ.
    """
    if expected is None or not _VERIFY.get() or type(data) is not Tensor or data.device.type == "meta":
        return  # fake and meta tensors have no content to verify
    if checksum(header, bytes_of(data)) != expected:
        raise CorruptCheckpointError(f"the tensor {name}", file_being_loaded())


def is_verifying() -> bool:
    """Whether checksums are compared; False inside :func:`without_verification`."""
    return _VERIFY.get()


def shard_name(rank: int, save: str) -> str:
    """Return the name of the file that a process writes of a checkpoint in shards.

    It names the save, so that a file of another save cannot take its place.
    """
    return f"__{rank}_0.{save}.distcp"


_SHARD = re.compile(r"__\d+_0\.([0-9a-f]{16})\.distcp")


def save_of(path: str | os.PathLike[str]) -> str | None:
    """Return which save a file is of by its name; None for one that is no shard, or plain Lightning's."""
    found = _SHARD.fullmatch(os.path.basename(path))
    return None if found is None else found[1]


def check_save(name: str, save: str | None) -> None:
    """Compare the save that a payload names with the save in the name of its file.

    Raises:
        CorruptCheckpointError: If they are not the same.
    """
    if save is None or not _VERIFY.get():
        return
    file = file_being_loaded()
    expected = None if file is None else save_of(file)
    if expected not in (None, save):
        raise CorruptCheckpointError(f"the tensor {name}, of another save than the rest of the checkpoint,", file)


def file_being_loaded() -> str | None:
    """Return the file that a ``torch.load`` of this thread is reading; None if its name is not known.

    The functions that a file calls are not told which file it is. The callers' variables say it, so that an error can
    name the file.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not getattr(torch.load, "__code__", None):
        frame = frame.f_back
    file = None if frame is None else frame.f_locals.get("f")
    file = getattr(file, "base_stream", file)  # DCP's view of a part of it
    name = file if isinstance(file, str | os.PathLike) else getattr(file, "name", None)
    return os.fspath(name) if isinstance(name, str | os.PathLike) else None


@contextmanager
def without_verification() -> Iterator[None]:
    """Within this context, do not compare checksums, so that the rest of a damaged file can be loaded.

    Damaged tensors then have wrong values. A file that was cut off still cannot be loaded.

    Example:
        >>> with without_verification():  # doctest: +SKIP
        ...     checkpoint = torch.load("damaged.ckpt", weights_only=True)
    """
    token = _VERIFY.set(False)
    try:
        yield
    finally:
        _VERIFY.reset(token)
