"""Pickle a checkpoint in few objects, and compress the pickle to a sixth.

Any reader of torch's files reads it. In a model of a million parameters, headers, keys and summary would otherwise take
1.5% of the file.
"""

import pickle
import zlib
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

from torch import Tensor

from q8lightning.checkpoint.containers import ATOMS
from q8lightning.checkpoint.file.pack.parts import Parts
from q8lightning.checkpoint.file.pack.small_tensors import SmallTensors
from q8lightning.checkpoint.payload import QuantizedTensor

PICKLE = "data.pkl"
"""The name of the record that has everything but the values of tensors."""

WORTHWHILE = 2**20
"""Bytes of the longest pickle that is compressed. A longer one is small beside the tensors of its model."""

_NO_STORAGES = ATOMS | {dict, list, tuple, Tensor, QuantizedTensor, FunctionType, BuiltinFunctionType}
"""Types of nearly everything that is pickled, and of no storage. To ask each object whether it is a storage, as torch
does in Python, takes as long as to pickle it."""

_LEVEL = 3
"""Of 9. The pickle is a twentieth smaller with 6, in twice the time, and another hundredth smaller with 9, in ten times
the time."""


def compact_pickle(parts: Parts, small: SmallTensors | None) -> Any:
    """Return what ``torch.serialization`` uses in place of the module ``pickle``.

    Args:
        parts: The payloads, which share buffers.
        small: Tensors to store together; None to store each by itself.
    """

    class Pickler(pickle.Pickler):
        def __init_subclass__(cls) -> None:  # torch derives a class that asks whether objects are storages
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
    """Compress without a header, as records of zip files are."""
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compressor.compress(content) + compressor.flush()
