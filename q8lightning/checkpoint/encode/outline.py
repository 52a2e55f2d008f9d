"""Outline a checkpoint, to tell whether two saves have the same tensors in the same places."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn

from q8lightning.checkpoint.containers import ATOMS, is_container
from q8lightning.checkpoint.layout.sections import OPTIMIZER_STATES, STATE_DICT
from q8lightning.checkpoint.memory import has_memory, is_ordinary
from q8lightning.checkpoint.staging.copier import IMMUTABLE
from q8lightning.checkpoint.tree import leaves

_PROPERTIES = attrgetter("shape", "dtype", "requires_grad")  # no device: addresses are unique across devices


class Outline(NamedTuple):
    """The outline of a checkpoint. Equal outlines have the same tensors under the same keys, in the same memory.

    Attributes:
        structure: Types and keys of its containers, and the types of what is in them.
        addresses: The address of each tensor in bytes; None if a tensor has none (sparse, nested). Then no outline
            counts as equal.
        strides: The strides of each tensor in elements; empty for a tensor without an address.
        properties: Shape, dtype and ``requires_grad`` of each tensor; empty for a tensor without an address.
    """

    structure: list[Any]
    addresses: list[int] | None
    strides: list[tuple[int, ...]]
    properties: list[tuple[Any, ...]]

    def is_that_of(self, other: "Outline") -> bool:
        """Whether both are equal; False if that cannot be told, as with keys that are tensors."""
        try:
            return self.addresses is not None and self == other
        except RuntimeError:
            return False


def outline_to_plan(checkpoint: Mapping[str, Any]) -> tuple[Mapping[str, Any], Outline, list[Tensor]]:
    """Return the part of a checkpoint that a plan covers, with the part's outline and its tensors, numbered alike.

    Callbacks, loops and schedulers keep counts and scores: plain values, and tensors of one element with memory of
    their own. They are never encoded, and scores are new tensors at every save. A section with nothing else is left
    out, so that the plan still fits when they change.
    """
    part, scores = {}, set[int]()
    for key, section in checkpoint.items():
        found = [] if key in _PLANNED else [leaf for _, leaf in leaves(section) if type(leaf) not in IMMUTABLE]
        if key in _PLANNED or not all(map(_is_score, found)):
            part[key] = section
        else:
            scores.update(map(Tensor.data_ptr, found))
    outline, tensors = outline_of(part)
    if not scores.isdisjoint(map(Tensor.data_ptr, filter(has_memory, tensors))):
        # The model shares a score, which must stay shared in the file.
        return checkpoint, *outline_of(checkpoint)
    return part, outline, tensors


_PLANNED = (STATE_DICT, OPTIMIZER_STATES)


def _is_score(leaf: Any) -> bool:
    """Whether a leaf is a tensor of one element that fills its memory."""
    return type(leaf) is Tensor and is_ordinary(leaf) and leaf.untyped_storage().nbytes() == leaf.element_size()


def outline_of(checkpoint: Mapping[str, Any]) -> tuple[Outline, list[Tensor]]:
    """Return the outline of a checkpoint and its tensors, numbered alike."""
    structure: list[Any] = []
    tensors: list[Tensor] = []
    numbers = {id(checkpoint): 0}
    pending: list[Any] = [checkpoint]
    for container in pending:
        for item in _outline(container, structure, tensors):
            structure.append(numbers.setdefault(id(item), len(pending)))  # the container's number
            if numbers[id(item)] == len(pending):
                pending.append(item)
    try:
        addresses, strides = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.stride, tensors))
        return Outline(structure, addresses, strides, list(map(_PROPERTIES, tensors))), tensors
    except (RuntimeError, NotImplementedError):  # sparse, nested
        strides = [tensor.stride() if has_memory(tensor) else () for tensor in tensors]
        properties = [_PROPERTIES(tensor) if has_memory(tensor) else () for tensor in tensors]
        return Outline(structure, None, strides, properties), tensors


def _outline(container: Any, structure: list[Any], tensors: list[Tensor]) -> list[Any]:
    """Outline one container; return the containers in it.

    Args:
        container: The container.
        structure: Gets its type, its keys and the types of its items.
        tensors: Gets the tensors in it.
    """
    items = container
    if isinstance(container, dict):
        structure.append(list(container))
        items = list(container.values())
    kinds = list(map(type, items))
    structure.append(type(container))
    structure.append(kinds)
    if kinds.count(Tensor) == len(kinds):  # a fast path: state dicts, and the states of a parameter
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
