"""Let a Trainer's Checkpoint callbacks see the names of pending files as taken."""

import os
from typing import Any, cast

import lightning.pytorch as pl

from q8lightning.system.paths import PathLike
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO
from q8lightning.trainer.lightning_api.both_packages import is_from_lightning
from q8lightning.trainer.lightning_api.stand_in import StandIn


class _KnowsPending(StandIn):
    """Stands in for a method of one Checkpoint callback, and knows what is pending. A copy has nothing pending.

    Args:
        callback: The callback that has the method.
        trainer: The Trainer that has the callback.
        checkpoint_io: What saves in the background.
    """

    name: str

    def __init__(self, callback: pl.Callback, trainer: pl.Trainer, checkpoint_io: QuantizedCheckpointIO) -> None:
        current = getattr(callback, self.name)
        again = isinstance(current, _KnowsPending)
        super().__init__(current.method if again else current)
        self.is_own = current.is_own if again else self.name in vars(callback)
        """Whether the callback itself had such a method before, not only its class."""
        self.trainer = trainer
        self.io = checkpoint_io

    @property
    def is_lightnings(self) -> bool:
        """Whether the method is that of ``ModelCheckpoint``, so that it is known what it does."""
        return is_from_lightning(self.method.__module__)


class _FileExists(_KnowsPending):
    """Stands in for ``file_exists``, which decides whether the name of a checkpoint is taken."""

    name = "file_exists"

    def __call__(self, filepath: PathLike, *args: Any, **kwargs: Any) -> bool:
        """Answer as if all that is pending were done."""
        if self.is_lightnings:
            # Only the process that writes knows what is pending. The method asks the disk in that one, too.
            there: bool | None = self.trainer.strategy.broadcast(self.io.exists(filepath))
            if there is not None:
                return there
        else:
            self.io.settle(filepath)  # a method of the user's may look anywhere
        return cast("bool", self.method(filepath, *args, **kwargs))


class _LinkCheckpoint(_KnowsPending):
    """Stands in for ``_link_checkpoint``, which makes ``last.ckpt`` a link to a checkpoint that may be pending.

    The method is private, but nothing else runs between the save and the link. A link that is made too early leads
    nowhere if the process is killed, and a pending save or removal of its own path undoes it.
    """

    name = "_link_checkpoint"

    def __call__(self, trainer: pl.Trainer, filepath: str, linkpath: str, *args: Any, **kwargs: Any) -> None:
        """Make the link after the saves before it."""
        if self.io.async_save and self.is_lightnings:
            if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
                self.io.link_checkpoint(filepath, linkpath)
            trainer.strategy.barrier()
        else:
            self.io.settle(filepath)
            self.io.settle(linkpath)
            self.method(trainer, filepath, linkpath, *args, **kwargs)


def show_pending_files(trainer: pl.Trainer, checkpoint_io: QuantizedCheckpointIO) -> None:
    """Let the Checkpoint callbacks of a Trainer see pending files, if saves go on in the background.

    It is called again for callbacks that are added later.
    """
    if not checkpoint_io.async_save:
        return
    for callback in trainer.checkpoint_callbacks:
        for kind in (_FileExists, _LinkCheckpoint):
            current = getattr(callback, kind.name, None)
            knows = isinstance(current, kind) and current.trainer is trainer and current.io is checkpoint_io
            if current is not None and not knows:
                setattr(callback, kind.name, kind(callback, trainer, checkpoint_io))


def stop_showing(trainer: pl.Trainer, checkpoint_io: QuantizedCheckpointIO) -> None:
    """Undo :func:`show_pending_files` after the last save in the background; do nothing if such saves go on."""
    if checkpoint_io.async_save:
        return
    for callback in trainer.checkpoint_callbacks:
        for name, standin in [*vars(callback).items()]:
            if isinstance(standin, _KnowsPending):
                delattr(callback, name)
                if standin.is_own:
                    setattr(callback, name, standin.method)
