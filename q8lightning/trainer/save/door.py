"""Record what every save of a Trainer lost, and publish it when it is known.

It is known when the save's :class:`SaveReport` is complete. In the background that is after the save has returned. The
thread that completes the report computes the values. The training thread publishes them at the next save, batch or end
of an epoch. It waits for them only where a callback decides by one of them.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from q8lightning.checkpoint.sharded.ranks import is_alone
from q8lightning.metrics.recorder import PREFIX, STALL, Recorded, Recorder
from q8lightning.trainer.checkpoint_io.quantized import QuantizedCheckpointIO
from q8lightning.trainer.lightning_api.both_packages import is_a
from q8lightning.trainer.lightning_api.internals import unmark
from q8lightning.trainer.prepare.warm_up import WarmUp
from q8lightning.trainer.record.publish import as_tensors, harmless, log, put, step_of
from q8lightning.trainer.record.save_losses import losses_of
from q8lightning.trainer.save.failures import Failures, is_from_making, saves_silently
from q8lightning.trainer.save.pending_names import let_callbacks_know, tell_callbacks

SAME = 1e-6
"""Relative difference up to which two measurements of one state are the same: sums are added in any order."""

PATIENCE = 600.0
"""Seconds to wait for what a save lost. After that the run ends without it."""


class _Pending(NamedTuple):
    """A save that has not been published.

    Attributes:
        step: The step at which Lightning logged then.
        state: The optimizer's steps by then; None outside of a fit, where the state may change between saves.
        seconds: How long it held training.
        known: What is recorded of it, and the same as tensors; cancelled if the save failed.
    """

    step: int
    state: int | None
    seconds: float
    known: "Future[tuple[Recorded, dict[str, Tensor]]]"


class _Row(NamedTuple):
    """What is published of a save; ``step`` and ``state`` are those of :class:`_Pending`."""

    step: int
    state: int | None
    values: dict[str, float]


class SaveWatch:
    """Stands in for the ``save_checkpoint`` of a Trainer's strategy, which every process calls, and records the save.

    Lightning has no hook after a save. All processes pass here, before the barrier that ends every save.

    The process that encodes logs what it knows on its loggers. All processes decide by ``callback_metrics``, so these
    change only where all of them meet: here, and at the end of an epoch, of a validation and of the fit.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        checkpoint_io: QuantizedCheckpointIO,
        recorder: Recorder,
        save: Callable[..., Any] | None,
    ) -> None:
        self.save = save
        """What other code put in place of the strategy's method; None for the method itself."""
        self.fitting = False
        """Whether hooks follow in which to publish. Otherwise a save waits until it is known what it lost."""
        self.warm_up: WarmUp | None = None
        """What loads kernels at the moment. The first save waits for it."""
        self.failures = Failures(trainer)
        """What failed in this process alone. It is raised in all when they meet."""
        self._trainer = trainer
        self._io = checkpoint_io
        self._recorder = recorder
        self._pending: deque[_Pending] = deque()
        self._untold: list[_Row] = []  # published here, and not yet in the other processes
        self._others_wait = False
        self._last: tuple[int | None, dict[str, float]] = None, {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is pending: a copy has saved nothing."""
        return {**self.__dict__, "warm_up": None, "_pending": deque(), "_untold": [], "_others_wait": False}

    def __call__(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Save and record; tell callbacks what is durable last, so that what they raise does not undo a save.

        What fails in one process is raised in all: the others would wait for it in the barrier that follows. Only one
        that has left others in the middle of a save in shards raises at once. They hear of it when the process ends.
        """
        trainer, failures = self._trainer, self.failures
        let_callbacks_know(trainer)
        with failures.kept(BaseException, unless=is_alone):
            unmark(trainer.strategy, checkpoint)
            self._save(checkpoint, *args, **kwargs)
        self._others_wait = trainer.world_size > 1
        # A Checkpoint callback may look right after this save, in the same hook.
        looks_now = any(is_a(each, Checkpoint) and _watches(each) for each in trainer.checkpoint_callbacks)
        self.publish(wait=looks_now or not self.fitting, together=True)
        if not failures:
            with failures.kept():
                tell_callbacks(trainer)
        failures.meet()
        failures.due = True

    def join(self, error: BaseException) -> None:
        """Tell the processes that are in a save that this one failed before it got here.

        That is so if ``error`` comes from making the checkpoint. A strategy with messages of its own in a save is left
        out, because this process would have to answer them.
        """
        trainer = self._trainer
        is_silent = self.save is None and saves_silently(trainer.strategy)
        if trainer.world_size > 1 and is_silent and is_from_making(trainer, error, SaveWatch.__call__):
            self._others_wait = True
            self.publish(together=True)
            self.failures.meet_after(error)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        trainer, strategy, reports = self._trainer, self._trainer.strategy, self._io.reports
        reports.clear()
        start = time.perf_counter()
        if self.warm_up is not None:
            self.warm_up.wait()  # it would load the same kernels a second time
            self.warm_up = None
        if self.save is None:
            type(strategy).save_checkpoint(strategy, *args, **kwargs)
        else:
            self.save(*args, **kwargs)
        seconds = time.perf_counter() - start
        state = trainer.global_step if self.fitting else None
        while reports:  # none if nothing was encoded, or not in this process
            known = losses_of(reports.popleft(), self._recorder)
            self._pending.append(_Pending(step_of(trainer), state, seconds, known))

    def publish(self, wait: bool = False, together: bool = False) -> None:
        """Publish what is known of the saves so far, in their order.

        Args:
            wait: Wait until everything is known.
            together: All processes call this at the same moment, so that ``callback_metrics`` change in all of them.
        """
        while self._pending and (wait or self._pending[0].known.done()):
            self._publish(self._pending.popleft())
        if together and self._others_wait and self._recorder.detail is not None:
            self._tell_others()

    def _publish(self, save: _Pending) -> None:
        with harmless(self._recorder, "computing what a save lost"):
            try:
                recorded, tensors = save.known.result(PATIENCE)
            except CancelledError:
                return  # the save failed, which is raised elsewhere
            self._recorder.count(recorded, save.seconds)
            if self._recorder.detail is None:
                return
            row = _Row(save.step, save.state, {**recorded.values, STALL: save.seconds * 1e3})
            self._log(row)
            if self._trainer.world_size > 1:
                self._untold.append(row)
            else:
                put(self._trainer, self._recorder, {**tensors, **as_tensors({STALL: row.values[STALL]})})

    def _log(self, row: _Row) -> None:
        """Log a row, except what an earlier save of the same state has logged."""
        values, (last, said) = row.values, self._last
        if row.state is None or row.state != last:
            self._last = row.state, dict(values)
        else:
            values = {name: value for name, value in values.items() if name != STALL and not _same(value, said, name)}
            if not values:
                return
            said.update(values)
        log(self._trainer, self._recorder, values, row.step)

    def _tell_others(self) -> None:
        """Publish in all processes what the first one has logged since the last time."""
        trainer, rows = self._trainer, self._untold
        self._untold, self._others_wait = [], False
        with harmless(self._recorder, "telling other processes what a save lost"):
            theirs, self._others_wait = trainer.strategy.broadcast((rows, bool(self._pending)))
            for row in theirs:
                if not trainer.is_global_zero:
                    self._log(row)
                put(trainer, self._recorder, as_tensors(row.values))


def watch_saves(trainer: pl.Trainer, checkpoint_io: QuantizedCheckpointIO, recorder: Recorder) -> None:
    """Record every save from now on, also after the run, when the CheckpointIO goes on encoding.

    Args:
        trainer: The Trainer that saves.
        checkpoint_io: What encodes the saves.
        recorder: Computes and counts; it replaces that of an earlier run.
    """
    save = vars(trainer.strategy).get("save_checkpoint")
    if isinstance(save, SaveWatch):
        save = save.save
    watch = SaveWatch(trainer, checkpoint_io, recorder, save)
    checkpoint_io.kept = watch.failures.kept
    trainer.strategy.save_checkpoint = watch  # type: ignore[method-assign]


def watch_of(trainer: pl.Trainer) -> SaveWatch | None:
    """Return what records the saves of a Trainer; None before its first setup."""
    save = vars(trainer.strategy).get("save_checkpoint")
    return save if isinstance(save, SaveWatch) else None


def failures_of(trainer: pl.Trainer) -> Failures:
    """Return what has failed in this process alone; nothing if no setup has seen the Trainer."""
    watch = watch_of(trainer)
    return Failures(trainer) if watch is None else watch.failures


def start_warm_up(trainer: pl.Trainer, warm_up: WarmUp) -> None:
    """Load the kernels of saves while training goes on; the first save waits until they are there."""
    watch = watch_of(trainer)
    if watch is not None:
        watch.warm_up = warm_up
        warm_up.start()


def join_others(trainer: pl.Trainer, error: BaseException) -> None:
    """Tell the processes that are in a save that this one failed in it."""
    watch = watch_of(trainer)
    if watch is not None:
        watch.join(error)


def defer_publishing(trainer: pl.Trainer) -> None:
    """Let the hooks that follow publish what later saves lose, if it is not known at once."""
    watch = watch_of(trainer)
    if watch is not None:
        watch.fitting = True


def publish_known(trainer: pl.Trainer) -> None:
    """Publish what is known by now, without waiting."""
    watch = watch_of(trainer)
    if watch is not None:
        watch.publish()


def publish_for_monitors(trainer: pl.Trainer) -> None:
    """Publish in all processes, before callbacks read what they monitor; wait for all values if one monitors ours."""
    watch = watch_of(trainer)
    if watch is not None:
        watch.publish(wait=is_watched(trainer), together=True)


def publish_rest(trainer: pl.Trainer, together: bool) -> None:
    """Publish what is left when no hook follows.

    Args:
        trainer: The Trainer that saved.
        together: Whether all processes get here, which they do not if one of them has failed.
    """
    watch = watch_of(trainer)
    if watch is not None:
        watch.fitting = False
        watch.publish(wait=True, together=together)


def is_watched(trainer: pl.Trainer) -> bool:
    """Whether a callback of a Trainer decides by a value that is recorded here."""
    return any(map(_watches, trainer.callbacks))  # type: ignore[attr-defined]


def _watches(callback: object) -> bool:
    """Whether a callback monitors a value that is recorded here."""
    return str(getattr(callback, "monitor", None)).startswith(f"{PREFIX}/")


def _same(value: float, said: dict[str, float], name: str) -> bool:
    return name in said and math.isclose(value, said[name], rel_tol=SAME)
