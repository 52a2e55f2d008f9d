"""The door that every save of a Trainer passes, in every process: encode, write, record, tell.

Lightning has no hook after a save. The door stands in for the ``save_checkpoint`` of the Trainer's strategy, which all
processes call, before the barrier that ends every save. What hooks of the callback do around saves is here as well.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import lightning.pytorch as pl

from q8lightning.checkpoint.sharded.ranks import is_alone
from q8lightning.metrics.recorder import Recorder
from q8lightning.system.paths import PathLike, check_is_there
from q8lightning.trainer.checkpoint_io.chain import is_async
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO
from q8lightning.trainer.lightning_api.internals import unmark
from q8lightning.trainer.record.publish import warn_safely
from q8lightning.trainer.record.save_losses import SaveLosses
from q8lightning.trainer.save.durable_files import DurableFiles
from q8lightning.trainer.save.failures import Failures, is_from_making, saves_silently
from q8lightning.trainer.save.pending_names import show_pending_files, stop_showing


class Waited(Protocol):
    """What a save waits for."""

    def wait(self) -> None: ...


class SaveDoor:
    """What every save of a Trainer passes.

    Args:
        trainer: The Trainer that saves.
        checkpoint_io: What encodes the saves.
        recorder: Computes and counts what they lose.
        save: What other code put in place of the strategy's method; None for the method itself.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        checkpoint_io: QuantizedCheckpointIO,
        recorder: Recorder,
        save: Callable[..., Any] | None,
    ) -> None:
        self.save = save
        self.warm_up: Waited | None = None
        """What loads kernels at the moment. The first save waits for it: it would load the same a second time."""
        self.training = False
        """Whether hooks follow before training changes what is saved."""
        self.losses = SaveLosses(trainer, recorder)
        self.failures = Failures(trainer)
        """What failed in this process alone. It is raised in all when they meet."""
        self.durable = DurableFiles(trainer)
        self._trainer = trainer
        self._io = checkpoint_io
        checkpoint_io.kept = self.failures.kept
        if not is_async(checkpoint_io):  # which hides when files are durable
            checkpoint_io.on_durable = self.durable.add

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what goes on: a copy loads nothing, and trains only when it is told so."""
        return {**self.__dict__, "warm_up": None, "training": False}

    def __call__(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Save and record; tell callbacks what is durable last, so that what they raise does not undo a save.

        What fails in one process is raised in all: the others would wait for it in the barrier that follows. Only one
        that has left others in the middle of a save in shards raises at once. They hear of it when the process ends.
        """
        trainer, failures = self._trainer, self.failures
        show_pending_files(trainer, self._io)
        with failures.kept(BaseException, unless=is_alone):
            unmark(trainer.strategy, checkpoint)
            self._save(checkpoint, *args, **kwargs)
        self.losses.publish_after_save()
        if not failures:
            self._tell()
        failures.meet()
        failures.due = True

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Save through the strategy, whose CheckpointIO encodes, and take what it reports."""
        strategy = self._trainer.strategy
        self._io.reports.clear()
        start = time.perf_counter()
        if self.warm_up is not None:
            self.warm_up.wait()
            self.warm_up = None
        if self.save is None:
            type(strategy).save_checkpoint(strategy, *args, **kwargs)
        else:
            self.save(*args, **kwargs)
        self.losses.take(self._io.reports, seconds=time.perf_counter() - start)

    def _tell(self) -> None:
        with self.failures.kept():
            self.durable.tell()

    def after_batch(self) -> None:
        """Publish what is known of saves, and tell callbacks what is durable by now."""
        self.losses.publish()
        show_pending_files(self._trainer, self._io)  # to callbacks that were added
        self._tell()

    def let_go(self) -> None:
        """Wait until training may change what was saved last."""
        with self.failures.kept():
            self._io.let_go()

    def finish(self, end_background: bool) -> None:
        """Finish the pending saves, and let callbacks ask the disk again which names are taken.

        Args:
            end_background: Let later saves, which are outside of the Trainer's loops, return when the file is there.

        Raises:
            BackgroundSaveError: If a save or removal failed that was not reported yet.
        """
        if end_background:
            self._io.async_save = False
        try:
            self._io.finish()
        finally:
            stop_showing(self._trainer, self._io)

    def end_fit(self, finish: Callable[[], None]) -> None:
        """Finish the saves and publish the rest; raise in all processes what one of them failed with."""
        try:
            with self.failures.kept():
                finish()
        finally:
            self.losses.publish_rest(together=True)
        self._tell()
        self.failures.meet()

    def join(self, error: BaseException) -> None:
        """Tell the processes that are in a save that this one failed before it got here.

        That is so if ``error`` comes from making the checkpoint. A strategy with messages of its own in a save is left
        out, because this process would have to answer them.
        """
        trainer = self._trainer
        is_silent = self.save is None and saves_silently(trainer.strategy)
        if trainer.world_size > 1 and is_silent and is_from_making(trainer, error, SaveDoor.__call__):
            self.losses.publish_after_failure()
            self.failures.meet_after(error)

    def fail(self, error: BaseException, finish: Callable[[], None]) -> None:
        """Finish the saves after an exception of the Trainer, which nothing replaces: what fails here is a warning."""
        self.training = False
        try:
            finish()
        except Exception as failure:  # a save, or a warning that is an error
            warn_safely(str(failure))
        self.losses.publish_rest(together=False)
        self.durable.tell()
        for each in self.failures.forget():
            warn_safely(f"{type(each).__name__}: {each}")
        if self.failures.ends_all(error):  # launchers kill the process that writes when another has ended
            with suppress(RuntimeError):  # it has
                self._trainer.strategy.barrier()

    def end(self, finish: Callable[[], None]) -> None:
        """Finish the saves at the end of a run, also of one that failed."""
        with self.failures.kept():
            finish()
        self.losses.publish_rest(together=False)
        self._tell()
        self.failures.meet_if_due()

    def wait_until_durable(self, path: PathLike | None) -> None:
        """Wait for what this process writes, then tell callbacks.

        Of a whole checkpoint the first process writes all. Of one in shards each writes a part, and hears of any that
        fails.
        """
        if self._trainer.is_global_zero:
            self._io.wait_until_durable(path)
        else:
            self._io.wait(path)
        self.durable.tell()


def open_door(trainer: pl.Trainer, checkpoint_io: QuantizedCheckpointIO, recorder: Recorder) -> None:
    """Let every save pass a door from now on, also after the run, when the CheckpointIO goes on encoding.

    Args:
        trainer: The Trainer that saves.
        checkpoint_io: What encodes the saves.
        recorder: Computes and counts; it replaces that of an earlier run.
    """
    save = vars(trainer.strategy).get("save_checkpoint")
    if isinstance(save, SaveDoor):
        save = save.save
    trainer.strategy.save_checkpoint = SaveDoor(trainer, checkpoint_io, recorder, save)  # type: ignore[method-assign]
    show_pending_files(trainer, checkpoint_io)


def door_of(trainer: pl.Trainer) -> SaveDoor | None:
    """Return the door of a Trainer; None before its first setup, and where nothing encodes its saves."""
    save = vars(trainer.strategy).get("save_checkpoint")
    return save if isinstance(save, SaveDoor) else None


def wait_until_durable(trainer: pl.Trainer, path: PathLike | None) -> None:
    """Let every process wait until a checkpoint is on the disk, or all are.

    Raises:
        Exception: In every process, what :meth:`QuantizedCheckpointIO.wait_until_durable` or a callback raises in the
            first.
    """
    door = door_of(trainer)
    failures = Failures(trainer) if door is None else door.failures
    with failures.kept(BaseException):
        if door is not None:
            door.wait_until_durable(path)
        elif path is not None and trainer.is_global_zero:
            check_is_there(path)
    failures.meet()
