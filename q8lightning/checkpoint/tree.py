"""Walk over the containers of a checkpoint: find what is in them, and rebuild them with other items.

Everything that finds, replaces, copies or counts the tensors of a checkpoint walks here, so that a file tells the truth
about itself. ``containers.py`` says what the walk enters.

Each container is visited once, however many paths lead to it, and nothing here recurses. Containers may be nested as
deep as they like, share each other and contain themselves.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from q8lightning.checkpoint.containers import ATOMS, PLAIN, is_container, items_of

Keys = tuple[Any, ...]
"""Keys and indices that lead to a leaf."""

PATHS = 8
"""By how many paths a container is entered where each path may mean something else. There must be a bound, because
containers that are shared at many levels have too many paths to walk them all."""

_FLAT = ATOMS | {Tensor}


def leaves(root: Any, paths: int = 1) -> list[tuple[Keys, Any]]:
    """Return the leaves in a container with the keys that lead to them, in its order.

    Args:
        root: Usually a checkpoint. Of a leaf, the leaf itself is returned, without keys.
        paths: By how many paths each container is entered.
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
    """Return ``root`` with its leaves replaced; containers in which nothing changes stay the same objects.

    Containers of a subclass keep their class and their attributes. None of their own methods is called.

    Args:
        root: A container, or a leaf.
        change: Returns what replaces a leaf, or the leaf itself. It is called once for each place of a leaf.
        everything: Copy all containers, even if nothing changes in them.
        anew: Copy the root, even if nothing changes.
        in_place: Change dicts and lists themselves, and copy only tuples.
        known: What replaces containers, by id. The copies are added. A caller that passes it to several calls keeps the
            containers alive.
        copied: Called with each container of a subclass and its copy, which shares the values of its attributes.
    """
    if not is_container(root):
        return change(root)
    copies = {} if known is None else known
    if id(root) in copies:
        return copies[id(root)]
    found = {id(root): root}
    pending = [root]
    edits: dict[int, list[tuple[Any, Any]]] = {}  # for each container, keys and new items
    inner: dict[int, list[tuple[Any, int]]] = {}  # for each container, keys and ids of the containers in it
    outer: dict[int, list[int]] = {}  # for each container, the ids of those that hold it
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
            if type(found[here]) not in PLAIN:
                copied(found[here], copies[here])
    return copies.get(id(root), root)


def _put(container: Any, items: Iterable[tuple[Any, Any]]) -> None:
    """Replace items of a dict or a list. A tuple has the new items from the beginning."""
    if isinstance(container, dict):
        dict.update(container, items)
    elif isinstance(container, list):
        for index, item in items:
            list.__setitem__(container, index, item)


def _reaching(edits: Iterable[int], outer: dict[int, list[int]], stay: dict[int, Any]) -> dict[int, None]:
    """Return the containers to change, by id: those with edits, and those that hold a container which is copied.

    Args:
        edits: The containers with edits.
        outer: For each container, those that hold it.
        stay: Containers that are changed in place; tuples among them are copied all the same.
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
    """Copy a tuple, after the tuples in it. Copies of dicts and lists exist by then and are filled later.

    Args:
        first: The tuple.
        found: All containers, by id.
        changed: The ids of those to change.
        copies: Their copies, by id; gets those of the tuples.
        inner: For each container, keys and ids of the containers in it.
        edits: For each container, keys and new items.
    """
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
    """Return a shallow copy of a dict or a list with its attributes, without calling methods of a subclass."""
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
