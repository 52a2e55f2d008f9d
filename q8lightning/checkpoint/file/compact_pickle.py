"""The pickle of a checkpoint in few objects and a sixth of its bytes, readable as any other.

In a model of a million parameters, the headers of its payloads, its keys and what it says about itself would take 1.5%
of the file.
"""

import pickle
import zlib
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

from torch import Tensor

from q8lightning.checkpoint.containers import ATOMS
from q8lightning.checkpoint.file.parts import Parts
from q8lightning.checkpoint.file.small_tensors import SmallTensors
from q8lightning.checkpoint.payload import QuantizedTensor

PICKLE = "data.pkl"
"""The record of a file with everything but the values of tensors."""

WORTHWHILE = 2**20
"""Bytes of a pickle up to which it is compressed: longer ones only occur where they are nothing beside the tensors."""

_NO_STORAGES = ATOMS | {dict, list, tuple, Tensor, QuantizedTensor, FunctionType, BuiltinFunctionType}
"""Types of nearly everything that is pickled. Torch would ask each of them whether it is a storage, in Python, which
takes as long as the pickling itself."""

_LEVEL = 3
"""Of 9. With zlib's default (6) it is a twentieth less in twice the time, with the highest another hundredth less in
ten times the time."""


def compact_pickle(parts: Parts, small: SmallTensors | None) -> Any:
    """Return what ``torch.serialization`` takes for the module ``pickle``.

    Args:
        parts: The payloads, which share buffers.
        small: Tensors to store together; None to store each by itself.
    """

    class Pickler(pickle.Pickler):
        def __init_subclass__(cls) -> None:  # torch makes a class of it, to which it adds its question
            ask = vars(cls).get("persistent_id")
            if ask is not None:
                question: Any = lambda self, obj: None if type(obj) in _NO_STORAGES else ask(self, obj)  # noqa: E731
                cls.persistent_id = question  # type: ignore[method-assign]

        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is QuantizedTensor:
                return parts.reduce(obj)
            return NotImplemented if small is None else small.reduce(obj)

    return SimpleNamespace(Pickler=Pickler)


def deflate(content: memoryview) -> bytes:
    """Compress as the records of zip files are: without a header."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(content) + compressor.flush()
