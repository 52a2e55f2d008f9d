"""What a save lost and what it takes, in plain numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


def sqnr_db(squared_error: float, squares: float) -> float:
    """Return the signal-to-quantization-noise ratio in dB.

    Infinity where nothing was lost, -infinity where zeros became something else, NaN where there are no numbers.
    """
    error = relative_error(squared_error, squares)
    return math.inf if error == 0 else -20 * math.log10(error)


def relative_error(squared_error: float, squares: float) -> float:
    """Return the root of error power over signal power: 0 where nothing was lost, infinity where zeros changed."""
    if squared_error == 0:
        return 0.0
    return math.sqrt(squared_error / squares) if squares else math.inf


class TensorLoss(NamedTuple):
    """What an encoded tensor lost.

    Attributes:
        path: Its path in the checkpoint.
        kind: ``weights``, the key of an optimizer's state such as ``exp_avg``, or else the section of the checkpoint.
        parameter: The name of the parameter that it is or belongs to; its path where that is not known.
        original_bytes: What it took.
        stored_bytes: What its codes and scales take.
        squared_error: Sum of squared differences, in squared units of the tensor, as the rest in
            :class:`~q8lightning.quantization.spec.reference.ErrorStatistics`.
        squares: Sum of squares of the original.
        max_error: Largest absolute difference.
        zeros: How many original elements are zero.
        zeroed: How many others became zero.
    """

    path: str
    kind: str
    parameter: str
    original_bytes: int
    stored_bytes: int
    squared_error: float
    squares: float
    max_error: float
    zeros: float
    zeroed: float

    @property
    def statistics(self) -> tuple[float, ...]:
        """The five numbers that were measured."""
        return self[5:]

    @property
    def figures(self) -> dict[str, float]:
        """What it lost, by name."""
        return _figures([self])


class DirectionLoss(NamedTuple):
    """How far the update direction of a parameter is off.

    Attributes:
        path: The path of its first moment.
        parameter: Its name; the path where that is not known.
        squared_error: Sum of squared differences of the directions.
        squares: Sum of squares of the original one.
    """

    path: str
    parameter: str
    squared_error: float
    squares: float


class Guarded(NamedTuple):
    """What the guard did for a tensor.

    Attributes:
        path: Its path in the checkpoint.
        name: What messages call it.
        found: What the rule's codec would have lost.
        remedy: ``"residual"`` if the tensor has a residual stage instead, ``"raw"`` if it is stored as it is.
    """

    path: str
    name: str
    found: str
    remedy: str


@dataclass
class SaveReport:
    """What a save lost and what it takes.

    Attributes:
        tensors: Every encoded tensor, tied ones once.
        directions: Every parameter of which a moment is encoded.
        guarded: Tensors that would have lost more than the policy allows.
        refused: Tensors that no codec can hold, stored as they are, with the reason.
        passed_over: If nothing is encoded, the tensors that no rule of the policy names and that are large enough.
        original_bytes: Of the tensors of the checkpoint, encoded or not; without scores of callbacks, a few bytes each.
        stored_bytes: Of what is stored of them.
    """

    tensors: list[TensorLoss] = field(default_factory=list)
    directions: list[DirectionLoss] = field(default_factory=list)
    guarded: list[Guarded] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    original_bytes: int = 0
    stored_bytes: int = 0

    def __iadd__(self, other: "SaveReport") -> "SaveReport":
        """Add what another part of the same checkpoint lost and takes."""
        self.tensors += other.tensors
        self.directions += other.directions
        self.guarded += other.guarded
        self.refused += other.refused
        self.original_bytes += other.original_bytes
        self.stored_bytes += other.stored_bytes
        return self

    @property
    def metrics(self) -> dict[str, float]:
        """What was lost and saved by kind of tensor, under the names that loggers get it by, without their prefix."""
        kinds: dict[str, list[TensorLoss]] = {}
        for loss in self.tensors:
            kinds.setdefault(loss.kind, []).append(loss)
        result = {f"{kind}/{name}": value for kind, losses in kinds.items() for name, value in _figures(losses).items()}
        if self.directions:
            result["update_direction_error"] = relative_error(*_sums(self.directions))
        if self.stored_bytes:
            result["compression_ratio"] = self.original_bytes / self.stored_bytes
        return result

    def summary(self) -> dict[str, Any]:
        """Return what a checkpoint says about itself: dicts, numbers and strings.

        Figures have 7 digits: the rest depends on how many threads added up.
        """
        tensors = {loss.path: {name: _rounded(value) for name, value in loss.figures.items()} for loss in self.tensors}
        for direction in self.directions:
            error = relative_error(direction.squared_error, direction.squares)
            tensors.setdefault(direction.path, {})["update_direction_error"] = _rounded(error)
        return {
            "metrics": {name: _rounded(value) for name, value in self.metrics.items()},
            "bytes": {
                "original": self.original_bytes,
                "stored": self.stored_bytes,
                "encoded_original": sum(loss.original_bytes for loss in self.tensors),
                "encoded_stored": sum(loss.stored_bytes for loss in self.tensors),
            },
            "tensors": tensors,
            "guarded": {each.path: {"found": each.found, "remedy": each.remedy} for each in self.guarded},
            "refused": list(self.refused),
        }


def _sums(losses: Iterable[TensorLoss | DirectionLoss]) -> tuple[float, float]:
    pairs = [(loss.squared_error, loss.squares) for loss in losses]
    return math.fsum(error for error, _ in pairs), math.fsum(squares for _, squares in pairs)


def _rounded(value: float) -> float:
    """Return a number with no more digits than float32 has: what is zero then takes nothing in a compressed file."""
    if not math.isfinite(value):
        return value
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


def _figures(losses: list[TensorLoss]) -> dict[str, float]:
    sums = _sums(losses)
    return {
        "sqnr_db": sqnr_db(*sums),
        "relative_error": relative_error(*sums),
        "max_error": max(loss.max_error for loss in losses),
    }
