"""Tell which objects of a checkpoint the walk enters.

A container is a dict, a list, a tuple or an object of a subclass that keeps and pickles its items as its base does.
Everything else is a leaf: a tensor, any other object, a subclass with a ``__reduce__`` of its own, and one with tensors
among its attributes. Nothing looks into a leaf, and it is saved whole.
"""

import copyreg
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from torch import Tensor

ATOMS = frozenset((int, float, str, bool, type(None)))
"""Types of values that hold nothing. The walk skips them."""

PLAIN = frozenset((dict, list, tuple))
"""Types of containers that are no subclass of another."""

_BASES = frozenset((object, dict, list, tuple, OrderedDict, defaultdict, Counter))
_PICKLING = (
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__"),
    *("__iter__", "__len__", "__getitem__", "keys", "items", "values"),
)
"""Methods that decide what a container holds and how it is pickled."""

_UNPICKLING = ("__new__", "__init__", "__setitem__", "append", "extend", "update")
"""Methods that are called with the items when a container is unpickled."""


def is_container(value: Any) -> bool:
    """Whether the walk enters ``value``."""
    kind: Any = type(value)
    if kind in PLAIN:
        return True
    if not isinstance(value, dict | list | tuple) or not _pickles_as_its_base(kind):
        return False
    attributes = getattr(value, "__dict__", None)
    # Attributes that mirror the items would keep the old ones when the items are replaced.
    return not attributes or not (attributes is value or any(isinstance(each, Tensor) for each in attributes.values()))


def is_unpickled_plainly(container: Any) -> bool:
    """Whether unpickling has put the items into a container and done nothing else with them."""
    kind: Any = type(container)
    return kind in PLAIN or _inherits(kind, _UNPICKLING)


def items_of(container: Any) -> Iterable[tuple[Any, Any]]:
    """Return keys or indices with the items of a container."""
    return container.items() if isinstance(container, dict) else enumerate(container)


@lru_cache(maxsize=256)
def _pickles_as_its_base(kind: Any) -> bool:
    has_slots = any(vars(each).get("__slots__") for each in kind.__mro__ if each not in _BASES)
    return not has_slots and kind not in copyreg.dispatch_table and _inherits(kind, _PICKLING)


@lru_cache(maxsize=256)
def _inherits(kind: Any, names: tuple[str, ...]) -> bool:
    """Whether a class has these methods from Python's own containers, or as ``namedtuple`` makes them."""
    for name in names:
        owner = next((each for each in kind.__mro__ if name in vars(each)), object)
        if owner not in _BASES and not (_is_named_tuple(owner) and name in ("__new__", "__getnewargs__")):
            return False
    return True


_NAMED = namedtuple("_NAMED", ()).__getnewargs__.__code__  # type: ignore[attr-defined]


def _is_named_tuple(kind: type) -> bool:
    """Whether ``namedtuple`` or ``NamedTuple`` made the class: both always make it in the same way."""
    return tuple in kind.__bases__ and getattr(kind.__getnewargs__, "__code__", None) is _NAMED  # type: ignore[attr-defined]
