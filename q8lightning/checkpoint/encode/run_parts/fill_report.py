"""Report what a run stored and what that lost."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from q8lightning.checkpoint.encode.plan import PairPlan, Plan
from q8lightning.checkpoint.payload import QuantizedTensor
from q8lightning.checkpoint.report import DirectionLoss, SaveReport, TensorLoss

Payloads = Sequence[QuantizedTensor | None]


def add_losses(
    report: SaveReport,
    plan: Plan,
    payloads: Payloads,
    losses: Mapping[int, tuple[float, ...]],
    directions: Mapping[int, tuple[float, float]],
) -> None:
    """Add what each encoded tensor and each update direction lost.

    Args:
        report: Gets it.
        plan: What was run.
        payloads: For each member what is stored in its place; None if it is stored as it is.
        losses: Five numbers for each member; see :class:`~q8lightning.quantization.spec.reference.ErrorStatistics`.
        directions: Two numbers for each pair; see :class:`~q8lightning.checkpoint.report.DirectionLoss`.
    """
    for i, (member, payload) in enumerate(zip(plan.members, payloads, strict=True)):
        if payload is not None:
            loss = TensorLoss(member.path, member.kind, member.parameter, member.nbytes, payload.nbytes, *losses[i])
            report.tensors.append(loss)
    for i, pair in enumerate(plan.pairs):
        sums = directions[i]
        is_number = not math.isnan(sums[0])  # NaN for 0 / 0, and where the training diverged
        if pair.is_stepped_by and _is_encoded(pair, payloads) and is_number:
            report.directions.append(DirectionLoss(pair.path, pair.parameter, *sums))


def _is_encoded(pair: PairPlan, payloads: Payloads) -> bool:
    return any(side.member is not None and payloads[side.member] is not None for side in pair[:2])


def add_bytes(report: SaveReport, plan: Plan, payloads: Payloads, own: Mapping[int, Tensor]) -> None:
    """Set what all tensors take, what is stored of them, and for how many parameters.

    Bytes are those of whole memories, as ``torch.save`` writes them.

    Args:
        report: Gets it.
        plan: What was run.
        payloads: For each member what is stored in its place; None if it is stored as it is.
        own: Tensors that are stored in memory of their own, by number.
    """
    replaced = {i for i, member in plan.places.items() if payloads[member] is not None} | own.keys()
    report.parameters = plan.parameters
    report.original_bytes = sum(storage.nbytes for storage in plan.storages)
    report.stored_bytes = sum(storage.nbytes for storage in plan.storages if not replaced.issuperset(storage.numbers))
    report.stored_bytes += sum(payload.nbytes for payload in payloads if payload is not None)
    report.stored_bytes += sum(each.nbytes for each in {id(each): each for each in own.values()}.values())
