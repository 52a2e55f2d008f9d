"""Publish values on the loggers, in ``trainer.callback_metrics`` and at the end of ``fit``.

Reporting must not break a save or a training, nor hide the exception that a run dies of. An error here is a warning.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from q8lightning.metrics.recorder import Recorder
from q8lightning.trainer.lightning_api.both_packages import is_a
from q8lightning.trainer.lightning_api.internals import logged_steps


def publish(trainer: pl.Trainer, recorder: Recorder, values: Mapping[str, float], step: int) -> None:
    """Put values into ``callback_metrics`` and log them on every logger for a step."""
    if values:
        put(trainer, recorder, as_tensors(values))
        log(trainer, recorder, values, step)


def step_of(trainer: pl.Trainer) -> int:
    """Return the step at which Lightning logs now."""
    return logged_steps(trainer)


def as_tensors(values: Mapping[str, float]) -> dict[str, Tensor]:
    """Return values as ``callback_metrics`` has them, ``[]`` float32 each on the CPU."""
    return {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in values.items()}


def put(trainer: pl.Trainer, recorder: Recorder, tensors: Mapping[str, Tensor]) -> None:
    """Put values into ``callback_metrics``, where EarlyStopping and ModelCheckpoint look, until the next ones."""
    with harmless(recorder, "putting values into trainer.callback_metrics"):
        trainer.callback_metrics.update(tensors)


def log(trainer: pl.Trainer, recorder: Recorder, values: Mapping[str, float], step: int) -> None:
    """Log finite values on every logger; several loggers refuse the others, and none can draw them."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    for index, logger in enumerate(trainer.loggers):
        with harmless(recorder, f"logging to {type(logger).__name__}, trainer.loggers[{index}],"):
            logger.log_metrics(dict(finite), step=step)
            logger.save()


@contextmanager
def harmless(recorder: Recorder, doing: str) -> Iterator[None]:
    """Turn an exception of the block into a warning, once a run for each ``doing``.

    Args:
        recorder: Remembers the warnings of the run.
        doing: What the block does, for the message.
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
    """Warn on rank zero; if warnings are errors, log instead."""
    try:
        rank_zero_warn(message)
    except Warning:
        rank_zero_info(message)


def print_totals(trainer: pl.Trainer, recorder: Recorder) -> None:
    """Print the totals of all saves below the last bar, through rich if the Trainer does; log them if it has no bar."""
    with harmless(recorder, "printing what all saves come to"):
        _print(trainer, recorder.totals.lines())


def _print(trainer: pl.Trainer, lines: list[tuple[str, str]]) -> None:
    bar = trainer.progress_bar_callback
    if not lines or not trainer.is_global_zero:
        return
    if bar is None or getattr(bar, "is_disabled", False):
        rank_zero_info(_line(lines))
    elif is_a(bar, RichProgressBar):
        from rich import get_console
        from rich.table import Table

        if bar.progress is not None:
            bar.progress.stop()  # or else it draws its bars again below this
        table = Table(title="q8lightning", title_justify="left", show_header=False)
        for line in lines:
            table.add_row(*line)
        get_console().print(table)
    else:
        print(_line(lines))


def _line(lines: list[tuple[str, str]]) -> str:
    return "q8lightning: " + "; ".join(f"{label} {value}" for label, value in lines)
