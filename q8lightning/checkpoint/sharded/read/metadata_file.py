"""Read DCP's list of what a folder holds, without running code of the file.

The file is a pickle. DCP unpickles whatever is in it; here only what DCP puts there is made.
"""

import io
import pickle
from dataclasses import is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata

from q8lightning.system.private_names import resolve

_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_LAYOUT = "_get_layout"
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


def load_metadata(data: bytes, trust: bool = False) -> Metadata:
    """Return what the file ``.metadata`` says.

    Args:
        data: The file.
        trust: Also make objects of other classes, which can run code of the file.

    Raises:
        UnpicklingError: If there are such objects in it, or it is no pickle.
    """
    return cast("Metadata", (pickle.Unpickler if trust else _Unpickler)(io.BytesIO(data)).load())


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name in _PATHS:
            return PurePath  # where the folder was; those of another system cannot be made
        if module == "torch.serialization" and name == _LAYOUT:
            return resolve(module, name)
        found: Any = super().find_class(module, name) if module in (*_MODULES, "torch") else None
        if isinstance(found, torch.dtype) or found is torch.Size:
            return found
        if module in _MODULES and isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum)):
            return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is nothing that torch writes here")
