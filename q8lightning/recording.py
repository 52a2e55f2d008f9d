"""Hand what saves lose to the loggers, to ``trainer.callback_metrics`` and to the other processes."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar

from q8lightning.checkpoint.io import QuantizedCheckpointIO
from q8lightning.checkpoint.losses import SaveReport
from q8lightning.metrics.recorder import Loss, Recorder, Save, Totals
from q8lightning.pending import let_callbacks_know, tell_callbacks


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
        report: Callable[[], SaveReport] | None = self._io.report  # none of what is not encoded, or in another process
        values = {} if report is None else self._recorder.save(_describe(report(), seconds))
        if self._recorder.detail is None:
            return
        if self._trainer.world_size > 1:
            values = strategy.broadcast(values)
        publish(self._trainer, values)


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


def publish(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Put values where EarlyStopping and ModelCheckpoint look, until the next ones, and on every logger.

    The step is the one at which Lightning logs at this moment.
    """
    if not values:
        return
    trainer.callback_metrics.update({name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()})
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
        logger.save()


def print_totals(trainer: pl.Trainer, totals: Totals) -> None:
    """Print what all saves come to, as the Trainer prints: through rich if it does, not at all without progress bar."""
    lines = totals.lines()
    bar = trainer.progress_bar_callback
    if not lines or not trainer.is_global_zero or bar is None or getattr(bar, "is_disabled", False):
        return
    if isinstance(bar, RichProgressBar):
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
