"""What a checkpoint looks like: whether the tensors of two saves are the same, in the same places."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from q8lightning.checkpoint.tree import ATOMS, is_container

_PROPERTIES = attrgetter("shape", "dtype", "requires_grad")  # addresses are unique across devices


class Outline(NamedTuple):
    """What a checkpoint looks like; equal outlines have the same tensors under the same keys, in the same places.

    Attributes:
        structure: Types and keys of its containers, and the types of what is in them.
        addresses: Where each tensor begins.
        strides: Of each tensor.
        properties: What else tells how each tensor is saved.
    """

    structure: list[Any]
    addresses: list[int]
    strides: list[tuple[int, ...]]
    properties: list[tuple[Any, ...]]

    def is_that_of(self, other: "Outline | None") -> bool:
        """Whether both are equal; not if that cannot be said, as of keys that are tensors."""
        try:
            return self == other
        except RuntimeError:
            return False


def outline_of(checkpoint: Mapping[str, Any]) -> tuple[Outline, list[Tensor]] | None:
    """Return the outline and the tensors of a checkpoint; None if one has no place in memory."""
    structure: list[Any] = []
    tensors: list[Tensor] = []
    numbers = {id(checkpoint): 0}
    pending: list[Any] = [checkpoint]
    for container in pending:
        for item in _outline(container, structure, tensors):
            structure.append(numbers.setdefault(id(item), len(pending)))  # which of the containers it is
            if numbers[id(item)] == len(pending):
                pending.append(item)
    try:
        addresses, strides = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors))
    except (RuntimeError, NotImplementedError):  # sparse, nested
        return None
    return Outline(structure, addresses, strides, list(map(_PROPERTIES, tensors))), tensors


def _outline(container: Any, structure: list[Any], tensors: list[Tensor]) -> list[Any]:
    """Add what a container looks like and the tensors in it; return the containers in it."""
    items = container
    if isinstance(container, dict):
        structure.append(list(container))
        items = list(container.values())
    kinds = list(map(type, items))
    structure.append(type(container))
    structure.append(kinds)
    if kinds.count(Tensor) == len(kinds):  # a state dict, or what an optimizer remembers of a parameter
        tensors += items
        return []
    inner = []
    for item, kind in zip(items, kinds, strict=True):
        if kind in ATOMS:
            continue
        if kind is Tensor or kind is nn.Parameter:
            tensors.append(item)
        elif is_container(item):
            inner.append(item)
    return inner
