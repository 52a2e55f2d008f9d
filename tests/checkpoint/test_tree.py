"""The walk: each container once, whatever it is in, and built anew as what it was.

Graphs of containers are made at random, with shared containers and with cycles.
"""

import copyreg
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.parsing import AttributeDict
from support.containers import Bag, Converting, Pair, Row, Stack, Typed, deep, shared

from q8lightning.checkpoint import tree
from q8lightning.checkpoint.containers import is_container, is_unpickled_plainly


class Leaf:
    """Something that is no container."""

    def __init__(self, number: int) -> None:
        self.number = number


DICTS: dict[type, Callable[[], Any]] = {
    dict: dict,
    OrderedDict: OrderedDict,
    defaultdict: lambda: defaultdict(list),
    Counter: Counter,
    Bag: Bag,
    AttributeDict: AttributeDict,
    Converting: lambda: Converting.__new__(Converting),
}
LISTS: dict[type, Callable[[], Any]] = {list: list, Stack: Stack}
TUPLES: dict[type, Callable[[list[Any]], Any]] = {
    tuple: tuple,
    Row: Row,
    Pair: lambda items: Pair(*([*items, None, None])[:2]),
    Typed: lambda items: Typed(*([*items, None, None])[:2]),
}

Plan = list[tuple[type, list[int]]]
"""Of each container its type and what is in it: containers by their numbers, modulo, and leaves by -1 and below."""

plans = st.lists(
    st.tuples(st.sampled_from([*DICTS, *LISTS, *TUPLES]), st.lists(st.integers(-4, 11), max_size=4)),
    min_size=1,
    max_size=12,
)


def build(plan: Plan, leaf: Callable[[int], Any]) -> Any:
    """Make the containers of a plan and return the first; a tuple has mutable ones and those that come later."""
    made: dict[int, Any] = {}
    leaves = {number: leaf(number) for number in range(-4, 0)}
    for index, (kind, _) in enumerate(plan):
        if kind not in TUPLES:
            made[index] = (DICTS | LISTS)[kind]()
    for index, (kind, items) in reversed(list(enumerate(plan))):
        if kind in TUPLES:
            places = [item % len(plan) if item >= 0 else item for item in items]
            made[index] = TUPLES[kind]([leaves[i] if i < 0 else made.get(i) for i in places])
    for index, (kind, items) in enumerate(plan):
        values = [leaves[item] if item < 0 else made[item % len(plan)] for item in items]
        if kind in DICTS:
            for key, value in enumerate(values):
                (OrderedDict if kind is OrderedDict else dict).__setitem__(made[index], key, value)
        elif kind in LISTS:
            made[index] += values
        if kind is Bag:
            made[index].note = [1]
    return made[0]


@settings(max_examples=150, deadline=None)
@given(plans)
def test_every_graph_of_containers_is_built_anew_as_what_it_was(plan: Plan) -> None:
    def other(leaf: Any) -> Any:
        return Leaf(leaf.number + 100) if leaf.number not in done else done[leaf.number]

    root = build(plan, Leaf)
    before = described(root)
    expected = described(build(plan, lambda number: Leaf(number + 100)))
    done = {number: Leaf(number + 100) for number in range(-4, 0)}

    assert tree.rebuild(root, lambda leaf: leaf) is root, "nothing changes"
    copy = tree.rebuild(root, lambda leaf: leaf, everything=True)
    assert described(copy) == before
    assert not [x for key, x in containers(copy).items() if key in containers(root) and x != ()]
    assert described(tree.rebuild(root, other)) == expected
    assert described(root) == before, "it is left as it was"
    changed = tree.rebuild(root, other, in_place=True)
    assert described(changed) == expected
    assert changed is root or isinstance(root, tuple)


@settings(max_examples=100, deadline=None)
@given(plans)
def test_keys_lead_to_every_leaf(plan: Plan) -> None:
    root = build(plan, Leaf)
    seen: list[Any] = []
    tree.rebuild(root, lambda leaf: seen.append(leaf) or leaf)
    for paths in (1, tree.PATHS):
        found = tree.leaves(root, paths)
        for keys, leaf in found:
            assert reduce(lambda item, key: item[key], keys, root) is leaf
        assert len({keys for keys, _ in found}) == len(found)
        assert {id(leaf) for _, leaf in found} == {id(leaf) for leaf in seen}
    assert len(tree.leaves(root)) == len(seen), "one path for each place"


def containers(root: Any) -> dict[int, Any]:
    """Return all containers by their ids, in the order in which one meets them."""
    found, pending = {id(root): root}, [root]
    for container in pending:
        for item in container.values() if isinstance(container, dict) else container:
            if isinstance(item, dict | list | tuple) and id(item) not in found:
                found[id(item)] = item
                pending.append(item)
    return found


def described(root: Any) -> list[Any]:
    """Say of every container what it is and what is in it, and where one comes again."""
    found = containers(root)
    numbers = {key: number for number, key in enumerate(found)}

    def place(item: Any) -> Any:
        return ("leaf", item.number) if isinstance(item, Leaf) else numbers.get(id(item))

    def row(value: Any) -> Any:
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        return type(value), [(key, place(item)) for key, item in items], dict(getattr(value, "__dict__", {}))

    return [row(value) for value in found.values()]


@pytest.mark.parametrize("root", [shared(60), deep(3_000)], ids=["shared", "deep"])
def test_neither_depth_nor_the_number_of_paths_matters(root: Any) -> None:
    for paths in (1, tree.PATHS):
        found = tree.tensors(root, paths)
        assert 0 < len(found) <= 3 * tree.PATHS
    copy = tree.rebuild(root, lambda leaf: leaf + 1, everything=True)
    assert all(float(each[0]) == 2 for _, each in tree.tensors(copy))
    assert all(float(each[0]) == 1 for _, each in tree.tensors(root))
    assert len(containers(copy)) == len(containers(root))


def test_by_several_paths_a_container_is_entered_several_times() -> None:
    both = {"x": torch.ones(1)}
    assert [keys for keys, _ in tree.leaves([both, both])] == [(0, "x")]
    assert [keys for keys, _ in tree.leaves([both, both], tree.PATHS)] == [(0, "x"), (1, "x")]


class Reducing(dict):  # type: ignore[type-arg]
    def __reduce__(self) -> Any:
        return dict, (list(self.items()),)


class Slotted(dict):  # type: ignore[type-arg]
    __slots__ = ("more",)


class Listing(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(())


class Making(Row):
    def __getnewargs__(self) -> Any:
        return (list(self),)


class Mirror(dict):  # type: ignore[type-arg]
    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__ = self


class Registered(Row):
    __slots__ = ()


copyreg.pickle(Registered, lambda row: (Registered, (list(row),)))

WHOLE = {
    "pickled by a function": Registered([1]),
    "pickles itself": Reducing(x=1),
    "has slots": Slotted(x=1),
    "iterates otherwise": Listing([1]),
    "has arguments of its own": Making([1]),
    "is its own attributes": Mirror(x=1),
    "torch.Size": torch.Size([1]),
    "values and indices": torch.ones(2, 2).max(0),
}


@pytest.mark.parametrize("value", WHOLE.values(), ids=WHOLE)
def test_what_may_hold_more_than_its_items_is_a_leaf(value: Any) -> None:
    assert not is_container(value)
    assert [leaf for _, leaf in tree.leaves({"a": [value]})] == [value]


def test_so_is_what_mirrors_a_tensor_among_its_attributes() -> None:
    for kind in (Bag, Stack, OrderedDict):
        value = kind()
        value.name = "word"
        assert is_container(value)
        value.tensor = torch.ones(2)
        assert not is_container(value)


def test_what_unpickling_may_have_converted_is_told_from_what_it_has_not() -> None:
    for plain in ({}, [], (), OrderedDict(), defaultdict(list), Counter(), Bag(), Stack(), Pair(1, 2), Typed(1)):
        assert is_container(plain)
        assert is_unpickled_plainly(plain)
    converting = Converting.__new__(Converting)
    assert is_container(converting)
    assert not is_unpickled_plainly(converting)
