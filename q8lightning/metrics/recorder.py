"""What is recorded of saves and of quantized weights: metrics by name, and what is worth saying at the end."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from q8lightning.metrics.compression import CompressionRatio
from q8lightning.metrics.functional.reconstruction import relative_error_compute, sqnr_compute
from q8lightning.metrics.reconstruction import ReconstructionSQNR, RelativeReconstructionError
from q8lightning.metrics.update_direction import UpdateDirectionError

PREFIX = "q8"
"""What all names begin with."""

M = TypeVar("M", bound=Metric)

Detail = Literal["kind", "tensor"]
"""What values are logged of: of each kind of tensor, or of each tensor too."""


class Loss(NamedTuple):
    """What one tensor lost.

    Attributes:
        kind: Such as ``weights`` or ``exp_avg``.
        name: Of the tensor.
        statistics: Five numbers; see :mod:`q8lightning.metrics.functional.reconstruction`.
    """

    kind: str
    name: str
    statistics: Sequence[float]


class Save(NamedTuple):
    """What one save lost and took.

    Attributes:
        losses: Of each encoded tensor.
        directions: For each parameter the sums of squared differences and of squares of Adam's update direction.
        original_bytes: Bytes of all tensors.
        stored_bytes: Bytes of what is stored of them.
        seconds: How long training stood still.
    """

    losses: Sequence[Loss]
    directions: Sequence[Sequence[float]]
    original_bytes: int
    stored_bytes: int
    seconds: float


@dataclass
class Totals:
    """What all saves of a run come to.

    Attributes:
        saves: How many there were.
        original_bytes: What they would have taken.
        stored_bytes: What they took.
        longest_stall: Seconds.
        worst: The smallest signal-to-quantization-noise ratio in dB, and the kind and name of the tensor that had it.
    """

    saves: int = 0
    original_bytes: int = 0
    stored_bytes: int = 0
    longest_stall: float = 0.0
    worst: tuple[float, str, str] | None = None

    def lines(self) -> list[tuple[str, str]]:
        """Return labels and values to print; nothing if there was no save."""
        if not self.saves:
            return []
        ratio = self.original_bytes / self.stored_bytes if self.stored_bytes else math.inf
        lines = [
            ("saves", str(self.saves)),
            (
                "size",
                f"{_size(self.stored_bytes)} instead of {_size(self.original_bytes)}, {ratio:.2f} times smaller",
            ),
            ("longest stall", f"{self.longest_stall * 1e3:.0f} ms"),
        ]
        if self.worst is not None:
            sqnr, kind, name = self.worst
            lines.append(("worst tensor", f"{kind} of {name}, SQNR {sqnr:.1f} dB"))
        return lines


class Recorder:
    """Computes what is logged, and keeps the totals of a run.

    Args:
        detail: ``"kind"`` for values by kind of tensor, ``"tensor"`` for those of each tensor as well.

    Raises:
        ValueError: If it is neither, nor None.

    Example:
        >>> recorder = Recorder("tensor")
        >>> a, b = [0.25, 25.0, 0.5, 0.0, 0.0], [0.0, 75.0, 0.0, 0.0, 0.0]
        >>> for name, value in recorder.losses([Loss("weights", "a", a), Loss("weights", "b", b)]).items():
        ...     print(name, round(value, 3))
        q8/weights/sqnr_db 26.021
        q8/weights/relative_error 0.05
        q8/weights/a/sqnr_db 20.0
        q8/weights/a/relative_error 0.1
        q8/weights/b/sqnr_db inf
        q8/weights/b/relative_error 0.0
    """

    def __init__(self, detail: Detail | None = "kind") -> None:
        if detail not in (*get_args(Detail), None):
            raise ValueError(
                f"log must be 'kind', 'tensor' or None, got {detail!r}; 'kind' logs the weights together, exp_avg"
                " together, and so on"
            )
        self.detail = detail
        self.totals = Totals()
        self.warned: set[str] = set()
        """What failed while it reported, and has been warned of in this run."""

    def start_run(self) -> None:
        """Count from zero, and warn again."""
        self.totals = Totals()
        self.warned.clear()

    def losses(self, losses: Sequence[Loss], prefix: str = PREFIX) -> dict[str, float]:
        """Return ratio and relative error of each kind and, if wanted, of each tensor, by name."""
        values: dict[str, float] = {}
        for kind in dict.fromkeys(loss.kind for loss in losses):
            statistics = _float64([loss.statistics for loss in losses if loss.kind == kind])
            sqnr, error = _alone(ReconstructionSQNR), _alone(RelativeReconstructionError)
            for name, metric in (("sqnr_db", sqnr), ("relative_error", error)):
                metric.update_from_statistics(statistics)
                values[f"{prefix}/{kind}/{name}"] = float(metric.compute())
        if self.detail == "tensor" and losses:
            sums = _float64([loss.statistics for loss in losses]).T[:2]
            each = zip(losses, sqnr_compute(sums).tolist(), relative_error_compute(sums).tolist(), strict=True)
            for loss, sqnr, error in each:
                values[f"{prefix}/{loss.kind}/{loss.name}/sqnr_db"] = sqnr
                values[f"{prefix}/{loss.kind}/{loss.name}/relative_error"] = error
        return values

    def save(self, save: Save) -> dict[str, float]:
        """Count a save and return all that is logged of it, by name."""
        values = self.losses(save.losses)
        if save.directions:
            direction = _alone(UpdateDirectionError)
            direction.update_from_sums(_float64(save.directions))
            values[f"{PREFIX}/update_direction_error"] = float(direction.compute())
        ratio = _alone(CompressionRatio)
        ratio.update(save.original_bytes, save.stored_bytes)
        values[f"{PREFIX}/compression_ratio"] = float(ratio.compute())
        values[f"{PREFIX}/save_stall_ms"] = save.seconds * 1e3
        self._count(save)
        return values

    def _count(self, save: Save) -> None:
        totals = self.totals
        totals.saves += 1
        totals.original_bytes += save.original_bytes
        totals.stored_bytes += save.stored_bytes
        totals.longest_stall = max(totals.longest_stall, save.seconds)
        if save.losses:
            ratios = sqnr_compute(_float64([loss.statistics for loss in save.losses]).T[:2])
            index = int(ratios.argmin())
            worst = float(ratios[index])
            if math.isfinite(worst) and (totals.worst is None or worst < totals.worst[0]):
                totals.worst = (worst, save.losses[index].kind, save.losses[index].name)


def _alone(kind: type[M]) -> M:
    """Return a metric of the host's that waits for no other process.

    One process records a save, or each its own copy of the same weights; the default device has no part in it.
    """
    with torch.device("cpu"):
        return kind(sync_on_compute=False)


def _float64(rows: Iterable[Sequence[float]]) -> Tensor:
    return torch.tensor([list(row) for row in rows], dtype=torch.float64, device="cpu")


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
