"""Save with Fabric: through its CheckpointIO, or in shards where its strategy has none."""

import os
from collections.abc import Mapping
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies.strategy import Strategy

from q8lightning.checkpoint.encode.select.model_names import describe_state
from q8lightning.checkpoint.policy import CheckpointPolicy, Preset
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO, find_quantized_io
from q8lightning.trainer.checkpoint_io.shards import ShardSaver
from q8lightning.trainer.fabric.shards import Filter, save_gathered, save_in_shards
from q8lightning.trainer.fabric.strategies import check_gathers, saves_in_shards, uses_io
from q8lightning.trainer.lightning_api.model import in_state_dict


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
    if not in_shards and not uses_io(strategy):
        check_gathers(strategy)
    io = _io_of(strategy, checkpoint)

    def door(path: Any, state: Any, filter: Any = None, **_: Any) -> None:
        if in_shards:
            if filter is not None:
                raise NotImplementedError("checkpoints in shards cannot be filtered; save without filter")
            save_in_shards(_saver_of(strategy, io), path, state, describe_state(state, in_state_dict))
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


def _save_whole(strategy: Strategy, io: QuantizedCheckpointIO, path: Any, state: Any, filter: Any) -> None:
    """Save a file in the first process, through the CheckpointIO."""
    names = describe_state(state, in_state_dict)
    io.describe_model = lambda: names
    try:
        if uses_io(strategy):
            before = strategy.checkpoint_io
            if find_quantized_io(before) is not io:
                strategy.checkpoint_io = io
            try:
                type(strategy).save_checkpoint(strategy, path=path, state=state, filter=filter)
            finally:
                strategy.checkpoint_io = before
        else:
            save_gathered(_saver_of(strategy, io), path, state, filter)
    finally:
        io.describe_model = None


def _io_of(strategy: Strategy, checkpoint: Preset | CheckpointPolicy | None) -> QuantizedCheckpointIO:
    """Return what encodes the saves of a strategy: the plugin, or one of its own that is kept for the next save."""
    base = strategy.checkpoint_io if uses_io(strategy) else None
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


_KEPT, _SAVER = "q8lightning_io", "q8lightning_saver"
"""Where a strategy keeps what its next save uses again."""


def _saver_of(strategy: Strategy, io: QuantizedCheckpointIO) -> ShardSaver:
    kept = vars(strategy).get(_SAVER)
    if not isinstance(kept, ShardSaver) or kept.io is not io:
        kept = vars(strategy)[_SAVER] = ShardSaver(io)
    return kept
