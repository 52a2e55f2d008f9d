"""Explain the errors of ``torch.load``: a file was cut off, has a later format, or is none of torch's."""

import os
import pickletools
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import torch

from q8lightning.checkpoint.format import FORMAT_VERSION, NewerFormatError
from q8lightning.checkpoint.integrity import CorruptCheckpointError
from q8lightning.checkpoint.payload import register_functions

CONTENTS = "the end of the file (cut off or changed)"

FOREIGN = "the file (it ends too early, or is none of torch.save: perhaps a page that was fetched instead)"

_BEGINNINGS = (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
"""The first bytes of zips and pickles. ``torch.save`` writes nothing else."""

_NO_PICKLE = ("Invalid magic number", "invalid load key", "pickle data was truncated")
"""Parts of messages of torch and pickle about bytes that ``torch.save`` did not write."""

_OPERANDS = {each.code for each in pickletools.opcodes} - {"P"}
"""The instructions of pickles. P is left out: it is how a zip begins, of which no more may be left."""


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Load a checkpoint within this context, and errors say what is wrong with it and name the file.

    Raises:
        CorruptCheckpointError: If the content is not what was saved.
        NewerFormatError: If the file was written in a later format than this version reads.
    """
    register_functions()  # torch's list may have been cleared
    try:
        yield
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(error.what, path) from error.__cause__  # it knows the tensor; add the file
    except Exception as error:
        damage = damage_in(error) or (FOREIGN if _torch_read_something_else(path, error) else None)
        if damage is not None:
            raise CorruptCheckpointError(damage, path) from error
        newer = newer_format_in(error)
        if newer is not None:
            raise newer from error
        raise


def damage_in(error: Exception) -> str | None:
    """Return what is damaged according to an error of ``torch.load``; None if it means something else."""
    text = str(error)
    if "PytorchStreamReader" in text:
        return CONTENTS
    operand = re.search(r"Unsupported operand (\d+)", text)  # of a later protocol, or none that a pickle could have
    if (
        isinstance(error, EOFError)
        or any(words in text for words in _NO_PICKLE)
        or (operand is not None and chr(int(operand[1])) not in _OPERANDS)
    ):
        return FOREIGN
    return None


def _torch_read_something_else(path: str | os.PathLike[str], error: Exception) -> bool:
    """Whether ``torch.load`` raised an error over a file that does not begin as files of ``torch.save`` do.

    Such files fail in as many ways as pickles have instructions.
    """
    frames = traceback.walk_tb(error.__traceback__)
    if not any(frame.f_code is getattr(torch.load, "__code__", None) for frame, _ in frames):
        return False  # of a CheckpointIO with files of its own kind
    try:
        with fsspec.open(os.fspath(path), "rb") as file:
            return not file.read(2).startswith(_BEGINNINGS)
    except Exception:  # what cannot be opened says so itself
        return False


def newer_format_in(error: Exception) -> NewerFormatError | None:
    """Return the error that says so if ``torch.load`` met a function of a later format version; else None."""
    found = re.search(r"GLOBAL q8lightning\.checkpoint\.payload\.rebuild_v(\d+)", str(error))
    if found is None or int(found[1]) <= FORMAT_VERSION:
        return None
    return NewerFormatError.of_version(found[1])
