"""Save and load with Fabric: through its CheckpointIO, or in shards where its strategy has none."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from lightning.fabric.strategies.strategy import Strategy

from q8lightning.checkpoint.encode.select.model_names import describe_state
from q8lightning.checkpoint.policy import CheckpointPolicy, Preset
from q8lightning.checkpoint.sharded.check import check_shards, is_sharded
from q8lightning.checkpoint.sharded.ranks import Ranks
from q8lightning.trainer.checkpoint_io import QuantizedCheckpointIO, find_quantized_io
from q8lightning.trainer.fabric_shards import FabricShards
from q8lightning.trainer.model_structure import in_state_dict
from q8lightning.trainer.twins import is_a, twin_of

Filter = Mapping[str, Callable[[str, Any], bool]]
"""For keys of a state, functions that say by name and value what of it is saved."""


def save(
    fabric: Fabric,
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    checkpoint: Preset | CheckpointPolicy | None = None,
    *,
    filter: Filter | None = None,
) -> None:
    """Save as ``fabric.save`` does, quantized; call it in all processes.

    It knows the modules in ``state``: their buffers stay as they are, and messages name parameters. With FSDP and
    ModelParallelStrategy, which use no CheckpointIO, every process encodes and writes its own shards. Everything loads
    through ``fabric.load``.

    Args:
        fabric: The Fabric, after ``launch`` and ``setup``.
        path: The file, or the folder if the strategy saves in shards.
        state: Modules, optimizers and anything else by keys of your own.
        checkpoint: A preset or a policy. None for that of the QuantizedCheckpointIO among Fabric's plugins, which also
            decides whether saves go on in the background, or else for ``"resume"``.
        filter: See ``fabric.save``; not with shards.

    Raises:
        ValueError: If there is no such preset, a plugin has another policy, or the strategy writes its checkpoints
            in a way of its own (DeepSpeed, XLA).

    Example:
        >>> import torch
        >>> from lightning.fabric import Fabric
        >>> from q8lightning.fabric import save
        >>> fabric = Fabric(accelerator="cpu", devices=1)
        >>> model = fabric.setup(torch.nn.Linear(128, 128))
        >>> save(fabric, "last.ckpt", {"model": model, "step": 100})  # doctest: +SKIP
    """
    strategy = fabric.strategy
    in_shards = saves_in_shards(strategy)
    if not in_shards and not _uses_io(strategy):
        _check_gathers(strategy)
    io = _io_of(strategy, checkpoint)

    def door(path: Any, state: Any, filter: Any = None, **_: Any) -> None:
        if in_shards:
            _shards_of(strategy, io).save(path, state, describe_state(state, in_state_dict), filter)
        else:
            _save_whole(strategy, io, path, state, filter)

    before = vars(strategy).get("save_checkpoint")
    # fabric.save unwraps the objects of the state
    strategy.save_checkpoint = door  # type: ignore[method-assign, assignment]
    try:
        fabric.save(os.fspath(path), dict(state), filter=None if filter is None else dict(filter))
    finally:
        if before is None:
            del strategy.save_checkpoint
        else:
            strategy.save_checkpoint = before  # type: ignore[method-assign]


def load(
    fabric: Fabric, path: str | os.PathLike[str], state: dict[str, Any] | None = None, *, strict: bool = True
) -> dict[str, Any]:
    """Load as ``fabric.load`` does, after every byte was compared with what was written; call it in all processes.

    ``fabric.load`` itself compares what is quantized, and with a QuantizedCheckpointIO among Fabric's plugins the rest
    of a file as well. This compares everything, also of folders and without the plugin.

    Args:
        fabric: The Fabric.
        path: The file or folder.
        state: What is restored in place; numbers and the like are replaced in it. None to get everything.
        strict: Whether every key of ``state`` must be in the checkpoint.

    Returns:
        What of the checkpoint was not restored into ``state``.

    Raises:
        CorruptCheckpointError: If the checkpoint is not what was saved.
        NewerFormatError: If it was written in a later format than this version reads.
    """
    strategy = fabric.strategy
    if is_sharded(path):
        check_shards(os.path.abspath(path), Ranks.of_all())
        return fabric.load(os.fspath(path), state, strict=strict)
    if not _uses_io(strategy) or find_quantized_io(strategy.checkpoint_io) is not None:
        return fabric.load(os.fspath(path), state, strict=strict)
    before = strategy.checkpoint_io
    strategy.checkpoint_io = QuantizedCheckpointIO(before)
    try:
        return fabric.load(os.fspath(path), state, strict=strict)
    finally:
        strategy.checkpoint_io = before


def saves_in_shards(strategy: Strategy) -> bool:
    """Whether a strategy of Fabric lets each process write a part of a checkpoint."""
    if is_a(strategy, FSDPStrategy):
        return getattr(strategy, "_state_dict_type", None) == "sharded"
    return is_a(strategy, ModelParallelStrategy) and bool(getattr(strategy, "_save_distributed_checkpoint", False))


def _save_whole(strategy: Strategy, io: QuantizedCheckpointIO, path: Any, state: Any, filter: Any) -> None:
    """Save a file in the first process, through the CheckpointIO."""
    names = describe_state(state, in_state_dict)
    io.describe_model = lambda: names
    try:
        if _uses_io(strategy):
            before = strategy.checkpoint_io
            if find_quantized_io(before) is not io:
                strategy.checkpoint_io = io
            try:
                type(strategy).save_checkpoint(strategy, path=path, state=state, filter=filter)
            finally:
                strategy.checkpoint_io = before
        else:
            _shards_of(strategy, io).save_gathered(path, state, filter)
    finally:
        io.describe_model = None


def _io_of(strategy: Strategy, checkpoint: Preset | CheckpointPolicy | None) -> QuantizedCheckpointIO:
    """Return what encodes the saves of a strategy: the plugin, or one of its own that is kept for the next save."""
    base = strategy.checkpoint_io if _uses_io(strategy) else None
    plugin = find_quantized_io(base)
    policy = None if checkpoint is None else CheckpointPolicy.of(checkpoint)
    if plugin is not None:
        if policy not in (None, plugin.policy):
            raise ValueError(
                "Fabric has a QuantizedCheckpointIO among its plugins with another policy than this save asks for;"
                " leave the policy of the save out, or give that one to the plugin"
            )
        return plugin
    kept = vars(strategy).get(_KEPT)
    if isinstance(kept, QuantizedCheckpointIO) and policy in (None, kept.policy):
        return kept
    io = QuantizedCheckpointIO(base, policy or "resume")
    vars(strategy)[_KEPT] = io
    return io


_KEPT, _SHARDS = "q8lightning_io", "q8lightning_shards"
"""Where a strategy keeps what its next save uses again."""


def _shards_of(strategy: Strategy, io: QuantizedCheckpointIO) -> FabricShards:
    kept = vars(strategy).get(_SHARDS)
    if not isinstance(kept, FabricShards) or kept.io is not io:
        kept = vars(strategy)[_SHARDS] = FabricShards(io)
    return kept


def _uses_io(strategy: Strategy) -> bool:
    """Whether a strategy saves through a CheckpointIO: it has the method of all strategies."""
    methods = (getattr(each, "save_checkpoint", None) for each in (Strategy, twin_of(Strategy)))
    return type(strategy).save_checkpoint in methods


def _check_gathers(strategy: Strategy) -> None:
    if not is_a(strategy, FSDPStrategy, ModelParallelStrategy):
        raise ValueError(
            f"{type(strategy).__name__} writes its checkpoints in a way of its own, so they cannot be quantized; use"
            " ModelParallelStrategy (FSDP2, tensor parallelism), FSDPStrategy, DDP or a single device, or fabric.save"
        )
