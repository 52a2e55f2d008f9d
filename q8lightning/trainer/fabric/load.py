"""Load with Fabric, compared with its checksums."""

import os
from typing import Any

from lightning.fabric import Fabric

from q8lightning.checkpoint.sharded.check import check_shards, is_sharded
from q8lightning.checkpoint.sharded.ranks import Ranks
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO, find_quantized_io
from q8lightning.trainer.fabric.strategies import uses_io


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
    if not uses_io(strategy) or find_quantized_io(strategy.checkpoint_io) is not None:
        return fabric.load(os.fspath(path), state, strict=strict)
    before = strategy.checkpoint_io
    strategy.checkpoint_io = QuantizedCheckpointIO(before)
    try:
        return fabric.load(os.fspath(path), state, strict=strict)
    finally:
        strategy.checkpoint_io = before
