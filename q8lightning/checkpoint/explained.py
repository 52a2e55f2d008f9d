"""What the errors of ``torch.load`` mean: a file that was cut off, one of a later format, or none of torch's at all."""

import os
import pickletools
import re
from collections.abc import Iterator
from contextlib import contextmanager

from q8lightning.checkpoint.integrity import CorruptCheckpointError
from q8lightning.checkpoint.payload import FORMAT_VERSION, NewerFormatError, register_functions

CONTENTS = "the table of contents at the end of the file, which was cut off or changed,"

_NO_PICKLE = ("Invalid magic number", "invalid load key", "pickle data was truncated")
"""What torch and pickle say of bytes that ``torch.save`` did not write."""

_OPERANDS = {each.code for each in pickletools.opcodes} - {"P"}
"""What a pickle of torch may consist of. With a P begins a zip, of which no more than that may be left."""


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within this context, a checkpoint is loaded; errors say what is wrong with it, and name the file.

    Raises:
        CorruptCheckpointError: If the content is not what was saved.
        NewerFormatError: If the file was written in a later format than this version reads.
    """
    register_functions()  # somebody may have cleared torch's list
    try:
        yield
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(error.what, path) from error.__cause__  # it knows the tensor; add the file
    except Exception as error:
        damage = damage_in(error)
        if damage is not None:
            raise CorruptCheckpointError(damage, path) from error
        newer = newer_format_in(error)
        if newer is not None:
            raise newer from error
        raise


def damage_in(error: Exception) -> str | None:
    """Return what is damaged, as far as an error of ``torch.load`` tells; None if it means something else."""
    text = str(error)
    if "PytorchStreamReader" in text:
        return CONTENTS
    operand = re.search(r"Unsupported operand (\d+)", text)  # of a later protocol, or none that a pickle could have
    if (
        isinstance(error, EOFError)
        or any(words in text for words in _NO_PICKLE)
        or (operand is not None and chr(int(operand[1])) not in _OPERANDS)
    ):
        return "the file, which ends too early or is none of torch.save (perhaps a page that was fetched instead),"
    return None


def newer_format_in(error: Exception) -> NewerFormatError | None:
    """Return what it means that ``torch.load(weights_only=True)`` does not know a function of a file."""
    found = re.search(r"GLOBAL q8lightning\.checkpoint\.payload\.rebuild_v(\d+)", str(error))
    if found is None:
        return None
    version = int(found[1])
    return NewerFormatError(version if version > FORMAT_VERSION else f"later than {FORMAT_VERSION}")
