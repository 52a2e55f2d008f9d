"""Compute what is logged of saves and quantized weights, and the totals of a run."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from q8lightning.metrics.functional.compression import compression_ratio
from q8lightning.metrics.functional.reconstruction import relative_error_compute, sqnr_compute

PREFIX = "q8"
"""The first part of all names."""

STALL = f"{PREFIX}/save_stall_ms"
"""The name of the time for which a save held training, in milliseconds. Only this value needs no device."""

Detail = Literal["kind", "tensor"]
"""Log values of each kind of tensor, or of each tensor as well."""


class Loss(NamedTuple):
    """What one tensor lost.

    Attributes:
        kind: The kind of tensor, such as ``weights`` or ``exp_avg``.
        name: The tensor's name.
        statistics: The five numbers of :mod:`q8lightning.metrics.functional.reconstruction`.
    """

    kind: str
    name: str
    statistics: Sequence[float]


class Saved(NamedTuple):
    """What one save lost and took.

    Attributes:
        losses: The loss of each encoded tensor.
        directions: The sums of squared differences and of squares of Adam's update direction, for each parameter.
        original_bytes: Bytes of all tensors.
        stored_bytes: Bytes of their stored form.
        parameters: How many parameters the model has; 0 if that is not known.
    """

    losses: Sequence[Loss]
    directions: Sequence[Sequence[float]]
    original_bytes: int
    stored_bytes: int
    parameters: int = 0


class Recorded(NamedTuple):
    """The values that are logged of one save, and its part in the totals.

    Attributes:
        values: All logged values but the stall, by name.
        original_bytes: Bytes of all tensors.
        stored_bytes: Bytes of their stored form.
        worst: The smallest signal-to-quantization-noise ratio in dB, with the kind and name of its tensor; None if
            nothing was lost.
        parameters: How many parameters the model has; 0 if that is not known.
    """

    values: dict[str, float]
    original_bytes: int
    stored_bytes: int
    worst: tuple[float, str, str] | None
    parameters: int = 0


@dataclass
class Totals:
    """The totals of all saves of a run.

    Attributes:
        saves: The number of saves.
        original_bytes: Bytes of all tensors.
        stored_bytes: Bytes of their stored form.
        longest_stall: The longest time for which a save held training, in seconds.
        worst: The smallest signal-to-quantization-noise ratio in dB, with the kind and name of its tensor; None if
            nothing was lost.
        stored_rates: The fewest and the most bytes a parameter in a save; None if no save had parameters.
        original_rates: The same without encoding.
    """

    saves: int = 0
    original_bytes: int = 0
    stored_bytes: int = 0
    longest_stall: float = 0.0
    worst: tuple[float, str, str] | None = None
    stored_rates: tuple[float, float] | None = None
    original_rates: tuple[float, float] | None = None

    def lines(self) -> list[tuple[str, str]]:
        """Return labels and values to print, none if there was no save."""
        if not self.saves:
            return []
        ratio = self.original_bytes / self.stored_bytes if self.stored_bytes else math.inf
        lines = [
            ("saves", str(self.saves)),
            (
                "size",
                f"{_size(self.stored_bytes)} instead of {_size(self.original_bytes)}, {ratio:.2f} times smaller",
            ),
        ]
        if self.stored_rates is not None and self.original_rates is not None:
            said = f"{_range(*self.stored_rates)} instead of {_range(*self.original_rates)}"
            lines.append(("bytes a parameter", said))
        lines.append(("longest stall", f"{self.longest_stall * 1e3:.0f} ms"))
        if self.worst is not None:
            sqnr, kind, name = self.worst
            lines.append(("worst tensor", f"{kind} of {name}, SQNR {sqnr:.1f} dB"))
        return lines


class Recorder:
    """Computes the logged values, and keeps the totals of a run.

    Args:
        detail: ``"kind"`` for values of each kind of tensor, ``"tensor"`` for values of each tensor as well, None if
            nothing is logged.

    Raises:
        ValueError: If ``detail`` is something else.

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
        """The parts of reporting that have failed in this run, each with a warning."""

    def start_run(self) -> None:
        """Forget the totals and the warnings of the run before."""
        self.totals = Totals()
        self.warned.clear()

    def losses(self, losses: Sequence[Loss], prefix: str = PREFIX) -> dict[str, float]:
        """Return SQNR and relative error of each kind, and of each tensor if that is wanted, by name."""
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

    def record(self, save: Saved) -> Recorded:
        """Compute the logged values of a save, in any thread. The totals stay as they are."""
        values = self.losses(save.losses)
        if save.directions:
            error = relative_error_compute(_sums(save.directions).sum(dim=0))
            values[f"{PREFIX}/update_direction_error"] = float(error)
        values[f"{PREFIX}/compression_ratio"] = float(compression_ratio(save.original_bytes, save.stored_bytes))
        return Recorded(values, save.original_bytes, save.stored_bytes, _worst(save.losses), save.parameters)

    def count(self, recorded: Recorded, seconds: float) -> None:
        """Add a save, which held training for so many seconds, to the totals."""
        totals = self.totals
        totals.saves += 1
        totals.original_bytes += recorded.original_bytes
        totals.stored_bytes += recorded.stored_bytes
        if recorded.parameters:
            totals.stored_rates = _widened(totals.stored_rates, recorded.stored_bytes / recorded.parameters)
            totals.original_rates = _widened(totals.original_rates, recorded.original_bytes / recorded.parameters)
        totals.longest_stall = max(totals.longest_stall, seconds)
        if recorded.worst is not None and (totals.worst is None or recorded.worst[0] < totals.worst[0]):
            totals.worst = recorded.worst


def _worst(losses: Sequence[Loss]) -> tuple[float, str, str] | None:
    """Return the smallest ratio with the kind and name of its tensor; None if no ratio is finite."""
    if not losses:
        return None
    ratios = sqnr_compute(_sums(loss.statistics for loss in losses).T)
    index = int(ratios.argmin())
    ratio = float(ratios[index])
    return (ratio, losses[index].kind, losses[index].name) if math.isfinite(ratio) else None


def _sums(rows: Iterable[Sequence[float]]) -> Tensor:
    """Return the first two numbers of each row, ``[rows, 2]`` float64: squared error and squares."""
    flat = [number for row in rows for number in row[:2]]  # a list of lists would take longer to convert
    return torch.tensor(flat, dtype=torch.float64, device="cpu").view(-1, 2)


def _widened(known: tuple[float, float] | None, value: float) -> tuple[float, float]:
    return (value, value) if known is None else (min(known[0], value), max(known[1], value))


def _range(lowest: float, highest: float) -> str:
    first, last = f"{lowest:.2f}", f"{highest:.2f}"
    return first if first == last else f"{first} to {last}"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
