"""Let a Trainer's callbacks know which files are pending, and tell them when these are durable."""

import os
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl

from q8lightning.system.advice import advise
from q8lightning.system.paths import PathLike, check_is_there
from q8lightning.trainer.checkpoint_io.chain import is_async
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO, find_quantized_io
from q8lightning.trainer.lightning_api.both_packages import is_from_lightning
from q8lightning.trainer.save.failures import Failures

HOOK = "on_checkpoint_durable"


class _StandIn:
    """Stands in for a method of one Checkpoint callback, and knows what is pending.

    Args:
        callback: The callback that has the method.
        trainer: The Trainer that has the callback.
        checkpoint_io: What saves in the background.
    """

    name: str

    def __init__(self, callback: pl.Callback, trainer: pl.Trainer, checkpoint_io: QuantizedCheckpointIO) -> None:
        current = getattr(callback, self.name)
        again = isinstance(current, _StandIn)
        self.is_own = current.is_own if again else self.name in vars(callback)
        """Whether the callback itself had such a method before, not only its class."""
        self.method: Callable[..., Any] = current.method if again else current
        self.trainer = trainer
        self.io = checkpoint_io

    @property
    def is_lightnings(self) -> bool:
        """Whether the method is that of ``ModelCheckpoint``, so that it is known what it does."""
        return is_from_lightning(self.method.__module__)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the callback has nothing pending, so it gets the method."""
        return _itself, (self.method,)


class _FileExists(_StandIn):
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


class _LinkCheckpoint(_StandIn):
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


def _itself(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


def let_callbacks_know(trainer: pl.Trainer) -> None:
    """Let the Checkpoint callbacks of a Trainer see the names of pending files as taken.

    It is called again for callbacks that are added later.
    """
    checkpoint_io = find_quantized_io(trainer.strategy.checkpoint_io)
    if checkpoint_io is None or not checkpoint_io.async_save:
        return
    for callback in trainer.checkpoint_callbacks:
        for kind in (_FileExists, _LinkCheckpoint):
            current = getattr(callback, kind.name, None)
            knows = isinstance(current, kind) and current.trainer is trainer and current.io is checkpoint_io
            if current is not None and not knows:
                setattr(callback, kind.name, kind(callback, trainer, checkpoint_io))


def leave_callbacks_alone(trainer: pl.Trainer) -> None:
    """Undo :func:`let_callbacks_know` after the last save in the background; do nothing if such saves go on."""
    checkpoint_io = find_quantized_io(trainer.strategy.checkpoint_io)
    if checkpoint_io is not None and checkpoint_io.async_save:
        return
    for callback in trainer.checkpoint_callbacks:
        for name, standin in [*vars(callback).items()]:
            if isinstance(standin, _StandIn):
                delattr(callback, name)
                if standin.is_own:
                    setattr(callback, name, standin.method)


def begin_to_tell(checkpoint_io: QuantizedCheckpointIO) -> None:
    """Collect what becomes durable for :func:`tell_callbacks`, unless an AsyncCheckpointIO hides when that is."""
    if checkpoint_io.durable is None and not is_async(checkpoint_io):
        checkpoint_io.durable = deque()


def tell_callbacks(trainer: pl.Trainer) -> None:
    """Call ``on_checkpoint_durable(path)`` of every callback that has it, for each file that became durable since.

    All are called, also after one of them has raised.

    Raises:
        Exception: The first one of a callback. After an exception in the Trainer, which it must not hide, each is a
            warning instead.
    """
    checkpoint_io = find_quantized_io(trainer.strategy.checkpoint_io)
    if checkpoint_io is None or not checkpoint_io.durable or checkpoint_io.telling:
        return  # a hook has saved or waited: its caller goes on telling, so that all hear of files in order
    failure: Exception | None = None
    checkpoint_io.telling = True
    try:
        while checkpoint_io.durable:
            path = checkpoint_io.durable.popleft()
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                try:
                    getattr(callback, HOOK, _ignore)(path)
                except Exception as error:
                    failure = failure or error
                    if trainer.interrupted:
                        _warn(callback, path, error)
    finally:
        checkpoint_io.telling = False
    if failure is not None and not trainer.interrupted:
        raise failure


def wait_until_durable(trainer: pl.Trainer, path: PathLike | None, failures: Failures) -> None:
    """Let every process wait for what it writes, then tell the callbacks.

    Of a whole checkpoint the first one writes all. Of one in shards each writes a part, and hears of any that fails.

    Raises:
        Exception: In every process, what :meth:`QuantizedCheckpointIO.wait_until_durable` or a callback raises in the
            first.
    """
    checkpoint_io = find_quantized_io(trainer.strategy.checkpoint_io)
    with failures.kept(BaseException):
        if not trainer.is_global_zero:
            if checkpoint_io is not None:
                checkpoint_io.wait(path)
        elif checkpoint_io is not None:
            checkpoint_io.wait_until_durable(path)
        elif path is not None:
            check_is_there(path)
        tell_callbacks(trainer)
    failures.meet()


def _ignore(path: str) -> None:
    pass


def _warn(callback: pl.Callback, path: str, error: Exception) -> None:
    advise(
        f"{type(callback).__name__}.{HOOK}({path!r}) raised {type(error).__name__}: {error}. The checkpoint is there;"
        " do by hand what the callback was to do with it"
    )
