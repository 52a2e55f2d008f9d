"""Split a checkpoint into parts that can be encoded one after the other with the same result.

A part is what :func:`~q8lightning.checkpoint.encode.checkpoint.encode_and_report` must see together: tensors that
share memory, and the optimizer's state of one parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.layout.places import NOWHERE, Places, is_optimizer, place_of
from q8lightning.checkpoint.layout.sections import is_in_state
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.sharded.read.unread import UnreadTensor
from q8lightning.checkpoint.tree import Keys
from q8lightning.tools.tensors import Value

Found = tuple[Keys, Value]
"""A tensor of a checkpoint, after the keys that lead to it."""


@dataclass(eq=False)
class Part:
    """Tensors that are encoded together.

    Attributes:
        leaves: The tensors, with the keys that lead to them.
        results: What replaces each tensor, by its id; None until the writer meets the first one.
    """

    leaves: list[Found] = field(default_factory=list)
    results: dict[int, Any] | None = None


def memory_of(value: Value) -> Any:
    """Return a key that tensors share if they share memory; None for a tensor that no policy encodes."""
    if isinstance(value, QuantizedTensor | UnreadTensor):
        return id(value)
    if value.layout != torch.strided or type(value) not in (Tensor, torch.nn.Parameter):
        return None
    return value.untyped_storage()._cdata


def parts_of(found: Sequence[Found], places: Places = NOWHERE) -> dict[int, Part]:
    """Return the part that each tensor belongs to, by the tensor's id.

    Args:
        found: All tensors that have memory in the sense of :func:`memory_of`.
        places: Those of the checkpoint.
    """
    leader: dict[Any, Any] = {}  # a union-find: marks of one part lead to the same one

    def find(mark: Any) -> Any:
        while leader.setdefault(mark, mark) != mark:
            mark = leader[mark]
        return mark

    for keys, value in found:
        place = place_of(keys, places)
        if is_in_state(place):
            leader[find(keys[: len(keys) - len(place) + 4])] = find(memory_of(value))
    parts: dict[Any, Part] = {}
    by_tensor: dict[int, Part] = {}
    for keys, value in found:
        part = by_tensor[id(value)] = parts.setdefault(find(memory_of(value)), Part())
        part.leaves.append((keys, value))
    return by_tensor


def containers_around(content: Any, wanted: Sequence[tuple[Keys, Tensor]]) -> Any:
    """Return the containers around the wanted tensors, with nothing else in them; keys and indices stay the same.

    It follows the keys that a walk has found. The walk itself (``tree.rebuild``) would copy what is not wanted.

    Args:
        content: The checkpoint.
        wanted: Tensors with the keys that lead to them. If the content itself is a tensor, it has no keys.
    """
    if not wanted[0][0]:
        return wanted[0][1]
    result = _empty(content)
    options: list[tuple[dict[Any, Any], Any]] = []
    for keys, tensor in wanted:
        original, part = content, result
        for key in keys[:-1]:
            original = original[key]
            if not _has(part, key):
                _put(part, key, _empty(original))
                if is_optimizer(original):
                    options.append((part[key], original["param_groups"]))
            part = part[key]
        _put(part, keys[-1], tensor)
    for part, groups in options:  # the states are judged by options of their groups, such as eps
        if "state" not in part:
            continue
        kept = _groups_of(groups, part["state"])
        for group, found in zip(kept, part.get("param_groups", ()), strict=False):
            group.update(found)
        part["param_groups"] = kept
    return result


_HOLE: Mapping[Any, Any] = MappingProxyType({})
"""An item of a list in whose place nothing is wanted."""


def _empty(container: Any) -> Any:
    return {} if isinstance(container, dict) else []


def _has(part: Any, key: Any) -> bool:
    return key in part if isinstance(part, dict) else key < len(part) and part[key] is not _HOLE


def _put(part: Any, key: Any, value: Any) -> None:
    if isinstance(part, list):
        part += [_HOLE] * (key + 1 - len(part))
    part[key] = value


def _groups_of(groups: Any, parameters: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Return the groups of an optimizer with only these of their parameters, and without tensors."""
    return [
        {key: value for key, value in group.items() if isinstance(value, int | float | str)}
        | {"params": [key for key in group.get("params", ()) if key in parameters]}
        for group in groups
    ]
