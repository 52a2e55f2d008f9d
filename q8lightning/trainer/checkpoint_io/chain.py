"""Ask a chain of CheckpointIOs that wrap each other, of which a Trainer has the first."""

from collections.abc import Iterator

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO

from q8lightning.trainer.lightning_api.both_packages import is_a
from q8lightning.trainer.lightning_api.internals import WrappingCheckpointIO


def chain_of(checkpoint_io: CheckpointIO | None) -> Iterator[CheckpointIO]:
    """Yield a CheckpointIO and those that it wraps, from the outside in."""
    while checkpoint_io is not None:
        yield checkpoint_io
        checkpoint_io = checkpoint_io.checkpoint_io if is_a(checkpoint_io, WrappingCheckpointIO) else None


def is_async(checkpoint_io: CheckpointIO | None) -> bool:
    """Whether there is an AsyncCheckpointIO in the chain, which does not say when a save is durable."""
    return any(is_a(each, AsyncCheckpointIO) for each in chain_of(checkpoint_io))


def check_not_async(checkpoint_io: CheckpointIO | None) -> None:
    """Raise ValueError for an AsyncCheckpointIO in a chain that saves in the background itself."""
    if is_async(checkpoint_io):
        raise ValueError(
            "async_save=True does what AsyncCheckpointIO does, and both cannot keep removals behind saves;"
            " remove AsyncCheckpointIO from the Trainer's plugins, or pass async_save=False"
        )


def writes_where_told(checkpoint_io: CheckpointIO) -> bool:
    """Whether the chain ends in Lightning's own CheckpointIO, which writes a file at the path of the save."""
    *_, last = chain_of(checkpoint_io)
    return is_a(last, TorchCheckpointIO)
