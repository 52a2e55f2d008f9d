"""Tensors that are not read before they are needed, as Lightning's FSDP loads a whole checkpoint.

It unpickles the file itself, with something else in the place of every tensor, so that each process reads what it
needs. A payload needs its bytes at once.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

_READ: "WeakKeyDictionary[Any, Tensor]" = WeakKeyDictionary()
"""What was read: many payloads lie in one tensor."""


def read(value: Any) -> Any:
    """Return the tensor that something stands for, read from the file; anything else as it is."""
    if isinstance(value, Tensor) or not hasattr(value, "_load_tensor"):
        return value
    if value not in _READ:
        _READ[value] = value._load_tensor()
    return _READ[value]
