"""Cut a checkpoint into pieces that can be encoded one after the other with the same result.

A piece is what :func:`~q8lightning.checkpoint.encode.checkpoint.encode_and_report` must see together: tensors that
share memory, and the optimizer's state of one parameter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.sections import is_state
from q8lightning.checkpoint.tree import Keys

Found = tuple[Keys, Tensor | QuantizedTensor]
"""A tensor of a checkpoint, after the keys that lead to it."""


@dataclass(eq=False)
class Piece:
    """Tensors that are encoded together.

    Attributes:
        leaves: They, and the keys that lead to them.
        results: What takes the place of each, by its id; None until the first of them is met.
    """

    leaves: list[Found] = field(default_factory=list)
    results: dict[int, Any] | None = None


def memory_of(value: Tensor | QuantizedTensor) -> Any:
    """Return what tensors that share memory have in common, None for those that no policy ever encodes."""
    if isinstance(value, QuantizedTensor):
        return id(value)
    if value.layout != torch.strided or type(value) not in (Tensor, torch.nn.Parameter):
        return None
    return value.untyped_storage()._cdata


def pieces_of(found: Sequence[Found]) -> dict[int, Piece]:
    """Return the piece that each tensor belongs to, by the tensor's id.

    Args:
        found: All tensors that have memory in the sense of :func:`memory_of`.
    """
    leader: dict[Any, Any] = {}  # of each mark, another one of the same piece; its own if it speaks for all

    def find(mark: Any) -> Any:
        while leader.setdefault(mark, mark) != mark:
            mark = leader[mark]
        return mark

    for keys, value in found:
        if is_state(keys):
            leader[find(keys[:4])] = find(memory_of(value))
    pieces: dict[Any, Piece] = {}
    by_tensor: dict[int, Piece] = {}
    for keys, value in found:
        piece = by_tensor[id(value)] = pieces.setdefault(find(memory_of(value)), Piece())
        piece.leaves.append((keys, value))
    return by_tensor


def part_of(content: Any, wanted: Sequence[tuple[Keys, Tensor]]) -> Any:
    """Return the containers around the wanted tensors, with nothing else in them; indices stay what they are."""
    if not wanted[0][0]:
        return wanted[0][1]
    below: dict[Any, list[tuple[Keys, Tensor]]] = {}
    for (key, *keys), tensor in wanted:
        below.setdefault(key, []).append((tuple(keys), tensor))
    if isinstance(content, dict):
        part = {key: part_of(content[key], items) for key, items in below.items()}
        if "param_groups" in content and "state" in part:  # whose options, such as eps, say what the states are for
            groups = _groups_of(content["param_groups"], part["state"])
            for group, tensors in zip(groups, part.get("param_groups", ()), strict=False):
                group.update(tensors)
            part["param_groups"] = groups
        return part
    return [part_of(content[index], below[index]) if index in below else {} for index in range(max(below) + 1)]


def _groups_of(groups: Any, parameters: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Return the groups of an optimizer with only these of their parameters, and without tensors."""
    return [
        {key: value for key, value in group.items() if isinstance(value, int | float | str)}
        | {"params": [key for key in group.get("params", ()) if key in parameters]}
        for group in groups
    ]
