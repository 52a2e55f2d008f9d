"""Save with the strategies of Fabric that hand states to torch.distributed.checkpoint: FSDP and ModelParallel."""

import os
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import Optimizer

from q8lightning.checkpoint.encode.save import Save
from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.report import SaveReport
from q8lightning.checkpoint.sharded.ranks import Ranks, talking
from q8lightning.checkpoint.sharded.write.local_shards import local_shards
from q8lightning.checkpoint.sharded.write.save import ShardedSave
from q8lightning.checkpoint.sharded.write.shard_plan import ShardPlan, ShardPlanner, agree
from q8lightning.checkpoint.staging.transfer import HostMemory
from q8lightning.trainer.checkpoint_io import QuantizedCheckpointIO


class FabricShards:
    """Saves the states of one strategy; made and called in all processes.

    Args:
        io: What encodes.
    """

    def __init__(self, io: QuantizedCheckpointIO) -> None:
        self.io = io
        self._front, self._back = Ranks.of_all(), Ranks.of_all()  # one for the training, one for what writes
        self._last: ShardPlan | None = None

    def save(self, path: Any, state: Mapping[str, Any], names: ModelNames, filter: Any) -> None:
        """Save a state to a folder, each process its own shards.

        Args:
            path: The folder.
            state: Modules, optimizers and anything else, unwrapped.
            names: What is known of them.
            filter: Must be None.

        Raises:
            NotImplementedError: If there is a filter, as from ``fabric.save``.
        """
        if filter is not None:
            raise NotImplementedError("checkpoints in shards cannot be filtered; save without filter")
        checkpoint = states_of(state, StateDictOptions())
        roots = {key: (key,) for key, value in state.items() if isinstance(value, nn.Module | Optimizer)}
        with talking():
            target = self._front.at_first(lambda: os.path.abspath(path))
            planner = ShardPlanner(roots)
            parts = {key: checkpoint[key] for key in roots}
            plan = self._last = agree(planner, parts, self._front, self._last)
            part = self._front.together(lambda: local_shards(checkpoint, plan, planner, self._front.is_first))

        def write(save: Save, memory: HostMemory) -> SaveReport:
            return ShardedSave(save, plan, part.places, self._back, tuple(roots)).write(target, memory)

        self.io.save_shards(part.checkpoint, part.shards, path, names, self._front, write)

    def save_gathered(self, path: Any, state: Mapping[str, Any], filter: Any) -> None:
        """Gather a state in the first process, which saves one file.

        Args:
            path: The file.
            state: Modules, optimizers and anything else, unwrapped.
            filter: For keys of the state, functions that say by name and value what is saved.
        """
        checkpoint = states_of(state, StateDictOptions(full_state_dict=True, cpu_offload=True))
        for key, keep in (filter or {}).items():
            checkpoint[key] = {name: value for name, value in checkpoint[key].items() if keep(name, value)}
        self._front.at_first(lambda: self.io.save_checkpoint(checkpoint, path))


def states_of(state: Mapping[str, Any], options: StateDictOptions) -> dict[str, Any]:
    """Return a state with the states of its objects in their place.

    Raises:
        ValueError: If there are optimizers, and not one module that they may belong to.
    """
    modules = [value for value in state.values() if isinstance(value, nn.Module)]
    if not modules:
        raise ValueError(
            "a checkpoint in shards has a module, which names the parameters, got none; pass it in the state, such as"
            ' {"model": model, "optimizer": optimizer}'
        )
    module = _main(modules)
    result: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, nn.Module):
            result[key] = get_model_state_dict(value, options=options)
        elif isinstance(value, Optimizer):
            result[key] = get_optimizer_state_dict(module, value, options=options)
        else:
            result[key] = value.state_dict() if callable(getattr(value, "state_dict", None)) else value
    return result


def _main(modules: list[nn.Module]) -> nn.Module:
    """Return the module that is sharded; Fabric saves one at a time."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    def is_sharded(module: nn.Module) -> bool:
        parts = any(isinstance(each, FullyShardedDataParallel) for each in module.modules())
        return parts or any(isinstance(each, DTensor) for each in module.parameters())

    return next(filter(is_sharded, modules), modules[0])
