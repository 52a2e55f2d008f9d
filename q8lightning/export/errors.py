"""The error of an export that cannot be done, and the check that a target's library is installed."""

import importlib
from typing import Any

from q8lightning.tools.open_checkpoint import ToolError


class ExportError(ToolError, ValueError):
    """A checkpoint cannot be exported as asked. Nothing was written; the message says why, and what would do."""


def library(name: str, extra: str) -> Any:
    """Return the library of a target.

    Args:
        name: Of the module.
        extra: The extra of this package that installs it.

    Raises:
        ExportError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise
        raise ExportError(f'format="{extra}" needs {name}; pip install "q8lightning[{extra}]"') from error
