"""Write files durably in the place of Lightning's own CheckpointIO."""

import os
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO

from q8lightning.checkpoint.file.temporaries import remove_folder
from q8lightning.checkpoint.file.write import write_checkpoint
from q8lightning.system.paths import local_path
from q8lightning.trainer.lightning_api.both_packages import is_a, is_exactly_a
from q8lightning.trainer.lightning_api.internals import WrappingCheckpointIO, replace_wrapped


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's default CheckpointIO, except that local files are flushed to the disk before they get their name.

    A subclass is as fast unless it overrides a method. One that overrides ``save_checkpoint`` may keep the tensors, so
    that what comes from a GPU gets memory of its own at each save. One that overrides ``load_checkpoint`` may look at
    them, so that they are decoded one by one while the file is read.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``; see :func:`q8lightning.checkpoint.file.write.write_checkpoint`."""
        local = local_path(path)
        if storage_options is None and local is not None:
            write_checkpoint(checkpoint, local)
        else:
            super().save_checkpoint(checkpoint, path, storage_options=storage_options)  # type: ignore[arg-type]

    def load_checkpoint(self, path: str | os.PathLike[str] | IO[bytes], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load as Lightning's CheckpointIO does, also from an open file."""
        if isinstance(path, str | os.PathLike):
            return super().load_checkpoint(path, *args, **kwargs)  # type: ignore[arg-type]
        return self._load_file(path, *args, **kwargs)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint; one in shards is gone from under its name before any part of it is."""
        local = local_path(path)
        if local is not None and os.path.isdir(local) and not os.path.islink(local):
            remove_folder(local)
        else:
            super().remove_checkpoint(path)  # type: ignore[arg-type]

    @staticmethod
    def _load_file(
        file: IO[bytes], map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(file, map_location=map_location, weights_only=weights_only)
        return checkpoint


def is_ours(checkpoint_io: CheckpointIO, method: str) -> bool:
    """Whether a method is that of :class:`DurableCheckpointIO`."""
    return getattr(type(checkpoint_io), method) is getattr(DurableCheckpointIO, method)


def make_durable(checkpoint_io: WrappingCheckpointIO) -> None:
    """Replace Lightning's plain CheckpointIO at the end of a chain of wrappers; leave any other one there."""
    base = checkpoint_io.checkpoint_io
    if is_a(base, WrappingCheckpointIO):
        make_durable(base)
    elif base is None or is_exactly_a(base, TorchCheckpointIO):
        replace_wrapped(checkpoint_io, DurableCheckpointIO())
