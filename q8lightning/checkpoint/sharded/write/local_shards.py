"""The part of a checkpoint that one process writes, as a checkpoint of its own: the same plan then encodes it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from q8lightning.checkpoint.encode.select.leaves import Shard
from q8lightning.checkpoint.layout.places import is_optimizer
from q8lightning.checkpoint.layout.sections import OPTIMIZER_STATES, STATE_DICT, listed
from q8lightning.checkpoint.sharded.write.shard_plan import ShardPlan, ShardPlanner, local_tensor
from q8lightning.checkpoint.tree import Keys

_MORE = "more shards"
"""The key of further shards of a tensor, where one process has several of it. They are stored as they are."""


class LocalShards(NamedTuple):
    """What one process writes.

    Attributes:
        checkpoint: Its shards, where a checkpoint of Lightning has the whole tensors. In the first process also what no
            process has a part of.
        places: Where what is written stands in it.
        shards: What each tensor is a part of, by its id.
    """

    checkpoint: dict[str, Any]
    places: Mapping[MetadataIndex, Keys]
    shards: Mapping[int, Shard]


def local_shards(checkpoint: Mapping[str, Any], plan: ShardPlan, planner: ShardPlanner, with_rest: bool) -> LocalShards:
    """Return what this process writes of a checkpoint.

    Args:
        checkpoint: Whose tensors may be DTensors or ShardedTensors; left as it is.
        plan: What this process writes.
        planner: Knows where it is.
        with_rest: Whether this process writes what is neither of the model nor of the optimizers.
    """
    states: dict[str, Any]
    if planner.roots is None:
        groups = [_without_state(each) for each in listed(checkpoint.get(OPTIMIZER_STATES))]
        states = {STATE_DICT: {}, OPTIMIZER_STATES: groups}
    else:
        parts = {key: checkpoint[key] for key in planner.roots}
        states = {key: _without_state(part) if is_optimizer(part) else {} for key, part in parts.items()}
    places: dict[MetadataIndex, Keys] = {}
    shards: dict[int, Shard] = {}
    taken: set[Keys] = set()
    for item in plan.items:
        keys = planner.keys_of(item.index)
        value = local_tensor(planner, item)
        if keys in taken:
            keys = (_MORE, len(taken), *keys)
        taken.add(keys)
        places[item.index] = keys
        if isinstance(value, Tensor):
            shards[id(value)] = _shard_of(item)
        _put(states, keys, value)
    rest = {key: value for key, value in checkpoint.items() if key not in states} if with_rest else {}
    return LocalShards({**rest, **states}, places, shards)


def at(content: Any, keys: Keys) -> Any:
    """Return what stands in a checkpoint at some keys."""
    for key in keys:
        content = content[key]
    return content


def _without_state(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all processes know of an optimizer: its groups, and no states yet."""
    return {key: {} if key == "state" else _unshared(value) for key, value in optimizer.items()}


def _unshared(value: Any) -> Any:
    """Return copies of the containers in a value."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return list(map(_unshared, value)) if isinstance(value, list) else value


def _put(root: Any, keys: Keys, value: Any) -> None:
    *outer, last = keys
    for key in outer:
        root = root.setdefault(key, {}) if isinstance(root, dict) else root[key]
    root[last] = value


def _shard_of(item: WriteItem) -> Shard:
    assert item.tensor_data is not None
    data, chunk = item.tensor_data, item.tensor_data.chunk
    row = math.prod(data.size[1:])
    inner = math.prod(chunk.sizes[1:])
    first = math.prod(data.size[2:]) * chunk.offsets[1] if len(data.size) > 1 else 0
    return Shard(data.size.numel(), math.gcd(row, inner, first) if len(data.size) > 1 else 0)
