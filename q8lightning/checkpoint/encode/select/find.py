"""Find the tensors of a checkpoint that are encoded, those that are tied, and the moments that belong together."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from q8lightning.checkpoint.encode.select.leaves import WHOLE, Leaf, Shard, leaves_of
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.encode.select.pairs import Pair, pairs_of
from q8lightning.checkpoint.layout.sections import epsilons_of
from q8lightning.checkpoint.policy import CheckpointPolicy


class Found(NamedTuple):
    """The tensors of a checkpoint, sorted by how they are stored.

    Attributes:
        leaves: All its tensors.
        members: Those to encode: each member is a list of leaves that view the same memory, which ties them.
        neighbours: Leaves that share the memory of a member but are stored as they are, tied ones together.
        pairs: Moments that are measured together.
        refused: Tensors that the policy selects and that cannot be encoded, each with a reason for the user.
    """

    leaves: list[Leaf]
    members: list[list[Leaf]]
    neighbours: list[list[Leaf]]
    pairs: list[Pair]
    refused: list[str]


def find(
    checkpoint: Mapping[str, Any], policy: CheckpointPolicy, names: ModelNames, shards: Mapping[int, Shard] = WHOLE
) -> Found:
    """Find the tensors that the policy selects and that can be encoded.

    Two sorts are not encoded, so that they stay tied: tensors that overlap in memory without being equal, and tied ones
    whose rules name different codecs.

    Args:
        checkpoint: The checkpoint.
        policy: Says what is encoded, and how.
        names: What is known of the model.
        shards: What tensors are a part of, by their ids; whether one is large enough depends on the whole.
    """
    leaves = list(leaves_of(checkpoint, policy, names, shards))
    found = Found(leaves, [], [], [], [f"{leaf.name} ({leaf.refused})" for leaf in leaves if leaf.refused])
    for sharing in _by_storage(leaves):
        views = _views(sharing)
        members = [view for view in views if _is_member(view, found.refused)] if _are_separate(views) else []
        found.members.extend(members)
        if members and len(members) < len(views):
            # A view is saved with all of its memory, even a small one such as the bias of a fused LSTM.
            found.neighbours.extend(view for view in views if view not in members)
    encoded = {id(leaf.tensor) for member in found.members for leaf in member}
    found.pairs.extend(pairs_of(leaves, encoded, epsilons_of(checkpoint, names.places)))
    return found


def _by_storage(leaves: list[Leaf]) -> list[list[Leaf]]:
    """Return the leaves of each storage that has at least one to encode."""
    storages: dict[Any, list[Leaf]] = {}
    for leaf in leaves:
        if leaf.codec is not None:
            storages.setdefault(leaf.storage, []).append(leaf)
    for leaf in leaves:
        if leaf.codec is None and leaf.storage in storages and leaf.tensor.numel():
            storages[leaf.storage].append(leaf)
    return list(storages.values())


def _views(leaves: list[Leaf]) -> list[list[Leaf]]:
    """Group the leaves of a storage by what they view of it; the leaves of a group are tied."""
    if len(leaves) == 1:
        return [leaves]
    views: dict[tuple[Any, ...], list[Leaf]] = {}
    for leaf in leaves:
        tensor = leaf.tensor
        views.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), []).append(leaf)
    return list(views.values())


def _are_separate(views: list[list[Leaf]]) -> bool:
    """Whether no view of a storage overlaps another."""
    spans = sorted(_span(view[0].tensor) for view in views) if len(views) > 1 else []
    return all(start >= end for (_, end), (start, _) in pairwise(spans))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses where a tensor begins and ends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _is_member(view: list[Leaf], refused: list[str]) -> bool:
    """Whether tied leaves are encoded.

    They must have one codec and load as the same kind of tensor. If only the latter fails, ``refused`` gets the reason.
    """
    first, *others = view
    if first.codec is None or any(other.codec != first.codec for other in others):
        return False
    other = next((each for each in others if _loads_as(each.tensor) != _loads_as(first.tensor)), None)
    if other is None:
        return True
    refused.append(
        f"{first.name} (it is also there as {other.name}, and only one of them is a parameter or requires grad; put"
        " .detach() of that one there)"
    )
    return False


def _loads_as(tensor: Tensor) -> tuple[bool, bool]:
    """Return what decides how a tensor is loaded: whether it is a parameter and whether it requires grad."""
    return type(tensor) is nn.Parameter, tensor.requires_grad
