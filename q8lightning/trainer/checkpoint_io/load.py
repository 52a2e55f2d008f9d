"""Load a checkpoint through a CheckpointIO, decoded and compared with its checksums."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from q8lightning.checkpoint.file.load_errors import explained
from q8lightning.checkpoint.file.read import read_checkpoint, read_elsewhere
from q8lightning.checkpoint.format import check_version
from q8lightning.checkpoint.integrity import without_verification
from q8lightning.checkpoint.layout.sections import summary_in
from q8lightning.system.paths import PathLike, local_path
from q8lightning.trainer.checkpoint_io.durable import is_ours


def load(
    checkpoint_io: CheckpointIO, path: PathLike, verify: bool, device: torch.device | None, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Return the checkpoint at ``path``.

    Args:
        checkpoint_io: What loads it.
        path: A local file or anything that the CheckpointIO loads.
        verify: Compare the content with its checksums.
        device: Where optimizer states are decoded if it is a GPU and the CheckpointIO is this package's.
        args: Further arguments of the CheckpointIO.
        kwargs: Likewise.

    Raises:
        CorruptCheckpointError: If the content is not what was saved.
        NewerFormatError: If the file was written in a later format than this version reads.
    """
    with explained(path):
        checkpoint: dict[str, Any] = _load(checkpoint_io, path, verify, device, *args, **kwargs)
    check_version(summary_in(checkpoint))
    return checkpoint


def _load(
    checkpoint_io: CheckpointIO, path: PathLike, verify: bool, device: torch.device | None, *args: Any, **kwargs: Any
) -> Any:
    load: Callable[..., Any] = checkpoint_io.load_checkpoint
    file, checkpoint = local_path(path), None
    if file is not None and not os.path.isfile(file):
        file = None
    if file is not None and is_ours(checkpoint_io, "load_checkpoint"):
        gpu = device if device is not None and device.type == "cuda" else None
        checkpoint = read_checkpoint(file, lambda opened: load(opened, *args, **kwargs), verify, gpu)
    elif file is not None and verify:  # another CheckpointIO may do something with the tensors
        checkpoint = read_elsewhere(file, partial(load, path, *args, **kwargs))
    else:
        with nullcontext() if verify else without_verification():
            checkpoint = load(path, *args, **kwargs)
    return checkpoint
