"""Compute what a save lost from its report, in the thread that completes the report."""

from concurrent.futures import Future
from functools import partial

from torch import Tensor

from q8lightning.checkpoint.report import SaveReport
from q8lightning.metrics.recorder import Loss, Recorded, Recorder, Save
from q8lightning.trainer.record.publish import as_tensors


def losses_of(report: "Future[SaveReport]", recorder: Recorder) -> "Future[tuple[Recorded, dict[str, Tensor]]]":
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


def _describe(report: SaveReport) -> Save:
    losses: list[Loss] = []
    seen: set[tuple[str, str]] = set()
    for loss in report.tensors:
        own = loss.kind, loss.parameter
        # Averaged weights go by the same names as those being trained.
        losses.append(Loss(loss.kind, loss.path if own in seen else loss.parameter, loss.statistics))
        seen.add(own)
    directions = [(each.squared_error, each.squares) for each in report.directions]
    return Save(losses, directions, report.original_bytes, report.stored_bytes, report.parameters)
