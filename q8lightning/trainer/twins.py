"""Lightning exists twice, as ``lightning`` and as standalone packages: a class of one has a twin in the other.

Both have the same code. Scripts import either, and what they hand to us is of that one. Nothing here imports Lightning:
who has not imported a package has no objects of it.
"""

import sys
from abc import ABCMeta
from typing import TypeGuard, TypeVar

from q8lightning.system.private_names import STANDALONE

T = TypeVar("T")


def twin_of(cls: type) -> type | None:
    """Return the class of the standalone package; None if ``cls`` is not Lightning's, or that is not imported."""
    for package, standalone in STANDALONE.items():
        if cls.__module__.startswith(f"{package}."):
            module = sys.modules.get(standalone + cls.__module__.removeprefix(package))
            twin = getattr(module, cls.__name__, None)
            return twin if isinstance(twin, type) else None
    return None


def is_a(instance: object, *classes: type[T]) -> TypeGuard[T]:
    """Whether ``instance`` is of one of Lightning's ``classes``, or of the twin of one."""
    return isinstance(instance, (*classes, *filter(None, map(twin_of, classes))))


def is_exactly_a(instance: object, cls: type[T]) -> TypeGuard[T]:
    """Whether ``instance`` is of Lightning's ``cls`` or of its twin, and not of a subclass."""
    return type(instance) in (cls, twin_of(cls))


def count_as_twins(cls: type) -> None:
    """Let ``cls`` pass for a subclass of the twins of its base classes, where these are abstract base classes."""
    for base in cls.__mro__:
        twin = twin_of(base)
        if isinstance(twin, ABCMeta) and not issubclass(cls, twin):
            twin.register(cls)


def is_from_lightning(module: str) -> bool:
    """Whether a module of that name is one of PyTorch Lightning's, in either package."""
    return module.startswith(("lightning.pytorch.", "pytorch_lightning."))
