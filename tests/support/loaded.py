"""Hear of the kernels that are compiled or loaded."""

from typing import Any


def loaded() -> list[str]:
    """Return a list that gets every kernel which is compiled or loaded from now on."""
    found: list[str] = []

    def hook(*_: Any, **said: Any) -> None:
        found.append(said["repr"])

    try:
        from triton import knobs
    except ImportError:  # before Triton 3.4
        from triton.runtime.jit import JITFunction

        JITFunction.cache_hook = hook
    else:
        knobs.runtime.jit_cache_hook = hook
    return found
