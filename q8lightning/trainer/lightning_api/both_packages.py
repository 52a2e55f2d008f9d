"""Recognize objects of ``lightning`` and of the standalone packages, whose classes are twins.

Both have the same code, and scripts import either. Nothing here imports a standalone package: a script that has not
imported it has no objects of it.
"""

import sys
from abc import ABCMeta
from typing import TypeGuard, TypeVar

from q8lightning.system.private_names import STANDALONE

T = TypeVar("T")


def twin_of(cls: type) -> type | None:
    """Return the twin in the standalone package; None if that is not imported, or ``cls`` is not Lightning's."""
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


def register_in_both(cls: type) -> None:
    """Register ``cls`` as a subclass of the twins of its base classes, if these are abstract base classes."""
    for base in cls.__mro__:
        twin = twin_of(base)
        if isinstance(twin, ABCMeta) and not issubclass(cls, twin):
            twin.register(cls)


def is_from_lightning(module: str) -> bool:
    """Whether a module of that name is one of PyTorch Lightning's, in either package."""
    return module.startswith(("lightning.pytorch.", "pytorch_lightning."))
