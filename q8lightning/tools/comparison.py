"""The result of comparing two checkpoints: the differences of their tensors, and sums of them by kind."""

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from q8lightning.checkpoint.report import relative_error, sqnr_db
from q8lightning.tools.tensors import KINDS, BytesAParameter
from q8lightning.tools.text import Column, Table, decibels, number


@dataclass(frozen=True)
class Difference:
    """The difference of values from those that they are compared with.

    Attributes:
        error: Sum of the squared differences.
        signal: Sum of the squares of the first values.
        max_error: The largest difference.
    """

    error: float = 0.0
    signal: float = 0.0
    max_error: float = 0.0

    def __add__(self, other: "Difference") -> "Difference":
        largest = math.nan if math.isnan(self.max_error + other.max_error) else max(self.max_error, other.max_error)
        return Difference(self.error + other.error, self.signal + other.signal, largest)

    @property
    def relative_error(self) -> float:
        """Norm of the difference over the norm of the first values; 0 if both are the same."""
        return relative_error(self.error, self.signal)

    @property
    def sqnr_db(self) -> float:
        """The same as a signal-to-noise ratio in dB; infinite if both are the same."""
        return sqnr_db(self.error, self.signal)


@dataclass(frozen=True)
class Row:
    """The comparison of one tensor, or of the update direction of one parameter.

    Attributes:
        path: Its path; for an update direction, the path of the parameter's state.
        name: Its name for people, such as ``layer.weight: exp_avg``; the path if the parameter is not known.
        kind: Its kind; ``update_direction`` for exp_avg / (sqrt(exp_avg_sq) + eps).
        first: Dtype or codec in the first file.
        second: Dtype or codec in the second file.
        difference: The difference of the second from the first.
    """

    path: str
    name: str
    kind: str
    first: str
    second: str
    difference: Difference


@dataclass(frozen=True)
class Reshaped:
    """A tensor that has another shape in the second file.

    Attributes:
        path: Its path.
        name: Its name for people.
        first: Its shape in the first file.
        second: Its shape in the second file.
    """

    path: str
    name: str
    first: tuple[int, ...]
    second: tuple[int, ...]


UPDATE_DIRECTION = "update_direction"


@dataclass(frozen=True, repr=False)
class Comparison:
    """The differences of a second checkpoint from a first.

    ``print`` shows them as ``q8lightning compare`` does, and so does a notebook.

    Attributes:
        rows: Tensors that both have, in the first file's order, then update directions.
        only_first: Names of tensors that only the first file has.
        only_second: Names of tensors that only the second file has.
        reshaped: Tensors whose shapes differ.
        first: What the first file takes.
        second: What the second file takes.
    """

    rows: tuple[Row, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    reshaped: tuple[Reshaped, ...]
    first: BytesAParameter
    second: BytesAParameter

    @property
    def differing(self) -> tuple[Row, ...]:
        """The rows of tensors that are not the same."""
        return tuple(row for row in self.rows if row.difference.error != 0)

    def by_kind(self) -> dict[str, Difference]:
        """Return the differences of all tensors of a kind together."""
        totals: dict[str, Difference] = {}
        for kind in (*KINDS, UPDATE_DIRECTION):
            for row in self.rows:
                if row.kind == kind:
                    totals[kind] = totals.get(kind, Difference()) + row.difference
        return totals

    def as_primitives(self) -> dict[str, Any]:
        """Return everything as JSON has it; a ratio that is not finite is None."""
        rows = [{key: getattr(row, key) for key in ("path", "name", "kind", "first", "second")} for row in self.rows]
        return {
            "kinds": {kind: _numbers(difference) for kind, difference in self.by_kind().items()},
            "bytes_a_parameter": {"first": asdict(self.first), "second": asdict(self.second)},
            "tensors": [each | _numbers(row.difference) for each, row in zip(rows, self.rows, strict=True)],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
            "different_shapes": [asdict(each) for each in self.reshaped],
        }

    def __repr__(self) -> str:
        tensors = [row for row in self.rows if row.kind != UPDATE_DIRECTION]
        differing = sum(row.difference.error != 0 for row in tensors)
        return f"{type(self).__name__}({len(tensors):,} tensors, {differing:,} of them differ)"

    def __str__(self) -> str:
        tables = (line for table in tables_of(self) for line in (*table.lines(), ""))
        return "\n".join([*tables, *lines_about(self)])

    def _repr_html_(self) -> str:
        tables = "".join(table.html() for table in tables_of(self))
        return f"{tables}<pre>{html.escape(chr(10).join(lines_about(self)))}</pre>"


def tables_of(result: Comparison, top: int | None = None) -> Iterator[Table]:
    """Yield the tables of differences by kind and, if tensors differ, by tensor.

    Args:
        result: The comparison.
        top: Show only so many tensors, the largest errors first; None for all in their order.
    """
    sizes = result.first, result.second
    rows = [
        [kind, _from_to([each.kinds.get(kind) for each in sizes]), *_errors(difference)]
        for kind, difference in result.by_kind().items()
    ]
    if any(size.parameters for size in sizes):
        rows.append(["whole", _from_to([each.whole for each in sizes])])
    yield Table([Column("kind"), Column("bytes a parameter", 2), *_ERRORS], rows)
    shown = list(result.differing)
    if top is not None:
        shown = sorted(shown, key=lambda row: -row.difference.relative_error)[:top]
    if shown:
        columns = [Column("tensor", is_text=True), Column("first", 3), Column("second", 2), *_ERRORS]
        yield Table(columns, [[row.name, row.first, row.second, *_errors(row.difference)] for row in shown])


def lines_about(result: Comparison) -> Iterator[str]:
    """Yield lines that say how many tensors differ, and which have no counterpart."""
    tensors = [row.difference.error != 0 for row in result.rows if row.kind != UPDATE_DIRECTION]
    same = f"all {len(tensors)} tensors are the same"
    yield f"{sum(tensors)} of {len(tensors)} tensors differ, the others are the same" if any(tensors) else same
    for where, names in (("first", result.only_first), ("second", result.only_second)):
        yield from (f"only in the {where} file: {name}" for name in names)
    yield from (f"different shapes: {each.name}: {each.first} and {each.second}" for each in result.reshaped)


def _from_to(values: Sequence[float | None]) -> str:
    """Return the number of each file; empty if neither has one."""
    said = ["none" if value is None else f"{value:.2f}" for value in values]
    return "" if set(said) == {"none"} else " -> ".join(said)


_ERRORS = (Column("relative error"), Column("SQNR dB", 1), Column("max error", 4))


def _errors(difference: Difference) -> tuple[str, str, str]:
    return (
        number(difference.relative_error),
        decibels(difference.sqnr_db),
        number(difference.max_error),
    )


def _numbers(difference: Difference) -> dict[str, float | None]:
    names = ("relative_error", "sqnr_db", "max_error")
    numbers: dict[str, float] = {name: getattr(difference, name) for name in names}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
