"""Record what every save of a Trainer lost, and publish it when it is known.

It is known when the save's :class:`SaveReport` is complete. In the background that is after the save has returned. The
thread that completes the report computes the values. The training thread publishes them at the next save, batch or end
of an epoch. It waits for them only where a callback decides by one of them.
"""

import math
from collections import deque
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from q8lightning.checkpoint.report import SaveReport
from q8lightning.metrics.recorder import PREFIX, STALL, Loss, Recorded, Recorder, Saved
from q8lightning.trainer.lightning_api.both_packages import is_a
from q8lightning.trainer.record.publish import as_tensors, harmless, log, put, step_of

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


class SaveLosses:
    """What the saves of a Trainer lost, on their way to its loggers and metrics.

    The process that encodes logs what it knows on its loggers. All processes decide by ``callback_metrics``, so these
    change only where all of them meet: at a save, and at the end of an epoch, of a validation and of the fit.

    Args:
        trainer: The Trainer that saves.
        recorder: Computes and counts.
    """

    def __init__(self, trainer: pl.Trainer, recorder: Recorder) -> None:
        self.deferred = False
        """Whether hooks follow in which to publish. Otherwise a save waits until it is known what it lost."""
        self._trainer = trainer
        self._recorder = recorder
        self._pending: deque[_Pending] = deque()
        self._untold: list[_Row] = []  # published here, and not yet in the other processes
        self._others_wait = False
        self._last: tuple[int | None, dict[str, float]] = None, {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is pending: a copy has saved nothing."""
        return {**self.__dict__, "_pending": deque(), "_untold": [], "_others_wait": False}

    def take(self, reports: "deque[Future[SaveReport]]", seconds: float) -> None:
        """Take the reports of a save: none if nothing was encoded, or not in this process.

        Args:
            reports: Completed when it is known what the save lost; cancelled if it fails. They are taken out.
            seconds: How long the save held training.
        """
        state = self._trainer.global_step if self.deferred else None
        while reports:
            known = _losses_of(reports.popleft(), self._recorder)
            self._pending.append(_Pending(step_of(self._trainer), state, seconds, known))

    def publish_after_save(self) -> None:
        """Publish in all processes, which have just saved; wait if a Checkpoint callback may look in the same hook."""
        trainer = self._trainer
        self._others_wait = trainer.world_size > 1
        looks_now = any(is_a(each, Checkpoint) and _monitors_ours(each) for each in trainer.checkpoint_callbacks)
        self.publish(wait=looks_now or not self.deferred, together=True)

    def publish_for_monitors(self) -> None:
        """Publish in all processes, before callbacks read what they monitor; wait for all if one monitors ours."""
        self.publish(wait=is_monitored(self._trainer), together=True)

    def publish_rest(self, together: bool) -> None:
        """Publish what is left when no hook follows; see :meth:`publish`."""
        self.deferred = False
        self.publish(wait=True, together=together)

    def publish_after_failure(self) -> None:
        """Publish with the processes that have saved, in the place of the save that failed in this one."""
        self._others_wait = True
        self.publish(together=True)

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


def is_monitored(trainer: pl.Trainer) -> bool:
    """Whether a callback of a Trainer decides by a value that is recorded here."""
    return any(map(_monitors_ours, trainer.callbacks))  # type: ignore[attr-defined]


def _monitors_ours(callback: object) -> bool:
    return str(getattr(callback, "monitor", None)).startswith(f"{PREFIX}/")


def _same(value: float, said: dict[str, float], name: str) -> bool:
    return name in said and math.isclose(value, said[name], rel_tol=SAME)


def _losses_of(report: "Future[SaveReport]", recorder: Recorder) -> "Future[tuple[Recorded, dict[str, Tensor]]]":
    """Return the values to publish of a save, and the same as tensors; cancelled if the save fails.

    Args:
        report: What the save will report.
        recorder: Computes the values.
    """
    known: Future[tuple[Recorded, dict[str, Tensor]]] = Future()
    report.add_done_callback(partial(_compute, recorder, known))
    return known


def _compute(
    recorder: Recorder, known: "Future[tuple[Recorded, dict[str, Tensor]]]", report: "Future[SaveReport]"
) -> None:
    if report.cancelled() or report.exception() is not None:
        known.cancel()
        return
    try:
        recorded = recorder.record(_describe(report.result()))
        known.set_result((recorded, as_tensors(recorded.values)))
    except BaseException as error:  # raised where the values would be published
        known.set_exception(error)


def _describe(report: SaveReport) -> Saved:
    losses: list[Loss] = []
    seen: set[tuple[str, str]] = set()
    for loss in report.tensors:
        own = loss.kind, loss.parameter
        # Averaged weights go by the same names as those being trained.
        losses.append(Loss(loss.kind, loss.path if own in seen else loss.parameter, loss.statistics))
        seen.add(own)
    directions = [(each.squared_error, each.squares) for each in report.directions]
    return Saved(losses, directions, report.original_bytes, report.stored_bytes, report.parameters)
