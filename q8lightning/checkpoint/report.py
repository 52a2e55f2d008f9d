"""Report in plain numbers what a save lost and how many bytes it takes."""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


def sqnr_db(squared_error: float, squares: float) -> float:
    """Return the signal-to-quantization-noise ratio in dB.

    Infinity where nothing was lost, -infinity where zeros became something else, NaN where there are no numbers.
    """
    return _decibels(relative_error(squared_error, squares))


def _decibels(error: float) -> float:
    return math.inf if error == 0 else -20 * math.log10(error)


def relative_error(squared_error: float, squares: float) -> float:
    """Return the root of error power over signal power: 0 if nothing was lost, infinity if zeros changed."""
    if squared_error == 0:
        return 0.0
    return math.sqrt(squared_error / squares) if squares else math.inf


class TensorLoss(NamedTuple):
    """What an encoded tensor lost.

    Attributes:
        path: Its path in the checkpoint.
        kind: ``weights``, the key of an optimizer's state such as ``exp_avg``, or else the section of the checkpoint.
        parameter: The name of the parameter that it is or belongs to; its path where that is not known.
        original_bytes: Bytes of its values.
        stored_bytes: Bytes of its codes and scales.
        squared_error: Sum of squared differences, in squared units of the tensor. The five numbers from here on are
            those of :class:`~q8lightning.quantization.spec.reference.ErrorStatistics`.
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
        """The five numbers that were measured, from ``squared_error`` on."""
        return self[5:]

    @property
    def figures(self) -> dict[str, float]:
        """What it lost, by name."""
        return _figures([self])


class DirectionLoss(NamedTuple):
    """The error of a parameter's update direction.

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
        remedy: ``"residual"`` if the tensor is stored in 16 bits, with a residual, ``"raw"`` if it is stored as it is,
            ``"none"`` if it is stored by its rule because it was overwritten too early.
    """

    path: str
    name: str
    found: str
    remedy: str


class Kept(NamedTuple):
    """States of optimizers with one key that are large and kept as they are, for a reason that the user should hear.

    Attributes:
        key: The key, as a rule's pattern ends.
        name: What messages call the first of them.
        number: How many there are.
        why: The reason.
    """

    key: str
    name: str
    number: int
    why: str


@dataclass
class SaveReport:
    """What a save lost and how many bytes it takes.

    Attributes:
        tensors: The losses of encoded tensors, of tied ones once.
        directions: The losses of parameters of which a moment is encoded.
        guarded: Tensors that would have lost more than the policy allows.
        refused: Tensors that are stored as they are because no codec can hold them, with the reason.
        passed_over: If nothing is encoded, the tensors that are large enough but that no rule names.
        unmatched: If nothing is encoded of a checkpoint in Lightning's layout, the patterns that match nothing of it.
        kept: States of optimizers that are kept as they are, although the policy encodes others.
        original_bytes: Bytes of the tensors of the checkpoint, encoded or not, without the scores of callbacks.
        stored_bytes: Bytes that are stored of them.
        parameters: Elements of the model's parameters, of tied ones once; of all floats in the state dict if names are
            not known.
    """

    tensors: list[TensorLoss] = field(default_factory=list)
    directions: list[DirectionLoss] = field(default_factory=list)
    guarded: list[Guarded] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    original_bytes: int = 0
    stored_bytes: int = 0
    parameters: int = 0

    def __iadd__(self, other: "SaveReport") -> "SaveReport":
        """Add the report of another part of the same checkpoint."""
        self.tensors += other.tensors
        self.directions += other.directions
        self.guarded += other.guarded
        self.refused += other.refused
        self.kept += other.kept
        self.original_bytes += other.original_bytes
        self.stored_bytes += other.stored_bytes
        self.parameters += other.parameters
        return self

    @property
    def metrics(self) -> dict[str, float]:
        """What was lost and saved by kind of tensor, under the names that loggers get, without their prefix."""
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
        """Return the summary that a checkpoint gets: dicts, numbers and strings.

        Figures have 7 digits, because further ones depend on how many threads added up.
        """
        errors = [relative_error(loss.squared_error, loss.squares) for loss in self.tensors]
        columns = {  # column by column, which takes half of the time: a save of a large model waits for it
            "sqnr_db": _all_rounded([_decibels(error) for error in errors]),
            "relative_error": _all_rounded(errors),
            "max_error": _all_rounded([loss.max_error for loss in self.tensors]),
        }
        rows = zip(*columns.values(), strict=True)
        tensors = {
            loss.path: dict(zip(columns, row, strict=True)) for loss, row in zip(self.tensors, rows, strict=True)
        }
        turned = [relative_error(each.squared_error, each.squares) for each in self.directions]
        for direction, error in zip(self.directions, _all_rounded(turned), strict=True):
            tensors.setdefault(direction.path, {})["update_direction_error"] = error
        kept = {each.key: {"name": each.name, "number": each.number, "why": each.why} for each in self.kept}
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
            **({"kept": kept} if kept else {}),
        }


def _sums(losses: Iterable[TensorLoss | DirectionLoss]) -> tuple[float, float]:
    pairs = [(loss.squared_error, loss.squares) for loss in losses]
    return math.fsum(error for error, _ in pairs), math.fsum(squares for _, squares in pairs)


def _rounded(value: float) -> float:
    """Return a number with no more digits than float32 has, so that its zero bytes compress well."""
    if not math.isfinite(value):
        return value
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**24), exponent - 24)


def _all_rounded(values: Sequence[float]) -> list[float]:
    """Return :func:`_rounded` of each: what float32 makes of it, where its exponent reaches."""
    return [
        short if _SMALLEST < abs(value) < _LARGEST else _rounded(value)
        for value, short in zip(values, array("f", values), strict=True)
    ]


_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
"""Between these, float32 has all of its digits."""


def _figures(losses: list[TensorLoss]) -> dict[str, float]:
    sums = _sums(losses)
    return {
        "sqnr_db": sqnr_db(*sums),
        "relative_error": relative_error(*sums),
        "max_error": max(loss.max_error for loss in losses),
    }
