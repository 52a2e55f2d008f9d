"""Python's audit events, heard for as long as a test wants; whoever hears one can hold it up or make it fail."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

Listener = Callable[[str, tuple[Any, ...]], object]
"""Takes an event's name and arguments; what it raises is raised where the event happens."""

_LISTENERS: list[Listener] = []


def _tell(event: str, arguments: tuple[Any, ...]) -> None:
    for listener in tuple(_LISTENERS):
        listener(event, arguments)


@cache
def _install() -> None:
    sys.addaudithook(_tell)  # for good: hooks cannot be removed


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have every event told within this context."""
    _install()
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)
