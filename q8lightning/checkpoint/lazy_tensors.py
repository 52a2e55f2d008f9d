"""Read what Lightning's FSDP puts in the place of tensors when it loads a whole checkpoint.

FSDP unpickles the file itself, with a placeholder for each tensor, so that each process reads only what it needs. A
payload needs its bytes at once.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

_READ: "WeakKeyDictionary[Any, Tensor]" = WeakKeyDictionary()
"""What placeholders stand for, once it was read, since many payloads lie in one tensor."""


def read(value: Any) -> Any:
    """Return the tensor that a placeholder stands for, and anything else as it is."""
    if isinstance(value, Tensor) or not hasattr(value, "_load_tensor"):
        return value
    if value not in _READ:
        _READ[value] = value._load_tensor()
    return _READ[value]
