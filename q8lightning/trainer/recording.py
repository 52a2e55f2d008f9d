"""Hand what saves lose to the loggers, to ``trainer.callback_metrics`` and to the other processes.

Nothing of it may break what it reports, nor hide the exception that a run dies of: what fails here is a warning.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from q8lightning.checkpoint.report import SaveReport
from q8lightning.metrics.recorder import Loss, Recorder, Save
from q8lightning.trainer.checkpoint_io import QuantizedCheckpointIO
from q8lightning.trainer.lightning_internals import logged_steps
from q8lightning.trainer.pending_names import let_callbacks_know, tell_callbacks
from q8lightning.trainer.twins import is_a


class SaveWatch:
    """Stands in for the ``save_checkpoint`` of a Trainer's strategy, which every process calls, and records the save.

    There is no hook after a save. This is the one place that all processes pass, before the barrier that ends every
    save: the process that encodes knows the values, and the others need them if EarlyStopping or ModelCheckpoint
    watches one.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        checkpoint_io: QuantizedCheckpointIO,
        recorder: Recorder,
        save: Callable[..., Any] | None,
    ) -> None:
        self.save = save
        """What somebody else put in the place of the strategy's method; None for the method."""
        self._trainer = trainer
        self._io = checkpoint_io
        self._recorder = recorder

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Save and record; then tell callbacks what is durable by now, when nothing that they raise undoes a save."""
        let_callbacks_know(self._trainer)
        self._save_and_record(*args, **kwargs)
        tell_callbacks(self._trainer)

    def _save_and_record(self, *args: Any, **kwargs: Any) -> None:
        strategy = self._trainer.strategy
        self._io.report = None
        start = time.perf_counter()
        if self.save is None:
            type(strategy).save_checkpoint(strategy, *args, **kwargs)
        else:
            self.save(*args, **kwargs)
        seconds = time.perf_counter() - start
        values: dict[str, float] = {}
        with harmless(self._recorder, "computing what a save lost"):
            report: Callable[[], SaveReport] | None = self._io.report
            if report is not None:  # something was encoded, and in this process
                values = self._recorder.save(_describe(report(), seconds))
        if self._recorder.detail is None:
            return
        with harmless(self._recorder, "telling other processes what a save lost"):
            if self._trainer.world_size > 1:
                values = strategy.broadcast(values)
        publish(self._trainer, self._recorder, values)


def watch_saves(trainer: pl.Trainer, checkpoint_io: QuantizedCheckpointIO, recorder: Recorder) -> None:
    """Record every save from now on; also after the run, as the CheckpointIO goes on encoding then.

    Args:
        trainer: Whose saves.
        checkpoint_io: What encodes them.
        recorder: What computes and counts; it takes the place of one of an earlier run.
    """
    save = vars(trainer.strategy).get("save_checkpoint")
    if isinstance(save, SaveWatch):
        save = save.save
    watch = SaveWatch(trainer, checkpoint_io, recorder, save)
    trainer.strategy.save_checkpoint = watch  # type: ignore[method-assign]


def is_watched(trainer: pl.Trainer) -> bool:
    """Whether saves of a Trainer are recorded: a setup has seen it."""
    return isinstance(vars(trainer.strategy).get("save_checkpoint"), SaveWatch)


def publish(trainer: pl.Trainer, recorder: Recorder, values: Mapping[str, float]) -> None:
    """Put values where EarlyStopping and ModelCheckpoint look, until the next ones, and on every logger.

    The step is the one at which Lightning logs at this moment. Loggers do not get what is not finite: several refuse
    it, and none can draw it.
    """
    if not values:
        return
    with harmless(recorder, "putting values into trainer.callback_metrics"):
        tensors = {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in values.items()}
        trainer.callback_metrics.update(tensors)
    step = logged_steps(trainer)
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    for index, logger in enumerate(trainer.loggers):
        with harmless(recorder, f"logging to {type(logger).__name__}, trainer.loggers[{index}],"):
            logger.log_metrics(dict(finite), step=step)
            logger.save()


@contextmanager
def harmless(recorder: Recorder, doing: str) -> Iterator[None]:
    """Turn an exception into a warning, one a run for what was being done.

    Args:
        recorder: Remembers what has been warned of.
        doing: What may fail, for the message.
    """
    try:
        yield
    except Exception as error:
        if doing not in recorder.warned:
            recorder.warned.add(doing)
            said = str(error).rstrip(".")
            warn_safely(
                f"{doing} failed: {type(error).__name__}: {said}. Training and checkpoints go on without; values that"
                " q8lightning records may be missing. Repair or remove what failed, or pass log=None to the"
                " QuantizationCallback"
            )


def warn_safely(message: str) -> None:
    """Warn where an exception would do harm; where warnings are errors, log instead."""
    try:
        rank_zero_warn(message)
    except Warning:
        rank_zero_info(message)


def print_totals(trainer: pl.Trainer, recorder: Recorder) -> None:
    """Print what all saves come to, as the Trainer prints: through rich if it does, not at all without progress bar."""
    with harmless(recorder, "printing what all saves come to"):
        _print(trainer, recorder.totals.lines())


def _print(trainer: pl.Trainer, lines: list[tuple[str, str]]) -> None:
    bar = trainer.progress_bar_callback
    if not lines or not trainer.is_global_zero or bar is None or getattr(bar, "is_disabled", False):
        return
    if is_a(bar, RichProgressBar):
        from rich import get_console
        from rich.table import Table

        table = Table(title="q8lightning", title_justify="left", show_header=False)
        for line in lines:
            table.add_row(*line)
        get_console().print(table)
    else:
        print("q8lightning: " + "; ".join(f"{label} {value}" for label, value in lines))


def _describe(report: SaveReport, seconds: float) -> Save:
    losses: list[Loss] = []
    seen: set[tuple[str, str]] = set()
    for loss in report.tensors:
        # Averaged weights go by the same names as those being trained.
        name = loss.path if (loss.kind, loss.parameter) in seen else loss.parameter
        seen.add((loss.kind, loss.parameter))
        losses.append(Loss(loss.kind, name, loss.statistics))
    directions = [(each.squared_error, each.squares) for each in report.directions]
    return Save(losses, directions, report.original_bytes, report.stored_bytes, seconds)
