"""One report for all processes: what a whole checkpoint lost and takes."""

from collections import defaultdict
from collections.abc import Sequence

from q8lightning.checkpoint.report import DirectionLoss, Guarded, SaveReport, TensorLoss


def merge_reports(reports: Sequence[SaveReport]) -> SaveReport:
    """Return what the shards lost together, each tensor once.

    The guard decides for each shard. What it did for some of a tensor's shards and not for others, the report says of
    the tensor, with the ranks that wrote those shards.
    """
    if len(reports) == 1:
        return reports[0]
    tensors: dict[str, list[TensorLoss]] = defaultdict(list)
    directions: dict[str, list[DirectionLoss]] = defaultdict(list)
    holders: dict[str, set[int]] = defaultdict(set)
    guarded: dict[tuple[str, str], list[tuple[int, Guarded]]] = defaultdict(list)
    for rank, report in enumerate(reports):
        for loss in report.tensors:
            tensors[loss.path].append(loss)
            holders[loss.path].add(rank)
        for direction in report.directions:
            directions[direction.path].append(direction)
        for each in report.guarded:
            guarded[each.path, each.remedy].append((rank, each))
            holders[each.path].add(rank)
    passed_over = [name for name in reports[0].passed_over if all(name in each.passed_over for each in reports)]
    return SaveReport(
        tensors=[_sum_of(losses) for losses in tensors.values()],
        directions=[_direction_of(losses) for losses in directions.values()],
        guarded=[_guarded_of(found, len(holders[path])) for (path, _), found in guarded.items()],
        refused=list(dict.fromkeys(name for report in reports for name in report.refused)),
        passed_over=passed_over,
        unmatched=[each for each in reports[0].unmatched if all(each in other.unmatched for other in reports)],
        kept=list({each.key: each for report in reversed(reports) for each in report.kept}.values()),
        original_bytes=sum(report.original_bytes for report in reports),
        stored_bytes=sum(report.stored_bytes for report in reports),
        parameters=sum(report.parameters for report in reports),
    )


def _sum_of(losses: Sequence[TensorLoss]) -> TensorLoss:
    first = losses[0]
    return TensorLoss(
        path=first.path,
        kind=first.kind,
        parameter=first.parameter,
        original_bytes=sum(each.original_bytes for each in losses),
        stored_bytes=sum(each.stored_bytes for each in losses),
        squared_error=sum(each.squared_error for each in losses),
        squares=sum(each.squares for each in losses),
        max_error=max(each.max_error for each in losses),
        zeros=sum(each.zeros for each in losses),
        zeroed=sum(each.zeroed for each in losses),
    )


def _direction_of(losses: Sequence[DirectionLoss]) -> DirectionLoss:
    squared_error, squares = (sum(numbers) for numbers in zip(*(each[2:] for each in losses), strict=True))
    return DirectionLoss(losses[0].path, losses[0].parameter, squared_error, squares)


def _guarded_of(found: Sequence[tuple[int, Guarded]], holders: int) -> Guarded:
    first = found[0][1]
    if len(found) == holders:
        return first
    ranks = ", ".join(str(rank) for rank, _ in found)
    where = f"in the shard of rank {ranks}" if len(found) == 1 else f"in the shards of ranks {ranks}"
    return Guarded(first.path, first.name, f"{first.found}, {where}", first.remedy)
