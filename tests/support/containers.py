"""Containers that are more than dicts, lists and tuples, that are deep, or that are shared."""

from collections import namedtuple
from typing import Any, NamedTuple

import torch


class Bag(dict):  # type: ignore[type-arg]
    """A dict with attributes."""


class Stack(list):  # type: ignore[type-arg]
    """A list that is proud of itself."""


class Row(tuple):
    """A tuple by another name."""

    __slots__ = ()


class Typed(NamedTuple):
    """Two values with names."""

    one: Any
    two: Any = None

    def both(self) -> tuple[Any, Any]:
        return self.one, self.two


class Converting(dict):  # type: ignore[type-arg]
    """A dict that does something with what is put into it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, [value])

    def update(self, *others: Any) -> None:
        raise AssertionError("nobody may call this")

    __init__ = update  # type: ignore[assignment]


Pair = namedtuple("Pair", ["one", "two"])


def shared(levels: int) -> Any:
    """Containers that hold the next twice: as many paths as two to the power of their number."""
    inner: Any = torch.ones(2)
    for level in range(levels):
        inner = {"a": inner, "b": inner} if level % 2 else (inner, [inner])
    return inner


def deep(levels: int) -> Any:
    inner: Any = [torch.ones(2)]
    for level in range(levels):
        inner = ({"x": inner}, (inner,), [inner])[level % 3]
    return inner
