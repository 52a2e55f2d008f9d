"""What is recorded of saves and of quantized weights: metrics by name, and what is worth saying at the end."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from q8lightning.metrics.functional.compression import compression_ratio
from q8lightning.metrics.functional.reconstruction import relative_error_compute, sqnr_compute

PREFIX = "q8"
"""What all names begin with."""

STALL = f"{PREFIX}/save_stall_ms"
"""How long a save held training, in milliseconds: the one value that is known without the device."""

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
    """

    losses: Sequence[Loss]
    directions: Sequence[Sequence[float]]
    original_bytes: int
    stored_bytes: int


class Recorded(NamedTuple):
    """What there is to say of one save, as numbers.

    Attributes:
        values: All that is logged of it but the stall, by name.
        original_bytes: Bytes of all tensors.
        stored_bytes: Bytes of what is stored of them.
        worst: The smallest signal-to-quantization-noise ratio in dB, and the kind and name of the tensor that has it;
            None if nothing was lost.
    """

    values: dict[str, float]
    original_bytes: int
    stored_bytes: int
    worst: tuple[float, str, str] | None


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
        sums = _sums(loss.statistics for loss in losses)
        members: dict[str, list[int]] = {}
        for index, loss in enumerate(losses):
            members.setdefault(loss.kind, []).append(index)
        values: dict[str, float] = {}
        for kind, indices in members.items():
            total = sums[indices].sum(dim=0)
            values[f"{prefix}/{kind}/sqnr_db"] = float(sqnr_compute(total))
            values[f"{prefix}/{kind}/relative_error"] = float(relative_error_compute(total))
        if self.detail == "tensor":
            rows = zip(losses, sqnr_compute(sums.T).tolist(), relative_error_compute(sums.T).tolist(), strict=True)
            for loss, sqnr, error in rows:
                values[f"{prefix}/{loss.kind}/{loss.name}/sqnr_db"] = sqnr
                values[f"{prefix}/{loss.kind}/{loss.name}/relative_error"] = error
        return values

    def record(self, save: Save) -> Recorded:
        """Compute what there is to say of a save, in any thread; nothing is counted yet."""
        values = self.losses(save.losses)
        if save.directions:
            error = relative_error_compute(_sums(save.directions).sum(dim=0))
            values[f"{PREFIX}/update_direction_error"] = float(error)
        values[f"{PREFIX}/compression_ratio"] = float(compression_ratio(save.original_bytes, save.stored_bytes))
        return Recorded(values, save.original_bytes, save.stored_bytes, _worst(save.losses))

    def count(self, recorded: Recorded, seconds: float) -> None:
        """Add a save, which held training for so many seconds, to the totals."""
        totals = self.totals
        totals.saves += 1
        totals.original_bytes += recorded.original_bytes
        totals.stored_bytes += recorded.stored_bytes
        totals.longest_stall = max(totals.longest_stall, seconds)
        if recorded.worst is not None and (totals.worst is None or recorded.worst[0] < totals.worst[0]):
            totals.worst = recorded.worst


def _worst(losses: Sequence[Loss]) -> tuple[float, str, str] | None:
    """Return the smallest ratio and whose it is; None where nothing was lost or there are no numbers."""
    if not losses:
        return None
    ratios = sqnr_compute(_sums(loss.statistics for loss in losses).T)
    index = int(ratios.argmin())
    ratio = float(ratios[index])
    return (ratio, losses[index].kind, losses[index].name) if math.isfinite(ratio) else None


def _sums(rows: Iterable[Sequence[float]]) -> Tensor:
    """Return the first two numbers of each row, ``[rows, 2]`` float64: squared error and squares."""
    flat = [number for row in rows for number in row[:2]]  # a list of lists takes longer to convert
    return torch.tensor(flat, dtype=torch.float64, device="cpu").view(-1, 2)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
