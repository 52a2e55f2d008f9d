"""The walk over the containers of a checkpoint: which are entered, what is in them, and how they are built anew.

A container is a dict, a list, a tuple or an object of a subclass that keeps and pickles its items as its base does.
Whatever else there is (a subclass with a ``__reduce__`` of its own, one with tensors among its attributes, any other
object, a tensor) is a leaf: nobody looks into it, and it is saved whole. Everything that looks for tensors, replaces,
copies or counts them goes by this rule, so that what a file says of itself is so.

Each container is visited once, however many paths lead to it, and nothing here recurses: containers may be as deep as
they like, share each other and hold themselves.
"""

import copyreg
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

Keys = tuple[Any, ...]
"""Keys and indices that lead to a leaf."""

ATOMS = frozenset((int, float, str, bool, type(None)))
"""Types of values that hold nothing; the walk passes them by."""

PATHS = 8
"""By how many paths a container is entered where each path may mean something else. What many levels share has more
paths than anybody can walk."""

_FLAT = ATOMS | {Tensor}
_EXACT = frozenset((dict, list, tuple))
_BASES = frozenset((object, dict, list, tuple, OrderedDict, defaultdict, Counter))
_PICKLING = (
    *("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__"),
    *("__iter__", "__len__", "__getitem__", "keys", "items", "values"),
)
"""Methods that say what a container holds and how it is pickled."""

_UNPICKLING = ("__new__", "__init__", "__setitem__", "append", "extend", "update")
"""Methods that are called with the items when a container is unpickled."""


def is_container(value: Any) -> bool:
    """Whether the walk enters ``value``."""
    kind: Any = type(value)
    if kind in _EXACT:
        return True
    if not isinstance(value, dict | list | tuple) or not _pickles_as_its_base(kind):
        return False
    attributes = getattr(value, "__dict__", None)
    # Attributes that mirror the items would keep what the items have no longer.
    return not attributes or not (attributes is value or any(isinstance(each, Tensor) for each in attributes.values()))


def is_unpickled_plainly(container: Any) -> bool:
    """Whether unpickling put the items into a container without doing anything to them."""
    kind: Any = type(container)
    return kind in _EXACT or _inherits(kind, _UNPICKLING)


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
    """Whether ``namedtuple`` or ``NamedTuple`` made the class, which lets nobody override how it is made."""
    return tuple in kind.__bases__ and getattr(kind.__getnewargs__, "__code__", None) is _NAMED  # type: ignore[attr-defined]


def items_of(container: Any) -> Iterable[tuple[Any, Any]]:
    """Return keys or indices and what is there."""
    return container.items() if isinstance(container, dict) else enumerate(container)


def leaves(root: Any, paths: int = 1) -> list[tuple[Keys, Any]]:
    """Return the leaves in a container with the keys that lead to them, in its order.

    Args:
        root: Usually a checkpoint. A leaf is returned by itself.
        paths: By how many paths a container is entered.
    """
    if not is_container(root):
        return [((), root)]
    found: list[tuple[Keys, Any]] = []
    entered, around = {id(root): 1}, {id(root)}
    stack: list[tuple[Keys, Any, Iterator[tuple[Any, Any]]]] = [((), root, iter(items_of(root)))]
    while stack:
        keys, container, items = stack[-1]
        for key, item in items:
            kind = type(item)
            if kind in ATOMS:
                continue
            if kind is Tensor or not is_container(item):
                found.append(((*keys, key), item))
                continue
            here = id(item)
            times = entered.get(here, 0)
            if times < paths and here not in around:
                entered[here] = times + 1
                if _FLAT.issuperset(map(type, item.values() if isinstance(item, dict) else item)):
                    found += [((*keys, key, k), x) for k, x in items_of(item) if type(x) is Tensor]
                    continue
                around.add(here)
                stack.append(((*keys, key), item, iter(items_of(item))))
                break
        else:
            around.discard(id(container))
            stack.pop()
    return found


def tensors(root: Any, paths: int = 1) -> list[tuple[Keys, Tensor]]:
    """Return the tensors among the leaves; see :func:`leaves`."""
    return [leaf for leaf in leaves(root, paths) if isinstance(leaf[1], Tensor)]


def rebuild(
    root: Any,
    change: Callable[[Any], Any],
    everything: bool = False,
    anew: bool = False,
    in_place: bool = False,
    known: dict[int, Any] | None = None,
    copied: Callable[[Any, Any], None] | None = None,
) -> Any:
    """Return ``root`` with what ``change`` makes of its leaves; what holds nothing that changes stays the same object.

    Subclasses stay what they are and keep their attributes; none of their own methods is called.

    Args:
        root: A container, or a leaf.
        change: Returns what takes a leaf's place, or the leaf itself. Asked again for each place of a leaf.
        everything: Copy all containers, whether anything changes in them or not.
        anew: Copy the root, whether anything changes or not.
        in_place: Change dicts and lists themselves; only tuples are made anew.
        known: What takes the place of containers, by id; the copies that are made are added. Whoever passes it on to
            another call keeps the containers alive.
        copied: Told of each container that is no plain one, and of its copy; the attributes of both are the same.
    """
    if not is_container(root):
        return change(root)
    copies = {} if known is None else known
    if id(root) in copies:
        return copies[id(root)]
    found = {id(root): root}
    pending = [root]
    edits: dict[int, list[tuple[Any, Any]]] = {}  # of each container, what changes in it
    inner: dict[int, list[tuple[Any, int]]] = {}  # the containers in it
    outer: dict[int, list[int]] = {}  # those that it is in
    for container in pending:
        here, changes, within = id(container), [], []
        for key, item in items_of(container):
            kind = type(item)
            if kind in ATOMS:
                continue
            if kind is Tensor or not is_container(item):
                new = change(item)
            elif (new := copies.get(id(item), item)) is item:
                there = id(item)
                within.append((key, there))
                if not everything:
                    outer.setdefault(there, []).append(here)
                if there not in found:
                    found[there] = item
                    pending.append(item)
            if new is not item:
                changes.append((key, new))
        if changes:
            edits[here] = changes
        if within:
            inner[here] = within
    if anew:
        edits.setdefault(id(root), [])
    changed = found if everything else _reaching(edits, outer, found if in_place else {})
    tuples = []
    for here in changed:
        container = found[here]
        if isinstance(container, tuple):
            tuples.append(here)
        else:
            copies[here] = container if in_place else _copy(container)
    for here in tuples:
        _make_tuples(here, found, changed, copies, inner, edits)
    for here, items in edits.items():
        _put(copies[here], items)
    for here, within in inner.items():
        if here in changed:
            _put(copies[here], [(key, copies[there]) for key, there in within if there in copies])
    if copied is not None:
        for here in changed:
            if type(found[here]) not in _EXACT:
                copied(found[here], copies[here])
    return copies.get(id(root), root)


def _put(container: Any, items: Iterable[tuple[Any, Any]]) -> None:
    """Replace items of a dict or a list; a tuple was made with them."""
    if isinstance(container, dict):
        dict.update(container, items)
    elif isinstance(container, list):
        for index, item in items:
            list.__setitem__(container, index, item)


def _reaching(edits: Iterable[int], outer: dict[int, list[int]], stay: dict[int, Any]) -> dict[int, None]:
    """Return the containers in which something changes: those with edits, and those around any that is made anew.

    Of those in ``stay``, by id, only tuples are.
    """
    changed = dict.fromkeys(edits)
    pending = list(changed)
    while pending:
        here = pending.pop()
        if not isinstance(stay.get(here, ()), tuple):
            continue
        for around in outer.get(here, ()):
            if around not in changed:
                changed[around] = None
                pending.append(around)
    return changed


def _make_tuples(
    first: int,
    found: dict[int, Any],
    changed: Any,
    copies: dict[int, Any],
    inner: dict[int, list[tuple[Any, int]]],
    edits: dict[int, list[tuple[Any, Any]]],
) -> None:
    """Make a tuple anew, after those in it; dicts and lists are there already, to be filled later."""
    pending = [first]
    while pending:
        here = pending[-1]
        missing = [there for _, there in inner.get(here, ()) if there in changed and there not in copies]
        if missing:
            pending += missing
            continue
        pending.pop()
        if here not in copies:
            items = list(found[here])
            for key, there in inner.get(here, ()):
                items[key] = copies.get(there, items[key])
            for key, new in edits.get(here, ()):
                items[key] = new
            copies[here] = _with_attributes(tuple.__new__(type(found[here]), items), found[here])


def _copy(container: Any) -> Any:
    """Return a shallow copy of a dict or a list, with its attributes, that no method of a subclass had a say in."""
    kind = type(container)
    if kind is dict or kind is list:
        return container.copy()
    result: Any
    if kind is OrderedDict:
        result = OrderedDict(container)
    elif isinstance(container, OrderedDict):
        result = OrderedDict.__new__(kind)
        for key, item in container.items():
            OrderedDict.__setitem__(result, key, item)
    elif isinstance(container, dict):
        result = dict.__new__(kind)
        if isinstance(container, defaultdict):
            defaultdict.__init__(result, container.default_factory)
        dict.update(result, container)
    else:
        result = list.__new__(kind)
        list.extend(result, container)
    return _with_attributes(result, container)


def _with_attributes(copy: Any, container: Any) -> Any:
    attributes = getattr(container, "__dict__", None)
    if attributes:
        vars(copy).update(attributes)
    return copy


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor shows a memory that can be looked at: no subclass, nothing sparse, nested or on meta."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_meta
    )


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but what lies in its memory, seen through shape and strides; it has no attributes."""
    return (
        has_memory(tensor) and not (tensor.is_quantized or tensor.is_neg() or tensor.is_conj()) and not tensor.__dict__
    )
