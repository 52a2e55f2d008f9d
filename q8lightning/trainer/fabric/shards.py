"""Save with the strategies of Fabric that hand states to torch.distributed.checkpoint: FSDP and ModelParallel."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import Optimizer

from q8lightning.checkpoint.encode.select.model_names import ModelNames
from q8lightning.checkpoint.sharded.write.shard_plan import ShardPlanner
from q8lightning.system.paths import PathLike
from q8lightning.trainer.checkpoint_io.shards import ShardSaver

Filter = Mapping[str, Callable[[str, Any], bool]]
"""For keys of a state, functions that say by name and value what of it is saved."""


def save_in_shards(saver: ShardSaver, path: PathLike, state: Mapping[str, Any], names: ModelNames) -> None:
    """Save a state to a folder, each process its own shards.

    Args:
        saver: What saves the states of the strategy.
        path: The folder.
        state: Modules, optimizers and anything else, unwrapped.
        names: What is known of them.
    """
    checkpoint = states_of(state, StateDictOptions())
    roots = {key: (key,) for key, value in state.items() if isinstance(value, nn.Module | Optimizer)}
    parts = {key: checkpoint[key] for key in roots}
    saver.save(path, checkpoint, parts, ShardPlanner(roots), lambda: names, tuple(roots))


def save_gathered(saver: ShardSaver, path: PathLike, state: Mapping[str, Any], filter: Filter | None) -> None:
    """Gather a state in the first process, which saves one file.

    Args:
        saver: What saves the states of the strategy.
        path: The file.
        state: Modules, optimizers and anything else, unwrapped.
        filter: For keys of the state, functions that say by name and value what is saved.
    """
    checkpoint = states_of(state, StateDictOptions(full_state_dict=True, cpu_offload=True))
    for key, keep in (filter or {}).items():
        checkpoint[key] = {name: value for name, value in checkpoint[key].items() if keep(name, value)}
    saver.ranks.at_first(lambda: saver.io.save_checkpoint(checkpoint, path))


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
