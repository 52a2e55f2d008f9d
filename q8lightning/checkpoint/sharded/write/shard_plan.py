"""Agree on who writes which shard; what several processes hold alike, one of them writes.

DCP's own planner says what there is to write: of a DTensor or a ShardedTensor the shards of this process, of anything
else all of it. Nothing is encoded before all agree, so that nothing is encoded twice.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from q8lightning.checkpoint.layout.sections import OPTIMIZER_STATES, STATE_DICT
from q8lightning.checkpoint.sharded.folder import OPTIMIZER
from q8lightning.checkpoint.sharded.ranks import Ranks
from q8lightning.checkpoint.tree import Keys

_CHUNK = 1000
"""Bytes that ``torch.save`` takes for a chunk besides its content, about."""


@dataclass(frozen=True)
class ShardPlan:
    """What one process writes of a checkpoint.

    Attributes:
        outline: What the state looks like in this process; None if only DCP can tell.
        local: What this process has to offer. As long as that is the same in all of them, so is the rest.
        items: What it writes.
        metadata: What the checkpoint consists of; in the first process only.
    """

    outline: list[Any] | None
    local: SavePlan
    items: tuple[WriteItem, ...]
    metadata: Metadata | None


class ShardPlanner(DefaultSavePlanner):
    """DCP's planner, except that the two moments of a parameter stay together: they are judged by each other.

    Args:
        roots: The keys in the checkpoint to each part of the state; None for a checkpoint of Lightning.
    """

    def __init__(self, roots: Mapping[str, Keys] | None = None) -> None:
        super().__init__()
        self.roots = roots

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Let one process write what several have, as evenly as possible."""
        plans, metadata = super().create_global_plan(_without_copies(all_plans))
        return plans, metadata

    def outline(self) -> list[Any] | None:
        """Return what the state looks like: equal outlines give equal plans, which take ten times as long to make."""
        found: list[Any] = list(self.state_dict)
        for value in self.state_dict.values():
            if isinstance(value, DTensor):
                found.append((value.shape, value.dtype, value.placements, value.device_mesh))
            elif type(value) is Tensor:
                found.append((value.shape, value.dtype))
            elif isinstance(value, Tensor):
                return None
        return found

    def keys_of(self, index: MetadataIndex) -> Keys:
        """Return where what is written stands in the checkpoint."""
        path = self.mappings[index.fqn]
        return checkpoint_keys(path) if self.roots is None else (*self.roots[str(path[0])], *path[1:])


def checkpoint_keys(path: Keys) -> Keys:
    """Return the keys in a checkpoint of Lightning to what stands at a path of the state that DCP saves."""
    first, *others = path
    if str(first).startswith(OPTIMIZER):
        return OPTIMIZER_STATES, int(str(first).removeprefix(OPTIMIZER)), *others
    return STATE_DICT, *others


def state_for_dcp(checkpoint: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """Return what of a checkpoint of Lightning DCP saves; the rest goes into ``meta.pt``.

    Args:
        checkpoint: With the states of model and optimizers, whose tensors may be DTensors or ShardedTensors.
        weights: What the strategy calls the model's state there.
    """
    states = enumerate(checkpoint.get(OPTIMIZER_STATES, ()))
    return {weights: checkpoint[STATE_DICT], **{f"{OPTIMIZER}{index}": state for index, state in states}}


def agree(planner: ShardPlanner, state: dict[str, Any], ranks: Ranks, last: ShardPlan | None) -> ShardPlan:
    """Return what this process writes of a state, asking the others only if one of them has something else than before.

    Args:
        planner: A new one; it knows afterwards where what is written is.
        state: See :func:`state_for_dcp`.
        ranks: The processes.
        last: What this returned at the save before.
    """

    def plan_own() -> tuple[list[Any] | None, SavePlan]:
        planner.set_up_planner(state, is_coordinator=ranks.is_first)
        outline = planner.outline()
        if last is not None and outline is not None and outline == last.outline:
            return outline, last.local
        return outline, planner.create_local_plan()

    outline, local = ranks.together(plan_own)
    same = last is not None and (local is last.local or local == last.local)
    if ranks.smallest(same) and last is not None:
        return last

    def decide(plans: list[SavePlan]) -> list[tuple[SavePlan, Metadata | None]]:
        each, metadata = planner.create_global_plan(plans)
        return [(plan, metadata if rank == 0 else None) for rank, plan in enumerate(each)]

    plan, metadata = ranks.decide(local, decide)
    return ShardPlan(outline, local, tuple(plan.items), metadata)


def local_tensor(planner: ShardPlanner, item: WriteItem) -> Any:
    """Return what is to be written: of a tensor the part in this process, without a copy."""
    found = planner.lookup_object(item.index)
    return found.detach() if isinstance(found, Tensor) else found


def _without_copies(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Leave each item to one of the plans that have it; what belongs to the same shard of a parameter to the same."""
    holders: dict[MetadataIndex, list[int]] = defaultdict(list)
    for number, plan in enumerate(plans):
        for item in plan.items:
            holders[item.index].append(number)
    groups: dict[tuple[Any, ...], dict[MetadataIndex, int]] = defaultdict(dict)
    for plan in plans:
        for item in plan.items:
            path = tuple(plan.planner_data[item.index.fqn])
            group = groups[path[:3], item.index.offset, tuple(holders[item.index])]
            group[item.index] = _CHUNK + (item.tensor_storage_size() or 0)
    load, owner = [0] * len(plans), dict[MetadataIndex, int]()
    for (_, _, candidates), group in groups.items():
        least = min(candidates, key=load.__getitem__)
        load[least] += sum(group.values())
        owner |= dict.fromkeys(group, least)
    return [
        replace(plan, items=[item for item in plan.items if owner[item.index] == number])
        for number, plan in enumerate(plans)
    ]
