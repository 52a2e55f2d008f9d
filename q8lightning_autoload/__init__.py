"""Let ``torch.load(weights_only=True)`` read quantized checkpoints in processes that do not import ``q8lightning``.

Torch calls :func:`register` when it is imported (an entry point of its group ``torch.backends``;
``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` switches that off). It is a package of its own because importing a module of the
other one imports all of that. The package is imported when a file that needs it is loaded.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

_HOME = "q8lightning.checkpoint.payload"

_NAMES = tuple(f"rebuild_v{version}" for version in range(1, 10))
"""The functions that files name, one for each version of the format; those of versions that the installed package does
not know say so."""


def register() -> None:
    """Register stand-ins for the functions that files name. Never raises: ``import torch`` would fail."""
    with suppress(Exception):  # what remains then is torch's message about such a file
        from torch.serialization import add_safe_globals

        add_safe_globals([(_stand_in(name), f"{_HOME}.{name}") for name in _NAMES])


def _stand_in(name: str) -> Callable[..., Any]:
    """Return a function that does what the package's function of this name does."""

    def rebuild(*arguments: Any) -> Any:
        import torch

        with torch.device("cpu"):  # the package makes tables; whoever loads may be about to make things elsewhere
            from q8lightning.checkpoint import payload

        return getattr(payload, name)(*arguments)

    return rebuild
