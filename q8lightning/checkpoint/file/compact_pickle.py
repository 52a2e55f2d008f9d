"""The pickle of a checkpoint in a sixth of its bytes, readable as any other.

In a model of a million parameters, the headers of its payloads, its keys and what it says about itself would take 1.5%
of the file.
"""

import io
import pickle
import pickletools
import zlib
from types import SimpleNamespace
from typing import IO, Any

from q8lightning.checkpoint.file.small_tensors import SmallTensors

PICKLE = "data.pkl"
"""The record of a file with everything but the values of tensors."""

WORTHWHILE = 2**18
"""Bytes of a pickle up to which it is made smaller. It takes a fifth of a second a megabyte, and longer ones only occur
where they are nothing beside the tensors."""


def compact_pickle(small: SmallTensors | None) -> Any:
    """Return what ``torch.serialization`` takes for the module ``pickle``.

    Args:
        small: Tensors to store together; None to store each by itself.
    """

    class Pickler(pickle.Pickler):
        def __init__(self, file: IO[bytes], protocol: int) -> None:
            self._file = file
            self._buffer = io.BytesIO()
            super().__init__(self._buffer, protocol)

        def reducer_override(self, obj: Any) -> Any:
            return NotImplemented if small is None else small.reduce(obj)

        def dump(self, obj: Any) -> None:
            super().dump(obj)
            self._file.write(shorten(self._buffer.getvalue()))

    return SimpleNamespace(Pickler=Pickler)


def shorten(pickled: bytes) -> bytes:
    """Leave out the numbers of objects that nothing refers to: they grow all the time, and so do not compress."""
    return pickletools.optimize(pickled) if len(pickled) <= WORTHWHILE else pickled


def deflate(content: memoryview) -> bytes:
    """Compress as the records of zip files are: without a header."""
    compressor = zlib.compressobj(zlib.Z_BEST_COMPRESSION, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(content) + compressor.flush()
